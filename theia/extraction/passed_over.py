"""What in a folder or in tar files is not read as an image, counted by kind: one line tells it to the user."""

from collections import Counter
from typing import Literal

from theia.extraction.decode import IMAGE_ENDINGS

TAR_ENDING = ".tar"
COMPRESSED_TAR_ENDINGS = (".tgz", ".tbz", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")

# Endings that a user may well take for those of images, and what to know of them. JPEGs by other endings are not read
# either: ids are made of the list, and no store that was begun without them could be continued.
_EXPLAINED = (
    (
        (".gif", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".svg", ".ico", ".tga", ".psd", ".exr", ".hdr",
         ".ppm", ".pgm", ".pnm", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw"),
        "not JPEG, PNG, WebP, BMP or TIFF",
    ),
    ((".jfif", ".jif", ".jpe", ".pjpeg", ".pjp"), "JPEG by another ending: rename to .jpg"),
    (COMPRESSED_TAR_ENDINGS, "compressed: decompress first"),
)  # fmt: skip
_SURPRISING = tuple(ending for endings, _ in _EXPLAINED for ending in endings)
_SHOWN = 4  # endings that nobody takes for those of images

PassedKind = Literal["parent", "hidden", "hidden folder", "replaced"]
_SAID: dict[PassedKind, str] = {
    "parent": "with '..' in the path (pack with tar -C FOLDER)",
    "hidden": "hidden",
    "hidden folder": "hidden folder",
    "replaced": "replaced by a later member of the same name",
}


class PassedOver:
    """Counts, by ending or by the reason that a file has beside it."""

    def __init__(self) -> None:
        self._endings: Counter[str] = Counter()
        self._kinds: Counter[PassedKind] = Counter()
        self._examples: dict[PassedKind, str] = {}

    def add(self, name: str) -> None:
        """Counts a file whose ending is not that of an image.

        Args:
            name: Its path, with ``/``.
        """
        base = name.rpartition("/")[2].lower()
        compressed = next((ending for ending in COMPRESSED_TAR_ENDINGS if base.endswith(ending)), None)
        self._endings[compressed or ("." + base.rpartition(".")[2] if "." in base else "")] += 1

    def add_kind(self, kind: PassedKind, name: str) -> None:
        """Counts a file that has a reason of its own, if its ending may be that of an image; or a hidden folder.

        Args:
            kind: The reason.
            name: Its path, with ``/``.
        """
        if kind == "hidden folder" or name.lower().endswith((*IMAGE_ENDINGS, *_SURPRISING, TAR_ENDING)):
            self._kinds[kind] += 1
            self._examples.setdefault(kind, name)

    @property
    def may_surprise(self) -> bool:
        """Whether there is something among it that a user may take for images that are read."""
        return self._kinds["parent"] > 0 or any(ending in self._endings for ending in _SURPRISING)

    def __str__(self) -> str:
        """Such as ``12 .gif, 3 .heic (not JPEG, ...); 4 hidden, such as ._a.jpg``; empty if there is nothing."""
        rest = Counter(self._endings)
        parts = []
        for endings, explanation in _EXPLAINED:
            found = Counter({ending: rest.pop(ending) for ending in endings if ending in rest})
            if found:
                parts.append(f"{_listed(found, len(found))} ({explanation})")
        if rest:
            parts.append(_listed(rest, _SHOWN))
        for kind, said in _SAID.items():
            if count := self._kinds[kind]:
                several = "s" if kind == "hidden folder" and count > 1 else ""
                parts.append(f"{count:,} {said}{several}, such as {self._examples[kind]}")
        return "; ".join(parts)


def _listed(counts: Counter[str], most: int) -> str:
    shown = counts.most_common(most)
    others = counts.total() - sum(count for _, count in shown)
    text = ", ".join(f"{count:,} {ending or 'without ending'}" for ending, count in shown)
    return f"{text} and {others:,} other{'s' * (others > 1)}" if others else text
