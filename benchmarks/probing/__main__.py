"""``python -m benchmarks.probing``: probes frozen encoders, prints one table, writes one JSON."""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from benchmarks import command
from benchmarks.probing.data import TASKS, DenseData, Task
from benchmarks.probing.features import Device, check_encoders, choose_device, open_all
from benchmarks.probing.fingerprint import fingerprint, of_data, of_files
from benchmarks.probing.folder import open_folder, tasks_of
from benchmarks.probing.labelled import open_labelled
from benchmarks.probing.picture import draw
from benchmarks.probing.presets import PRESETS, Effort, Preset
from benchmarks.probing.probes import Probed, probe_classes, probe_nothing, probe_pixels, probe_places
from benchmarks.probing.report import results as records
from benchmarks.probing.report import table
from benchmarks.probing.scenes.dataset import scenes
from benchmarks.probing.storage import Storage, temporary
from benchmarks.probing.unfinished import Unfinished
from benchmarks.throughput.machine import machine, versions
from benchmarks.throughput.report import write
from theia.analysis.labels import short_labels
from theia.encoder.named import FORMS, NamedEncoder
from theia.errors import ConfigError, ImageError
from theia.lists import comma_list

SCENES = "scenes"
NOTHING = "no encoder"  # the column of what can be told without one


def classification(
    encoders: list[str],
    images: str,
    val: str | None = None,
    preset: Preset = "small",
    neighbours: int = 20,
    seeds: str = "0",
    device: Device = "auto",
    folder: Path | None = None,
    results: Path = Path("benchmarks/results"),
) -> Path:
    """Tells classes of images by mean-pooled patch tokens: nearest neighbours, and MAE's linear probe.

    The column "no encoder" always tells the most frequent class. The same command again after an interruption skips
    encoders that are finished; they are kept in the folder "unfinished" of --results.

    Args:
        encoders: Names with blanks between them. All are in memory together.
        images: Folder whose sub-folders are the classes.
        val: The same, held-out images; every fifth image of each class of --images by default.
        preset: small: a minute on a CPU; full: MAE's batch of 16384 and its learning rate, for ImageNet.
        neighbours: Images that vote.
        seeds: Of the linear probe, separated by commas; the table shows means, and of several their standard deviation.
        device: Where to work; auto takes a GPU if there is one.
        folder: Where the full preset puts its files, which are deleted in the end (not after kill -9: theia-probing-*);
            the system's temporary folder by default.
        results: Folder for the JSON.

    Returns:
        The JSON.

    Raises:
        TheiaError: If options do not fit the data, an image cannot be read, or an encoder cannot be probed.
    """
    where, numbers, effort = _common(device, seeds, folder, preset)
    if neighbours < 1:
        raise ConfigError(f"--neighbours is {neighbours}; it must be 1 or more.")
    training, testing = open_labelled(images, val, neighbours)
    opened = open_all(encoders, where)
    looks = check_encoders(opened, training.some(4), spatial=False)
    settings = {
        "preset": preset, "data": " and ".join(Path(root).resolve().name for root in (images, val) if root),
        "neighbours": neighbours, "seeds": numbers, "training images": len(training),
        "held-out images": len(testing), "classes": len(training.classes), "device": where,
    }  # fmt: skip
    notes = []
    if preset == "full" and len(training) < effort.probe.batch_size:
        notes.append(
            f"The full preset is meant for more than its batch of {effort.probe.batch_size}; with {len(training)} "
            "training images the linear probe ends before it has learned much. Take the small one."
        )

    def probe(encoder: NamedEncoder, storage: Storage) -> Probed:
        return probe_classes(encoder, training, testing, neighbours, effort.probe, numbers, where, storage)

    files = of_files(images, val)
    identities = {name: fingerprint(settings, versions(), files, look) for name, look in looks.items()}
    nothing = probe_nothing(training, testing)
    return _probe_all(
        "classification", opened, identities, nothing, probe, effort.on_disk, folder, results, settings, notes
    )[0]


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
        preset: small: a few minutes on a CPU with scenes; full: probe3D's epochs and learning rate.
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
    where, numbers, effort = _common(device, seeds, folder, preset)
    chosen = _tasks(data, tasks)
    opened = open_all(encoders, where)
    with temporary(effort.on_disk, folder) as storage:
        found = _data(data, chosen, effort.rooms, storage)
        looks = check_encoders(opened, found.val.images, spatial=True)
        settings = {
            "preset": preset, "data": found.description, "tasks": chosen, "seeds": numbers, "device": where,
        }  # fmt: skip
        left_out = [task for task in TASKS if task not in chosen] if tasks is None else []
        notes = [f"No data for: {', '.join(left_out)}."] if left_out else []

        def probe(encoder: NamedEncoder, storage: Storage) -> Probed:
            return probe_pixels(encoder, found, chosen, effort.head, numbers, where, storage)

        pixels = of_data(found)
        identities = {name: fingerprint(settings, versions(), pixels, look) for name, look in looks.items()}
        nothing = probe_places(found, chosen)
        path, probed = _probe_all(
            "dense", opened, identities, nothing, probe, effort.on_disk, folder, results, settings, notes
        )
        if nothing.maps:
            draw(path.with_suffix(".png"), found, probed)
            print(path.with_suffix(".png"))
        return path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        Exit status: 0, 1 for a failure with a message, 130 after Ctrl-C.
    """
    parser = ArgumentParser(prog="python -m benchmarks.probing", description="Probes frozen encoders.")
    commands = parser.add_subcommands(required=True)
    functions: dict[str, Callable[..., Path]] = {"classification": classification, "dense": dense}
    for name, function in functions.items():
        about = inspect.getdoc(function) or ""
        one = ArgumentParser(description=about.partition("\n\nArgs:")[0])
        # jsonargparse takes one word for a list; a comma may be part of an encoder's name.
        one.add_argument("--encoders", nargs="+", required=True, metavar="NAME", help=FORMS.replace("\n", "; "))
        one.add_function_arguments(function, skip={"encoders"})
        commands.add_subcommand(name, one, help=about.partition("\n")[0])
    options = parser.parse_args(argv)
    chosen = options.subcommand
    return command.run("benchmarks.probing", lambda: functions[chosen](**options[chosen].as_dict()))


def _probe_all(
    kind: str,
    encoders: Sequence[NamedEncoder],
    identities: Mapping[str, str],
    nothing: Probed,
    probe: Callable[[NamedEncoder, Storage], Probed],
    on_disk: bool,
    folder: Path | None,
    results: Path,
    settings: dict[str, Any],
    notes: list[str],
) -> tuple[Path, dict[str, Probed]]:
    """Probes what an interrupted run has not, then writes the JSON.

    Returns:
        The JSON, and what was found by the encoders' labels, with what needs no encoder first.
    """
    # Where a model lies is nobody else's business.
    labels = short_labels([encoder.name for encoder in encoders])
    found = {NOTHING: nothing}
    unfinished = Unfinished(results / "unfinished")
    for number, encoder in enumerate(encoders, 1):
        known = unfinished.load(identities[encoder.name])
        turn = f"encoder {number} of {len(encoders)}: {encoder.name}"
        if known is None:
            print(turn, file=sys.stderr)
            with temporary(on_disk, folder) as storage:
                known = probe(encoder, storage)
            unfinished.keep(identities[encoder.name], known)
        else:
            print(f"{turn} was finished by an interrupted run", file=sys.stderr)
        found[labels[encoder.name]] = known
    figures = {name: probed.figures for name, probed in found.items()}
    print("\n".join([table(figures), *notes]))
    record = {"versions": versions(), "machine": machine(), "settings": settings, "notes": notes}
    path = write(results, f"probing-{kind}", records(figures), record)
    unfinished.forget(identities.values())
    print(path)
    return path, found


def _common(device: Device, seeds: str, folder: Path | None, preset: Preset) -> tuple[str, list[int], Effort]:
    """What both commands check alike: the device, the seeds, and how much work there is."""
    numbers = comma_list(seeds)
    if not numbers or not all(number.isdecimal() for number in numbers):
        raise ConfigError(f"--seeds is {seeds!r}; give whole numbers from 0, separated by commas, such as 0,1,2.")
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}. Make it, or give another one with --folder.")
    return choose_device(device), [int(number) for number in numbers], PRESETS[preset]


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


if __name__ == "__main__":
    sys.exit(main())
