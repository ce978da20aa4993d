"""Decodes pictures into rows of panels, in one pass: first those that decide what colours mean, then the others."""

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from theia.decoding.frames import Frames, Video, video_writer
from theia.decoding.output import Output, picture_names
from theia.decoding.render import Colours, Group, Shown, Tokens, fit_colours, paint, row
from theia.decoding.subjects import Subject
from theia.decoding.viewer import View, Viewer
from theia.errors import ImageError
from theia.extraction.user_files import IMAGE_ENDINGS
from theia.types import Depth, Masks
from theia.utils.pictures import Picture
from theia.utils.progress import Progress

_FITTED_ON = 16  # images that decide what colours mean
_SCORE_NAMES = {"mask_iou": "mean IoU", "depth_error": "error", "cosine": "cosine"}  # the first at hand is shown

ByTeacher = dict[str, tuple[Colours, Colours]]  # for translations, and for the teacher's own output
Scores = dict[str, dict[str, float]]  # by teacher and name of a score


def decode(
    viewer: Viewer, frames: Frames, limit: int | None, out: Path, origin: Mapping[str, Any]
) -> tuple[dict[str, Any], Path]:
    """Shows pictures through a student and its teachers, and writes them.

    Args:
        viewer: Student and teachers.
        frames: Pictures to show.
        limit: Largest number of frames to show, from the first; all by default.
        out: Folder to write into, which :func:`theia.decoding.output.check_free` has allowed.
        origin: Record of the model and of Theia's version.

    Returns:
        The record, as it stands in ``decoded.json``; and the path of what was written, the folder or the video in it.

    Raises:
        ImageError: If nothing can be read.
    """
    count = min(len(frames.ids), limit or len(frames.ids))
    film = out / frames.film if isinstance(frames, Video) else None
    names = picture_names(frames.ids[:count], IMAGE_ENDINGS)
    output = Output(out, names)
    scores: dict[str, Scores] = {}
    with Progress("decode", count) as progress:
        # Spread evenly, so that a video's end counts as much as its beginning.
        chosen = {round(place) for place in np.linspace(0, count - 1, min(count, _FITTED_ON))}
        fitted = list(viewer.views(frames, sorted(chosen)))
        if not fitted:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(frames.skipped.items())[:3])
            raise ImageError(f"None of {len(chosen)} pictures can be read ({reasons}). Give others with --images.")
        colours = {subject.name: _fit(subject, fitted) for subject in viewer.subjects}
        first = fitted[0]
        others = viewer.views(frames, (index for index in range(count) if index not in chosen))
        output.begin([film.name] if film else [*names.values()])
        with _writer(frames, film, output) as write:
            for view in heapq.merge(fitted, others, key=attrgetter("index")):
                sample_id = frames.ids[view.index]
                write(sample_id, _row(sample_id, view, colours))
                scores[sample_id] = {name: pair.scores for name, pair in view.pairs.items()}
                progress.advance(1)
        progress.advance(count - len(scores))  # unreadable
    record = {
        **origin,
        "teachers": {subject.name: _summary(subject, first, scores) for subject in viewer.subjects},
        "images": scores,
        "skipped": frames.skipped,
    }
    output.finish(record, [film.name] if film else [names[sample_id] for sample_id in scores])
    return record, film or out


def _fit(subject: Subject, views: Sequence[View]) -> tuple[Colours, Colours]:
    """What colours mean: the same for translations and the teacher's own output, if features can be compared."""
    pairs = [view.pairs[subject.name] for view in views]
    translated = fit_colours([pair.translated for pair in pairs])
    own = [pair.own for pair in pairs if pair.own is not None]
    if not own:
        return translated, translated
    colours = fit_colours(own)
    return (colours if subject.comparable else translated), colours


def _row(sample_id: str, view: View, colours: ByTeacher) -> Picture:
    groups = [Group("image", [(sample_id, np.asarray(view.image))])]
    for name, pair in view.pairs.items():
        translated, own = colours[name]
        scores = (f"   {said} {pair.scores[key]:.2f}" for key, said in _SCORE_NAMES.items() if key in pair.scores)
        panels = [("student" + _kind(pair.translated), paint(pair.translated, translated, view.square))]
        if pair.own is not None:
            panels.append(("teacher" + _kind(pair.own), paint(pair.own, own, view.square)))
        groups.append(Group(name + next(scores, ""), panels))
    return row(groups, view.image.width / view.image.height)


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


def _summary(subject: Subject, first: View, scores: Mapping[str, Scores]) -> dict[str, Any]:
    """What the record says of a teacher; all its pictures are of the kind of the first."""
    pair = first.pairs[subject.name]
    spec = None if subject.teacher is None else subject.teacher.spec
    values: dict[str, list[float]] = {}
    for of_image in scores.values():
        for key, value in of_image[subject.name].items():
            values.setdefault(key, []).append(value)
    return {
        "shown_as": type(pair.translated).__name__.lower(),
        "own_shown": pair.own is not None,
        "weights": None if spec is None else spec.weights,
        "revision": None if spec is None else spec.revision,
        "notes": subject.notes,
        "mean_scores": {key: fmean(each) for key, each in values.items()},
    }


@contextmanager
def _writer(frames: Frames, film: Path | None, output: Output) -> Iterator[Callable[[str, Picture], object]]:
    if film is not None and isinstance(frames, Video):
        with video_writer(film, frames.frames_per_s) as add:
            yield lambda _, picture: add(picture)
    else:
        yield output.save
