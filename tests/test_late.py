import importlib
import sys
from pathlib import Path

import pytest

from theia.late import when_imported


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
