"""Installed teachers, found through entry points and loaded on first use."""

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any, cast

from torch import nn

from theia.errors import ConfigError, PluginError, TheiaError, UnknownTeacherError
from theia.plugins import NAME, NAME_RULE, Plugins
from theia.teacher import Teacher
from theia.types import TeacherSpec

GROUP = "theia.teachers"
_TEACHERS = Plugins(GROUP, "teacher", UnknownTeacherError)

# A teacher's name is also a folder in a store, beside that of the images, a prefix of options, and a key of torch's
# ModuleDict.
_RESERVED = frozenset({"image", "training", *dir(nn.ModuleDict)})


def names() -> list[str]:
    """Names of all registered teachers, sorted. Imports none of them."""
    return _TEACHERS.names()


@cache
def find(name: str) -> type[Teacher]:
    """Finds the class of one teacher.

    Args:
        name: Name of the teacher's entry point.

    Raises:
        UnknownTeacherError: If nothing registers the name. The message lists what is installed and the nearest name.
        PluginError: If the plugin cannot be imported, is not a Teacher, or shares its name with another.
    """
    return cast(type[Teacher], _TEACHERS.load(name, lambda teacher: _problem(teacher, name)))


def find_all() -> tuple[dict[str, type[Teacher]], dict[str, PluginError]]:
    """Finds every teacher that can be loaded, and the reason for each that cannot.

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
        name: Name of the teacher's entry point.
        options: Arguments of the teacher's constructor.

    Raises:
        UnknownTeacherError: If nothing registers the name.
        ConfigError: If the teacher does not have one of the options. The message lists those that it has.
        PluginError: If the plugin is broken.
        WeightsError: If the teacher's weights cannot be loaded.
    """
    found = find(name)
    # A class without a constructor inherits torch's, which takes anything and then fails.
    taken = {} if found.__init__ is nn.Module.__init__ else inspect.signature(found).parameters
    unknown = [option for option in options or {} if option not in taken]
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        raise ConfigError(f"Teacher {name!r} has no option {unknown[0]!r}. It has: {', '.join(taken) or 'none'}.")
    try:
        teacher = found(**(options or {}))
    except TheiaError:
        raise
    except Exception as error:
        raise PluginError(f"Teacher {name!r} cannot be built: {type(error).__name__}: {error}.") from error
    return teacher.eval().requires_grad_(False)


def _problem(teacher: Any, name: str) -> str | None:
    spec = getattr(teacher, "spec", None)
    if not (isinstance(teacher, type) and issubclass(teacher, Teacher)):
        return "is not a subclass of theia.Teacher"
    if not isinstance(spec, TeacherSpec):
        return "has no class attribute 'spec' of type theia.types.TeacherSpec"
    if spec.name != name:
        return f"has a spec named {spec.name!r}, but its entry point is named {name!r}"
    if inspect.isabstract(teacher):
        return "does not implement forward()"
    if not NAME.fullmatch(name) or name in _RESERVED:
        return f"needs another name: {NAME_RULE}, and none that Theia or torch uses itself"
    return None
