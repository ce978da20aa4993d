"""Installed teachers, found through entry points and loaded on first use."""

import difflib
import inspect
import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torch import nn

from theia.errors import PluginError, TheiaError, UnknownTeacherError
from theia.teacher import Teacher
from theia.types import TeacherSpec

GROUP = "theia.teachers"

# A name is a folder in a store, beside that of the images, a prefix of options, and a key of torch's ModuleDict.
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_RESERVED = frozenset({"image", "training", *dir(nn.ModuleDict)})


def names() -> list[str]:
    """Names of all registered teachers, sorted. Imports none of them."""
    return sorted({point.name for point in entry_points(group=GROUP)})


@cache
def find(name: str) -> type[Teacher]:
    """The class of one teacher.

    Args:
        name: Name of its entry point.

    Raises:
        UnknownTeacherError: If nothing registers the name; lists what is installed and the nearest name.
        PluginError: If the plugin cannot be imported, is not a Teacher, or shares its name with another.
    """
    points = [point for point in entry_points(group=GROUP) if point.name == name]
    if not points:
        raise UnknownTeacherError(_unknown(name))
    if len(points) > 1:
        places = " and ".join(_origin(point) for point in points)
        raise PluginError(f"Two plugins register the teacher {name!r}: {places}. Uninstall or rename one of them.")
    return _load(points[0])


def find_all() -> tuple[dict[str, type[Teacher]], dict[str, PluginError]]:
    """Every teacher that can be loaded, and why the others cannot.

    Returns:
        Classes by name, and errors by name. One broken plugin does not hide the others.
    """
    found: dict[str, type[Teacher]] = {}
    broken: dict[str, PluginError] = {}
    for name in names():
        try:
            found[name] = find(name)
        except PluginError as error:
            broken[name] = error
    return found, broken


def create(name: str, options: Mapping[str, Any] | None = None) -> Teacher:
    """Builds one teacher, in eval mode and frozen.

    Args:
        name: Name of its entry point.
        options: Arguments of its constructor.

    Raises:
        UnknownTeacherError: If nothing registers the name.
        PluginError: If the plugin is broken or does not take these options.
        WeightsError: If its weights cannot be had.
    """
    try:
        teacher = find(name)(**(options or {}))
    except TheiaError:
        raise
    except Exception as error:
        raise PluginError(f"Teacher {name!r} cannot be built: {type(error).__name__}: {error}.") from error
    return teacher.eval().requires_grad_(False)


def _load(point: EntryPoint) -> type[Teacher]:
    try:
        teacher = point.load()
    except Exception as error:
        # Whatever a third party's import raises must not reach the teachers beside it.
        raise PluginError(
            f"Teacher {point.name!r} of {_origin(point)} cannot be imported: {type(error).__name__}: {error}. "
            "Reinstall or uninstall that distribution."
        ) from error
    spec = getattr(teacher, "spec", None)
    if not (isinstance(teacher, type) and issubclass(teacher, Teacher)):
        reason = "is not a subclass of theia.Teacher"
    elif not isinstance(spec, TeacherSpec):
        reason = "has no class attribute 'spec' of type theia.types.TeacherSpec"
    elif spec.name != point.name:
        reason = f"has a spec named {spec.name!r}, but its entry point is named {point.name!r}"
    elif inspect.isabstract(teacher):
        reason = "does not implement forward()"
    elif not _NAME.fullmatch(point.name) or point.name in _RESERVED:
        reason = "needs another name: of lower-case letters, digits and '_', and none that Theia or torch uses itself"
    else:
        return teacher
    raise PluginError(f"Teacher {point.name!r} of {_origin(point)} ({point.value}) {reason}.")


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def _unknown(name: str) -> str:
    installed = names()
    nearest = difflib.get_close_matches(name, installed, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return (
        f"No teacher named {name!r}.{hint} Installed: {', '.join(installed) or 'none'}. "
        f"A plugin adds one under [project.entry-points.{GROUP!r}]."
    )
