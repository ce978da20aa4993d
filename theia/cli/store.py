"""``theia store``: lists the content of a feature store, checks that it is whole, measures it, and copies it."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate
from tqdm import tqdm

from theia.store.verify import Problem, SetSummary, describe
from theia.store.verify import verify as verify_store
from theia.types import Json
from theia.utils.arguments import MOST_PROCESSES, check_number, comma_list
from theia.utils.device import Device, choose_device
from theia.utils.files import check_folder
from theia.utils.progress import Progress, readable_bytes

if TYPE_CHECKING:
    from theia.store.transfer import Transferred

_SHARES = (0.9, 0.99, 0.999)  # of the variance


def info(path: Path) -> int:
    """Show what is in a feature store, and which of its files are missing or cut short.

    Args:
        path: Folder of the store.
    """
    headers = ("set", "samples", "shards", "size", "grid x channels", "CLS", "stored as", "weights", "licence", "state")
    for split in describe(path):
        images = split.images
        lines = [
            f"{split.name}: {images.listed} images, {images.size}x{images.size} pixels ({images.resize})",
            f"  from {_origin(images.source)}",
        ]
        if images.classes is not None:
            lines.append(f"  {len(images.classes)} classes")
        if split.skipped:
            lines.append(f"  {split.skipped} could not be read: {path / split.name / 'skipped.csv'}")
        rows = [_row(part, images.size, images.shard_count) for part in split.sets]
        # A revision may be a long digest.
        widths = [None] * 7 + [36, 36, None]
        problems = [f"{problem.path} {problem.text}" for part in split.sets for problem in part.problems]
        print("\n".join([*lines, tabulate(rows, headers, maxcolwidths=widths), *problems, ""]))
    return 0


def verify(path: Path) -> int:
    """Read every byte of a feature store and compare it with its checksums.

    Args:
        path: Folder of the store.

    Returns:
        Exit status: 1 if there is any problem.
    """
    files = problems = 0
    total = sum(part.bytes for split in describe(path) for part in split.sets)
    # Shown on a terminal only, which tqdm calls `disable=None`.
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
        for event in verify_store(path):
            if isinstance(event, Problem):
                problems += 1
                bar.write(f"{event.path}: {event.text}")
            else:
                files += 1
                bar.update(event.bytes)
    found = f"problems: {problems}" if problems else "all whole"
    print(f"{path}: {files} shards, {readable_bytes(total)}, {found}.")
    return 1 if problems else 0


def statistics(path: Path, teachers: str | None = None, images: int | None = None, device: Device = "auto") -> int:
    """Measure the covariances of each teacher's channels, and say how many principal components hold its variance.

    They are written to the folder statistics of the store. The same command goes on after an interruption.

    Args:
        path: Folder of the store.
        teachers: Teachers to measure, separated by commas; by default all of the training split.
        images: Number of images, spread evenly over the training split; by default all.
        device: Device that multiplies; auto takes a GPU if there is one.
    """
    check_number("images", images, 2)
    # Listing a store needs no torch.
    from theia.store import second_moments
    from theia.store.reader import FeatureStore
    from theia.store.schema import TRAIN

    store = FeatureStore(path)
    names = comma_list(teachers) or list(store.teachers(TRAIN))
    place = choose_device(device)
    counts = {name: second_moments.count(store, name, images) for name in names}
    rows = []
    for name in names:
        with Progress(name, counts[name]) as progress:
            found = second_moments.measure(store, name, images, place, progress.advance)
        deviations = found.covariance.diagonal() ** 0.5
        spread = f"{deviations.min():.3g} to {deviations.max():.3g}"
        parts = [found.components_for(share) for share in _SHARES]
        rows.append((name, len(found.mean), found.images, found.tokens, spread, *parts))
    headers = ("teacher", "channels", "images", "tokens", "deviations", *(f"for {share:.1%}" for share in _SHARES))
    print(tabulate(rows, headers))
    print("\nThe last columns: number of principal components that hold that share of the variance.")
    return 0


def push(path: Path, to: str, workers: int = 8) -> int:
    """Copy a whole feature store to another place: an object store, another machine, a disk.

    The same command goes on after an interruption.

    Args:
        path: Folder of the store.
        to: Place that fsspec opens, such as s3://bucket/stores/imagenet, gs://..., hf://datasets/OWNER/NAME,
            sftp://host/folder; each kind needs its package, such as s3fs.
        workers: Number of files that are copied at once.
    """
    check_number("workers", workers, 1, MOST_PROCESSES)
    # Listing a store does not need what opens other places.
    from theia.store import transfer

    print(_copied(transfer.push(path, to, workers), to))
    return 0


def pull(source: str, path: Path, teachers: str | None = None, splits: str | None = None, workers: int = 8) -> int:
    """Copy a feature store, or some of its teachers, from another place, and compare every shard with its checksum.

    The same command goes on after an interruption.

    Args:
        source: Place that 'theia store push' wrote.
        path: Folder of the store here: a new one, or one that holds other teachers of the same images.
        teachers: Teachers to copy, separated by commas; by default all.
        splits: Splits to copy, separated by commas; by default all.
        workers: Number of files that are copied at once.
    """
    check_number("workers", workers, 1, MOST_PROCESSES)
    check_folder(path, "path")
    from theia.store import transfer

    done = transfer.pull(source, path, comma_list(teachers) or None, comma_list(splits) or None, workers)
    print(_copied(done, str(path)))
    return 0


def _copied(done: "Transferred", to: str) -> str:
    there = f"; {done.files - done.copied} were there" if done.files > done.copied else ""
    return (
        f"{to}: {done.copied} of {done.files} files copied, {readable_bytes(done.bytes)}{there}. All checksums agree."
    )


def _stored_as(part: SetSummary) -> str:
    kept = "" if part.components is None else f", {part.components} components"
    return f"{part.dtype or ''}{kept}"


def _origin(source: Mapping[str, Json]) -> str:
    """The record of an image source in words."""
    facts = {name: _words(value) for name, value in source.items()}
    kind = facts.pop("kind", "unknown")
    return f"{kind} ({'; '.join(f'{name}: {words}' for name, words in facts.items())})" if facts else kind


def _words(value: Json) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _row(part: SetSummary, size: int, shards: int) -> tuple[str, ...]:
    spec = part.spec
    state = "damaged" if part.problems else "complete" if part.complete else "unfinished"
    there = (part.name, str(part.rows), f"{part.shards} of {shards}", readable_bytes(part.bytes))
    if spec is None:
        return (*there, f"{size}x{size} x 3", "", "uint8", "", "", state)
    weights = spec.weights if spec.revision is None else f"{spec.weights} ({spec.revision})"
    shape = f"{spec.grid_hw[0]}x{spec.grid_hw[1]} x {spec.channels}"
    return (*there, shape, "yes" if spec.has_cls else "no", _stored_as(part), weights, spec.licence, state)
