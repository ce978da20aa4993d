"""Images in tar files, which are listed once and then read by their offset."""

import tarfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from theia.errors import ImageError
from theia.extraction.images import UnreadableImageError, read_image
from theia.extraction.user_files import IMAGE_ENDINGS, PassedOver, open_regular, reason, was_never_a_file
from theia.types import Json

_LABEL_ENDING = ".cls"
_TAIL_BYTES = 1 << 16


class Stretch(NamedTuple):
    """Bytes of an archive."""

    offset: int
    size: int


_NOWHERE = Stretch(-1, 0)
# Place of each image by name, or the reason why it cannot be read.
Members = dict[str, Stretch | str]


class TarSource:
    """Images in uncompressed tar files, archive by archive, in the order within each archive.

    Anything that is named like an image or like an archive of images but never held one, such as a FIFO, a device, or
    an archive that is a link to itself, counts as one image that cannot be read.

    Args:
        root: Folder of the archives.
        names: Paths of the archives relative to it; a sample id is ``<archive>/<member>``.
        labels: Whether to read the class of ``a.jpg``, or of ``a.left.jpg``, from the member ``a.cls``, an integer in
            ASCII.
        passed_over: Counter of the members that are not images.

    Raises:
        ImageError: If an archive is missing, forbidden, damaged or compressed, or if labels are asked for and one is
            missing or not an integer.
    """

    def __init__(self, root: Path, names: list[str], labels: bool, passed_over: PassedOver) -> None:
        self.ids: list[str] = []
        self.classes: list[str] | None = None
        self.labels: list[int] | None = [] if labels else None
        self.description: dict[str, Json] = {"kind": "tar", "archives": len(names)}
        self._archives = [root / name for name in names]
        self._unreadable: dict[int, str] = {}  # reason for each unreadable image, by its place in the list
        places: list[tuple[int, int, int]] = []
        for number, (name, path) in enumerate(zip(names, self._archives, strict=True)):
            found, classes = _open(path, name, labels, passed_over)
            for sample_id, stretch in found.items():
                if isinstance(stretch, str):
                    self._unreadable[len(self.ids)] = stretch
                    stretch = _NOWHERE
                self.ids.append(sample_id)
                places.append((number, *stretch))
            if self.labels is not None:
                self.labels += classes
        # An array instead of a million tuples, because worker processes get a copy.
        self._places = np.array(places, np.int64).reshape(-1, 3)

    def read(self, index: int) -> Image.Image:
        """Reads one image; RGB.

        Raises:
            UnreadableImageError: If the image cannot be decoded, or the member is not an image.
            ImageError: If the archive cannot be read.
        """
        if index in self._unreadable:
            raise UnreadableImageError(f"cannot be read: {self._unreadable[index]}")
        archive, offset, size = self._places[index].tolist()
        return read_image(self._archives[archive], offset, size)


def _open(path: Path, name: str, labels: bool, passed_over: PassedOver) -> tuple[Members, list[int]]:
    """Images of one archive by sample id, and their classes if labels are asked for."""
    try:
        file = open_regular(path)
    except OSError as error:
        if was_never_a_file(error):
            return {name: reason(path, error)}, [0] * labels
        raise ImageError(
            f"{path} cannot be read: {reason(path, error)}. It stands for all of its images: bring it back, correct "
            "its permissions, or remove it."
        ) from error
    with file:
        members = scan(file, path, name, labels, passed_over)
        images = {member: part for member, part in members.items() if member.lower().endswith(IMAGE_ENDINGS)}
        classes = read_labels(file, path, images, members) if labels else []
    return {f"{name}/{member}": part for member, part in images.items()}, classes


def scan(file: BinaryIO, path: Path | str, archive: str, labels: bool, passed_over: PassedOver) -> Members:
    """Finds the members of an archive that are images and, if asked for, labels.

    Args:
        file: The archive.
        path: Path of the archive, for messages.
        archive: Name of the archive, for the counter.
        labels: Whether to find labels.
        passed_over: Counter of the other members.

    Raises:
        ImageError: If the archive is damaged, cut short or compressed, or a member is a link.
    """
    endings = (*IMAGE_ENDINGS, _LABEL_ENDING) if labels else IMAGE_ENDINGS
    members: Members = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name).as_posix().lstrip("/")
                if member.isdir():
                    continue
                parts = PurePosixPath(name).parts
                if ".." in parts:
                    passed_over.add_kind("parent", f"{archive}/{name}")
                elif any(part.startswith(".") for part in parts):
                    passed_over.add_kind("hidden", f"{archive}/{name}")
                elif not name.lower().endswith(endings):
                    passed_over.add(name)
                else:
                    # Of two members with the same name the later one counts, as when unpacking.
                    if name in members:
                        passed_over.add_kind("replaced", f"{archive}/{name}")
                    members[name] = _stretch(member, path)
            end = tar.offset
        file.seek(end)
        tail = file.read(_TAIL_BYTES)
    except (tarfile.TarError, OSError) as error:
        raise ImageError(
            f"{path} cannot be read as a tar file: {error}. It is damaged, cut short or compressed; "
            "copy it again, or decompress it first: images are read by offset."
        ) from error
    # tarfile takes a damaged header for the end of the archive; the real end is marked by blocks of zeros.
    if len(tail) < tarfile.BLOCKSIZE or any(tail):
        raise ImageError(
            f"{path} has no end-of-archive mark at byte {end}, after the last member that can be read: it "
            "is cut short, damaged there, or several archives in one file. Copy or pack it again."
        )
    return members


def _stretch(member: tarfile.TarInfo, path: Path | str) -> Stretch | str:
    if member.isdev():
        return f"a {'FIFO' if member.isfifo() else 'device'}, not a regular file"
    if not member.isreg() or member.issparse():
        raise ImageError(
            f"Member {member.name!r} of {path} is a link or a sparse file, not plain bytes. "
            "Pack it again with tar --dereference --hard-dereference."
        )
    return Stretch(member.offset_data, member.size)


def read_labels(file: BinaryIO, path: Path | str, images: Iterable[str], members: Members) -> list[int]:
    """Reads the class of each image.

    Args:
        file: The archive.
        path: Path of the archive, for messages.
        images: Names of the members that are images.
        members: Members of the archive, from :func:`scan`.

    Raises:
        ImageError: If one is missing or not an integer.
    """
    labels = []
    for image in images:
        if isinstance(members[image], str):
            labels.append(0)  # placeholder for an image that cannot be read, and so is not stored
            continue
        # Several images of one sample share a label: a.left.jpg and a.right.jpg have a.cls.
        base = PurePosixPath(image)
        name = str(base.with_suffix(_LABEL_ENDING))
        sample = str(base.with_name(base.name.partition(".")[0] + _LABEL_ENDING))
        place = members.get(name, members.get(sample))
        if not isinstance(place, Stretch):
            raise ImageError(
                f"Labels were asked for, but {path} has no member {name!r} beside {image!r}. "
                "Pack one for every image, or extract without labels."
            )
        file.seek(place.offset)
        text = file.read(place.size).strip()
        if not text.isdigit():
            raise ImageError(
                f"Member {name!r} of {path} holds {text[:20]!r}; a label is an integer from 0. "
                "Correct it, or extract without labels."
            )
        labels.append(int(text))
    return labels
