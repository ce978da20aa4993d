"""All pictures of a call: colours first, from some of them, then every row of panels, and a record of the scores."""

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from theia.decoding.output import Output, Scores, check_free, find_unfinished
from theia.decoding.render import Colours, Group, Shown, Tokens, fit_colours, paint, row
from theia.decoding.video import Video, video_writer
from theia.decoding.viewer import Frames, Pair, Subject, View, Viewer
from theia.errors import ImageError
from theia.types import Depth, Masks
from theia.utils.pictures import ColourBasis, Picture
from theia.utils.progress import Progress

logger = logging.getLogger(__name__)

_FITTED_ON = 16  # images that decide what colours mean
_SCORE_NAMES = {"mask_iou": "mean IoU", "depth_error": "error", "cosine": "cosine"}  # the first at hand is shown

ByTeacher = dict[str, tuple[Colours, Colours]]  # of translations, and of the teacher's own


def decode(
    viewer: Viewer, frames: Frames, count: int, names: Mapping[str, str] | Path, out: Path, overwrite: bool,
    about: Mapping[str, Any], call: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Shows pictures through a student and its teachers, and writes them.

    A call that was stopped is gone on with, but for a video, which is written as a whole.

    Args:
        viewer: Student and teachers.
        frames: What to show.
        count: How many of them, from the first.
        names: File of each image by id, relative to ``out``; or of the video, absolute.
        out: Folder.
        overwrite: Remove what an earlier call wrote.
        about: What else is to stand in the record.
        call: By option, what pictures depend on, as plain values.

    Returns:
        The record, as it stands in ``decoded.json``.

    Raises:
        ConfigError: If the folder is used otherwise.
        ImageError: If nothing can be read.
    """
    check_free(out, overwrite)
    files = {names.name: names.name} if isinstance(names, Path) else names
    before = None if overwrite or isinstance(names, Path) else find_unfinished(out, call, files)
    output = Output(out, files)
    scores: dict[str, Scores] = {}
    if before is not None:
        scores = dict(before.scores)
        logger.info("Going on behind %d of %d pictures of an earlier call.", len(scores), count)
    wanted = [index for index in range(count) if frames.ids[index] not in scores]
    with Progress("decode", len(wanted)) as progress:
        if before is not None:
            output.go_on(before.scores)
            shown, colours = before.start["shown"], _from_plain(before.start["colours"])
            views = viewer.views(frames, wanted)
        else:
            first, colours = _begin(viewer, frames, count)
            shown = {name: _about(pair) for name, pair in first.pairs.items()}
            _row(viewer, first, frames, colours)  # what fails, fails before earlier pictures are gone
            output.begin(call, {"shown": shown, "colours": _plain(colours)})
            # A video whose very first frame cannot be read has no others: this is in order.
            rest = viewer.views(frames, (index for index in wanted if index != first.index))
            views = itertools.chain([first], rest)
        try:
            with _writer(frames, names, output) as write:
                for view in views:
                    sample_id = frames.ids[view.index]
                    of_image = {name: pair.scores for name, pair in view.pairs.items()}
                    write(sample_id, _row(viewer, view, frames, colours), of_image)
                    scores[sample_id] = of_image
                    progress.advance(1)
        except KeyboardInterrupt:
            if not isinstance(names, Path):
                logger.warning("%d of %d pictures are whole; the same call goes on behind them.", len(scores), count)
            raise
        progress.advance(count - len(scores))  # unreadable
    record = {
        **about,
        "teachers": {
            subject.name: {**shown[subject.name], **_teacher(subject), "mean_scores": _means(subject.name, scores)}
            for subject in viewer.subjects
        },
        "images": {sample_id: scores[sample_id] for sample_id in frames.ids[:count] if sample_id in scores},
        "skipped": frames.skipped,
    }
    output.finish(record)
    return record


def _begin(viewer: Viewer, frames: Frames, count: int) -> tuple[View, ByTeacher]:
    """The first picture that can be read, and what colours mean."""
    # Evenly over all, so that a video's end counts as much as its beginning.
    chosen = sorted({round(place) for place in np.linspace(0, count - 1, min(count, _FITTED_ON))})
    first = next((view for index in chosen for view in viewer.views(frames, [index])), None)
    if first is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(frames.skipped.items())[:3])
        raise ImageError(f"None of {len(chosen)} pictures can be read ({reasons}). Give others with --images.")
    # Masks take minutes and need no colours; what needs them is computed twice, which spares keeping it.
    fitted = [subject for subject in viewer.subjects if _has_colours(first.pairs[subject.name])]
    views = [first]
    if fitted:
        views += viewer.views(frames, (index for index in chosen if index > first.index), fitted)
    return first, {
        subject.name: _fit(subject, [view.pairs[subject.name] for view in views if subject.name in view.pairs])
        for subject in viewer.subjects
    }


def _has_colours(pair: Pair) -> bool:
    return any(isinstance(shown, Tokens | Depth) for shown in (pair.translated, pair.own))


def _fit(subject: Subject, pairs: Sequence[Pair]) -> tuple[Colours, Colours]:
    """What the colours of translations and of the teacher's own mean: the same, if the features can be compared."""
    translated: list[Shown] = [pair.translated for pair in pairs]
    own: list[Shown] = [pair.own for pair in pairs if pair.own is not None]
    if not own:
        colours = fit_colours(translated)
        return colours, colours
    colours = fit_colours(own)
    return (colours if subject.comparable else fit_colours(translated)), colours


def _plain(colours: ByTeacher) -> dict[str, Any]:
    """Colours as JSON holds them, to the last digit."""

    def plain(one: Colours) -> dict[str, Any]:
        basis = None if one.basis is None else {name: part.tolist() for name, part in vars(one.basis).items()}
        return {"basis": basis, "depth": one.depth}

    return {name: [plain(one) for one in pair] for name, pair in colours.items()}


def _from_plain(content: Mapping[str, Any]) -> ByTeacher:
    def colours(one: Mapping[str, Any]) -> Colours:
        basis = one["basis"] and ColourBasis(**{name: np.array(part) for name, part in one["basis"].items()})
        return Colours(basis, tuple(one["depth"]))

    return {name: (colours(translated), colours(own)) for name, (translated, own) in content.items()}


def _row(viewer: Viewer, view: View, frames: Frames, colours: ByTeacher) -> Picture:
    groups = [Group("image", [(frames.ids[view.index], np.asarray(view.image))])]
    groups += [_group(subject, view, *colours[subject.name]) for subject in viewer.subjects]
    return row(groups, view.image.width / view.image.height)


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


def _about(pair: Pair) -> dict[str, Any]:
    return {"shown_as": type(pair.translated).__name__.lower(), "own_shown": pair.own is not None}


def _teacher(subject: Subject) -> dict[str, Any]:
    spec = None if subject.teacher is None else subject.teacher.spec
    return {
        "weights": None if spec is None else spec.weights,
        "revision": None if spec is None else spec.revision,
        "notes": subject.notes,
    }


def _means(teacher: str, scores: Mapping[str, Scores]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for of_image in scores.values():
        for key, value in of_image[teacher].items():
            values.setdefault(key, []).append(value)
    return {key: sum(each) / len(each) for key, each in values.items()}


@contextmanager
def _writer(
    frames: Frames, names: Mapping[str, str] | Path, output: Output
) -> Iterator[Callable[[str, Picture, Scores], None]]:
    if not isinstance(names, Path):
        yield output.save
        return
    if not isinstance(frames, Video):
        raise TypeError("only a video becomes a video")
    with video_writer(names, frames.frames_per_s) as add:
        yield lambda _, picture, __: add(picture)
