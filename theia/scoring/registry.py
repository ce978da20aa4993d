"""Installed scorers, found through entry points and loaded on first use."""

from typing import TYPE_CHECKING, Any, cast

from theia.errors import UnknownScorerError
from theia.plugins import NAME, NAME_RULE, Plugins

if TYPE_CHECKING:  # the contract takes torch along
    from theia.scoring.contract import Scorer

GROUP = "theia.scorers"
_SCORERS = Plugins(GROUP, "scorer", UnknownScorerError)


def names() -> list[str]:
    """Names of all registered scorers, sorted. Imports none of them."""
    return _SCORERS.names()


def find(name: str) -> "Scorer":
    """One scorer.

    Args:
        name: Name of its entry point.

    Raises:
        UnknownScorerError: If nothing registers the name; lists what is installed and the nearest name.
        PluginError: If the plugin cannot be imported, is not a function, or shares its name with another.
    """
    return cast("Scorer", _SCORERS.load(name, lambda scorer: _problem(scorer, name)))


def _problem(scorer: Any, name: str) -> str | None:
    if not callable(scorer):
        return "is not a function"
    if not NAME.fullmatch(name):
        return f"needs another name: {NAME_RULE}"
    return None
