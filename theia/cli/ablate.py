"""``theia ablate``: a grid of trainings, and a report of them."""

import logging
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import auto_cli

from theia.ablation.grid import arguments_of, expand, flat, refuse_idle, refuse_reserved
from theia.cli.parser import Parser
from theia.cli.sweep_options import only_of, refuse_unclear_keys, seeds_of, split
from theia.errors import ConfigError
from theia.scoring.contract import find_scorer, scorer_names
from theia.utils.arguments import comma_list
from theia.utils.files import check_folder

if TYPE_CHECKING:
    from theia.ablation.run import Run
    from theia.ablation.summary import Summary

logger = logging.getLogger(__name__)

# What stands in these are options of 'theia fit', which says itself what may be empty.
_OF_FIT = ("rows", "product", "options")

_DESCRIPTION = """Train a student for every row and seed of a grid, score all, and write a table and a picture.

The paper's grids are in configs/ablations: theia ablate --config configs/ablations/teachers.yaml --data.store STORE.
Options with a dot, such as --data.store or --trainer.max_epochs, are those of 'theia fit' and hold for all rows; for
those without a dot write --options.checkpoint_every 100. The same command again goes on where it was interrupted.
'theia ablate report FOLDER' writes the report anew. Scorers that are installed: {scorers}."""


def main(argv: list[str]) -> int:
    """Runs ``theia ablate`` or ``theia ablate report``.

    Args:
        argv: Arguments after the command.

    Returns:
        Exit status: 0, 1 if a run failed, 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.

    Raises:
        TheiaError: If the sweep cannot be started or reported on.
    """
    if argv[:1] == ["report"]:
        return int(auto_cli(report, args=argv[1:], prog="theia ablate report", parser_class=Parser))
    parser = Parser(prog="theia ablate", description=_DESCRIPTION.format(scorers=", ".join(scorer_names())))
    parser.may_be_empty = ("scorers", *_OF_FIT)
    parser.add_argument("--config", action="config", help="YAML file of these options: the sweep.")
    parser.add_function_arguments(ablate, skip={"fit_options", "command"})
    own, fit_options = split(argv, {action.dest for action in parser._actions})
    arguments = parser.parse_args(own)
    for path in arguments.pop("config") or []:
        if path is not None:  # options in place of a file
            refuse_unclear_keys(Path(str(path)))
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
    lower_is_better: str | list[str] | None = None,
    only: str | list[str] | None = None,
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
        lower_is_better: Scores of which less is better, such as external/seconds, with commas between them. Losses are
            known to be.
        only: Rows to run now, of those of the sweep: a name, or a list of names.
        jobs: Runs at a time. On this machine they share GPUs and cores.
        launcher: local: processes of this machine. slurm: an array of jobs, through submitit.
        slurm: Options of submitit: {timeout_min: 600, slurm_partition: NAME, gpus_per_node: 1}.
        dry_run: Only show the runs, their commands, what is finished, and the cost.
        fit_options: Arguments of 'theia fit' for all rows.
        command: What was typed.
    """
    # torch takes seconds to import; --help does not need it.
    from theia.ablation import sweep
    from theia.ablation.launch import check_launcher
    from theia.ablation.run import check_runs, earlier_record, hold, write_record
    from theia.ablation.summary import read_external as read_scores
    from theia.ablation.sweep import forecast
    from theia.cli import plan

    check_launcher(launcher, jobs)
    if slurm and launcher != "slurm":
        raise ConfigError(
            "--slurm has options of SLURM, but --launcher is local. Give --launcher slurm, or leave it out."
        )
    check_folder(out, "--out")
    wanted = comma_list(scorers)
    for name in wanted:
        find_scorer(name)
    numbers = seeds_of(seeds)
    arguments = [*(["--config", base] if base else []), *arguments_of(options or {}), *fit_options]
    typed = [argument[2:].partition("=")[0] for argument in fit_options if argument.startswith("--")]
    refuse_reserved([*(options or {}), *typed], "The sweep")
    stores = plan.Stores()
    common = plan.resolve(arguments, "the base of the sweep")
    if common["ckpt_path"] is not None:
        raise ConfigError(f"The base {base} sets ckpt_path, which the sweep itself sets. Leave it out.")
    # Only sets of teachers need to know which there are; rows may all have stores of their own.
    found = expand(rows, teachers, product, list(stores.open(common["data"]).teacher_specs) if teachers else [])
    refuse_idle([*flat(options or {}), *typed], found)
    earlier = earlier_record(out)
    planned = earlier.with_planned([row.name for row in found], numbers)
    if reference is not None and reference not in planned:
        raise ConfigError(f"The reference {reference!r} is no row. There are: {'; '.join(planned)}.")
    if scores is not None:
        read_scores(scores, planned)
    runs = plan.plan(only_of(found, only), numbers, arguments, out, tuple(wanted), stores)
    if dry_run:
        check_runs(runs)
        print(forecast(runs, arguments))
        return 0
    with hold(out):
        now = {
            "reference": reference, "sort_by": sort_by, "scores": scores and str(scores.resolve()),
            "lower_is_better": comma_list(lower_is_better),
        }  # fmt: skip
        # What is not said now is as it was said before.
        chosen = {name: value or earlier.statement.get(name, value) for name, value in now.items()}
        statement = {"command": command, "base": base, **chosen, "store": stores.provenance()}
        write_record(out, runs, earlier.runs, planned, statement)
        for line in stores.caveats():
            logger.warning("%s", line)
        interrupted = 0
        signal.signal(signal.SIGTERM, _terminate)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
            signal.signal(signal.SIGHUP, _terminate)
        try:
            failed = sweep.carry_out(out, runs, launcher, jobs, slurm or {})
        except KeyboardInterrupt as stop:
            failed = [run for run in runs if run.failed.exists()]
            interrupted = 128 + (stop.args[0] if stop.args else signal.SIGINT)
        summary = sweep.report(out)
    _print(out, summary, failed)
    if interrupted:
        print("Stopped. Every run keeps its checkpoint: the same command goes on.", file=sys.stderr)
    return interrupted or (1 if failed else 0)


def report(
    folder: Path,
    sort_by: str | None = None,
    scores: Path | None = None,
    reference: str | None = None,
    lower_is_better: str | list[str] | None = None,
) -> int:
    """Write the report of a sweep anew, from the runs that are finished. What is not given is as in the sweep.

    Args:
        folder: Of the sweep.
        sort_by: Score that ranks the rows.
        scores: CSV of further scores (row,seed,NAME...), such as those of a robot.
        reference: Row that the others are compared with.
        lower_is_better: Scores of which less is better, such as external/seconds, with commas between them.
    """
    from theia.ablation import sweep

    summary = sweep.report(folder, sort_by, scores, reference, comma_list(lower_is_better))
    if summary is None:
        raise ConfigError(
            f"No run of {folder} is finished, so there is nothing to report. Wait for one, or start the sweep again."
        )
    _print(folder, summary, [])
    return 0


def _terminate(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def _print(out: Path, summary: "Summary | None", failed: "Sequence[Run]") -> None:
    from theia.ablation.report import main_table

    if summary is not None:
        print(main_table(summary))
        print(f"report:  {out / 'report.md'} (also .csv, .json)")
        print(f"picture: {out / 'report.png'}")
        print(f"curves:  tensorboard --logdir {shlex.quote(str(out))}")
    if failed:
        print(f"Failed: {'; '.join(run.name for run in failed)}. The same command tries them again.")
