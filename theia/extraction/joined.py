"""Sources made of others: several places as one list of images, and some images of a source."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from theia.errors import ConfigError, ImageError
from theia.types import Json

if TYPE_CHECKING:
    from theia.extraction.sources import ImageSource


class JoinedSource:
    """The images of several sources, one after another; each sample id begins with the name of its source.

    Args:
        parts: Sources by name.

    Raises:
        ImageError: If only some have labels, or they number their classes differently.
    """

    def __init__(self, parts: "dict[str, ImageSource]") -> None:
        self._parts = list(parts.values())
        self.ids: Sequence[str] = [f"{name}/{sample}" for name, part in parts.items() for sample in part.ids]
        self._starts = [0]
        for part in self._parts:
            self._starts.append(self._starts[-1] + len(part.ids))
        self.classes = self._parts[0].classes
        self.labels: Sequence[int] | None = None
        first = next(iter(parts))
        if self._parts[0].labels is not None:
            self.labels = [label for part in self._parts for label in part.labels or ()]
            for name, part in parts.items():
                if part.classes != self.classes:
                    raise ImageError(
                        f"The sources {first} and {name} number their classes differently. Extract them into splits or "
                        "stores of their own, or without labels."
                    )
        self.description: dict[str, Json] = {
            "kind": "joined",
            "parts": [{"as": name, "images": len(part.ids), **part.description} for name, part in parts.items()],
        }

    def read(self, index: int) -> Image.Image:
        """Decodes one image; RGB.

        Raises:
            ImageError: For the reasons that its source has.
        """
        part = next(number for number, start in enumerate(self._starts[1:]) if index < start)
        return self._parts[part].read(index - self._starts[part])


class ChosenSource:
    """Some images of a source, in its order.

    Args:
        source: The source.
        places: Places of the images in it.
    """

    def __init__(self, source: "ImageSource", places: Sequence[int]) -> None:
        self._source, self._places = source, places
        self.ids: Sequence[str] = [source.ids[place] for place in places]
        self.labels = None if source.labels is None else [source.labels[place] for place in places]
        self.classes, self.description = source.classes, source.description

    def read(self, index: int) -> Image.Image:
        """Decodes one image; RGB.

        Raises:
            ImageError: For the reasons that the source has.
        """
        return self._source.read(self._places[index])


def join(places: Sequence[str], open_one: "Callable[[str], ImageSource]") -> "ImageSource":
    """Opens several places as one source; a single one as it is.

    Args:
        places: Places, as a user gives them. ``NAME=PLACE`` chooses the name with which sample ids begin; it is the
            last part of the place otherwise.
        open_one: Function that opens one place.

    Raises:
        ConfigError: If two places have the same name.
        ImageError: If they do not go together.
    """
    if len(places) == 1:
        return open_one(places[0])
    named: dict[str, str] = {}
    for text in places:
        name, place = split_name(text)
        if name in named:
            raise ConfigError(
                f"Both {named[name]} and {place} would be called {name!r} in sample ids. Give one another name: "
                f"NAME={place}"
            )
        named[name] = place
    return JoinedSource({name: open_one(place) for name, place in named.items()})


def split_name(text: str) -> tuple[str, str]:
    """Name and place of one of several sources.

    Args:
        text: ``PLACE`` or ``NAME=PLACE``.
    """
    name, sign, place = text.partition("=")
    if sign and name and not set(name) & set("/:#. "):
        return name, place
    kind, colon, rest = text.partition(":")
    path = Path((rest if colon else kind).partition("#")[0])
    return path.stem if path.suffix.lower() in (".tar", ".txt") else path.resolve().name, text
