"""``theia probe``: probes several encoders one after another, and keeps what is finished if it is interrupted."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from theia.encoder.from_name import NamedEncoder, of_model
from theia.errors import ConfigError, ImageError
from theia.plugins import checked_by
from theia.probing.datasets import (
    TASKS,
    DenseData,
    Storage,
    Task,
    fingerprint,
    of_data,
    of_files,
    open_folder,
    tasks_of,
    temporary,
)
from theia.probing.display import as_json, draw, figures_table
from theia.probing.embedding import check_encoders, open_all
from theia.probing.heads import Fit
from theia.probing.labelled import open_labelled
from theia.probing.linear_probe import Schedule
from theia.probing.probes import Probed, probe_classes, probe_nothing, probe_pixels, probe_places
from theia.probing.scenes import scenes
from theia.utils.arguments import comma_list, seed_numbers
from theia.utils.device import Device, choose_device
from theia.utils.files import check_folder, remove_stale, replacing, write_whole
from theia.utils.pictures import short_labels
from theia.utils.provenance import machine, versions

logger = logging.getLogger(__name__)

Preset = Literal["small", "full"]

SCENES = "scenes"  # rendered rooms, in place of a folder
NOTHING = "no encoder"  # the column of what can be said without one

# Figures of dense tasks that are scores of a student, by the name of the score.
_SCORES = {
    "depth_rmse": "depth/rmse", "normals_rmse": "normals/angular_rmse", "mean_iou": "segmentation/mean_iou",
    "recall_10px": "correspondence/recall_10px",
}  # fmt: skip


@dataclass(frozen=True)
class Effort:
    """All that a preset decides.

    Attributes:
        probe: How MAE's probe of classes is trained; ``None`` takes logistic regression instead.
        head: How the heads of dense tasks are fitted.
        rooms: Number of rendered rooms to fit on, and to test on.
        on_disk: Whether what is computed once lies in files that are mapped into memory.
    """

    probe: Schedule | None
    head: Fit
    rooms: tuple[int, int]
    on_disk: bool


PRESETS: dict[Preset, Effort] = {
    "small": Effort(
        # On few images MAE's probe ends before it has converged, and so ranks encoders by how fast they are learned.
        probe=None,
        head=Fit(epochs=20, warmup=2, batch_size=8, learning_rate=5e-3),
        rooms=(16, 6),
        on_disk=False,
    ),
    # MAE's and probe3D's.
    "full": Effort(
        probe=Schedule(batch_size=16384, base_rate=0.1),
        head=Fit(epochs=10, warmup=1.5, batch_size=8, learning_rate=5e-4),
        rooms=(400, 50),
        on_disk=True,
    ),
}


@dataclass(frozen=True)
class Result:
    """What a command prints when it is done.

    Attributes:
        table: A row per figure, a column per encoder.
        notes: Sentences that a reader of the table must know.
        files: The JSON file and, for dense tasks, the picture.
    """

    table: str
    notes: list[str]
    files: list[Path]


def classification(
    encoders: Sequence[str],
    images: str,
    val: str | None,
    out: Path,
    preset: Preset,
    neighbours: int,
    seeds: str | None,
    device: Device,
    folder: Path | None,
) -> Result:
    """Probes classes of images; see :func:`theia.cli.probe.classification` for the arguments.

    Raises:
        TheiaError: If options do not fit the data, an image cannot be read, or an encoder cannot be probed.
    """
    if seeds is not None and PRESETS[preset].probe is None:
        raise ConfigError(f"--seeds: nothing in the probe of --preset {preset} is random. Leave it out.")
    run = _open_run("classification", device, seeds, folder, preset, out)
    opened = open_all(encoders, run.device, spatial=False)
    training, testing = open_labelled(images, val, neighbours)
    looks = check_encoders(opened, training.some(4), spatial=False)
    schedule = run.effort.probe
    settings = {
        "preset": preset, "data": " and ".join(Path(root).resolve().name for root in (images, val) if root),
        "neighbours": neighbours, "seeds": run.seeds if schedule else [], "training images": len(training),
        "held-out images": len(testing), "classes": len(training.classes), "device": str(run.device),
    }  # fmt: skip
    notes = []
    if schedule is not None and len(training) < schedule.batch_size:
        notes.append(
            f"The full preset is meant for more images than its batch of {schedule.batch_size}; with "
            f"{len(training)} training images the linear probe ends before it has learned much. Take the small one."
        )

    def probe(encoder: NamedEncoder, storage: Storage) -> Probed:
        return probe_classes(encoder, training, testing, neighbours, schedule, run.seeds, run.device, storage)

    nothing = probe_nothing(training, testing)
    found, path = run.probe_all(opened, looks, of_files(images, val), nothing, probe, settings, notes)
    return Result(figures_table(found), notes, [path])


def dense(
    encoders: Sequence[str],
    data: str,
    tasks: str | None,
    out: Path,
    preset: Preset,
    seeds: str,
    device: Device,
    folder: Path | None,
) -> Result:
    """Probes maps of pictures; see :func:`theia.cli.probe.dense` for the arguments.

    Raises:
        TheiaError: If options do not fit the data, a file is missing, or an encoder cannot be probed.
    """
    run = _open_run("dense", device, seeds, folder, preset, out)
    chosen = _tasks(data, tasks)
    opened = open_all(encoders, run.device, spatial=True)
    with temporary(run.effort.on_disk, folder) as storage:
        pictures = _data(data, chosen, run.effort.rooms, storage)
        looks = check_encoders(opened, pictures.val.images, spatial=True)
        settings = {
            "preset": preset, "data": pictures.description, "tasks": chosen, "seeds": run.seeds,
            "device": str(run.device),
        }  # fmt: skip
        left_out = [task for task in TASKS if task not in chosen] if tasks is None else []
        notes = [f"No data for: {', '.join(left_out)}."] if left_out else []

        def probe(encoder: NamedEncoder, storage: Storage) -> Probed:
            return probe_pixels(encoder, pictures, chosen, run.effort.head, run.seeds, run.device, storage)

        nothing = probe_places(pictures, chosen)
        found, path = run.probe_all(opened, looks, of_data(pictures), nothing, probe, settings, notes)
        files = [path]
        if nothing.maps:
            files.append(path.with_suffix(".png"))
            draw(files[1], pictures, found)
        return Result(figures_table(found), notes, files)


@checked_by(lambda argument: _tasks(argument or SCENES, None))
def dense_scorer(trained: Any) -> dict[str, float]:
    """Depth, surface normals, classes of pixels and matches of views: linear heads on patch tokens.

    Protocol: that of ``theia probe dense`` with its defaults, one seed. Data: rendered rooms, or the folder that
    follows the scorer's name, as in ``--scorers dense@/data/nyu``.

    Args:
        trained: The student, a :class:`theia.scoring.contract.Trained`.

    Returns:
        Those for which there are data: ``depth_rmse`` in metres and ``normals_rmse`` in degrees, ``mean_iou`` of the
        classes, and ``recall_10px``, the share of places that are found again within 10 pixels.

    Raises:
        TheiaError: If the folder does not hold what a task needs.
    """
    data = trained.argument or SCENES
    tasks = _tasks(data, None)
    effort = PRESETS["small"]
    with temporary(effort.on_disk, None) as storage:
        pictures = _data(data, tasks, effort.rooms, storage)
        encoder = of_model(trained.encoder, "student")
        figures = probe_pixels(encoder, pictures, tasks, effort.head, [0], trained.device, storage).figures
    return {name: figures[figure][0] for name, figure in _SCORES.items() if figure in figures}


@dataclass(frozen=True)
class Run:
    """Where a command works, and how much work it does.

    Attributes:
        kind: Name of the command.
        device: Device that encoders and probes run on.
        seeds: Seeds of the probes.
        effort: Amount of work, as the preset sets it.
        folder: Folder for files that are mapped into memory; the system's temporary folder by default.
        out: Folder for the JSON file, and for finished encoders when a run is interrupted.
    """

    kind: str
    device: torch.device
    seeds: list[int]
    effort: Effort
    folder: Path | None
    out: Path

    def probe_all(
        self,
        encoders: Sequence[NamedEncoder],
        looks: Mapping[str, str],
        data: str,
        nothing: Probed,
        probe: Callable[[NamedEncoder, Storage], Probed],
        settings: Mapping[str, Any],
        notes: Sequence[str],
    ) -> tuple[dict[str, Probed], Path]:
        """Probes the encoders that an interrupted run has not finished, and writes the JSON beside earlier ones.

        Args:
            encoders: All encoders.
            looks: Fingerprint of each encoder's features, by its name.
            data: Fingerprint of the data.
            nothing: Figures that can be reached without an encoder.
            probe: Function that probes one encoder.
            settings: Options that the figures depend on.
            notes: Sentences that a reader of the figures must know.

        Returns:
            The results by the encoder's label, first those without an encoder; and the path of the JSON file.
        """
        # Paths of this machine mean nothing elsewhere, so columns have short labels.
        labels = short_labels([encoder.name for encoder in encoders])
        identities = {name: fingerprint(settings, versions(), data, look) for name, look in looks.items()}
        found = {NOTHING: nothing}
        unfinished = Unfinished(self.out / "unfinished")
        for number, encoder in enumerate(encoders, 1):
            known = unfinished.load(identities[encoder.name])
            turn = f"Encoder {number} of {len(encoders)}: {encoder.name}"
            if known is None:
                logger.info("%s", turn)
                with temporary(self.effort.on_disk, self.folder) as storage:
                    known = probe(encoder, storage)
                unfinished.keep(identities[encoder.name], known)
            else:
                logger.info("%s was finished by an interrupted run", turn)
            found[labels[encoder.name]] = known
        path = self.out / f"probing-{self.kind}-{datetime.now():%Y%m%d-%H%M%S}.json"
        while path.exists():
            path = path.with_stem(f"{path.stem}-again")
        record = {"versions": versions(), "machine": machine(), "settings": settings, "notes": notes}
        write_whole(path, json.dumps({**record, "figures": as_json(found)}, indent=1) + "\n")
        unfinished.forget(identities.values())
        return found, path


class Unfinished:
    """Finished encoders of an unfinished run, one file each.

    Args:
        folder: Folder of the files, made and removed as needed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, identity: str) -> Probed | None:
        """Results of an encoder, if it is finished."""
        path = self._path(identity)
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as file:
            maps = {name.removeprefix("maps/"): file[name] for name in file.files if name != "figures"}
            return Probed(json.loads(str(file["figures"])), maps)

    def keep(self, identity: str, probed: Probed) -> None:
        """Writes the file of an encoder, whole or not at all."""
        maps = {f"maps/{name}": values for name, values in probed.maps.items()}
        with replacing(self._path(identity)) as temporary, temporary.open("wb") as file:
            np.savez(file, figures=np.array(json.dumps(probed.figures)), **maps)  # type: ignore[arg-type]

    def forget(self, identities: Iterable[str]) -> None:
        """Deletes the files of encoders, and the folder if nothing else is in it."""
        for identity in identities:
            self._path(identity).unlink(missing_ok=True)
        remove_stale(self._folder)
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _path(self, identity: str) -> Path:
        return self._folder / f"{identity}.npz"


def _open_run(kind: str, device: Device, seeds: str | None, folder: Path | None, preset: Preset, out: Path) -> Run:
    """Checks the options that both commands have.

    Raises:
        ConfigError: If one has no use or cannot be what it is.
    """
    effort = PRESETS[preset]
    if folder is not None and not effort.on_disk:
        raise ConfigError(
            f"--preset {preset} keeps everything in memory and puts no files into --folder. Leave it out."
        )
    numbers = seed_numbers(0 if seeds is None else seeds)
    check_folder(out, "--out")
    if folder is not None:
        if not folder.is_dir():
            raise ConfigError(f"There is no folder {folder}. Make it, or give another one with --folder.")
        check_folder(folder, "--folder")
    return Run(kind, choose_device(device), numbers, effort, folder, out)


def _tasks(data: str, tasks: str | None) -> list[Task]:
    if data != SCENES and not Path(data).is_dir():
        raise ImageError(f"There is no folder {data}. Give one with train and val, or {SCENES!r} for rendered rooms.")
    if tasks is None:
        return list(TASKS) if data == SCENES else tasks_of(Path(data))
    names = comma_list(tasks)
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        raise ConfigError(f"--tasks is {tasks!r}; choose from: {', '.join(TASKS)}.")
    return [task for task in TASKS if task in names]


def _data(data: str, tasks: Sequence[Task], rooms: tuple[int, int], storage: Storage) -> DenseData:
    return scenes(*rooms, storage) if data == SCENES else open_folder(Path(data), tasks, storage)
