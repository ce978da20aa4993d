import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from theia.late import torchmetrics_in_part, when_imported


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "late_one.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "late_one", raising=False)
    return "late_one"


def test_work_comes_once_after_the_module(module: str) -> None:
    seen = []
    when_imported(module, lambda: seen.append(sys.modules[module].value))
    assert not seen
    importlib.reload(importlib.import_module(module))
    assert seen == [1]


def test_work_comes_at_once_for_a_module_that_is_there(module: str) -> None:
    importlib.import_module(module)
    seen = []
    when_imported(module, lambda: seen.append(True))
    assert seen == [True]


def test_a_module_that_is_never_there_does_no_harm() -> None:
    when_imported("no_such_module_of_anybody", lambda: pytest.fail("it does not exist"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_module_of_anybody")


@pytest.fixture
def without_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if nobody had imported it; afterwards all is as it was."""
    there = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "torchmetrics"}
    finders = [*sys.meta_path]
    for name in there:
        del sys.modules[name]
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchmetrics"]:
        del sys.modules[name]
    sys.modules.update(there)
    sys.meta_path[:] = finders


@pytest.mark.usefixtures("without_torchmetrics")
def test_torchmetrics_gives_its_base_at_once_and_the_rest_when_it_is_asked() -> None:
    torchmetrics_in_part()
    import torchmetrics
    from torchmetrics.regression import ExplainedVariance

    assert "torchmetrics.image" not in sys.modules
    assert issubclass(ExplainedVariance, torchmetrics.Metric)
    base = torchmetrics.Metric
    assert issubclass(torchmetrics.Accuracy, base)
    assert torchmetrics.functional.accuracy is sys.modules["torchmetrics.functional.classification"].accuracy
    assert torchmetrics.Metric is base
    assert not hasattr(torchmetrics, "no_such_metric")


@pytest.mark.usefixtures("without_torchmetrics")
def test_torchmetrics_whose_base_needs_more_is_imported_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.import_module

    def another(name: str, package: str | None = None) -> object:
        if name == "torchmetrics.collections" and "torchmetrics.image" not in sys.modules:
            raise ImportError(name)
        return original(name, package)

    monkeypatch.setattr(importlib, "import_module", another)
    torchmetrics_in_part()
    import torchmetrics

    assert "torchmetrics.image" in sys.modules
    assert issubclass(torchmetrics.MetricCollection, torch.nn.Module)
