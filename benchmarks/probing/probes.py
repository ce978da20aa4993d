"""All probes of one encoder."""

from collections.abc import Sequence

import torch

from benchmarks.probing.data import IMAGE_SIZE, DenseData, Task
from benchmarks.probing.features import Features, pooled_features, token_features
from benchmarks.probing.heads import Fit, apply_head, fit_head
from benchmarks.probing.labelled import Labelled
from benchmarks.probing.linear import Schedule, train_probe
from benchmarks.probing.matching import correspondence
from benchmarks.probing.nearest import nearest_classes
from benchmarks.probing.storage import Storage
from benchmarks.probing.tasks import DepthTask, HeadTask, NormalTask, SegmentationTask
from theia.encoder.named import NamedEncoder

Figures = dict[str, list[float]]

_CHUNK = 4096  # vectors


def probe_classes(
    encoder: NamedEncoder,
    training: Labelled,
    testing: Labelled,
    neighbours: int,
    schedule: Schedule,
    seeds: Sequence[int],
    device: str,
    storage: Storage,
) -> Figures:
    """Nearest neighbours and a linear probe on mean-pooled patch tokens.

    Args:
        encoder: Frozen.
        training: Images to learn from.
        testing: Images to be told.
        neighbours: That vote.
        schedule: Of the linear probe.
        seeds: One linear probe each.
        device: Of the probes.
        storage: For the vectors.

    Returns:
        ``classification/knn`` and ``classification/linear``, shares of held-out images that are told right.
    """
    train = pooled_features(encoder, training.batches(), len(training), storage, "training images")
    test = pooled_features(encoder, testing.batches(), len(testing), storage, "held-out images")
    truth = torch.from_numpy(testing.labels)
    labels = torch.from_numpy(training.labels).to(device)
    nearest = nearest_classes(
        torch.from_numpy(train).to(device), labels, torch.from_numpy(test).to(device), neighbours
    ).cpu()
    linear = []
    for seed in seeds:
        what = f"{encoder.name}: linear probe, seed {seed}"
        probe = train_probe(train, training.labels, len(training.classes), schedule, seed, device, what)
        with torch.no_grad():
            parts = torch.from_numpy(test).split(_CHUNK)  # type: ignore[no-untyped-call]
            told = torch.cat([probe(part.to(device)).argmax(1).cpu() for part in parts])
        linear.append(float((told == truth).float().mean()))
    return {"classification/knn": [float((nearest == truth).float().mean())], "classification/linear": linear}


def probe_pixels(
    encoder: NamedEncoder,
    data: DenseData,
    tasks: Sequence[Task],
    fit: Fit,
    seeds: Sequence[int],
    device: str,
    storage: Storage,
) -> Figures:
    """Linear heads on patch tokens, and matches between views.

    Args:
        encoder: Frozen.
        data: With what the tasks need.
        tasks: Which.
        fit: Of the heads.
        seeds: One head each; matches have none.
        device: Of the heads.
        storage: For the tokens.

    Returns:
        By ``task/figure``.
    """
    val = token_features(encoder, data.val.images, storage, "val images")
    found: Figures = {}
    heads = [task for task in tasks if task != "correspondence"]
    if heads:
        train = token_features(encoder, data.train.images, storage, "train images")
        for task in heads:
            for seed in seeds:
                what = f"{encoder.name}: {task}, seed {seed}"
                for name, value in _probe(task, train, val, data, fit, seed, device, what).items():
                    found.setdefault(f"{task}/{name}", []).append(value)
    if "correspondence" in tasks and data.val.depth is not None and data.val.cameras is not None:
        matches = correspondence(val, data.val.depth, data.val.cameras, data.val.pairs, device)
        found |= {f"correspondence/{name}": [value] for name, value in matches.items()}
    return found


def _task(name: Task, data: DenseData) -> tuple[HeadTask, str]:
    """The task, and the attribute of a split that holds its truth."""
    if name == "depth":
        return DepthTask(), "depth"
    if name == "normals":
        return NormalTask(), "normals"
    return SegmentationTask(len(data.classes)), "labels"


def _probe(
    name: Task, train: Features, val: Features, data: DenseData, fit: Fit, seed: int, device: str, what: str
) -> dict[str, float]:
    task, truth = _task(name, data)
    head = fit_head(train, getattr(data.train, truth), task.channels, task.loss, fit, seed, device, what)
    targets = getattr(data.val, truth)
    batches = [
        task.measure(maps, torch.from_numpy(targets[part]).to(device))
        for part, maps in apply_head(head, val, IMAGE_SIZE, fit.batch_size)
    ]
    return task.summarise(batches)
