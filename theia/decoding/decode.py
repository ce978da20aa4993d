"""All pictures of a call: colours first, from some of them, then every row of panels, and a record of the scores."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from theia.decoding.frames import Frames
from theia.decoding.looks import Colours, Shown, Tokens, fit_colours, paint
from theia.decoding.output import check_free, prepare, write_record
from theia.decoding.panels import Group, row
from theia.decoding.subject import Subject
from theia.decoding.video import Video, video_writer
from theia.decoding.views import Pair, View, Viewer
from theia.errors import ImageError
from theia.extraction.progress import Progress
from theia.pictures import Picture
from theia.types import Depth, Masks

logger = logging.getLogger(__name__)

_FITTED_ON = 16  # images that decide what colours mean
_SCORE_NAMES = {"mask_iou": "mean IoU", "depth_error": "error", "cosine": "cosine"}  # the first at hand is shown


def decode(
    viewer: Viewer, frames: Frames, count: int, names: Mapping[str, str] | Path, out: Path, overwrite: bool,
    about: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Shows pictures through a student and its teachers, and writes them.

    Args:
        viewer: Student and teachers.
        frames: What to show.
        count: How many of them, from the first.
        names: File of each image by id, relative to ``out``; or of the video, absolute.
        out: Folder.
        overwrite: See :func:`theia.decoding.output.prepare`.
        about: What else is to stand in the record.

    Returns:
        The record, as it stands in ``decoded.json``.

    Raises:
        ConfigError: If the folder is used otherwise.
        ImageError: If nothing can be read.
    """
    files = [names.name] if isinstance(names, Path) else [names[sample_id] for sample_id in frames.ids[:count]]
    check_free(out, overwrite)
    # Evenly over all, so that a video's end counts as much as its beginning. They are not computed again.
    chosen = sorted({round(place) for place in np.linspace(0, count - 1, min(count, _FITTED_ON))})
    scores: dict[str, dict[str, dict[str, float]]] = {}
    with Progress("decode", count) as progress:
        known = {view.index: view for view in _counted(viewer.views(frames, chosen), progress)}
        if not known:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(frames.skipped.items())[:3])
            raise ImageError(f"None of {len(chosen)} pictures can be read ({reasons}). Give others with --images.")
        colours = {subject.name: _fit(subject, list(known.values())) for subject in viewer.subjects}
        prepare(out, files, overwrite)  # not before there is something to put in the place of earlier pictures
        with _writer(frames, names, out) as write:
            for view in _all_views(viewer, frames, count, known, progress):
                sample_id = frames.ids[view.index]
                groups = [Group("image", [(sample_id, np.asarray(view.image))])]
                groups += [_group(subject, view, *colours[subject.name]) for subject in viewer.subjects]
                write(sample_id, row(groups, view.image.width / view.image.height))
                scores[sample_id] = {name: pair.scores for name, pair in view.pairs.items()}
        progress.advance(count - len(scores))  # unreadable
    first = next(iter(known.values()))
    record = {
        **about,
        "finished": True,
        "teachers": {subject.name: _about(subject, first.pairs[subject.name], scores) for subject in viewer.subjects},
        "images": scores,
        "skipped": frames.skipped,
        "files": files,
    }
    write_record(out, record)
    return record


def _all_views(
    viewer: Viewer, frames: Frames, count: int, known: Mapping[int, View], progress: Progress
) -> Iterator[View]:
    """In order; those known already between the others, which are read in one go, as a video must be."""
    waiting = iter(sorted(known))
    following = next(waiting, None)
    others = (index for index in range(count) if index not in known and frames.ids[index] not in frames.skipped)
    for view in _counted(viewer.views(frames, others), progress):
        while following is not None and following < view.index:
            yield known[following]
            following = next(waiting, None)
        yield view
    while following is not None:
        yield known[following]
        following = next(waiting, None)


def _counted(views: Iterator[View], progress: Progress) -> Iterator[View]:
    for view in views:
        progress.advance(1)
        yield view


def _fit(subject: Subject, views: Sequence[View]) -> tuple[Colours, Colours]:
    """What the colours of translations and of the teacher's own mean: the same, if the features can be compared."""
    pairs = [view.pairs[subject.name] for view in views]
    translated: list[Shown] = [pair.translated for pair in pairs]
    own: list[Shown] = [pair.own for pair in pairs if pair.own is not None]
    if not own:
        colours = fit_colours(translated)
        return colours, colours
    colours = fit_colours(own)
    return (colours if subject.comparable else fit_colours(translated)), colours


def _group(subject: Subject, view: View, translated: Colours, own: Colours) -> Group:
    pair = view.pairs[subject.name]
    score = next((f"   {said} {pair.scores[key]:.2f}" for key, said in _SCORE_NAMES.items() if key in pair.scores), "")
    panels = [("student" + _kind(pair.translated), paint(pair.translated, translated, view.square))]
    if pair.own is not None:
        panels.append(("teacher" + _kind(pair.own), paint(pair.own, own, view.square)))
    return Group(subject.name + score, panels)


def _kind(shown: Shown) -> str:
    match shown:
        case Depth():
            return ", depth"
        case Masks(masks, _):
            return f", {len(masks[0])} mask" + "s" * (len(masks[0]) != 1)
        case Tokens():
            return ", PCA colours"
        case _:
            return ""


def _about(subject: Subject, pair: Pair, scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    values: dict[str, list[float]] = {}
    for of_image in scores.values():
        for key, value in of_image[subject.name].items():
            values.setdefault(key, []).append(value)
    spec = None if subject.teacher is None else subject.teacher.spec
    return {
        "shown_as": type(pair.translated).__name__.lower(),
        "own_shown": pair.own is not None,
        "weights": None if spec is None else spec.weights,
        "revision": None if spec is None else spec.revision,
        "notes": subject.notes,
        "mean_scores": {key: sum(each) / len(each) for key, each in values.items()},
    }


@contextmanager
def _writer(frames: Frames, names: Mapping[str, str] | Path, out: Path) -> Iterator[Callable[[str, Picture], None]]:
    if isinstance(names, Path):
        if not isinstance(frames, Video):
            raise TypeError("only a video becomes a video")
        with video_writer(names, frames.frames_per_s) as add:
            yield lambda _, picture: add(picture)
        return

    def save(sample_id: str, picture: Picture) -> None:
        path = out / names[sample_id]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)

    yield save
