"""How every command ends: with one line, or quietly, whatever the system does."""

import ast
import errno
import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from theia.cli import main as module
from theia.cli.main import COMMANDS, carry_out, main
from theia.errors import TheiaError


@contextmanager
def nobody_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Standard output is a pipe whose reader has gone, as in ``theia teachers | true``."""
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch, os.fdopen(writer, "w") as stream:
        patch.setattr("sys.stdout", stream)
        yield
        # The interpreter does so at its end; what it cannot write it would complain about.
        stream.flush()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_that_nobody_reads_is_no_noise(
    command: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Lightning's parsers alone take seconds to build; what ends a command is the same for all.
    def help_only(command: str, arguments: list[str]) -> None:
        sys.stdout.write("usage: ...")
        raise SystemExit(0)

    monkeypatch.setattr(module, "_call", help_only)
    with nobody_reads(monkeypatch), pytest.raises(SystemExit):
        main([command, "--help"])
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("lines", [1, 10000], ids=["buffered", "not buffered"])
@pytest.mark.parametrize("command", COMMANDS)
def test_results_that_nobody_reads_end_a_command_quietly(
    command: str, lines: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def results(command: str, arguments: list[str]) -> int:
        sys.stdout.write("result\n" * lines)
        return 0

    monkeypatch.setattr(module, "_call", results)
    with nobody_reads(monkeypatch):
        assert main([command]) == 141
    assert capfd.readouterr().err == ""


def test_the_list_of_teachers_and_the_list_of_commands_may_be_cut_off(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with nobody_reads(monkeypatch):
        assert main(["teachers"]) == 141
    with nobody_reads(monkeypatch), pytest.raises(SystemExit):
        main(["--help"])
    assert capfd.readouterr().err == ""


def test_a_pipe_that_breaks_elsewhere_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    assert carry_out("theia extract", work) == 1
    assert "theia extract: Broken pipe." in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/there/x"), "/there/x: Permission denied. Mend that"),
        (OSError(errno.EROFS, "Read-only file system", "/there/x"), "/there/x: Read-only file system. Mend that"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", b"/there/x"), "/there/x: Is a directory."),
        (OSError(errno.ENOSPC, "No space left on device", "/there/x"), "Disk full while writing /there/x (file system"),
        (OSError(errno.ENOSPC, "No space left on device"), "Disk full."),
        (OSError("it is odd"), "it is odd. Mend that"),
    ],
    ids=["permission", "read-only", "folder", "full", "full somewhere", "odd"],
)
def test_an_error_of_the_system_is_one_line(
    command: str, error: OSError, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(command: str, arguments: list[str]) -> None:
        raise error

    monkeypatch.setattr(module, "_call", work)
    assert main([command]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"theia {command}: {said}")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_into_a_full_file_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        assert main(["teachers"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("theia teachers: Disk full.")


def test_a_process_without_any_output_can_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    assert carry_out("theia", lambda: None) == 0


def test_an_output_that_is_no_file_of_the_systems_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", stream := io.StringIO())
    assert carry_out("theia", lambda: stream.write("heard\n") and None) == 0
    assert stream.getvalue() == "heard\n"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["extrct"], "theia: There is no command 'extrct'. Did you mean 'theia extract'?"),
        (["zzz"], "theia: There is no command 'zzz'. 'theia --help'"),
        (["fit", "--config", "none.yaml"], "theia fit: --config none.yaml: there is no such file."),
        (["ablate", "--config=~/none.yaml"], "theia ablate: --config ~/none.yaml: there is no such file."),
        (["fit", "-c", "none.yaml"], "theia fit: -c none.yaml: there is no such file."),
        (["fit", "--model.image_size", "64"], "theia fit: --model.image_size comes from the data: leave it out."),
        (["fit", "--data", "nope.Data"], "theia fit: --data: Problem with given class_path 'nope.Data': No module"),
        (["extract"], "theia extract: the following arguments are required: --images, --teachers, --store. 'theia"),
        (["export"], "theia export: the following arguments are required: --encoder. 'theia export --help'"),
        (["store", "info"], "theia store: the following arguments are required: path. 'theia store --help' lists"),
        (["probe", "classification", "--out=x"],
         "theia probe: the following arguments are required: --encoders, --images. 'theia"),
        (["store", "inof", "x"], "theia store: argument subcommand: invalid choice: 'inof' (choose from "),
        (["extract", "--images=x", "--teachers=hog", "--store=y", "--imags=x"], "theia extract: unrecognized arg"),
        (["fit", "--config"], "theia fit: argument -c/--config: expected one argument. 'theia fit --help'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_command_line_that_does_not_parse_is_answered_in_one_line(
    typed: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main(typed)
    except SystemExit as stop:
        status = int(str(stop.code))
    assert status in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)


@pytest.mark.parametrize("given", ["{trainer: {max_epochs: 1}}", "there.yaml", "/dev/stdin"])
def test_a_config_that_is_there_or_is_yaml_itself_is_taken(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.yaml").write_text("trainer: {}")
    monkeypatch.setattr(module, "_import", lambda name: (_ for _ in ()).throw(TheiaError("goes on")))
    with pytest.raises(TheiaError, match="goes on"):
        module._call("fit", ["--config", given])


COMMAND_LINE = re.compile(r"(theia [a-z]+|tensorboard|python -m)[^.;']* $")


def unquoted(path: Path) -> Iterator[str]:
    """Values that a message puts into a command line as they are."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            before = ""
            for part in node.values:
                if isinstance(part, ast.Constant):
                    before += part.value
                elif isinstance(part, ast.FormattedValue):
                    value = ast.unparse(part.value)
                    # Names of teachers have no blanks.
                    if COMMAND_LINE.search(before) and not value.startswith(("shlex.", "','.join(")):
                        yield value
                    before += "x"
        elif isinstance(node, ast.Constant) and "%s" in str(node.value):
            text = str(node.value)
            if COMMAND_LINE.search(text.partition("%s")[0]):
                yield text


def test_command_lines_to_copy_are_quoted(tmp_path: Path) -> None:
    example = tmp_path / "example.py"
    example.write_text(
        "f'Next: theia test --config {run} '; f'tensorboard --logdir {shlex.quote(run)}'; 'theia fit --x %s'"
    )
    assert list(unquoted(example)) == ["run", "theia fit --x %s"]
    rooms = ("cli", "ablation", "analysis", "data", "decoding", "scoring", "store")
    for path in [path for room in rooms for path in Path("theia", room).glob("*.py")]:
        assert not list(unquoted(path)), path
