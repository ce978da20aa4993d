"""Where images come from: a folder, tar files, or the sample photographs."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image

from theia.errors import ImageError
from theia.extraction.decode import IMAGE_ENDINGS
from theia.extraction.files import is_folder
from theia.extraction.folder import FolderSource, list_files
from theia.extraction.passed_over import COMPRESSED_TAR_ENDINGS, TAR_ENDING, PassedOver
from theia.extraction.samples import SampleSource
from theia.extraction.tar import TarSource
from theia.types import Json

logger = logging.getLogger(__name__)

SAMPLE = "sample"
SAMPLE_COUNT = 640


class ImageSource(Protocol):
    """A fixed sequence of images.

    Holds no open file, so that it can be pickled, and forked into worker processes.
    """

    @property
    def ids(self) -> Sequence[str]:
        """Sample ids, unique, in a fixed order."""

    @property
    def labels(self) -> Sequence[int] | None:
        """Class index of every image, or ``None``."""

    @property
    def classes(self) -> list[str] | None:
        """Class names by index, or ``None`` where they are not known."""

    @property
    def description(self) -> dict[str, Json]:
        """What this is, for the record: ``kind`` and what tells it from others of its kind, wherever it lies."""

    def read(self, index: int) -> Image.Image:
        """Decodes one image; RGB, any size.

        Raises:
            UnreadableImageError: If it alone cannot be read or decoded; the message is the reason.
            ImageError: If nothing can be read, for instance since the file system fails.
        """


def open_source(location: str, split: str, labels: bool = False) -> ImageSource:
    """Opens images for extraction.

    Args:
        location: One of

            - a folder of images, at any depth, in sorted order; the id is the path below the folder. With
              ``labels`` the folders right below it are the classes, in sorted order.
            - a ``.tar`` file or a folder of them, uncompressed; the id is ``<tar>/<member>``. With ``labels``
              the member ``a.cls`` holds the class of ``a.jpg`` as an integer.
            - ``sample`` or ``sample:COUNT``: crops of photographs that come with scikit-image. A folder of that
              name is ``./sample``.
        split: Which photographs ``sample`` shows; folders and tar files hold one split each.
        labels: Whether to read class labels.

    What is there and not read is logged in one line. What is named like an image and is no regular file is listed, as
    one that cannot be read.

    Raises:
        ImageError: If there is no such place or no image in it, tar files and images are mixed, a tar file is
            damaged or compressed, a name is no valid UTF-8, or labels are asked for and missing.
    """
    if location.partition(":")[0] == SAMPLE:
        return _open_sample(location, split, labels)
    root = Path(location)
    source: ImageSource
    passed_over = PassedOver()
    if is_folder(root, f"Give a folder of images, a .tar file or a folder of them, or {SAMPLE!r}."):
        source = _open_folder(root, labels, passed_over)
    elif root.suffix.lower() == TAR_ENDING:
        source = TarSource(root.parent, [root.name], labels, passed_over)
    else:
        raise ImageError(f"{root} is neither a folder nor a .tar file. {_compressed_hint([root.name])}")
    if not source.ids:
        there = f" There are: {passed_over}." if str(passed_over) else ""
        raise ImageError(
            f"No image in {root}.{there} Names that count end in {', '.join(IMAGE_ENDINGS)} (any case), or in .tar "
            "for files that hold such; hidden ones do not. A tar file of tar files must be unpacked once."
        )
    _check_names(source.ids, root)
    if str(passed_over):
        level = logging.WARNING if passed_over.may_surprise else logging.INFO
        logger.log(level, "Passed over in %s: %s", root, passed_over)
    return source


def _open_folder(root: Path, labels: bool, passed_over: PassedOver) -> ImageSource:
    names = list_files(root, passed_over)
    images = [name for name in names if name.lower().endswith(IMAGE_ENDINGS)]
    tars = [name for name in names if name.lower().endswith(TAR_ENDING)]
    compressed = [name for name in names if name.lower().endswith(COMPRESSED_TAR_ENDINGS)]
    if images and tars:
        raise ImageError(
            f"{root} holds both images ({images[0]}) and tar files ({tars[0]}). Point to a folder with one of the two."
        )
    if compressed and not images:
        raise ImageError(f"{root} holds compressed tar files ({compressed[0]}). {_compressed_hint(compressed)}")
    for name in names:
        if not name.lower().endswith((*IMAGE_ENDINGS, TAR_ENDING)):
            passed_over.add(name)
    return TarSource(root, tars, labels, passed_over) if tars else FolderSource(root, images, labels)


def _open_sample(location: str, split: str, labels: bool) -> ImageSource:
    _, colon, text = location.partition(":")
    count = int(text) if text.isdecimal() else 0 if colon else SAMPLE_COUNT
    if count < 1:
        raise ImageError(f"{location!r} asks for {text!r} sample crops. Give a number from 1, as in '{SAMPLE}:640'.")
    if labels:
        raise ImageError("The sample photographs have no labels. Extract without labels, or give a folder of classes.")
    return SampleSource(split, count)


def _compressed_hint(names: list[str]) -> str:
    if names[0].lower().endswith(COMPRESSED_TAR_ENDINGS):
        return "Images are read by offset, so decompress tar files first."
    return "Give the folder that holds it."


def _check_names(ids: Sequence[str], root: Path) -> None:
    for sample_id in ids:
        try:
            sample_id.encode()
        except UnicodeEncodeError as error:
            raise ImageError(
                f"The name {sample_id!r} in {root} is no valid UTF-8 and cannot be a sample id. Rename it."
            ) from error
