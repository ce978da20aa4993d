"""All probes of one encoder."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from theia.analysis.classifiers import logistic_classes, nearest_classes
from theia.encoder.from_name import NamedEncoder
from theia.probing.datasets import IMAGE_SIZE, DenseData, DenseSplit, Storage, Task
from theia.probing.embedding import pooled_features, token_features
from theia.probing.heads import Fit, HeadTask, apply_head, fit_head, head_task, whitening
from theia.probing.labelled import Labelled
from theia.probing.linear_probe import Schedule, train_probe
from theia.probing.matching import correspondence


@dataclass(frozen=True)
class Probed:
    """What was found of one encoder.

    Attributes:
        figures: One value per seed, or a single one where seeds play no part, by ``task/figure``.
        maps: Predictions for a few pictures of val, by task, shape ``(k, ..., S, S)``.
    """

    figures: dict[str, list[float]]
    maps: dict[str, NDArray[Any]]


def probe_classes(
    encoder: NamedEncoder,
    training: Labelled,
    testing: Labelled,
    neighbours: int,
    schedule: Schedule | None,
    seeds: Sequence[int],
    device: torch.device,
    storage: Storage,
) -> Probed:
    """Nearest neighbours and a linear probe on mean-pooled patch tokens.

    Args:
        encoder: The frozen encoder.
        training: Images to fit on.
        testing: Held-out images.
        neighbours: Number of neighbours that vote.
        schedule: How MAE's linear probe is trained; ``None`` takes logistic regression instead.
        seeds: One of MAE's linear probes is trained with each seed; logistic regression needs none.
        device: Device that the probes run on.
        storage: Storage for the vectors.

    Returns:
        Figures ``classification/knn`` and ``classification/linear``: shares of held-out images classified correctly.
    """
    train = pooled_features(encoder, training.batches(), len(training), storage, "training images")
    test = pooled_features(encoder, testing.batches(), len(testing), storage, "held-out images")
    truth = torch.from_numpy(testing.labels)
    labels = torch.from_numpy(training.labels).to(device)
    nearest = nearest_classes(
        torch.from_numpy(train).to(device), labels, torch.from_numpy(test).to(device), neighbours
    ).cpu()
    if schedule is None:
        answers = [logistic_classes(train, training.labels, test)]
    else:
        answers = [
            train_probe(
                train, training.labels, len(training.classes), schedule, seed, device,
                f"{encoder.name}: linear probe, seed {seed}",
            ).classify(test)
            for seed in seeds
        ]  # fmt: skip
    knn = [float((nearest == truth).float().mean())]
    linear = [float((found == testing.labels).mean()) for found in answers]
    return Probed({"classification/knn": knn, "classification/linear": linear}, {})


def probe_nothing(training: Labelled, testing: Labelled) -> Probed:
    """What can be told without an encoder, by always predicting the most frequent class of the training images."""
    usual = np.bincount(training.labels).argmax()
    share = [float((testing.labels == usual).mean())]
    return Probed({"classification/knn": share, "classification/linear": share}, {})


def probe_pixels(
    encoder: NamedEncoder,
    data: DenseData,
    tasks: Sequence[Task],
    fit: Fit,
    seeds: Sequence[int],
    device: torch.device,
    storage: Storage,
) -> Probed:
    """Linear heads on patch tokens, and matches between views.

    Args:
        encoder: The frozen encoder.
        data: Pictures, with the maps that the tasks need.
        tasks: Tasks to probe.
        fit: How the heads are fitted.
        seeds: One head is fitted with each seed; correspondence has no head.
        device: Device that the heads run on.
        storage: Storage for the tokens.

    Returns:
        Figures by ``task/figure``, and the maps that the first seed's heads predict for the pictures in :func:`shown`.
    """
    val = token_features(encoder, data.val.images, storage, "val images")
    found = Probed({}, {})
    heads = [task for task in tasks if task != "correspondence"]
    if heads:
        train = token_features(encoder, data.train.images, storage, "train images")
        white = whitening(train.tokens)
        for name in heads:
            task = head_task(name, data)
            for seed in seeds:
                what = f"{encoder.name}: {name}, seed {seed}"
                head = fit_head(
                    train, white, task.targets(data.train), task.channels, task.loss, fit, seed, device, what
                )
                predictions = (
                    (part, task.predict(maps, IMAGE_SIZE))
                    for part, maps in apply_head(head, val, IMAGE_SIZE, fit.batch_size)
                )
                _judge(name, task, data.val, predictions, found)
    if "correspondence" in tasks and data.val.depth is not None and data.val.cameras is not None:
        matches = correspondence(val, data.val.depth, data.val.cameras, data.val.pairs, device)
        found.figures.update({f"correspondence/{name}": [value] for name, value in matches.items()})
    return found


def probe_places(data: DenseData, tasks: Sequence[Task]) -> Probed:
    """What can be told without an encoder, by predicting what is usual at each place in the training pictures.

    A head whose figures are no better than these has learned nothing but where a token lies.

    Args:
        data: Pictures, with the maps that the tasks need.
        tasks: Tasks to probe; correspondence is left out.
    """
    found = Probed({}, {})
    for name in tasks:
        if name != "correspondence":
            task = head_task(name, data)
            usual = task.usual(task.targets(data.train))[None]
            parts = (slice(place, place + 1) for place in range(len(data.val.images)))
            _judge(name, task, data.val, ((part, usual) for part in parts), found)
    return found


def shown(count: int) -> list[int]:
    """Which of ``count`` pictures are drawn: two that lie far apart."""
    return [0, count // 2] if count > 1 else [0]


def _judge(
    name: Task, task: HeadTask, split: DenseSplit, predictions: Iterable[tuple[slice, Tensor]], found: Probed
) -> None:
    """Adds figures, and the pictures that are shown if there are none yet."""
    targets, places = task.targets(split), shown(len(split.images))
    batches, drawn = [], []
    for part, prediction in predictions:
        batches.append(task.measure(prediction, torch.from_numpy(targets[part]).to(prediction.device)))
        drawn += [prediction[place - part.start].cpu().numpy() for place in places if part.start <= place < part.stop]
    for figure, value in task.summarise(batches).items():
        found.figures.setdefault(f"{name}/{figure}", []).append(value)
    found.maps.setdefault(name, np.stack(drawn))
