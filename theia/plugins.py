"""Plug-ins of one kind, found through an entry-point group and imported on first use."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from theia.errors import PluginError, TheiaError

NAME = re.compile(r"[a-z][a-z0-9_]*")
NAME_RULE = "of lower-case letters, digits and '_'"


_CHECK = "check"
_Function = TypeVar("_Function", bound=Callable[..., Any])


def checked_by(check: Callable[[str | None], object]) -> Callable[[_Function], _Function]:
    """Gives a plug-in that is a function a check of the argument that may follow its name, as a decorator.

    Args:
        check: Takes the argument, or ``None`` if nothing follows; raises a :class:`theia.errors.TheiaError` if it is
            wrong. If it stands for data, it may return a fingerprint of them as text.
    """

    def mark(plugin: _Function) -> _Function:
        setattr(plugin, _CHECK, check)
        return plugin

    return mark


def check_argument(plugin: Any, argument: str | None) -> str | None:
    """Checks the argument of a plug-in that says how, and returns its fingerprint, if any; see :func:`checked_by`."""
    check = getattr(plugin, _CHECK, None)
    found = None if check is None else check(argument)
    return found if isinstance(found, str) else None


@dataclass(frozen=True)
class Plugins:
    """Plug-ins that installed distributions register in one group.

    Attributes:
        group: Name of the entry-point group.
        kind: Name for one of its plug-ins in messages.
        unknown: Class of the error for a name that nothing registers.
    """

    group: str
    kind: str
    unknown: type[TheiaError]

    def names(self) -> list[str]:
        """All registered names, sorted. Imports none of them."""
        return sorted({point.name for point in entry_points(group=self.group)})

    def load(self, name: str, problem: Callable[[Any], str | None]) -> Any:
        """Loads the plug-in of one name.

        Args:
            name: Name of the plug-in's entry point.
            problem: Function that says why an object is not of this kind, as the end of a sentence; ``None`` if it is.

        Raises:
            TheiaError: Of class ``unknown``, if nothing registers the name. The message lists what is installed and the
                nearest name.
            PluginError: If the plug-in cannot be imported, has a problem, or shares its name with another.
        """
        points = [point for point in entry_points(group=self.group) if point.name == name]
        if not points:
            raise self.unknown(self._unknown(name))
        if len(points) > 1:
            places = " and ".join(_origin(point) for point in points)
            raise PluginError(
                f"Two plugins register the {self.kind} {name!r}: {places}. Uninstall or rename one of them."
            )
        point = points[0]
        title = f"{self.kind.capitalize()} {name!r} of {_origin(point)}"
        try:
            found = point.load()
        except Exception as error:
            # A third party's import may raise anything, and must not affect the other plug-ins.
            raise PluginError(
                f"{title} cannot be imported: {type(error).__name__}: {error}. "
                "Reinstall or uninstall that distribution."
            ) from error
        reason = problem(found)
        if reason is not None:
            raise PluginError(f"{title} ({point.value}) {reason}.")
        return found

    def _unknown(self, name: str) -> str:
        installed = self.names()
        nearest = difflib.get_close_matches(name, installed, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        return (
            f"No {self.kind} named {name!r}.{hint} Installed: {', '.join(installed) or 'none'}. "
            f"A plugin adds one under [project.entry-points.{self.group!r}]."
        )


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value
