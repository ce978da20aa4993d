"""Theia: distil many vision foundation models into one small visual encoder for robots."""

from typing import TYPE_CHECKING, Any

from theia.version import __version__

if TYPE_CHECKING:
    from theia.teacher import Teacher

__all__ = ["Teacher", "__version__"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `theia --help` and `theia --version` do not need it.
    if name == "Teacher":
        from theia.teacher import Teacher

        return Teacher
    raise AttributeError(f"module 'theia' has no attribute {name!r}")
