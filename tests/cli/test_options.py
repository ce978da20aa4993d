"""What holds for every option of every command, walked over so that a new one cannot be forgotten."""

import ast
import contextlib
import importlib
import inspect
import io
import os
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser, Namespace, capture_parser

from benchmarks.latency import __main__ as latency
from benchmarks.soak import __main__ as soak
from benchmarks.throughput import __main__ as throughput
from theia import registry
from theia.cli import ablate, analyze, decode, export, probe, store
from theia.cli.main import _LIGHTNING, COMMANDS
from theia.cli.main import main as theia
from theia.cli.parser import OF_FIT_MAY_BE_EMPTY, Parser, settle
from theia.errors import ConfigError

# Those with commands of their own are tested elsewhere.
BENCHMARKS = sorted(
    {path.parent.name for path in Path("benchmarks").glob("*/__main__.py")} - {"cortexbench", "evidence"}
)
# Those of Lightning's own parser have their tests beside it.
OURS = [name for name, command in COMMANDS.items() if command.module != _LIGHTNING] + ["ablate report"]
PROGRAMS = OURS + [f"benchmarks.{name}" for name in BENCHMARKS]

# Options that mean something when they are empty: no scorers; and in a sweep, options of 'theia fit', which judges.
EMPTY = {("ablate", "scorers")}


@cache
def parser_of(program: str) -> ArgumentParser:
    """The parser of a command, as it would parse its command line."""
    if program.startswith("benchmarks."):
        return capture_parser(lambda: importlib.import_module(f"{program}.__main__").main([]))
    # "--help", as a command without options may do without a parser; it is caught before it is shown.
    return capture_parser(lambda: theia([*program.split(), "--help"]))


def run(program: str, arguments: list[str]) -> int:
    """Runs a command as its users do."""
    module, *subcommand = program.split()
    if module.startswith("benchmarks."):
        return int(importlib.import_module(f"{module}.__main__").main([*subcommand, *arguments]))
    return theia([*program.split(), *arguments])


def parsers() -> Iterator[tuple[str, ArgumentParser]]:
    """All, those of subcommands in place of the one above them."""
    for program in PROGRAMS:
        parser = parser_of(program)
        commands = [action.choices for action in parser._actions if action.dest == "subcommand"]
        if commands:
            yield from ((f"{program} {name}", one) for name, one in commands[0].items())
        else:
            yield program, parser


def options(parser: ArgumentParser) -> Iterator[Any]:
    return (one for one in parser._actions if one.dest not in ("help", "config", "print_config", "print_shtab"))


# Values of options that must be given, where no other option would be looked at otherwise.
INNOCENT = {"teachers": "hog"}


def line(parser: ArgumentParser, dest: str, value: str) -> list[str]:
    """A command line with that value of one option, and an innocent one wherever there must be one."""
    # Only this preset has a use for a folder.
    typed = ["--preset=full"] if dest == "folder" and any(one.dest == "preset" for one in options(parser)) else []
    for action in options(parser):
        if action.dest == dest or action.required or (not action.option_strings and action.nargs != "*"):
            given = value if action.dest == dest else INNOCENT.get(action.dest, "x")
            typed += [f"{action.option_strings[0]}={given}" if action.option_strings else given]
    return typed


def takes(parser: ArgumentParser, dest: str, value: str) -> Any:
    """What an option becomes; ``None`` if its type does not take the value."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return parser.parse_args(line(parser, dest, value))[dest]
    except SystemExit:
        return None


def texts() -> Iterator[Any]:
    """All options that take a text of any kind: names, paths, lists."""
    for program, parser in parsers():
        for action in options(parser):
            if takes(parser, action.dest, "some/text") is not None:
                yield pytest.param(program, parser, action.dest, id=f"{program}-{action.dest}")


TEXTS = list(texts())


# Where each command writes; a place that cannot be written is found out before any work.
PLACES = [
    (program, action.dest)
    for program, parser in parsers()
    for action in options(parser)
    if action.dest in ("out", "store", "results") or (action.dest == "folder" and action.option_strings)
]


def test_every_command_that_writes_has_a_place() -> None:
    assert {program for program, _ in PLACES} == {program for program, _ in parsers()} - {
        "store info", "store verify", "teachers",  # only read
        "store push", "store pull", "store statistics",  # their places stand by position
        "ablate report",  # writes into the sweep that it reads
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["a file", "below a file", "read-only"])
@pytest.mark.parametrize(("program", "dest"), PLACES)
def test_a_place_that_cannot_be_written_is_one_line_before_any_work(
    program: str, dest: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("precious")
    (tmp_path / "place").mkdir()

    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "place" and access(path, mode))
    place = {"a file": "file", "below a file": "file/below", "read-only": "place"}[kind]
    assert run(program, line(dict(parsers())[program], dest, str(tmp_path / place))) == 1
    (said,) = [one for one in capsys.readouterr().err.splitlines() if not one.startswith("WARNING")]
    assert said.startswith(f"{'' if program.startswith('bench') else 'theia '}{program.split()[0]}: ")
    assert str(tmp_path / place) in said
    assert f"--{dest}" in said
    assert {path.name for path in tmp_path.iterdir()} == {"file", "place"}
    assert (tmp_path / "file").read_text() == "precious"


# Senseless for nearly every number there is; 10**30 is a number of images that means all of them.
SENSELESS = ("-7", "0", "nan", "inf", "1e30", str(10**30))
# What means something for all that, and why.
SENSIBLE = {
    ("extract", "batch_size"): {str(10**30): "all images of a shard at once"},
    ("extract", "keep_components"): {str(10**30): "all channels"},
    ("extract", "workers"): {"0": "decodes in the same process"},
    ("extract", "shard_size"): {str(10**30): "all images in one shard"},
    ("extract", "max_skipped"): {"0": "every image must be readable"},
    ("extract", "dinov2.size"): dict.fromkeys(SENSELESS, "the teacher's own, who judges behind its weights"),
    ("ablate", "seeds"): {"0": "a seed"},
    ("analyze", "max_images"): {str(10**30): "all images"},
    ("analyze", "batch_size"): {str(10**30): "all images at once"},
    ("analyze", "pictures"): {"0": "no pictures", str(10**30): "one of every image"},
    ("decode", "limit"): {str(10**30): "all images"},
    ("decode", "batch_size"): {str(10**30): "all images at once"},
    ("probe classification", "neighbours"): {str(10**30): "needs as many images, which are not yet there"},
    ("probe dense", "seeds"): {"0": "a seed"},
    ("benchmarks.soak", "workers"): {"0": "reads in the training process"},
}


def numbers() -> Iterator[Any]:
    """All options that take a number, or by default a text of numbers."""
    for program, parser in parsers():
        for action in options(parser):
            found = takes(parser, action.dest, "17")
            if (
                isinstance(found, int | float)
                or action.dest == "seeds"
                or str(action.default).replace(",", "").isdecimal()
            ):
                yield pytest.param(program, action.dest, id=f"{program}-{action.dest}")


NUMBERS = list(numbers())


def test_the_walk_sees_every_kind_of_number() -> None:
    seen = {param.values for param in NUMBERS}
    assert {
        ("extract", "size"), ("extract", "max_skipped"), ("extract", "devices"), ("ablate", "seeds"),
        ("ablate", "jobs"),
        ("analyze", "max_images"), ("decode", "limit"), ("benchmarks.soak", "minutes"),
        ("benchmarks.latency", "batches"), ("probe dense", "seeds"),
    } <= seen  # fmt: skip
    assert SENSIBLE.keys() <= seen


@pytest.mark.parametrize(("program", "dest"), NUMBERS)
def test_a_senseless_number_is_refused_by_name_before_anything_is_written(
    program: str, dest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    parser = dict(parsers())[program]
    for number in SENSELESS:
        if number in SENSIBLE.get((program, dest), ()):
            continue
        try:
            status = run(program, line(parser, dest, number))
        except SystemExit as stop:
            status = stop.code
        said = capsys.readouterr().err
        assert status in (1, 2), f"{number}: {said}"
        assert dest in said.splitlines()[-1] + said.rpartition("error:")[2], f"{number}: {said}"
        assert "Traceback" not in said
        assert not list(tmp_path.iterdir()), number


def test_the_walk_sees_every_command() -> None:
    seen = {(param.values[0], param.values[2]) for param in TEXTS}
    assert {
        ("extract", "images"), ("extract", "teachers"), ("extract", "store"), ("extract", "clip.weights"),
        ("store info", "path"), ("store verify", "path"), ("ablate", "only"), ("ablate report", "folder"),
        ("analyze", "encoders"), ("decode", "out"), ("export", "encoder"), ("benchmarks.soak", "results"),
        ("benchmarks.latency", "encoder"), ("probe dense", "encoders"),
        ("benchmarks.throughput", "suites"),
    } <= seen  # fmt: skip
    assert all(isinstance(parser, Parser) for _, parser in parsers())


@pytest.mark.parametrize(("program", "parser", "dest"), TEXTS)
def test_nothing_is_taken_for_something(
    program: str, parser: ArgumentParser, dest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for nothing in ("", " , "):
        if (program, dest) in EMPTY:
            assert parser.parse_args(line(parser, dest, nothing))[dest] == nothing
            continue
        positional = not next(action for action in parser._actions if action.dest == dest).option_strings
        with pytest.raises(ConfigError, match=rf"^{'' if positional else '--'}{dest}(\.\d)? is empty"):
            parser.parse_args(line(parser, dest, nothing))


@pytest.mark.parametrize(("program", "parser", "dest"), TEXTS)
def test_a_tilde_is_the_home_folder(
    program: str, parser: ArgumentParser, dest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/somewhere/home")
    found = takes(parser, dest, "~/some")
    assert str(found[0] if isinstance(found, list) else found) == "/somewhere/home/some"


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ("images: ''", "--images"),
        ("images: {train: a, val: ''}", "--images.val"),
        ("teachers: []", "--teachers"),
        ("teachers: [clip, '']", "--teachers.1"),
        ("store: ' '", "--store"),
        ("clip: {weights: ''}", "--clip.weights"),
    ],
)
def test_a_config_file_is_held_to_the_same(tmp_path: Path, typed: str, named: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(typed)
    rest = [f"--{name}=x" for name in ("images", "teachers", "store") if not typed.startswith(name)]
    with pytest.raises(ConfigError, match=rf"^{named} is empty"):
        parser_of("extract").parse_args([*rest, f"--config={config}"])


def test_a_tilde_is_expanded_at_any_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere/home")
    config = tmp_path / "config.yaml"
    config.write_text("images: {train: ~/a, val: b/~/c}\nteachers: [clip]\nstore: ~/x\nclip: {weights: ~/w}")
    found = parser_of("extract").parse_args([f"--config={config}"])
    assert found.images == {"train": "/somewhere/home/a", "val": "b/~/c"}
    assert found.store == Path("/somewhere/home/x")
    assert found.clip.weights == "/somewhere/home/w"


def test_options_of_a_training_are_settled_as_they_are_named_there() -> None:
    def of(**values: Any) -> Namespace:
        fit = Namespace(trainer=Namespace(callbacks=[]), scorers="", data=Namespace(store="s"))
        return Namespace(subcommand="fit", fit=Namespace(**{**vars(fit), **values}))

    settle(of(), OF_FIT_MAY_BE_EMPTY)
    with pytest.raises(ConfigError, match=r"^--data\.teachers is empty"):
        settle(of(data=Namespace(teachers=[])), OF_FIT_MAY_BE_EMPTY)
    with pytest.raises(ConfigError, match=r"^--run_folder is empty"):
        settle(of(run_folder=""), OF_FIT_MAY_BE_EMPTY)


def test_what_is_empty_by_default_was_not_typed() -> None:
    parser = Parser()
    parser.add_argument("--suffix", type=str, default="")
    parser.add_argument("--words", type=dict[str, str], default={"a": ""})
    assert parser.parse_args([]) == parser.parse_args(["--suffix="]) == Namespace(suffix="", words={"a": ""})
    with pytest.raises(ConfigError, match=r"^--words\.b is empty"):
        parser.parse_args(["--words={b: ''}"])


def test_the_current_folder_is_still_a_folder() -> None:
    assert takes(parser_of("analyze"), "out", ".") == Path()


# Commands that are functions, whose parameters are the options.
FUNCTIONS = {
    "store info": store.info,
    "store verify": store.verify,
    "store statistics": store.statistics,
    "store push": store.push,
    "store pull": store.pull,
    "ablate": ablate.ablate,
    "ablate report": ablate.report,
    "analyze": analyze.analyze,
    "decode": decode.decode,
    "export": export.export,
    "benchmarks.latency": latency.bench,
    "probe classification": probe.classification,
    "probe dense": probe.dense,
    "probe dynamics": probe.dynamics,
    "benchmarks.soak": soak.soak,
    "benchmarks.throughput": throughput.bench,
}
# What an extraction reads in place of an option.
READ_AS = {"images": "locations", "split": "locations", "teachers": "teacher_names"}


def test_every_option_is_read() -> None:
    assert {program for program, _ in parsers()} == {*FUNCTIONS, "extract", "teachers"}
    for program, parser in parsers():
        listed = {action.dest for action in options(parser)}
        if program in FUNCTIONS:
            tree = ast.parse(textwrap.dedent(inspect.getsource(FUNCTIONS[program])))
            read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
            assert listed, program
            assert listed <= read, program
    assert not list(options(parser_of("teachers")))


def test_every_option_of_an_extraction_is_read() -> None:
    room = "".join(path.read_text() for path in Path("theia/extraction").glob("*.py") if path.name != "config.py")
    for action in options(parser_of("extract")):
        if action.dest.partition(".")[0] not in registry.names():  # the teacher's constructor takes these, or raises
            assert re.search(rf"\bconfig\.{READ_AS.get(action.dest, action.dest)}\b", room), action.dest


# Options that have no use beside others: (command line, what is said).
IDLE = [
    ("extract --images {train: a} --teachers hog --store s --split val", "--split"),
    ("extract --images a --teachers hog --store s --clip.weights random", "--clip.weights is about a teacher"),
    ("ablate --out s --slurm {timeout_min: 3}", "--slurm"),
    ("analyze --encoders a --images b --out c --pictures 3 --picture_ids d", "--pictures"),
    ("analyze --encoders a --images b --out c --max_images 1 --picture_ids d e", "--max_images"),
    ("benchmarks.latency --encoder a --backbones theia_tiny", "--backbones"),
    ("probe classification --encoders a --images b --out c --folder .", "--folder"),
    ("probe classification --encoders a --images b --out c --seeds 1", "--seeds"),
    ("probe dense --encoders a --data scenes --out c --folder .", "--folder"),
]


@pytest.mark.parametrize(("typed", "said"), IDLE, ids=[typed for typed, _ in IDLE])
def test_an_option_that_has_no_use_is_refused(
    typed: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    program, *arguments = re.split(r" (?![^{]*})", typed)
    assert run(program, arguments) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_config_may_have_sections_of_teachers_that_are_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "all.yaml").write_text("images: nowhere\nteachers: [clip, hog]\nstore: s\nclip: {weights: random}\n")
    assert theia(["extract", "--config", "all.yaml", "--teachers", "hog"]) == 1
    assert "There is no nowhere" in capsys.readouterr().err
