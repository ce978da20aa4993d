"""``python -m benchmarks.probing``: probes frozen encoders, prints one table, writes one JSON."""

import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from theia.cli.main import carry_out
from theia.cli.parser import Parser
from theia.encoder.from_name import FORMS, NamedEncoder
from theia.errors import ConfigError, ImageError
from theia.probing.datasets import TASKS, DenseData, Storage, Task, of_data, of_files, open_folder, tasks_of, temporary
from theia.probing.features import Device, check_encoders, open_all
from theia.probing.labelled import open_labelled
from theia.probing.picture import draw
from theia.probing.probes import Probed, probe_classes, probe_nothing, probe_pixels, probe_places
from theia.probing.run import PRESETS, Preset, open_run
from theia.probing.scenes import scenes
from theia.utils.arguments import check_number, comma_list


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        Exit status: 0, 1 for a failure with a message, 130 after Ctrl-C.
    """
    parser = Parser(prog="python -m benchmarks.probing", description="Probes frozen encoders.")
    commands = parser.add_subcommands(required=True)
    functions: dict[str, Callable[..., Path]] = {"classification": classification, "dense": dense}
    for name, function in functions.items():
        about = inspect.getdoc(function) or ""
        one = Parser(description=about.partition("\n\nArgs:")[0])
        # jsonargparse takes one word for a list; a comma may be part of an encoder's name.
        one.add_argument("--encoders", nargs="+", required=True, metavar="NAME", help=FORMS.replace("\n", "; "))
        one.add_function_arguments(function, skip={"encoders"})
        commands.add_subcommand(name, one, help=about.partition("\n")[0])

    def work() -> None:
        options = parser.parse_args(argv)
        functions[options.subcommand](**options[options.subcommand].as_dict())

    return carry_out("benchmarks.probing", work)


if __name__ == "__main__":
    sys.exit(main())


def classification(
    encoders: list[str],
    images: str,
    val: str | None = None,
    preset: Preset = "small",
    neighbours: int = 20,
    seeds: str | None = None,
    device: Device = "auto",
    folder: Path | None = None,
    results: Path = Path("benchmarks/results"),
) -> Path:
    """Tells classes of images by mean-pooled patch tokens: nearest neighbours, and a linear probe.

    The column "no encoder" always tells the most frequent class. The same command again after an interruption skips
    encoders that are finished; they are kept in the folder "unfinished" of --results.

    Args:
        encoders: Names with blanks between them. All are in memory together.
        images: Folder whose sub-folders are the classes.
        val: The same, held-out images; every fifth image of each class of --images by default.
        preset: small: the probe is logistic regression (scikit-learn, C = 1, standardised channels), one vector of each
            image is in memory, a minute on a CPU; full: MAE's probe, for ImageNet: LARS, batches of 16384.
        neighbours: Images that vote.
        seeds: Of MAE's probe, separated by commas; the table shows means, and of several their standard deviation.
            0 by default. The small preset's leaves nothing to chance, and takes none.
        device: Where to work; auto takes a GPU if there is one.
        folder: Where the full preset puts its files, which are deleted in the end (not after kill -9: theia-probing-*);
            the system's temporary folder by default.
        results: Folder for the JSON.

    Returns:
        The JSON.

    Raises:
        TheiaError: If options do not fit the data, an image cannot be read, or an encoder cannot be probed.
    """
    check_number("neighbours", neighbours, 1)
    if seeds is not None and PRESETS[preset].probe is None:
        raise ConfigError(f"--seeds: the probe of --preset {preset} leaves nothing to chance. Leave it out.")
    run = open_run("classification", device, seeds, folder, preset, results)
    opened = open_all(encoders, run.device, spatial=False)
    training, testing = open_labelled(images, val, neighbours)
    looks = check_encoders(opened, training.some(4), spatial=False)
    schedule = run.effort.probe
    settings = {
        "preset": preset, "data": " and ".join(Path(root).resolve().name for root in (images, val) if root),
        "neighbours": neighbours, "seeds": run.seeds if schedule else [], "training images": len(training),
        "held-out images": len(testing), "classes": len(training.classes), "device": run.device,
    }  # fmt: skip
    notes = []
    if schedule is not None and len(training) < schedule.batch_size:
        notes.append(
            f"The full preset is meant for more than its batch of {schedule.batch_size}; with {len(training)} "
            "training images the linear probe ends before it has learned much. Take the small one."
        )

    def probe(encoder: NamedEncoder, storage: Storage) -> Probed:
        return probe_classes(encoder, training, testing, neighbours, schedule, run.seeds, run.device, storage)

    nothing = probe_nothing(training, testing)
    return run.probe_all(opened, looks, of_files(images, val), nothing, probe, settings, notes)[0]


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
        data: Folder with train and val, each with rgb and what the tasks need (see theia/probing/datasets.py), or
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
