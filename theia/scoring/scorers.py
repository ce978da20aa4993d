"""The scorers of ``theia test``: runs them, tabulates their scores, and writes the report."""

import inspect
import json
import logging
import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import seed_everything
from tabulate import tabulate
from tqdm import tqdm

from theia.data.protocol import TrainingData
from theia.encoder.load import load
from theia.errors import PluginError, TheiaError
from theia.scoring.contract import Part, Scorer, Trained
from theia.types import FeatureBatch
from theia.utils.files import write_whole

logger = logging.getLogger(__name__)


class Parts:
    """The two parts of some data as scorers see them, on one device.

    Args:
        data: Data with every teacher.
        device: Device of the batches.
        images: Largest number of training images.
        labelled: Whether batches have labels.
    """

    def __init__(self, data: TrainingData, device: torch.device, images: int, labelled: bool) -> None:
        self._data, self._device, self._images, self._labelled = data, device, images, labelled
        self._loaders: dict[tuple[str, bool], Iterable[FeatureBatch]] = {}

    def of(self, part: Literal["train", "held_out"], scorer: str) -> Part:
        """One part.

        Args:
            part: Training or held-out images.
            scorer: Name of the scorer, for the progress bar.
        """

        def iterate(features: bool = True) -> Iterator[FeatureBatch]:
            most = self._images if part == "train" else None
            if (part, features) not in self._loaders:
                loader = self._data.ordered_dataloader(part, self._device, most, features)
                self._loaders[part, features] = loader
            label = f"{scorer}, {part.replace('_', '-')} images"
            found = self._loaders[part, features]
            for batch in tqdm(found, label, unit="batch", leave=False, dynamic_ncols=True, disable=None):
                moved = self._data.transfer_batch_to_device(batch, self._device, 0)
                yield moved if self._labelled else replace(moved, labels=None)

        return iterate

    def close(self) -> None:
        """Ends the workers of the data."""
        self._data.teardown("test")


def run_scorers(
    scorers: Mapping[str, Scorer],
    data: TrainingData,
    checkpoint: Path,
    device: torch.device,
    *,
    images: int,
    seed: int,
) -> dict[str, float]:
    """Scores a student. Must be called in a single process.

    Args:
        scorers: Scorers by name.
        data: Data with every teacher; its workers are ended afterwards.
        checkpoint: Checkpoint file of the student.
        device: Device to compute on.
        images: Largest number of training images to fit on.
        seed: Seed for the scorers.

    Returns:
        Scores by ``scorer/key``, all finite.

    Raises:
        PluginError: If a scorer fails, or gives anything but finite numbers.
        TheiaError: If a scorer raises one.
    """
    parts = Parts(data, device, images, data.labels_agree())
    scores: dict[str, float] = {}
    try:
        for full_name, scorer in scorers.items():
            name, _, argument = full_name.partition("@")
            seed_everything(seed, verbose=False)
            # Loaded anew, so that no scorer sees what another did to its encoder.
            encoder = load(checkpoint, device=device).freeze()
            trained = Trained(
                checkpoint=checkpoint,
                encoder=encoder,
                shapes=data.teacher_shapes,
                statistics=data.statistics(),
                train=parts.of("train", name),
                held_out=parts.of("held_out", name),
                device=device,
                seed=seed,
                images=images,
                argument=argument or None,
            )
            scores |= _scores(name, scorer, trained)
    finally:
        parts.close()
    return scores


def scores_table(scorer: str, scores: Mapping[str, float], distilled: Collection[str]) -> str:
    """A table of the scores of one scorer.

    Args:
        scorer: Name of the scorer.
        scores: Scores of all scorers, by ``scorer/key``; a key is a metric, or ``metric/teacher``.
        distilled: Names of the teachers that the student was distilled from, which the table marks.

    Returns:
        A table as text.
    """
    rows: dict[str, dict[str, float]] = {}
    overall: dict[str, float] = {}
    metrics: dict[str, None] = {}
    for key, value in scores.items():
        name, _, metric = key.partition("/")
        if name != scorer:
            continue
        start, _, teacher = metric.rpartition("/")
        if start:
            metric = start
            rows.setdefault(teacher, {})[metric] = value
        else:
            overall[metric] = value
        metrics[metric] = None
    if not metrics:
        return f"{scorer}: no scores"
    shown = [(name, "yes" if name in distilled else "no", values) for name, values in rows.items()]
    by_teacher = bool(rows)
    if overall:
        shown.append(("overall", "", overall))
    cells = [
        [name, *([mark] if by_teacher else []), *(values.get(metric) for metric in metrics)]
        for name, mark, values in shown
    ]
    headers = [scorer, *(["distilled"] if by_teacher else []), *(metric.replace("_", " ") for metric in metrics)]
    return str(tabulate(cells, headers=headers, floatfmt=".3f"))


def _scores(name: str, scorer: Scorer, trained: Trained) -> dict[str, float]:
    doc = (inspect.getdoc(scorer) or "").partition("\n")[0]
    logger.info("Scorer %s: %s", name, doc or "no description")
    started = time.monotonic()
    try:
        given = dict(scorer(trained))
    except TheiaError:
        raise
    except Exception as error:
        raise PluginError(
            f"Scorer {name!r} failed: {type(error).__name__}: {error}. Leave it out of --scorers, or correct it; "
            "no report was written."
        ) from error
    logger.info("Scorer %s: %d scores in %.1f s.", name, len(given), time.monotonic() - started)
    return {f"{name}/{key}": _finite(name, key, value) for key, value in given.items()}


def _finite(name: str, key: str, value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]  # whatever a third party gives
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise PluginError(
            f"Scorer {name!r} gave {value!r} for {key!r}, which is not a finite number; no report was written. "
            "Leave it out of --scorers, or correct it."
        )
    return number


# Metric as logged -> heading.
_SHOWN = {"cosine": "cosine", "explained_variance": "explained variance"}


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Writes the report of a test as JSON, whole or not at all: the file is there only once the test is finished.

    Args:
        path: Path of the JSON file.
        report: Content of the report, as plain values.

    Raises:
        FileError: If it cannot be written, for instance on a full disk.
    """
    write_whole(path, json.dumps(report, indent=2) + "\n")


def translators_table(teachers: list[str], before: Mapping[str, float] | None, after: Mapping[str, float]) -> str:
    """A table of held-out figures per teacher.

    Args:
        teachers: Names of the teachers, one row each.
        before: Metrics of the untrained student by logged name, ``test/<metric>/<teacher>``; ``None`` leaves them out.
        after: Metrics of the trained student, by the same names.

    Returns:
        A table as text.
    """
    stages = [("before", before), ("after", after)] if before is not None else [("", after)]
    headers = ["teacher"] + [f"{heading} {stage}".strip() for heading in _SHOWN.values() for stage, _ in stages]
    rows = [
        [teacher] + [values[f"test/{metric}/{teacher}"] for metric in _SHOWN for _, values in stages]
        for teacher in teachers
    ]
    return str(tabulate(rows, headers=headers, floatfmt=".3f"))
