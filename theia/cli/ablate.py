"""``theia ablate``: trains and scores a student for every row and seed of a sweep, and reports on them."""

import logging
import shlex
import signal
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import yaml

from theia.ablation.planning import Parse, Planner, Stores, check_sweep_file, select_rows, split_arguments
from theia.cli.parser import OF_FIT_MAY_BE_EMPTY, Parser, call, one_line, settle
from theia.errors import ConfigError
from theia.scoring.contract import find_scorers, scorer_names
from theia.utils.arguments import comma_list, seed_numbers
from theia.utils.files import check_folder

if TYPE_CHECKING:
    from theia.ablation.summary import Summary
    from theia.ablation.sweep_run import Run

logger = logging.getLogger(__name__)

# These hold options of 'theia fit', which checks itself whether they may be empty.
_OF_FIT = ("rows", "product", "options")

_DESCRIPTION = """Train and score a student for every row and seed of a sweep, and write a table and a picture.

The paper's sweeps are in configs/ablations: theia ablate --config configs/ablations/teachers.yaml --data.store STORE.
Options with a dot, such as --data.store or --trainer.max_epochs, are those of 'theia fit' and hold for all rows; for
its options without a dot write --options.checkpoint_every 100. The same command again resumes an interrupted sweep.
'theia ablate report FOLDER' writes the report again. Installed scorers: {scorers}."""


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
        return call([report], argv[1:], "theia ablate report", positional=True)
    parser = Parser(prog="theia ablate", description=_DESCRIPTION.format(scorers=", ".join(scorer_names())))
    parser.may_be_empty = ("scorers", *_OF_FIT)
    parser.add_argument("--config", action="config", help="Sweep file: YAML with these options.")
    parser.add_function_arguments(ablate, skip={"fit_options", "command"})
    own, fit_options = split_arguments(argv, {action.dest for action in parser._actions})
    arguments = parser.parse_args(own)
    for path in arguments.pop("config") or []:
        if path is not None:  # options were given instead of a file
            check_sweep_file(Path(str(path)))
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
    """Trains and scores students, and reports on them.

    Args:
        out: Folder for the runs and the report.
        base: Config of 'theia fit' that all rows start from.
        rows: Options of 'theia fit' for each row, by its name: {NAME: {data.teachers: [clip]}}.
        teachers: Sets of teachers, one row for each: singles, all, leave_one_out, all_pairs or powerset of the store's
            teachers, or a list of these words and of lists of teachers.
        product: Values of options of 'theia fit', by option: {model.registers: [0, 4]}. Each row is repeated for each
            combination.
        options: Options of 'theia fit' for all rows: {checkpoint_every: 100}, or --options.checkpoint_every 100.
        seeds: Seeds of each row, comma-separated or a YAML list. Confidence intervals need two or more.
        reference: Row that all others are compared with.
        scorers: Scorers to run besides those of each student's own translators, comma-separated or a YAML list. Data of
            their own follow an @: dynamics@FOLDER, readout@STORE.
        sort_by: Score that ranks the rows.
        scores: CSV file (row,seed,NAME...) of scores measured elsewhere, such as a robot's, to add to the report.
        lower_is_better: Scores for which less is better, such as external/seconds, comma-separated or a YAML list.
            Losses and costs need not be listed.
        only: Names of the rows to run now, comma-separated or a YAML list; all by default.
        jobs: Number of runs at a time. Runs on this machine share its GPUs and cores.
        launcher: Where to run: local starts processes on this machine, slurm submits an array of jobs through submitit.
        slurm: Options of submitit: {timeout_min: 600, slurm_partition: NAME, gpus_per_node: 1}.
        dry_run: Only show the runs, their commands, the finished ones among them, and the cost.
        fit_options: Arguments of 'theia fit' for all rows.
        command: Command line as it was typed.
    """
    # These modules import torch, which takes seconds and is not needed for --help.
    from theia.ablation import sweep
    from theia.ablation.launch import check_launcher
    from theia.ablation.record import check_runs, earlier_record, hold, write_record
    from theia.ablation.summary import read_external

    check_launcher(launcher, jobs)
    if slurm and launcher != "slurm":
        raise ConfigError(
            "--slurm has options of SLURM, but --launcher is local. Give --launcher slurm, or leave them out."
        )
    check_folder(out, "--out")
    chosen = find_scorers(scorers)
    numbers = seed_numbers(seeds)
    stores = Stores()
    planner = Planner(_fit_parser(), stores, base, options or {}, fit_options)
    grid = planner.rows(rows, teachers, product)
    earlier = earlier_record(out)
    planned = earlier.with_planned([row.name for row in grid], numbers)
    if reference is not None and reference not in planned:
        raise ConfigError(f"--reference: there is no row {reference!r}. Rows: {'; '.join(planned)}.")
    if scores is not None:
        read_external(scores, planned)
    runs = planner.runs(select_rows(grid, only), numbers, out, chosen)
    if dry_run:
        check_runs(runs)
        print(sweep.forecast(runs, planner.arguments))
        return 0
    with hold(out):
        choices = {
            "reference": reference, "sort_by": sort_by, "scores": scores and str(scores.resolve()),
            "lower_is_better": comma_list(lower_is_better),
        }  # fmt: skip
        kept = {name: value or earlier.provenance.get(name, value) for name, value in choices.items()}
        provenance = {"command": command, "base": base, **kept, "store": stores.provenance()}
        write_record(out, runs, earlier.runs, planned, provenance)
        for line in stores.caveats():
            logger.warning("%s", line)
        changed = sorted({name for run in runs for name in run.outdated})
        if changed:
            logger.info("Finished runs are tested again, since the data of %s have changed", ", ".join(changed))
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
        print("Stopped. Every run keeps its checkpoint: the same command resumes the sweep.", file=sys.stderr)
    return interrupted or (1 if failed else 0)


def report(
    folder: Path,
    sort_by: str | None = None,
    scores: Path | None = None,
    reference: str | None = None,
    lower_is_better: str | list[str] | None = None,
) -> int:
    """Write the report of a sweep again from its finished runs, by default with the sweep's own choices.

    Args:
        folder: Folder of the sweep.
        sort_by: Score that ranks the rows.
        scores: CSV file (row,seed,NAME...) of scores measured elsewhere, such as a robot's, to add to the report.
        reference: Row that all others are compared with.
        lower_is_better: Scores for which less is better, such as external/seconds, comma-separated or a YAML list.
    """
    from theia.ablation import sweep

    summary = sweep.report(folder, sort_by, scores, reference, comma_list(lower_is_better))
    if summary is None:
        raise ConfigError(
            f"No run in {folder} is finished, so there is nothing to report. Wait for one, or start the sweep again."
        )
    _print(folder, summary, [])
    return 0


def _fit_parser() -> Parse:
    """Makes a function that parses and checks arguments as ``theia fit`` does, with one parser for all rows."""
    from theia.cli.lightning import fit_parser
    from theia.cli.options import check_used
    from theia.cli.trainer import check_trainer

    parser = fit_parser()

    def parse(arguments: Sequence[str]) -> dict[str, Any]:
        check_used("fit", arguments)
        try:
            options = settle(parser.parse_args(arguments), OF_FIT_MAY_BE_EMPTY)
        except ArgumentError as error:
            raise ConfigError(one_line(str(error), parser)) from error
        check_trainer(options)
        config: dict[str, Any] = yaml.safe_load(parser.dump(options, "yaml", skip_unset=False))
        return config

    return parse


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
