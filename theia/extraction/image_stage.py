"""The first stage of an extraction: images, decoded and brought to one size, into the store."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from theia.errors import ImageError
from theia.extraction.config import ExtractConfig
from theia.extraction.decode import UnreadableImageError, to_square
from theia.extraction.images import ImageSource
from theia.extraction.processes import Processes
from theia.extraction.progress import Progress
from theia.store.schema import IMAGE, ImageSet, Resize
from theia.store.writer import SplitWriter

_DECODED_TOGETHER = 16
_REASONS_SHOWN = 5


class DecodedImages(NamedTuple):
    """A few neighbours of the list.

    Attributes:
        images: uint8, shape ``(n, 3, size, size)``: the readable ones.
        listed: Their places in the list.
        skipped: Id and reason of each other one.
    """

    images: Tensor
    listed: list[int]
    skipped: list[tuple[str, str]]


class _Decoder(Dataset[DecodedImages | ImageError]):
    def __init__(self, source: ImageSource, size: int, resize: Resize) -> None:
        self._source, self._size, self._resize = source, size, resize

    def __getitem__(self, places: range) -> DecodedImages | ImageError:
        images = np.empty((len(places), 3, self._size, self._size), np.uint8)
        listed: list[int] = []
        skipped: list[tuple[str, str]] = []
        for place in places:
            try:
                images[len(listed)] = to_square(self._source.read(place), self._size, self._resize)
            except UnreadableImageError as error:
                skipped.append((self._source.ids[place], str(error)))
            except ImageError as error:
                return error  # raised in the main process: a worker's own traceback would bury the message
            else:
                listed.append(place)
        return DecodedImages(torch.from_numpy(images[: len(listed)]), listed, skipped)


def store_images(
    split: str,
    source: ImageSource,
    images: ImageSet,
    writer: SplitWriter,
    config: ExtractConfig,
    processes: Processes,
) -> None:
    """Decodes this process's missing image shards of one split.

    Raises:
        ImageError: As soon as more images are unreadable than ``max_skipped`` allows, or the file system fails.
    """
    missing = [shard for shard in processes.mine(images.shard_count) if not writer.has_shard(IMAGE, shard)]
    if not missing:
        return
    skipped_before = writer.skipped()
    pieces = {shard: _pieces(images, shard) for shard in missing}
    loader = DataLoader(
        _Decoder(source, images.size, images.resize),
        sampler=[piece for shard in missing for piece in pieces[shard]],
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=config.workers,
    )
    decoded = iter(loader)
    total = sum(images.listed_in(shard) for shard in missing)
    skipped_here: list[tuple[str, str]] = []
    with Progress(f"{split}: images", total, shown=processes.rank == 0) as progress:
        for shard in missing:
            pixels = np.empty((images.listed_in(shard), 3, images.size, images.size), np.uint8)
            listed: list[int] = []
            skipped: list[tuple[str, str]] = []
            for _ in pieces[shard]:
                part = next(decoded)
                if isinstance(part, ImageError):
                    raise part
                pixels[len(listed) : len(listed) + len(part.listed)] = part.images.numpy()
                listed += part.listed
                skipped += part.skipped
                check_skipped(split, skipped_before + skipped_here + skipped, images, config.max_skipped)
                progress.advance(len(part.listed) + len(part.skipped), part.images.numel())
            writer.write_images(
                shard,
                [source.ids[place] for place in listed],
                pixels[: len(listed)],
                None if source.labels is None else np.array([source.labels[place] for place in listed], np.int64),
                skipped,
            )
            skipped_here += skipped


def check_skipped(split: str, skipped: Sequence[tuple[str, str]], images: ImageSet, max_skipped: float) -> None:
    """Stops the work when too many images are unreadable.

    Args:
        split: Name of the split.
        skipped: Id and reason of each unreadable image so far.
        images: The list that they are from.
        max_skipped: Share of the list that may be unreadable.

    Raises:
        ImageError: If more are, or all are.
    """
    if len(skipped) <= max_skipped * images.listed and len(skipped) < images.listed:
        return
    shown = "".join(f"\n  {sample}: {reason}" for sample, reason in skipped[:_REASONS_SHOWN])
    more = f"\n  and {len(skipped) - _REASONS_SHOWN} more" if len(skipped) > _REASONS_SHOWN else ""
    allowed = f"more than --max_skipped {max_skipped} allows" if len(skipped) < images.listed else "which is all"
    raise ImageError(
        f"{len(skipped)} of the {images.listed} images of split {split!r} cannot be read, {allowed}:{shown}{more}\n"
        "Repair or remove them and give a new --store, or allow a larger share with --max_skipped."
    )


def _pieces(images: ImageSet, shard: int) -> list[range]:
    start = shard * images.shard_size
    stop = start + images.listed_in(shard)
    return [range(first, min(first + _DECODED_TOGETHER, stop)) for first in range(start, stop, _DECODED_TOGETHER)]


def _unchanged(decoded: Any) -> Any:
    return decoded
