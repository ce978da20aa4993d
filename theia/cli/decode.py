"""``theia decode``: shows what a student has learned from each teacher, as that teacher would show it."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from tabulate import tabulate

from theia.cli.parser import settle
from theia.errors import ConfigError
from theia.utils.arguments import check_number, comma_list
from theia.utils.device import Device, choose_device
from theia.version import __version__

if TYPE_CHECKING:
    from theia.decoding.subjects import Subject

logger = logging.getLogger(__name__)


def decode(
    encoder: str,
    images: str,
    out: Path,
    teachers: list[str] | str | None = None,
    teachers_side_by_side: bool = False,
    teacher_options: dict[str, Any] | str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: Device = "auto",
    overwrite: bool = False,
) -> int:
    """Show what a student has learned from each teacher, as that teacher would show it: a row of panels per image.

    SAM shows masks, Depth-Anything depth, HOG strokes, color colours. Any other teacher, and one whose weights cannot
    be loaded, shows the principal components of its features as colours. Colours mean the same in all pictures.

    Args:
        encoder: An exported folder, a checkpoint of 'theia fit', or the id of a published model on the hub. Published
            models have no statistics of features, so all their teachers are shown as colours of principal components.
        images: A folder of images, one image, a .tar file of images, a video, or sample:COUNT for sample photographs.
        out: Folder to write: a PNG per image, or a video for a video, and decoded.json with the scores.
        teachers: Teachers to show, in this order, with commas between them; all teachers of the model by default. For a
            published model, sam may stand for facebook/sam-vit-huge.
        teachers_side_by_side: Also show what each teacher itself gives, and the score between teacher and student;
            needs the weights of the teachers.
        teacher_options: Arguments of teachers that are not built with their defaults, such as {sam: {weights: PATH,
            model: vit_b}}; or a YAML file with such sections, for instance a config of 'theia extract'. On a CPU, SAM's
            masks take long; {sam: {mask_generator: {points_per_side: 8}}} looks for them at 64 points instead of 1024.
        limit: Largest number of images or frames to show, from the first.
        batch_size: Number of images to encode together.
        device: Device that student and teachers run on; auto takes a GPU if there is one.
        overwrite: Replace the pictures that an earlier call wrote into the folder.

    Raises:
        ConfigError: If options do not fit together, or the folder holds other files.
        ImageError: If there are no images, or none can be read.
        UnknownTeacherError: If the model has no such teacher.
    """
    check_number("limit", limit, 1)
    check_number("batch_size", batch_size, 1)

    # torch takes seconds to import; --help does not need it.
    from theia.decoding.frames import open_frames
    from theia.decoding.output import check_free
    from theia.decoding.panels import decode as write
    from theia.decoding.subjects import learned_from, names_of, open_subjects
    from theia.decoding.viewer import Viewer
    from theia.encoder.load import load

    path = Path(encoder)
    if ":" in encoder and not path.exists():
        raise ConfigError(
            f"--encoder is {encoder!r}; only a Theia model has translators to decode. Give an exported folder, a "
            "checkpoint of 'theia fit', or an id on the hub. 'theia analyze' takes any encoder."
        )
    check_free(out, overwrite)
    frames = open_frames(images)
    place = choose_device(device)
    model = load(encoder, device=place).freeze()
    options = _options(teacher_options, [*names_of(model)])
    # A file may also serve an extraction; options that are typed are meant for this call only.
    typed = isinstance(teacher_options, dict)
    chosen = None if teachers is None else comma_list(teachers)
    subjects = open_subjects(model, chosen, options, typed, teachers_side_by_side, place, learned_from(path))
    _warn(subjects)

    viewer = Viewer(model, subjects, batch_size)
    origin = {"theia_version": __version__, "model": path.name if path.exists() else encoder}
    record, written = write(viewer, frames, limit, out, origin)
    for sample_id, reason in record["skipped"].items():
        logger.warning("Skipped %s: %s", sample_id, reason)
    print(_summary(record))
    print(written)
    return 0


def _warn(subjects: "Sequence[Subject]") -> None:
    """Warns about what cannot be shown. A warning that concerns several teachers is given once."""
    notes: dict[str, list[str]] = {}
    for subject in subjects:
        for note in subject.notes:
            notes.setdefault(note, []).append(subject.name)
    for note, names in notes.items():
        logger.warning("%s: %s", ", ".join(names), note)


def _options(given: dict[str, Any] | str | None, known: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Arguments of the teachers' constructors, by teacher."""
    if isinstance(given, str):
        try:
            content = yaml.safe_load(Path(given).read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"--teacher_options: {given} cannot be read ({error}). Give a YAML file.") from error
        if not isinstance(content, dict):
            raise ConfigError(f"--teacher_options: {given} has no sections. Give a YAML file with one per teacher.")
        # The file may be a config of 'theia extract', which has other options, too.
        of_teachers: dict[str, Any] = {name: value for name, value in content.items() if name in known}
        given = dict(settle({"teacher_options": of_teachers})["teacher_options"])
    for name, value in (given or {}).items():
        if name not in known:
            raise ConfigError(f"--teacher_options has {name!r}; the model's teachers are {', '.join(known)}.")
        if not isinstance(value, dict):
            raise ConfigError(f"--teacher_options: {name} is {value!r}. Give arguments: {{{name}: {{weights: PATH}}}}.")
    return given or {}


def _summary(record: Mapping[str, Any]) -> str:
    keys = sorted({key for teacher in record["teachers"].values() for key in teacher["mean_scores"]})
    rows = [
        (name, teacher["shown_as"], *(teacher["mean_scores"].get(key) for key in keys))
        for name, teacher in record["teachers"].items()
    ]
    table = tabulate(rows, ("teacher", "shown as", *keys), floatfmt=".3f", missingval="")
    return f"{table}\n{len(record['images'])} images, {len(record['skipped'])} skipped"
