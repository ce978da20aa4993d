import json
import os
import platform
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks.throughput import __main__ as command
from benchmarks.throughput.measure import Measure, ParityError, Result, Settings
from theia.utils.provenance import machine, versions


def suite(name: str, monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None) -> list[Settings]:
    """Puts a suite in place; gives the settings that it is run with."""
    seen: list[Settings] = []

    def run(settings: Settings) -> Result:
        seen.append(settings)
        (settings.folder / "data").write_bytes(b"0")
        if error is not None:
            raise error
        return Result([Measure("speed", [1.0, 3.0, 2.0], aim=1.5)], {"raw": [[1, 2]]}, ["It is quick."])

    module = ModuleType(name)
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, f"benchmarks.throughput.{name}", module)
    monkeypatch.setattr(command, "SUITES", [*command.SUITES, name])
    return seen


def bench(tmp_path: Path, *arguments: str) -> int:
    return command.main([*arguments, f"--folder={tmp_path}", f"--results={tmp_path / 'results'}"])


def record(tmp_path: Path) -> dict:
    (path,) = (tmp_path / "results").iterdir()
    return json.loads(path.read_text())


def test_the_table_shows_the_figures_beside_the_aim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite("quick", monkeypatch)
    assert bench(tmp_path, "quick") == 0
    (row,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("speed")]
    assert row == ["speed", "2x", "1x", "3x", ">=", "1.5x", "yes"]


def test_the_json_holds_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = suite("quick", monkeypatch)
    bench(tmp_path, "quick", "--pairs=7", "--threads=1")
    written = record(tmp_path)
    assert seen[0].pairs == 7
    assert written["settings"] == {"suites": ["quick"], "pairs": 7, "threads": 1}
    assert written["suites"]["quick"]["measures"][0]["values"] == [1.0, 3.0, 2.0]
    assert written["suites"]["quick"]["measures"][0]["reached"] is True
    assert written["suites"]["quick"]["details"] == {"raw": [[1, 2]]}
    assert written["versions"]["python"] == platform.python_version()


def test_the_number_of_threads_is_set_for_the_suites_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    suite("quick", monkeypatch)
    seen: list[int] = []
    monkeypatch.setattr(
        sys.modules["benchmarks.throughput.quick"], "run", lambda _: seen.append(torch.get_num_threads()) or Result([])
    )
    bench(tmp_path, "quick", f"--threads={before + 1}")
    assert (seen, torch.get_num_threads()) == ([before + 1], before)


def test_data_are_deleted_and_no_result_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = suite("quick", monkeypatch)
    bench(tmp_path, "quick")
    assert seen[0].folder.parent == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
    assert [path.suffix for path in (tmp_path / "results").iterdir()] == [".json"]


@pytest.mark.parametrize(
    ("error", "status"), [(ParityError("a differs from b"), 1), (KeyboardInterrupt(), 130)], ids=["parity", "ctrl-c"]
)
def test_what_was_finished_outlives_a_suite_that_was_not(
    error: BaseException, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    suite("quick", monkeypatch)
    suite("broken", monkeypatch, error)
    assert bench(tmp_path, "quick", "broken") == status
    assert list(record(tmp_path)["suites"]) == ["quick"]
    assert str(error) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_an_unforeseen_error_keeps_its_traceback_and_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite("quick", monkeypatch)
    suite("broken", monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        bench(tmp_path, "quick", "broken")
    assert list(record(tmp_path)["suites"]) == ["quick"]


def test_an_unknown_suite_is_named_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = suite("quick", monkeypatch)
    assert bench(tmp_path, "quick", "quack") == 1
    assert "'quack'" in capsys.readouterr().err
    assert not seen


@pytest.mark.parametrize("option", ["--pairs=0", "--threads=0"])
def test_nothing_to_measure_is_refused_before_anything_runs(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = suite("quick", monkeypatch)
    assert bench(tmp_path, "quick", option) == 1
    assert "at least 1" in capsys.readouterr().err
    assert not seen


def test_without_arguments_the_suites_of_the_cpu_run() -> None:
    assert set(command.DEFAULT) <= {"loaders", "step", "growth", "extraction"}
    assert {"loaders", "growth"} <= set(command.DEFAULT)


def test_the_record_does_not_say_whose_machine_it_is() -> None:
    text = json.dumps([machine(), versions()])
    assert machine()["cores"] == len(os.sched_getaffinity(0))
    for private in (platform.node(), str(Path.home()), str(Path.cwd()), os.environ.get("USER", "/home")):
        assert private not in text
