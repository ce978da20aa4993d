"""An analysis as a whole: what was measured, of which encoders and images, and what goes with which score."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from theia.analysis.measure import EncoderFigures, Measured
from theia.analysis.norms import CONFIDENCE, OUTLIER_FACTOR, REPLICATES
from theia.analysis.scores import DISTILLED, REGULAR, PearsonR, Score, correlations
from theia.analysis.similarity import MIN_IMAGES, MINIBATCH, noise
from theia.training.metrics import NORM_BINS, NORM_RANGE
from theia.utils.files import jsonable
from theia.utils.pictures import short_labels

SCHEMA = 1
NORM_ENTROPY = "norm entropy"
_FEW = 0.01  # of tokens
_FEW_BINS = 5
_FEW_IMAGES = 50  # for CKA
_SHOWN = 5e-4  # what is less does not show in the report


@dataclass(frozen=True)
class Analysis:
    """Everything that a report says.

    Attributes:
        measured: Figures.
        labels: Short name of each encoder.
        groups: Group of each encoder: ``"distilled"``, ``"regular"`` or one that the user gave.
        scores: Scores that the user gave, by encoder.
        correlations: Correlations of figures with scores.
        skipped: Id of each unreadable image and why.
        provenance: What was run, as plain values.
    """

    measured: Measured
    labels: Mapping[str, str]
    groups: Mapping[str, str]
    scores: Mapping[str, float]
    correlations: Sequence[PearsonR]
    skipped: Sequence[tuple[str, str]]
    provenance: Mapping[str, Any]

    @property
    def notes(self) -> list[str]:
        """What a reader must know of these figures."""
        return _notes(self)


def assemble(
    measured: Measured,
    distilled: Mapping[str, bool],
    scores: Mapping[str, Score],
    skipped: Sequence[tuple[str, str]],
    provenance: Mapping[str, Any],
) -> Analysis:
    """Puts an analysis together.

    Args:
        measured: Figures.
        distilled: Whether each encoder is a trained Theia model.
        scores: Scores that the user gave, by encoder.
        skipped: Id of each unreadable image and why.
        provenance: What was run, as plain values.
    """
    groups = {name: DISTILLED if ours else REGULAR for name, ours in distilled.items()}
    groups |= {name: score.group for name, score in scores.items() if score.group is not None}
    values = {name: score.value for name, score in scores.items()}
    found = correlations(scalars(measured.encoders), values, groups) if values else []
    return Analysis(measured, short_labels([*distilled]), groups, values, found, skipped, provenance)


def scalars(figures: Mapping[str, EncoderFigures]) -> dict[str, dict[str, float | None]]:
    """The figures that are one number per encoder, by name and encoder."""
    return {
        NORM_ENTROPY: {name: one.entropy.value for name, one in figures.items()},
        "norm entropy, relative": {name: one.relative.entropy for name, one in figures.items()},
        "outlier share": {name: one.relative.outliers for name, one in figures.items()},
        "PCA area": {name: one.spectrum.area for name, one in figures.items()},
        "cosine to the mean token": {name: one.similarity.mean for name, one in figures.items()},
    }


def as_json(analysis: Analysis) -> dict[str, Any]:
    """Everything but pictures as plain values without NaN; what is not defined is ``None``."""
    measured = analysis.measured
    encoders = [
        {
            "encoder": name,
            "label": analysis.labels[name],
            "group": analysis.groups[name],
            "score": analysis.scores.get(name),
            **_figures(one),
        }
        for name, one in measured.encoders.items()
    ]
    content = {
        "theia_analysis": SCHEMA,
        "provenance": analysis.provenance,
        "images": {"analysed": measured.images, "skipped": [list(one) for one in analysis.skipped]},
        "settings": {
            "norm_bins": NORM_BINS,
            "norm_range": [0, NORM_RANGE],
            "norm_unit": "sqrt(width)",
            "bootstrap_replicates": REPLICATES,
            "confidence": CONFIDENCE,
            "outlier_factor": OUTLIER_FACTOR,
            "cka_minibatch": MINIBATCH,
        },
        "encoders": encoders,
        "cka": {"encoders": [*measured.encoders], "matrix": measured.cka},
        "correlations": [vars(one) for one in analysis.correlations],
        "notes": analysis.notes,
    }
    plain: dict[str, Any] = jsonable(content)
    return plain


def _figures(one: EncoderFigures) -> dict[str, Any]:
    ratio = one.spectrum.ratio
    return {
        "width": one.width,
        "grid": list(one.grid),
        "norm_entropy": {
            "value": one.entropy.value, "low": one.entropy.low, "high": one.entropy.high,
            "by_bins": one.entropy.by_bins, "beyond": one.entropy.beyond, "counts": one.entropy.counts.tolist(),
        },
        "relative_norms": {
            "median": one.relative.median, "entropy": one.relative.entropy, "outliers": one.relative.outliers,
            "counts": None if one.relative.counts is None else one.relative.counts.tolist(),
        },
        "pca": {
            "area": one.spectrum.area, "for_90": one.spectrum.for_90, "for_99": one.spectrum.for_99,
            "explained_variance_ratio": None if ratio is None else ratio.tolist(),
        },
        "similarity": {
            "mean": one.similarity.mean, "std": one.similarity.std,
            "without_direction": one.similarity.without_direction, "counts": one.similarity.counts.tolist(),
        },
    }  # fmt: skip


def _notes(analysis: Analysis) -> list[str]:
    measured, labels = analysis.measured, analysis.labels
    notes = []
    if measured.images == 1:
        notes.append("One image only: there is no spread over images, so intervals and standard deviations are absent.")
    if measured.images < MIN_IMAGES:
        notes.append(f"CKA is not defined for fewer than {MIN_IMAGES} images.")
    elif measured.images < _FEW_IMAGES and len(measured.encoders) > 1:
        notes.append(
            f"With {measured.images} images, CKA of unrelated encoders scatters about 0 with a standard deviation of "
            f"{noise(measured.images):.2f}: differences of that size say nothing. Take {_FEW_IMAGES} images or more."
        )
    for place, (name, one) in enumerate(measured.encoders.items()):
        label, tokens = labels[name], measured.images * one.grid[0] * one.grid[1]
        if one.relative.entropy is None and one.similarity.without_direction == tokens:
            notes.append(f"{label}: all tokens are 0, so its figures say nothing. Its weights may be broken.")
            continue
        if one.entropy.beyond >= _FEW:
            notes.append(
                f"{label}: {one.entropy.beyond:.0%} of norms lie beyond the range and share its last bin, so its norm "
                "entropy is too low; compare the relative one."
            )
        if one.entropy.beyond < _FEW:
            same, bins = one.entropy.counts.max() / one.entropy.counts.sum(), math.exp(one.entropy.value)
            if same > 1 - _FEW:
                why = (
                    "of tokens that are 0"
                    if one.relative.entropy is None
                    else "as features do that are normalised in the end"
                )
                notes.append(
                    f"{label}: {same:.1%} of norms lie in one bin, {why}; norm entropy and norm maps say "
                    "little about it."
                )
            elif bins < _FEW_BINS:
                notes.append(
                    f"{label}: norms spread over {bins:.1f} bins only, so that its norm entropy depends on where bins "
                    "begin; compare it with more bins."
                )
        if one.relative.entropy is None:
            notes.append(f"{label}: the median norm is 0, so there are no norms relative to it.")
        if one.spectrum.ratio is None:
            notes.append(f"{label}: all tokens are the same but for rounding; there are no principal components.")
        elif tokens <= one.width:
            notes.append(
                f"{label}: {tokens} tokens have at most {tokens - 1} principal components of {one.width}; its PCA area "
                "is too high. Take more images."
            )
        if one.similarity.without_direction:
            share = one.similarity.without_direction / tokens
            notes.append(f"{label}: {share:.1%} of tokens are 0 and have no cosine to the mean token.")
        if measured.images >= MIN_IMAGES and measured.cka[place][place] is None:
            notes.append(f"{label}: every image gives the same mean token, so CKA is not defined.")
    resolved = {name: one for name, one in measured.encoders.items() if one.entropy.beyond < _FEW}
    swaps = [
        f"{labels[a]} and {labels[b]}" for a, b in combinations(resolved, 2) if _change_places(resolved[a], resolved[b])
    ]
    if swaps:
        notes.append(f"Norm entropy ranks these one way or the other, as the number of bins is: {'; '.join(swaps)}.")
    without = [labels[name] for name in measured.encoders if name not in analysis.scores]
    if analysis.scores and without:
        notes.append(f"Without a score, and left out of the correlations: {', '.join(without)}.")
    return notes


def _change_places(a: EncoderFigures, b: EncoderFigures) -> bool:
    """Whether the encoder with the higher norm entropy is not the same with every number of bins."""
    differences = [a.entropy.by_bins[bins] - b.entropy.by_bins[bins] for bins in a.entropy.by_bins]
    return min(differences) < -_SHOWN and max(differences) > _SHOWN
