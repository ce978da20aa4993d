"""``theia decode``: what a student has learned of each teacher, as that teacher would show it."""

import json
import logging
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import auto_cli
from PIL import Image
from tabulate import tabulate

from theia.cli.parser import Parser, settle
from theia.errors import ConfigError, UnknownTeacherError
from theia.utils.arguments import check_number, comma_list
from theia.utils.device import Device, choose_device
from theia.version import __version__

if TYPE_CHECKING:
    from theia.decoding.viewer import Frames, Subject
    from theia.encoder.encoder import Encoder
    from theia.extraction.sources import ImageSource

logger = logging.getLogger(__name__)


class _Parser(Parser):
    """Takes the one option with many words with dashes between them, too."""

    def add_argument(self, *args: Any, **options: Any) -> Any:
        """See ``argparse``."""
        names = (*args, "--teachers-side-by-side") if args[0] == "--teachers_side_by_side" else args
        return super().add_argument(*names, **options)


def main(argv: list[str]) -> int:
    """Runs ``theia decode``.

    Args:
        argv: Arguments after the command.

    Returns:
        Exit status.

    Raises:
        TheiaError: See :func:`decode`.
    """
    return int(auto_cli(decode, args=argv, prog="theia decode", as_positional=False, parser_class=_Parser))


def decode(
    model: str,
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
    """Show what a student has learned of each teacher, as that teacher would show it: one row of panels per image.

    SAM shows masks, Depth-Anything depth, HOG strokes, color colours; any other teacher, and one whose weights cannot
    be had, the principal components of its features as colours. Colours mean the same in all pictures of a call.

    Args:
        model: An exported folder, a checkpoint of 'theia fit', or the id of a published model on the hub. Published
            ones have no statistics of features: all their teachers are shown as PCA colours.
        images: A folder of images, one image, a .tar file of images, a video, or sample:COUNT for photographs.
        out: Folder to make, for a PNG per image, or a video for a video, and decoded.json with the scores. Finished
            pictures there are replaced with --overwrite only. The same call goes on where it was stopped; a video
            starts over.
        teachers: Which to show, in this order, with commas between them, as sam for facebook/sam-vit-huge, too; all of
            the model by default.
        teachers_side_by_side: Also show what each teacher itself gives, and the score between the two; needs its
            weights.
        teacher_options: What makes the teachers, where it is not the default, as {sam: {weights: PATH, model: vit_b}};
            or a YAML file that has such sections, as a config of 'theia extract' does. On a CPU, SAM's masks take long;
            {sam: {mask_generator: {points_per_side: 8}}} asks for them at 64 points instead of 1024.
        limit: Show so many images or frames at most, the first ones.
        batch_size: Images that are encoded together.
        device: Where to compute; auto takes a GPU if there is one.
        overwrite: Replace what an earlier call wrote into the folder.

    Raises:
        ConfigError: If options do not fit together, or the folder is used otherwise.
        ImageError: If there are no images, or none can be read.
        UnknownTeacherError: If the model has no such teacher.
    """
    check_number("limit", limit, 1)
    check_number("batch_size", batch_size, 1)

    # torch takes seconds to import; --help does not need it.
    from theia.decoding.decode import decode as write
    from theia.decoding.output import check_free, picture_names
    from theia.decoding.video import GIF, Video
    from theia.decoding.viewer import Viewer, is_of_use, names_of, open_subject
    from theia.encoder.load import load
    from theia.extraction.decode import to_square
    from theia.extraction.files import IMAGE_ENDINGS

    if ":" in model and not Path(model).exists():
        raise ConfigError(
            f"--model is {model!r}; only a Theia model has translators to decode. Give an exported folder, a "
            "checkpoint of 'theia fit', or an id on the hub. 'theia analyze' takes any encoder."
        )
    check_free(out, overwrite)
    frames = _open(images)
    place = choose_device(device)
    encoder = load(model, device=place).freeze()
    known = names_of(encoder)
    installed = {key: name for name, key in known.items()}
    chosen = [*known] if teachers is None else [installed.get(name, name) for name in comma_list(teachers)]
    if not chosen:
        raise ConfigError("--teachers is empty. Leave it out to show all of the model.")
    for name in chosen:
        if name not in known:
            raise UnknownTeacherError(f"This model has no translator for {name!r}. It has: {', '.join(known)}.")
    options = _options(teacher_options, [*known])
    # A file may serve an extraction, too; what is typed is meant for this call.
    for name in options if isinstance(teacher_options, dict) else ():
        if name not in chosen or not is_of_use(name, encoder, teachers_side_by_side):
            raise ConfigError(
                f"--teacher_options has {name!r}, but nothing is shown that takes the teacher itself: a teacher that "
                "decodes nothing does so with --teachers_side_by_side only, and one that --teachers leaves out never."
            )
    trained_on = _teachers_of(Path(model))
    subjects = [
        open_subject(name, encoder, options.get(name), teachers_side_by_side, place, trained_on.get(name))
        for name in dict.fromkeys(chosen)
    ]
    _warn(subjects)

    count = min(len(frames.ids), limit or len(frames.ids))
    names: Mapping[str, str] | Path
    if isinstance(frames, Video):
        source = Path(images)
        names = out / f"{source.stem}{GIF if source.suffix.lower() == GIF else '.mp4'}"
    else:
        names = picture_names(frames.ids[:count], IMAGE_ENDINGS)
    viewer = Viewer(encoder, subjects, lambda image, side: to_square(image, side, "squash"), batch_size)
    about = {"theia_version": __version__, "model": Path(model).name if Path(model).exists() else model}
    call = {
        **about,
        "model": model,
        "weights of the model": _checksum(encoder),
        "images": images,
        "teachers_side_by_side": teachers_side_by_side,
        "teachers": [[one.name, one.shows_own, one.teacher and vars(one.teacher.spec)] for one in subjects],
        "teacher_options": options,
        "limit": limit,
    }
    record = write(viewer, frames, count, names, out, overwrite, about, call)
    for sample_id, reason in record["skipped"].items():
        logger.warning("Skipped %s: %s", sample_id, reason)
    print(_summary(record))
    print(names if isinstance(names, Path) else out)
    return 0


def _warn(subjects: "Sequence[Subject]") -> None:
    """Says what concerns several teachers once."""
    notes: dict[str, list[str]] = {}
    for subject in subjects:
        for note in subject.notes:
            notes.setdefault(note, []).append(subject.name)
    for note, names in notes.items():
        logger.warning("%s: %s", ", ".join(names), note)


def _checksum(encoder: "Encoder") -> int:
    """Of all parameters: a checkpoint may have other ones tomorrow."""
    checksum = 0
    for tensor in encoder.state_dict().values():
        checksum = zlib.crc32(tensor.detach().float().cpu().contiguous().numpy(), checksum)
    return checksum


class _Images:
    """Pictures of an image source; see :class:`theia.decoding.viewer.Frames`."""

    def __init__(self, source: "ImageSource") -> None:
        self.ids: Sequence[str] = source.ids
        self.skipped: dict[str, str] = {}
        self._source = source

    def pick(self, indices: Iterable[int]) -> Iterator[tuple[int, Image.Image]]:
        """See :meth:`theia.decoding.viewer.Frames.pick`."""
        from theia.extraction.decode import UnreadableImageError

        for index in indices:
            try:
                image = self._source.read(index)
            except UnreadableImageError as error:
                self.skipped[self.ids[index]] = str(error)
                continue
            yield index, image


def _open(location: str) -> "Frames":
    from theia.decoding.video import VIDEO_ENDINGS, Video
    from theia.extraction.stream import open_images

    path = Path(location)
    if path.suffix.lower() in VIDEO_ENDINGS and not path.is_dir():
        return Video(path)
    return _Images(open_images(location))


def _teachers_of(model: Path) -> dict[str, Any]:
    """Weights and revisions of the teachers that a local model learned from, by teacher, if it is known."""
    from theia.encoder.load import CONFIG

    # Of an exported folder, and of the run that a checkpoint lies in.
    exported = model.is_dir()
    path = model / CONFIG if exported else model.absolute().parent.parent / "environment.json"
    try:
        content = json.loads(path.read_text())[("record" if exported else "store")]["teachers"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return content if isinstance(content, dict) else {}


def _options(given: dict[str, Any] | str | None, known: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By teacher, arguments of its constructor."""
    if isinstance(given, str):
        try:
            content = yaml.safe_load(Path(given).read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"--teacher_options: {given} cannot be read ({error}). Give a YAML file.") from error
        if not isinstance(content, dict):
            raise ConfigError(f"--teacher_options: {given} has no sections. Give a YAML file with one per teacher.")
        # Such as a config of 'theia extract': what else it says is of no concern here.
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
