"""Images in other places: object stores, other machines, whatever fsspec opens."""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from PIL import Image

from theia.errors import ImageError
from theia.extraction.images import UnreadableImageError, decode
from theia.extraction.tars import read_labels, scan
from theia.extraction.user_files import IMAGE_ENDINGS, TAR_ENDING, PassedOver
from theia.types import Json
from theia.utils.files import open_url

_SIGN = "://"


def is_remote(place: str) -> bool:
    """Whether a place that a user gave is a URL."""
    return _SIGN in place


class RemoteSource:
    """Image files below a URL, or images in the uncompressed tar files there; the ids are those of a local copy.

    Every image is fetched by itself, when it is needed; of a tar file, its stretch. To list a tar file, it is read
    through once.

    Args:
        url: Folder or tar file, such as ``s3://bucket/photos``.
        labels: Whether to read class labels, as from a local copy.
        passed_over: Counter of the files that are not images.

    Raises:
        ConfigError: If what opens such places is not installed.
        ImageError: If nothing is there or it cannot be reached, or labels are asked for and missing.
    """

    def __init__(self, url: str, labels: bool, passed_over: PassedOver) -> None:
        self._url = url.rstrip("/")
        self.ids: list[str] = []
        self.labels: list[int] | None = [] if labels else None
        self.classes: list[str] | None = None
        self._places: list[tuple[str, int | None, int | None]] = []  # path, first byte and byte after the last one
        fs, root = open_url(self._url)
        try:
            found = sorted(fs.find(root))
        except Exception as error:
            # What lies behind fsspec raises errors of its own.
            raise self._unreachable(error) from error
        if not found:
            raise ImageError(f"There is nothing at {url}. Give a folder of images, or of .tar files.")
        if found == [root]:
            root = str(PurePosixPath(root).parent)
        names = [path.removeprefix(root).lstrip("/") for path in found]
        shown = [(name, path) for name, path in zip(names, found, strict=True) if not _is_hidden(name, passed_over)]
        images = [pair for pair in shown if pair[0].lower().endswith(IMAGE_ENDINGS)]
        tars = [pair for pair in shown if pair[0].lower().endswith(TAR_ENDING)]
        if images and tars:
            raise ImageError(
                f"{url} holds both images ({images[0][0]}) and tar files ({tars[0][0]}). Point to a folder with one of "
                "the two."
            )
        for name, _ in shown:
            if not name.lower().endswith((*IMAGE_ENDINGS, TAR_ENDING)):
                passed_over.add(name)
        self.description: dict[str, Json] = {"kind": "tar", "archives": len(tars)}
        for name, path in tars:
            self._add_archive(fs, name, path, passed_over)
        if not tars:
            self.description = {"kind": "folder", "name": PurePosixPath(root).name}
            self._add_images(images)

    def read(self, index: int) -> Image.Image:
        """Fetches one image; RGB.

        Raises:
            UnreadableImageError: If the file is gone or cannot be decoded.
            ImageError: If the place cannot be reached.
        """
        path, start, stop = self._places[index]
        try:
            # fsspec keeps one connection for each process; it cannot be pickled or forked.
            data = open_url(self._url)[0].cat_file(path, start=start, end=stop)
        except FileNotFoundError as error:
            raise UnreadableImageError(f"cannot be read: {error}") from error
        except Exception as error:
            raise self._unreachable(error) from error
        return decode(data)

    def _add_images(self, images: Sequence[tuple[str, str]]) -> None:
        self.ids = [name for name, _ in images]
        self._places = [(path, None, None) for _, path in images]
        if self.labels is None:
            return
        outside = next((name for name in self.ids if "/" not in name), None)
        if outside is not None:
            raise ImageError(
                f"Labels were asked for, but {outside} of {self._url} lies in no sub-folder: the folders right below "
                "it are the classes. Move it into one, or extract without labels."
            )
        folders = [name.partition("/")[0] for name in self.ids]
        self.classes = sorted(set(folders))
        self.labels = [self.classes.index(folder) for folder in folders]

    def _add_archive(self, fs: Any, name: str, path: str, passed_over: PassedOver) -> None:
        try:
            file = cast(BinaryIO, fs.open(path, "rb"))
        except Exception as error:
            raise self._unreachable(error) from error
        with file:
            members = scan(file, f"{self._url}/{name}", name, self.labels is not None, passed_over)
            images = {member: part for member, part in members.items() if member.lower().endswith(IMAGE_ENDINGS)}
            if self.labels is not None:
                self.labels += read_labels(file, f"{self._url}/{name}", images, members)
        for member, part in images.items():
            if isinstance(part, str):
                raise ImageError(f"Member {member!r} of {self._url}/{name} is {part}. Pack it again without.")
            self.ids.append(f"{name}/{member}")
            self._places.append((path, part.offset, part.offset + part.size))

    def _unreachable(self, error: Exception) -> ImageError:
        return ImageError(
            f"{self._url} cannot be read ({type(error).__name__}: {error}). Whole shards are kept; run the same "
            "command again, or copy the images to a local disk."
        )


def _is_hidden(name: str, passed_over: PassedOver) -> bool:
    hidden = any(part.startswith(".") for part in name.split("/"))
    if hidden:
        passed_over.add_kind("hidden", name)
    return hidden
