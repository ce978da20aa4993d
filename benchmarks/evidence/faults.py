"""Planted faults: does an ingredient remove the fault that it is for, and change nothing where there is none?

The faults lie in copies of one teacher's features, ``color`` as means over 2x2 of its cells, beside them in the same
store. A row of the sweep is a copy and an ingredient; rows of one seed share images, their order and initial weights.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import theia
from theia.errors import ConfigError
from theia.store.reader import FeatureStore
from theia.types import TeacherSpec
from theia.utils.estimates import Difference, Estimate, estimate, paired_difference
from theia.utils.files import read_json, write_whole

SOURCE = "color"
SIZE = 128  # pixels of an image: a patch of the student is a cell of the planted features
CLEAN, LOUD, DOMINATED, DEAD, PATTERN, TWIN, EASY, SHUFFLED = PLANTED = (
    "clean", "loud", "dominated", "dead", "pattern", "twin", "easy", "shuffled",
)  # fmt: skip
FACTOR = 100.0  # of a loud teacher's features; of a dominating direction's variance to that of all others together
PAPER = "paper"
INGREDIENTS: dict[str, dict[str, Any]] = {
    PAPER: {},
    "PHI-S": {"model.normalizer": "phi_s"},
    "power": {"model.normalizer": "power"},
    "whitened": {"model.normalizer": "whiten"},
    "shift": {"model.shift": 0.3},
    "AdaLoss": {"model.balance": "ada"},
    "dropped teachers": {"model.teacher_dropping": 0.5},
}
FIGURES = "figures.json"
REST, SHARE, CONTENT = "rest", "share", "content"
_EXPLAINED, _COSINE = "test/explained_variance/", "test/cosine/"

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Fault:
    """A fault, what it is planted in, and what should cure it.

    Attributes:
        about: Description in a few words.
        without: Teachers of the students without the fault, the one that is scored first.
        planted: Teachers of those with it, likewise.
        figure: Held-out figure that shows it: a score of ``theia test`` that ends in ``/`` and goes on with the
            teacher's name, or one of :func:`figures`.
        ingredients: Names of the ingredients.
    """

    about: str
    without: tuple[str, ...]
    planted: tuple[str, ...]
    figure: str
    ingredients: tuple[str, ...]


FAULTS = (
    Fault("a dominating direction", (CLEAN,), (DOMINATED,), REST, ("PHI-S", "power", "whitened")),
    Fault("a pattern at fixed places", (CLEAN,), (PATTERN,), SHARE, ("shift",)),
    Fault("a pattern at fixed places", (CLEAN,), (PATTERN,), CONTENT, ("shift",)),
    Fault("an easy loud teacher", (CLEAN, TWIN), (CLEAN, EASY), _COSINE, ("AdaLoss", "dropped teachers")),
    Fault("features of other images", (CLEAN,), (SHUFFLED,), _EXPLAINED, ("whitened", "shift")),
    Fault("a dead channel", (CLEAN,), (DEAD,), _EXPLAINED, ("whitened",)),
    Fault("loud: 100 times the features", (CLEAN,), (LOUD,), _EXPLAINED, ("PHI-S",)),
)  # fmt: skip
NAMES = {
    _EXPLAINED: "explained variance", _COSINE: "cosine of the hard teacher", REST: "explained variance of the rest",
    SHARE: "share of the pattern that is predicted", CONTENT: "explained variance of the content",
}  # fmt: skip
LESS_IS_BETTER = (SHARE,)


def rows() -> dict[str, dict[str, Any]]:
    """Rows of the sweep: options of ``theia fit`` by name, each once though several faults may need it."""
    return {
        row_name(teachers, name): {"data.teachers": list(teachers), **INGREDIENTS[name]}
        for fault in FAULTS for teachers in (fault.without, fault.planted) for name in (PAPER, *fault.ingredients)
    }  # fmt: skip


def row_name(teachers: Sequence[str], ingredient: str) -> str:
    """Name of the row of some teachers and an ingredient."""
    return f"{ingredient} on {'+'.join(teachers)}"


def plant(store: Path) -> str:
    """Plants faults: writes faulty copies of the features of 'color' beside them, as teachers of their own.

    Args:
        store: Feature store with the teacher 'color'. Copies that are finished are kept.

    Returns:
        What was written.

    Raises:
        ConfigError: If the store has no such features, or has them in another form than float16.
        StoreError: If it cannot be read or written.
    """
    found = FeatureStore(store)
    spec = found.teachers("train").get(SOURCE)
    if spec is None:
        raise ConfigError(f"{store} has no features of {SOURCE!r}. Extract them: theia extract --teachers {SOURCE}")
    source = {split: coarse(read(found, split, SOURCE)[1], spec.grid_hw) for split in ("train", "val")}
    grid_hw = spec.grid_hw[0] // 2, spec.grid_hw[1] // 2
    written = []
    for name in PLANTED:
        planted = faulty(name, source)
        for split, features in planted.items():
            new = TeacherSpec(
                name=name, channels=features.shape[-1], grid_hw=grid_hw, licence=spec.licence, weights="none",
                preprocessing={**spec.preprocessing, "planted": name},
            )  # fmt: skip
            written += _write(store, split, new, features)
    return f"Planted in {store}: {', '.join(dict.fromkeys(written)) or 'nothing new'}."


def _write(store: Path, split: str, spec: TeacherSpec, features: Array) -> list[str]:
    from theia.store.writer import SplitWriter  # imports torch, which takes seconds; so does what is below

    images = FeatureStore(store).manifest.splits[split].images
    writer = SplitWriter(store, split)
    writer.begin(images, [spec], "float16", {"planted_in": SOURCE})
    first, written = 0, []
    for index in range(images.shard_count):
        count = len(writer.images(index).keys())
        if not writer.has_shard(spec.name, index):
            with writer.open_shard(spec.name, index) as shard:
                shard.append(features[first : first + count], None)
            written = [spec.name]
        first += count
    writer.finish()
    return written


def read(store: FeatureStore, split: str, teacher: str) -> tuple[NDArray[np.uint8], Array]:
    """Images ``(n, 3, H, W)`` of a split, and a teacher's features ``(n, N, C)``."""
    opened = store.open_split(split, teacher)
    if f"{teacher}/scale" in opened.fields or opened.bases:
        raise ConfigError(
            f"{store.root} has {teacher!r} in int8 or as components. Extract it into another store without --dtype and "
            "--keep_components."
        )
    buffers = opened.allocate(len(opened))
    opened.read_into(np.arange(len(opened)), buffers)
    return buffers["image"], buffers[teacher].astype(np.float64)


def coarse(features: Array, grid_hw: tuple[int, int]) -> Array:
    """Means over 2x2 tokens of features ``(n, H * W, C)`` on a grid of even height and width."""
    count, _, channels = features.shape
    blocks = features.reshape(count, grid_hw[0] // 2, 2, grid_hw[1] // 2, 2, channels)
    return np.asarray(blocks.mean((2, 4)).reshape(count, -1, channels))


def faulty(name: str, source: Mapping[str, Array]) -> dict[str, Array]:
    """Features with a fault.

    Args:
        name: One of :data:`PLANTED`.
        source: Features without one by split, shape ``(n, N, C)``; those of ``train`` say what is normal.

    Returns:
        Features by split, of the same shape but for the dead channel's, which comes last.
    """
    train = source["train"]
    mean, std = train.mean((0, 1)), train.std((0, 1))
    axis, turn = direction(len(std)), _turn(len(std))
    along = ((train - mean) / std) @ axis
    rest = len(std) - along.var()  # of normalised channels, each of variance 1
    stretch = np.sqrt(FACTOR * rest / along.var()) - 1

    def change(features: Array) -> Array:
        normal = (features - mean) / std
        match name:
            case "loud":
                return FACTOR * features
            case "dominated":
                normal = normal + stretch * (normal @ axis)[..., None] * axis
            case "dead":
                return np.concatenate([features, np.full((*features.shape[:2], 1), 3.0)], -1)
            case "pattern":
                normal = normal + pattern(*features.shape[1:])
            case "twin":
                normal = normal @ turn
            case "easy":
                normal = FACTOR * np.broadcast_to(normal.mean(1, keepdims=True), normal.shape)
            case "shuffled":
                cycle = np.random.default_rng(0).permutation(len(features))
                normal[cycle] = normal[np.roll(cycle, 1)]  # no image keeps its own
        return np.asarray(mean + std * normal)

    return {split: change(features) for split, features in source.items()}


def direction(channels: int) -> Array:
    """The direction, of normalised channels, that dominates where it is planted: a unit vector ``(C,)``."""
    drawn = np.random.default_rng(0).standard_normal(channels)
    return np.asarray(drawn / np.linalg.norm(drawn))


def pattern(tokens: int, channels: int) -> Array:
    """The pattern, in deviations of each channel: normal numbers ``(N, C)``."""
    return np.random.default_rng(1).standard_normal((tokens, channels))


def _turn(channels: int) -> Array:
    return np.linalg.qr(np.random.default_rng(2).standard_normal((channels, channels)))[0]


def measure(sweep: Path, store: Path) -> str:
    """Measures the students of planted faults where 'theia test' cannot know what is fault and what is content.

    Args:
        sweep: Folder of the sweep.
        store: Feature store with the planted faults.

    Returns:
        How many students were measured.

    Raises:
        ConfigError: If no run of the sweep is finished.
        StoreError: If the store cannot be read.
    """
    import torch

    report, opened = sweep / "report.json", FeatureStore(store)
    if not report.is_file():
        raise ConfigError(
            f"No run of {sweep} is finished. Train them: python -m benchmarks.evidence run --stages faults"
        )
    known = opened.statistics(CLEAN)
    images, clean = read(opened, "val", CLEAN)
    count = 0
    for run in read_json(report)["runs"]:
        folder = sweep / run["row"] / f"seed_{run['seed']}"
        (name, *others), path = run["teachers"], folder / "checkpoints" / "last.ckpt"
        if others or name not in (CLEAN, DOMINATED, PATTERN):
            continue
        with torch.inference_mode():
            encoder = theia.load(path)
            predicted = encoder.translate(images, denormalize=True)[name].double().numpy()
        found = figures((predicted - known.mean) / known.std, (clean - known.mean) / known.std)
        write_whole(folder / FIGURES, json.dumps(found) + "\n")
        count += 1
    return f"Measured {count} students."


def figures(predicted: Array, clean: Array) -> dict[str, float]:
    """Figures of predictions of features with or without a fault, both in deviations of the features without.

    Args:
        predicted: Predictions, shape ``(n, N, C)``.
        clean: Features without the fault, same shape.

    Returns:
        ``rest``: explained variance without the direction of :func:`direction`. ``share``: coefficient of
        :func:`pattern` in the mean error, 0 if nothing of it is predicted and 1 if all is. ``content``: explained
        variance of what differs between images at a place.
    """
    axis, planted = direction(clean.shape[-1]), pattern(*clean.shape[1:])

    def rest(values: Array) -> Array:
        return values - (values @ axis)[..., None] * axis

    return {
        REST: explained(rest(predicted), rest(clean)),
        SHARE: float(((predicted - clean).mean(0) * planted).sum() / np.square(planted).sum()),
        CONTENT: explained(predicted - predicted.mean(0), clean - clean.mean(0)),
    }


def explained(predicted: Array, target: Array) -> float:
    """Explained variance, mean over channels, of features ``(n, N, C)``; 0 for the best constant."""
    return float(np.mean(1 - (target - predicted).var((0, 1)) / target.var((0, 1))))


@dataclass(frozen=True)
class Cure:
    """What an ingredient does to a fault. Differences are paired by seed, and more is better in all of them.

    Attributes:
        fault: Description of the fault.
        ingredient: Name of the ingredient.
        figure: Name of the figure.
        values: Means by ``paper`` or ``ingredient``, and by ``without`` or ``with`` the fault.
        damage: What the fault costs the paper's recipe, above 0 if it does harm.
        gain_without: Gain by the ingredient without the fault.
        gain: Gain by the ingredient with the fault.
        verdict: The gain in words.
    """

    fault: str
    ingredient: str
    figure: str
    values: Mapping[str, Mapping[str, Estimate]]
    damage: Difference
    gain_without: Difference
    gain: Difference
    verdict: str


def cures(sweep: Path) -> list[Cure]:
    """What the finished runs say; a fault and an ingredient of which a row is not finished are left out.

    Args:
        sweep: Folder of the sweep.
    """
    path = sweep / "report.json"
    scores: dict[str, dict[int, dict[str, float]]] = {}
    for run in read_json(path)["runs"] if path.is_file() else []:
        own = sweep / run["row"] / f"seed_{run['seed']}" / FIGURES
        scores.setdefault(run["row"], {})[run["seed"]] = run["scores"] | (read_json(own) if own.is_file() else {})
    return [
        cure for fault in FAULTS for name in fault.ingredients if (cure := _cure(fault, name, scores)) is not None
    ]  # fmt: skip


def _cure(
    fault: Fault, ingredient: str, scores: Mapping[str, Mapping[int, Mapping[str, float]]]
) -> Cure | None:  # fmt: skip
    def of(teachers: Sequence[str], name: str) -> dict[int | None, float]:
        figure = fault.figure + (teachers[0] if fault.figure.endswith("/") else "")
        of_seeds = scores.get(row_name(teachers, name), {})
        return {seed: values[figure] for seed, values in of_seeds.items() if figure in values}

    values = {
        who: {"without": of(fault.without, name), "with": of(fault.planted, name)}
        for who, name in ((PAPER, PAPER), ("ingredient", ingredient))
    }
    paper, ours = values.values()
    damage = _better(fault, paper["without"], paper["with"])
    before, gain = (_better(fault, ours[when], paper[when]) for when in ("without", "with"))
    if damage is None or before is None or gain is None:
        return None
    means = {who: {when: estimate(list(found.values())) for when, found in of.items()} for who, of in values.items()}
    return Cure(fault.about, ingredient, NAMES[fault.figure], means, damage, before, gain, verdict(gain, damage))


def _better(fault: Fault, ours: Mapping[int | None, float], theirs: Mapping[int | None, float]) -> Difference | None:
    return paired_difference(*((theirs, ours) if fault.figure in LESS_IS_BETTER else (ours, theirs)))


def verdict(gain: Estimate, damage: Estimate) -> str:
    """A gain in words, by its 95 % interval.

    Args:
        gain: Gain by an ingredient where the fault is.
        damage: Loss by the fault.

    Returns:
        ``"worse"`` or ``"no difference"`` if the interval is below 0 or holds it. ``"removes it"`` if the fault does
        harm, and the interval reaches all of the mean damage and is above half of it; else ``"helps"``.
    """
    if gain.low is None or gain.high is None or damage.low is None:
        return "one seed"
    if gain.high < 0:
        return "worse"
    if gain.low <= 0:
        return "no difference"
    if damage.low > 0 and gain.low >= damage.mean / 2 and gain.high >= damage.mean:
        return "removes it"
    return "helps"
