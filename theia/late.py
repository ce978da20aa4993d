"""Something to do once another package is imported, without importing it for that."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(name: str, work: Callable[[], object]) -> None:
    """Does some work after a module has been imported; at once if it has been.

    Args:
        name: Full name of the module.
        work: What to do, once.
    """
    if name in sys.modules:
        work()
    else:
        sys.meta_path.insert(0, _Finder(name, work))


class _Finder(MetaPathFinder):
    def __init__(self, name: str, work: Callable[[], object]) -> None:
        self._name = name
        self._work = work

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._work)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader, work: Callable[[], object]) -> None:
        self._loader = loader
        self._work = work

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._work()
