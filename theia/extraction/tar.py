"""Images that are members of tar files: headers are scanned once, images are then read by offset."""

import tarfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from theia.errors import ImageError
from theia.extraction.decode import IMAGE_ENDINGS, read_image
from theia.types import Json

_LABEL_ENDING = ".cls"
_ENDINGS = (*IMAGE_ENDINGS, _LABEL_ENDING)
_TAIL_BYTES = 1 << 16


class _Stretch(NamedTuple):
    offset: int
    size: int


class TarSource:
    """Members of uncompressed tar files, archive by archive, in the order in which each holds them.

    Args:
        root: Folder of the archives.
        names: Paths of the archives relative to it; a sample id is ``<archive>/<member>``.
        labels: Whether to read the class of ``a.jpg`` from the member ``a.cls``, an integer in ASCII.

    Raises:
        ImageError: If an archive is damaged or compressed, or labels are asked for and one is missing or no
            integer.
    """

    def __init__(self, root: Path, names: list[str], labels: bool) -> None:
        self.ids: list[str] = []
        self.classes: list[str] | None = None
        self.labels: list[int] | None = [] if labels else None
        self.description: dict[str, Json] = {"kind": "tar", "archives": len(names)}
        self._archives = [root / name for name in names]
        places: list[tuple[int, int, int]] = []
        for number, (name, path) in enumerate(zip(names, self._archives, strict=True)):
            members = _scan(path)
            images = [member for member in members if member.lower().endswith(IMAGE_ENDINGS)]
            self.ids += [f"{name}/{member}" for member in images]
            places += [(number, *members[member]) for member in images]
            if self.labels is not None:
                self.labels += _read_labels(path, images, members)
        # An array, not a million tuples: worker processes get a copy.
        self._places = np.array(places, np.int64).reshape(-1, 3)

    def read(self, index: int) -> Image.Image:
        """Reads one image; RGB.

        Raises:
            UnreadableImageError: If it cannot be decoded.
            ImageError: If the archive cannot be read.
        """
        archive, offset, size = self._places[index].tolist()
        return read_image(self._archives[archive], offset, size)


def _scan(path: Path) -> dict[str, _Stretch]:
    members: dict[str, _Stretch] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name).as_posix().lstrip("/")
                if member.isdir() or _is_hidden(name) or not name.lower().endswith(_ENDINGS):
                    continue
                if not member.isreg() or member.issparse():
                    raise ImageError(
                        f"Member {name!r} of {path} is a link or a sparse file, not plain bytes. "
                        "Pack it again with tar --dereference --hard-dereference."
                    )
                # A name that comes twice: the later one counts, as when unpacking.
                members[name] = _Stretch(member.offset_data, member.size)
            end = tar.offset
        with path.open("rb") as file:
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


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(path).parts)


def _read_labels(path: Path, images: list[str], members: dict[str, _Stretch]) -> list[int]:
    labels = []
    with path.open("rb") as file:
        for image in images:
            name = str(PurePosixPath(image).with_suffix(_LABEL_ENDING))
            if name not in members:
                raise ImageError(
                    f"Labels were asked for, but {path} has no member {name!r} beside {image!r}. "
                    "Pack one for every image, or extract without labels."
                )
            file.seek(members[name].offset)
            text = file.read(members[name].size).strip()
            if not text.isdigit():
                raise ImageError(
                    f"Member {name!r} of {path} holds {text[:20]!r}; a label is an integer from 0. "
                    "Correct it, or extract without labels."
                )
            labels.append(int(text))
    return labels
