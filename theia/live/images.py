"""Images by row number: which sources can give them, which of them cannot be decoded, and what is seen of each."""

import hashlib
import json
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from theia.data.loader import LARGE
from theia.data.sampler import Rows
from theia.errors import ImageError
from theia.extraction.images import UnreadableImageError
from theia.extraction.joined import ChosenSource
from theia.extraction.sources import ImageSource
from theia.extraction.stages import end_quietly
from theia.extraction.views import Augmentation
from theia.store.components import Basis
from theia.store.schema import IMAGE, Field, Resize, hash_ids
from theia.types import Json
from theia.utils.files import read_json, write_whole
from theia.utils.progress import Progress

logger = logging.getLogger(__name__)

# Kinds of sources that find any image as quickly as the next one.
_RANDOM_ACCESS = {"folder", "tar", "sample", "hf"}
_CHECKED_TOGETHER = 64  # number of images
_SECONDS_BETWEEN_RECORDS = 5.0
_MOST_UNREADABLE = 0.01  # as a share of all images, like theia extract --max_skipped
_REASONS_SHOWN = 5
_SAMPLED = 64  # images whose pixels tell one set from another


def check_random_access(description: Mapping[str, Json], place: object) -> None:
    """Refuses a source that must be read in order.

    Args:
        description: Description of the source.
        place: Place of the images, for the message.

    Raises:
        ImageError: If a part of the source is of such a kind.
    """
    parts = description.get("parts")
    for part in parts if isinstance(parts, list) else [description]:
        kind = part.get("kind") if isinstance(part, dict) else None
        if kind not in _RANDOM_ACCESS:
            way = (
                "give it as hf:FOLDER, of which the package datasets makes a copy that finds any image at once"
                if kind == "parquet"
                else "unpack the images into a folder or into tar files"
            )
            raise ImageError(
                f"Images of {place} cannot be decoded during training: of {kind} data, a single image costs as much as "
                "its neighbours together, and training wants them in random order. Make a feature store with 'theia "
                f"extract', or {way}."
            )


class LiveImages:
    """Images of a source as samples for a loader. See :class:`theia.data.ring.Samples`.

    Args:
        source: Source of the images.
        place: Place of the images, for messages.
        size: Height and width of the decoded images, in pixels.
        resize: Way to bring an image to that size.
        augmentation: Random views; none by default.
        record: File in which an earlier check of the images is recorded, if there was one.
        largest: Height and width of the same views for the student, in pixels, if it sees larger ones.
    """

    def __init__(
        self,
        source: ImageSource,
        place: object,
        size: int,
        resize: Resize,
        augmentation: Augmentation | None = None,
        record: Path = Path(),
        largest: int = 0,
    ) -> None:
        self._record = record
        self._sizes = {IMAGE: size, LARGE: largest} if largest > size else {IMAGE: size}
        self.fields = {name: Field(np.dtype("u1"), (3, side, side)) for name, side in self._sizes.items()}
        self.teachers: Collection[str] = ()
        self.bases: Mapping[str, Basis] = {}
        self.labels = None if source.labels is None else np.array(source.labels, np.int64)
        self.folder = place
        self._source, self._resize = source, resize
        self._augmentation = augmentation or Augmentation()

    def read(self, rows: Rows, arrays: Mapping[str, NDArray[Any]], epoch: int) -> None:
        """Decodes images into a slot.

        Args:
            rows: Row numbers of the images.
            arrays: The slot's arrays by field name.
            epoch: Number of the epoch.

        Raises:
            ImageError: If an image cannot be decoded. The message names it and says how to go on.
        """
        for place, row in enumerate(rows.tolist()):
            try:
                image = self._source.read(row)
            except UnreadableImageError as error:
                anew = f"delete {self._record}" if self._record.exists() else "let data.check_images be true"
                raise ImageError(
                    f"Image {self._source.ids[row]!r} of {self.folder} cannot be read: {error}. It was drawn for "
                    "training, and none takes its place. Repair it and go on from the last checkpoint with --ckpt_path "
                    f"last; or {anew} and start a new run, which checks all images and leaves out those that cannot be "
                    "decoded."
                ) from error
            for name, side in self._sizes.items():
                arrays[name][place] = self._augmentation.view(image, side, self._resize, epoch, row)


class ReadableImages:
    """The images of a list that can be decoded. Which they are is known once a check has finished.

    Args:
        listed: All images.
        place: Place of the images, for messages.
        record: File in which the check records its result.
        check: Whether to check them; otherwise all count as readable.

    Attributes:
        listed: All images.
        record: The record of the check.
    """

    def __init__(self, listed: ImageSource, place: object, record: Path, check: bool) -> None:
        self.listed, self.record = listed, record
        self._place = place
        self._source = None if check else listed

    @property
    def source(self) -> ImageSource:
        """Those that can be decoded; all if that is not known yet."""
        if self._source is None:
            rows = readable_rows(self.record, len(self.listed.ids))
            if rows is None:
                return self.listed
            all_good = len(rows) == len(self.listed.ids)
            self._source = self.listed if all_good else ChosenSource(self.listed, rows)
        return self._source

    @property
    def known(self) -> bool:
        """Whether it is known which images can be decoded."""
        return self.source is self._source

    @property
    def unreadable(self) -> dict[int, str]:
        """Reason for each image that cannot be decoded, by its place in the list."""
        return {} if self.source is self.listed else dict(read_json(self.record)["unreadable"])

    def check(self, workers: int) -> None:
        """Decodes every image once if that was not done before, and says how many are left out.

        Args:
            workers: Number of decoding processes.

        Raises:
            ImageError: If too many images cannot be decoded.
        """
        if not self.known:
            check_images(self.listed, self._place, self.record, workers)
        left_out = len(self.listed.ids) - len(self.source.ids)
        if left_out:
            logger.warning(
                "%d of %d images of %s cannot be decoded and are left out. Reasons: %s",
                left_out, len(self.listed.ids), self._place, self.record,
            )  # fmt: skip


class _Check(Dataset[list[tuple[int, str]] | ImageError]):
    def __init__(self, source: ImageSource) -> None:
        self._source = source

    def __getitem__(self, places: range) -> list[tuple[int, str]] | ImageError:
        unreadable = []
        for place in places:
            try:
                self._source.read(place)
            except UnreadableImageError as error:
                unreadable.append((place, str(error)))
            except ImageError as error:
                return error  # raised in the main process: a worker's own traceback would bury the message
        return unreadable


def pixels_sha256(source: ImageSource) -> str:
    """A digest of the pixels of up to 64 images that are spread evenly over a source.

    Names alone would not tell a set of images from another with running numbers, or one whose images were made anew.

    Args:
        source: The images.

    Raises:
        ImageError: If the place of the images cannot be read.
    """
    digest = hashlib.sha256()
    for place in np.unique(np.linspace(0, len(source.ids) - 1, _SAMPLED).astype(int)).tolist():
        try:
            digest.update(source.read(place).tobytes())
        except UnreadableImageError:
            digest.update(b"unreadable")
    return digest.hexdigest()


def images_facts(source: ImageSource) -> dict[str, Any]:
    """What the list of a source says, as plain values."""
    return {"source": source.description, "ids": hash_ids(source.ids), "labels": source.labels is not None}


def readable_rows(record: Path, count: int) -> list[int] | None:
    """Places of the images that can be decoded, as a finished check has recorded them.

    Args:
        record: File that :func:`check_images` wrote.
        count: Number of images in the source.

    Returns:
        Sorted places in the source; ``None`` if the check has not finished.
    """
    found = read_json(record)
    if found.get("checked") != count:
        return None
    unreadable = {place for place, _ in found["unreadable"]}
    return [place for place in range(count) if place not in unreadable]


def check_images(source: ImageSource, place: object, record: Path, workers: int) -> None:
    """Decodes every image once, and records those that cannot be; goes on where it was interrupted.

    Args:
        source: Source of the images.
        place: Place of the images, for messages.
        record: JSON file of the result: ``checked``, the number of images so far, and ``unreadable``, a place in the
            source and a reason for each.
        workers: Number of decoding processes; 0 decodes in this one.

    Raises:
        ImageError: If more than 1 % of the images cannot be decoded, or none can be read at all.
        FileError: If the record cannot be written.
    """
    found = read_json(record)
    done, unreadable = found.get("checked", 0), [tuple(pair) for pair in found.get("unreadable", [])]
    total = len(source.ids)
    pieces = [range(start, min(start + _CHECKED_TOGETHER, total)) for start in range(done, total, _CHECKED_TOGETHER)]
    loader = DataLoader(
        _Check(source), sampler=pieces, batch_size=None, num_workers=workers, worker_init_fn=end_quietly
    )
    written = time.monotonic()
    with Progress("images checked", total, done=done) as progress:
        for piece, result in zip(pieces, loader, strict=True):
            if isinstance(result, ImageError):
                raise result
            unreadable += result
            done = piece.stop
            progress.advance(len(piece))
            if len(unreadable) > _MOST_UNREADABLE * total:
                _refuse(source, place, unreadable, done)
            if time.monotonic() - written > _SECONDS_BETWEEN_RECORDS or done == total:
                write_whole(record, json.dumps({"checked": done, "unreadable": unreadable}))
                written = time.monotonic()


def _refuse(source: ImageSource, place: object, unreadable: Sequence[Any], done: int) -> None:
    shown = "".join(f"\n  {source.ids[row]}: {reason}" for row, reason in unreadable[:_REASONS_SHOWN])
    more = f"\n  and {len(unreadable) - _REASONS_SHOWN} more" if len(unreadable) > _REASONS_SHOWN else ""
    raise ImageError(
        f"{len(unreadable)} of the first {done} images of {place} cannot be decoded; at most "
        f"{_MOST_UNREADABLE:.0%} of all {len(source.ids)} may be left out:{shown}{more}\n"
        "Repair or remove them, or point data.images to a list of the others."
    )
