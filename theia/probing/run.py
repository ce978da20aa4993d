"""A run over several encoders, as both commands share it."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import numpy as np
from tabulate import tabulate

from theia.encoder.from_name import NamedEncoder
from theia.errors import ConfigError
from theia.probing.classifiers import Schedule
from theia.probing.datasets import Storage, fingerprint, temporary
from theia.probing.features import Device, choose_device
from theia.probing.heads import Fit
from theia.probing.probes import Probed
from theia.utils.arguments import comma_list
from theia.utils.files import check_folder, remove_stale, replacing, write_whole
from theia.utils.pictures import short_labels
from theia.utils.provenance import machine, versions

Preset = Literal["small", "full"]


@dataclass(frozen=True)
class Effort:
    """All that a preset decides.

    Attributes:
        probe: Of classes: MAE's, or logistic regression for ``None``.
        head: Of pixels.
        rooms: Of rendered scenes, to fit and to test on.
        on_disk: Whether what is computed once lies in files, mapped into memory.
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


class Unfinished:
    """Finished encoders of an unfinished run, a file each.

    Args:
        folder: For the files; made and removed as needed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, identity: str) -> Probed | None:
        """What was kept, if it was."""
        path = self._path(identity)
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as file:
            maps = {name.removeprefix("maps/"): file[name] for name in file.files if name != "figures"}
            return Probed(json.loads(str(file["figures"])), maps)

    def keep(self, identity: str, probed: Probed) -> None:
        """Writes a file, whole or not at all."""
        maps = {f"maps/{name}": values for name, values in probed.maps.items()}
        with replacing(self._path(identity)) as temporary, temporary.open("wb") as file:
            np.savez(file, figures=np.array(json.dumps(probed.figures)), **maps)  # type: ignore[arg-type]

    def forget(self, identities: Iterable[str]) -> None:
        """Deletes files; and the folder, if nothing else is in it."""
        for identity in identities:
            self._path(identity).unlink(missing_ok=True)
        remove_stale(self._folder)
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _path(self, identity: str) -> Path:
        return self._folder / f"{identity}.npz"


# By encoder and figure ("task/name"), one value per seed; one value where seeds play no part.
Found = Mapping[str, Mapping[str, Sequence[float]]]

_UNITS = {
    "rmse": "m", "aligned_rmse": "m", "angular_rmse": "degrees", "silog": "100 log m",
}  # fmt: skip


def figures_table(found: Found) -> str:
    """A row per figure, a column per encoder; means over seeds, with their standard deviation if there are several.

    Args:
        found: By encoder, then figure.
    """
    figures = list(dict.fromkeys(figure for values in found.values() for figure in values))
    rows = []
    for figure in figures:
        cells = [_cell(values.get(figure, ())) for values in found.values()]
        rows.append([figure, _unit(figure), "less" if _unit(figure) else "more", *cells])
    lines: str = tabulate(rows, headers=["figure", "unit", "better", *found], disable_numparse=True)
    return lines


def as_json(found: Found) -> dict[str, dict[str, Any]]:
    """The same for the JSON, by encoder and figure, with every seed's value and the mean.

    Args:
        found: By encoder, then figure.
    """
    return {
        encoder: {
            figure: {
                "mean": fmean(values), "values": list(values), "unit": _unit(figure),
                "better": "less" if _unit(figure) else "more",
            }
            for figure, values in figures.items()
        }
        for encoder, figures in found.items()
    }  # fmt: skip


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def _unit(figure: str) -> str:
    """Shares have none. All that has one is an error, and better if less."""
    return _UNITS.get(figure.rpartition("/")[2], "")


NOTHING = "no encoder"  # the column of what can be told without one


@dataclass(frozen=True)
class Run:
    """Where and how much a command works.

    Attributes:
        kind: Name of the command.
        device: Where to work.
        seeds: Of what is fitted.
        effort: How much work there is.
        folder: For files that are mapped into memory; the system's temporary folder by default.
        results: For the JSON, and what is kept of an unfinished run.
    """

    kind: str
    device: str
    seeds: list[int]
    effort: Effort
    folder: Path | None
    results: Path

    def probe_all(
        self,
        encoders: Sequence[NamedEncoder],
        looks: Mapping[str, str],
        data: str,
        nothing: Probed,
        probe: Callable[[NamedEncoder, Storage], Probed],
        settings: dict[str, Any],
        notes: list[str],
    ) -> tuple[Path, dict[str, Probed]]:
        """Probes what an interrupted run has not, prints the table and writes the JSON.

        Args:
            encoders: Which.
            looks: Fingerprint of each, by name.
            data: That of the data.
            nothing: What needs no encoder.
            probe: Does one of them.
            settings: For the record.
            notes: What a reader of the table must know.

        Returns:
            The JSON, and what was found by the encoders' labels, with what needs no encoder first.
        """
        # Where a model lies is nobody else's business.
        labels = short_labels([encoder.name for encoder in encoders])
        identities = {name: fingerprint(settings, versions(), data, look) for name, look in looks.items()}
        found = {NOTHING: nothing}
        unfinished = Unfinished(self.results / "unfinished")
        for number, encoder in enumerate(encoders, 1):
            known = unfinished.load(identities[encoder.name])
            turn = f"encoder {number} of {len(encoders)}: {encoder.name}"
            if known is None:
                print(turn, file=sys.stderr)
                with temporary(self.effort.on_disk, self.folder) as storage:
                    known = probe(encoder, storage)
                unfinished.keep(identities[encoder.name], known)
            else:
                print(f"{turn} was finished by an interrupted run", file=sys.stderr)
            found[labels[encoder.name]] = known
        figures = {name: probed.figures for name, probed in found.items()}
        print("\n".join([figures_table(figures), *notes]))
        record = {"versions": versions(), "machine": machine(), "settings": settings, "notes": notes}
        path = self.results / f"probing-{self.kind}-{datetime.now():%Y%m%d-%H%M%S}.json"
        while path.exists():  # never over another
            path = path.with_stem(f"{path.stem}-again")
        write_whole(path, json.dumps({**record, "figures": as_json(figures)}, indent=1) + "\n")
        unfinished.forget(identities.values())
        print(path)
        return path, found


def open_run(kind: str, device: Device, seeds: str | None, folder: Path | None, preset: Preset, results: Path) -> Run:
    """Checks the options that both commands have.

    Args:
        kind: Name of the command.
        device: As the option says.
        seeds: Whole numbers, separated by commas; ``None`` is 0.
        folder: As the option says.
        preset: How much work there is.
        results: As the option says.

    Raises:
        ConfigError: If an option is of no use, there is no such device or folder, nothing can be written there, or
            seeds are no whole numbers.
    """
    effort = PRESETS[preset]
    if folder is not None and not effort.on_disk:
        raise ConfigError(f"--preset {preset} keeps all in memory and puts nothing into --folder. Leave it out.")
    numbers = comma_list("0" if seeds is None else seeds)
    if not numbers or not all(number.isdecimal() and int(number) < 2**32 for number in numbers):
        raise ConfigError(
            f"--seeds is {seeds!r}; give whole numbers from 0 and below 2**32, separated by commas, such as 0,1,2."
        )
    check_folder(results, "--results")
    if folder is not None:
        if not folder.is_dir():
            raise ConfigError(f"There is no folder {folder}. Make it, or give another one with --folder.")
        check_folder(folder, "--folder")
    return Run(kind, choose_device(device), [int(number) for number in numbers], effort, folder, results)
