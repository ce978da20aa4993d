"""Delayed imports: work to do once a package is imported, and packages that are imported only in part."""

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(name: str, work: Callable[[], object]) -> None:
    """Does some work once a module has been imported, or at once if it already has been.

    Args:
        name: Full name of the module.
        work: Function to call, once.
    """
    if name in sys.modules:
        work()
    else:
        sys.meta_path.insert(0, _Finder(name, lambda loader: _ThenLoader(loader, work)))


def torchmetrics_in_part() -> None:
    """Makes an import of torchmetrics load only the base of all metrics, which Lightning needs, and delays the rest.

    The package's own ``__init__`` imports its metrics for text, images and sound, and with them transformers,
    torchvision and scipy: seconds for every process that imports Lightning. It runs as soon as the package is asked for
    a name that the base does not have, so that all other metrics are still found in their usual place.
    """
    if "torchmetrics" not in sys.modules:
        sys.meta_path.insert(0, _Finder("torchmetrics", _TorchmetricsLoader))


class _Finder(MetaPathFinder):
    """Finds one module, once, and gives it another loader."""

    def __init__(self, name: str, loader: Callable[[Loader], Loader]) -> None:
        self._name = name
        self._loader = loader

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = self._loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader


class _ThenLoader(_Loader):
    """Does some work after the module has been loaded."""

    def __init__(self, loader: Loader, work: Callable[[], object]) -> None:
        super().__init__(loader)
        self._work = work

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        self._loader.exec_module(module)
        self._work()


class _LaterLoader(_Loader):
    """Runs a package's ``__init__`` only when the package is asked for a name it lacks. Its submodules work before."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)

        def complete(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            del module.__dict__["__getattr__"]
            self._loader.exec_module(module)
            return getattr(module, name)

        module.__dict__["__getattr__"] = complete


class _TorchmetricsLoader(_LaterLoader):
    """Gives the package the names that Lightning takes from it."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        functional = _Finder("torchmetrics.functional", _LaterLoader)
        sys.meta_path.insert(0, functional)
        module.__dict__["_logger"] = logging.getLogger("torchmetrics")  # the package's modules import it from here
        try:
            module.__dict__["__version__"] = importlib.import_module("torchmetrics.__about__").__version__
            importlib.import_module("torchmetrics.utilities")  # first: it and torchmetrics.metric import each other
            for home, name in (("metric", "Metric"), ("collections", "MetricCollection")):
                module.__dict__[name] = getattr(importlib.import_module(f"torchmetrics.{home}"), name)
        except (ImportError, AttributeError):  # another version, whose base needs more than that
            if functional in sys.meta_path:
                sys.meta_path.remove(functional)
            for name in [name for name in sys.modules if name.startswith("torchmetrics.")]:
                del sys.modules[name]
            module.__dict__.pop("__getattr__", None)
            self._loader.exec_module(module)
