"""``theia ablate``: a grid of trainings, and a report of them."""

import logging
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import yaml
from jsonargparse import auto_cli

from theia.ablation.grid import expand, refuse_reserved
from theia.cli.parser import Parser
from theia.errors import ConfigError
from theia.lists import comma_list

if TYPE_CHECKING:
    from theia.ablation.run import Run
    from theia.ablation.summary import Summary

logger = logging.getLogger(__name__)

_DESCRIPTION = """Train a student for every row and seed of a grid, score all, and write a table and a picture.

Options with a dot, such as --data.store or --trainer.max_epochs, are those of 'theia fit' and hold for all rows. The
same command again goes on where it was interrupted. 'theia ablate report FOLDER' writes the report anew."""


def main(argv: list[str]) -> int:
    """Runs ``theia ablate`` or ``theia ablate report``.

    Args:
        argv: Arguments after the command.

    Returns:
        Exit status: 0, 1 if a run failed, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        TheiaError: If the sweep cannot be started or reported on.
    """
    if argv[:1] == ["report"]:
        return int(auto_cli(report, args=argv[1:], prog="theia ablate report"))
    parser = Parser(prog="theia ablate", description=_DESCRIPTION)
    parser.add_argument("--config", action="config", help="YAML file of these options: the sweep.")
    parser.add_function_arguments(ablate, skip={"fit_options", "command"})
    own, fit_options = _split(argv, {action.dest for action in parser._actions})
    arguments = parser.parse_args(own)
    for path in arguments.pop("config") or []:
        _refuse_repeated_keys(Path(str(path)))
    command = shlex.join(["theia", "ablate", *argv])
    return ablate(**arguments.as_dict(), fit_options=fit_options, command=command)


def ablate(
    out: Path,
    base: str | None = None,
    rows: dict[str, dict[str, Any]] | None = None,
    teachers: str | list[str | list[str]] | None = None,
    product: dict[str, list[Any]] | None = None,
    options: dict[str, Any] | None = None,
    seeds: int | str | list[int] = 0,
    reference: str | None = None,
    scorers: str | list[str] = "readout,classification",
    sort_by: str | None = None,
    scores: Path | None = None,
    jobs: int = 1,
    launcher: Literal["local", "slurm"] = "local",
    slurm: dict[str, Any] | None = None,
    dry_run: bool = False,
    *,
    fit_options: Sequence[str] = (),
    command: str = "",
) -> int:
    """Trains, scores and reports.

    Args:
        out: Folder of the sweep.
        base: Config of 'theia fit' that all rows start from.
        rows: Named rows, each with its options of 'theia fit': {NAME: {data.teachers: [clip]}}.
        teachers: Sets of teachers, each a row: singles, all, leave_one_out, all_pairs, powerset of those in the store,
            or a list of these words and of lists of teachers.
        product: Values by option of 'theia fit'; every row for every combination: {model.registers: [0, 4]}.
        options: Options of 'theia fit' for all rows.
        seeds: One or some, with commas between them; intervals need two or more.
        reference: Row that the others are compared with.
        scorers: What is scored beside each student's own translators, with commas between them.
        sort_by: Score that ranks the rows.
        scores: CSV of further scores (row,seed,NAME...), such as those of a robot, for the report.
        jobs: Runs at a time. On this machine they share GPUs and cores.
        launcher: local: processes of this machine. slurm: an array of jobs, through submitit.
        slurm: Options of submitit: {timeout_min: 600, slurm_partition: NAME, gpus_per_node: 1}.
        dry_run: Only show the runs, their commands, what is finished, and the cost.
        fit_options: Arguments of 'theia fit' for all rows.
        command: What was typed.
    """
    # torch takes seconds to import; --help does not need it.
    from theia.ablation import launch, sweep
    from theia.cli import plan
    from theia.scoring import registry

    launch.check(launcher, jobs)
    wanted = comma_list(scorers)
    for name in wanted:
        registry.find(name)
    numbers = _seeds(seeds)
    arguments = [*(["--config", base] if base else []), *plan.arguments_of(options or {}), *fit_options]
    refuse_reserved([*(options or {}), *(argument[2:].partition("=")[0] for argument in fit_options)], "The sweep")
    stores = plan.Stores()
    pool = list(stores.open(plan.resolve(arguments, "the base of the sweep")["data"]).teacher_specs)
    found = expand(rows, teachers, product, pool)
    if reference is not None and reference not in [row.name for row in found]:
        raise ConfigError(f"The reference {reference!r} is no row. There are: {', '.join(row.name for row in found)}.")
    runs = plan.plan(found, numbers, arguments, out, tuple(wanted), stores)
    if dry_run:
        sweep.check(runs)
        print(plan.text(runs, arguments))
        return 0
    with sweep.held(out):
        statement = {
            "command": command, "base": base, "seeds": numbers, "reference": reference, "sort_by": sort_by,
            "store": stores.provenance(),
        }  # fmt: skip
        sweep.prepare(out, runs, statement)
        for line in stores.caveats():
            logger.warning("%s", line)
        interrupted = 0
        signal.signal(signal.SIGTERM, _terminate)
        try:
            failed = sweep.carry_out(out, runs, launcher, jobs, slurm or {})
        except KeyboardInterrupt as stop:
            failed, interrupted = [], 143 if stop.args == (signal.SIGTERM,) else 130
        summary = sweep.report(out, scores=scores)
    _print(out, summary, failed)
    if interrupted:
        print("Stopped. Every run keeps its checkpoint: the same command goes on.", file=sys.stderr)
    return interrupted or (1 if failed else 0)


def report(folder: Path, sort_by: str | None = None, scores: Path | None = None) -> int:
    """Write the report of a sweep anew, from the runs that are finished.

    Args:
        folder: Of the sweep.
        sort_by: Score that ranks the rows.
        scores: CSV of further scores (row,seed,NAME...), such as those of a robot.
    """
    from theia.ablation import sweep

    summary = sweep.report(folder, sort_by, scores)
    if summary is None:
        raise ConfigError(f"No run of {folder} is finished, so there is nothing to report. Start the sweep again.")
    _print(folder, summary, [])
    return 0


def _split(argv: Sequence[str], own: set[str]) -> tuple[list[str], list[str]]:
    """Arguments of this command, and those of ``theia fit``: the options with a dot, each with its value."""
    mine: list[str] = []
    theirs: list[str] = []
    to = mine
    for token in argv:
        if token.startswith("--"):
            name = token[2:].partition("=")[0]
            to = theirs if "." in name and name.partition(".")[0] not in own else mine
        to.append(token)
    return mine, theirs


def _seeds(seeds: int | str | list[int]) -> list[int]:
    given = [str(seed) for seed in seeds] if isinstance(seeds, list) else comma_list(str(seeds))
    numbers = [int(seed) for seed in given if seed.isdecimal()]
    if not given or len(set(numbers)) < len(given):
        raise ConfigError(f"seeds is {seeds!r}; it must be one or some whole numbers, each once: --seeds 0,1,2.")
    return numbers


class _StrictLoader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """YAML in which a key that stands twice is an error, not the last of the two."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            mark = node.start_mark
            raise ConfigError(f"{mark.name} names {repeated[0]!r} twice, from line {mark.line + 1} on. Rename one.")
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def _refuse_repeated_keys(path: Path) -> None:
    with path.open() as file:
        yaml.load(file, _StrictLoader)  # a SafeLoader


def _terminate(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def _print(out: Path, summary: "Summary | None", failed: "Sequence[Run]") -> None:
    from theia.ablation.page import main_table

    if summary is not None:
        print(main_table(summary))
        print(f"report:  {out / 'report.md'} (also .csv, .json)")
        print(f"picture: {out / 'report.png'}")
        print(f"curves:  tensorboard --logdir {out}")
    if failed:
        print(f"Failed: {'; '.join(run.name for run in failed)}. The same command tries them again.")
