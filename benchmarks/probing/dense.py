"""``python -m benchmarks.probing dense``."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.probing.data import TASKS, DenseData, Task
from benchmarks.probing.features import Device, check_encoders, open_all
from benchmarks.probing.fingerprint import of_data
from benchmarks.probing.folder import open_folder, tasks_of
from benchmarks.probing.picture import draw
from benchmarks.probing.presets import Preset
from benchmarks.probing.probes import Probed, probe_pixels, probe_places
from benchmarks.probing.run import open_run
from benchmarks.probing.scenes.dataset import scenes
from benchmarks.probing.storage import Storage, temporary
from theia.encoder.named import NamedEncoder
from theia.errors import ConfigError, ImageError
from theia.lists import comma_list

SCENES = "scenes"


def dense(
    encoders: list[str],
    data: str,
    tasks: str | None = None,
    preset: Preset = "small",
    seeds: str = "0",
    device: Device = "auto",
    folder: Path | None = None,
    results: Path = Path("benchmarks/results"),
) -> Path:
    """Tells depth, surface normals and classes of pixels by a linear head on patch tokens, and matches views.

    The column "no encoder" tells what is usual at each place of a picture, without looking at it. A picture shows what
    heads of the first seed say, beside the truth. Heads are linear and see the last layer alone: figures compare
    encoders with each other, not with those that probe3D publishes of its larger heads. The same command again after an
    interruption skips encoders that are finished; they are kept in the folder "unfinished" of --results.

    Args:
        encoders: Names with blanks between them. All are in memory together.
        data: Folder with train and val, each with rgb and what the tasks need (see benchmarks/probing/folder.py), or
            scenes: rendered rooms. A folder of that name is ./scenes.
        tasks: Of depth, normals, segmentation and correspondence, separated by commas; all that there is data for by
            default.
        preset: small: a few minutes on a CPU with scenes; all pictures, maps and tokens are in memory: take full for
            thousands of pictures. full: probe3D's epochs and learning rate; they lie in files.
        seeds: Of the heads, separated by commas; the table shows means, and of several their standard deviation.
        device: Where to work; auto takes a GPU if there is one.
        folder: Where the full preset puts its files, which are deleted in the end (not after kill -9: theia-probing-*);
            the system's temporary folder by default.
        results: Folder for the JSON and the picture.

    Returns:
        The JSON.

    Raises:
        TheiaError: If options do not fit the data, a file is missing, or an encoder cannot be probed.
    """
    run = open_run("dense", device, seeds, folder, preset, results)
    chosen = _tasks(data, tasks)
    opened = open_all(encoders, run.device, spatial=True)
    with temporary(run.effort.on_disk, folder) as storage:
        found = _data(data, chosen, run.effort.rooms, storage)
        looks = check_encoders(opened, found.val.images, spatial=True)
        settings = {
            "preset": preset, "data": found.description, "tasks": chosen, "seeds": run.seeds, "device": run.device,
        }  # fmt: skip
        left_out = [task for task in TASKS if task not in chosen] if tasks is None else []
        notes = [f"No data for: {', '.join(left_out)}."] if left_out else []

        def probe(encoder: NamedEncoder, storage: Storage) -> Probed:
            return probe_pixels(encoder, found, chosen, run.effort.head, run.seeds, run.device, storage)

        nothing = probe_places(found, chosen)
        path, probed = run.probe_all(opened, looks, of_data(found), nothing, probe, settings, notes)
        if nothing.maps:
            draw(path.with_suffix(".png"), found, probed)
            print(path.with_suffix(".png"))
        return path


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
