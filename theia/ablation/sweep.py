"""A sweep carried out, and its report."""

import logging
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from theia.ablation.grid import arguments_of
from theia.ablation.launch import Job, Launcher, run_locally, run_on_slurm
from theia.ablation.report import write_report
from theia.ablation.run import Run, lock, read_record
from theia.ablation.summary import Scored, Summary, caveats, merge_external, read_external, summarise
from theia.errors import ConfigError

logger = logging.getLogger(__name__)


def carry_out(
    folder: Path, runs: Sequence[Run], launcher: Launcher, parallel: int, slurm: Mapping[str, Any]
) -> list[Run]:
    """Trains and tests what is not finished.

    Args:
        folder: Of the sweep.
        runs: All of it.
        launcher: Where.
        parallel: How many at a time.
        slurm: Options of submitit.

    Returns:
        The runs that failed.
    """
    jobs = [Job(run) for run in runs if not run.finished]
    failed: list[Run] = []
    with Progress(runs) as progress:

        def ended(job: Job, status: int) -> None:
            if status == 0 and job.run.finished:
                return
            failed.append(job.run)
            progress.fail(job.run)
            how = f"exit status {status}" if status else "scores are missing: the same command goes on"
            progress.say(f"{job.run.name} failed ({how}); the end of {job.run.log}:")
            progress.say(job.run.last_lines())

        if launcher == "slurm":
            run_on_slurm(jobs, parallel, progress.update, ended, folder / "slurm", slurm)
        else:
            run_locally(jobs, parallel, progress.update, ended)
    return failed


def report(
    folder: Path,
    sort_by: str | None = None,
    scores: Path | None = None,
    reference: str | None = None,
    lower_is_better: Sequence[str] = (),
) -> Summary | None:
    """Writes table, picture and the rest from what is finished.

    What is not given is as it was when the sweep was started; then a lack is told, not an error.

    Args:
        folder: Of the sweep.
        sort_by: Column that ranks the rows.
        scores: CSV of external scores.
        reference: Row to compare the others with.
        lower_is_better: Scores of which less is better, beside losses and costs.

    Returns:
        What was written; ``None`` if no run has scores.

    Raises:
        ConfigError: If the folder holds no sweep, or a score or row that is given is unknown.
    """
    found = read_record(folder)
    statement = found.statement
    # Read once: a run may end meanwhile.
    shown = [(run, tested) for run in found.runs if (tested := run.report) is not None]
    if not shown:
        return None
    scored, notes = [_scored(run, tested) for run, tested in shown], caveats(shown)
    scored, more, scores = _with_external(scored, found.planned, scores, statement.get("scores"))
    notes += more
    names = {name for run in scored for name, value in run.scores.items() if math.isfinite(value)}
    asked = reference or statement.get("reference")
    if reference is None and asked in {run.row for run in scored}:
        reference = asked
    if sort_by is None and (wanted := statement.get("sort_by")) is not None:
        if wanted in names:
            sort_by = wanted
        else:
            notes.append(f"No run has the score `{wanted}`, so rows are ranked by another.")
    lower = list(lower_is_better)
    for name in statement.get("lower_is_better", []):
        if name in names:
            lower.append(name)
        else:
            notes.append(f"No run has the score `{name}`, of which less was said to be better.")
    summary = summarise(scored, sort_by, reference, list(dict.fromkeys(lower)))
    lacking: dict[str, list[str]] = {"failed": [], "unfinished": [], "lost": list(found.lost)}
    there = {run.folder for run, _ in shown}
    for run in found.runs:
        if run.folder not in there:
            lacking["failed" if run.failed.exists() else "unfinished"].append(run.name)
    for note in notes:
        logger.warning("%s", note.replace("*", ""))
    what = {
        **_environment(shown[0][0]), **statement, "reference": asked, "sort_by": sort_by, "lower_is_better": lower,
        "scores": scores and str(scores), "seeds": sorted({run.seed for run, _ in shown}),
        "store": _store(statement, [tested["store"] for _, tested in shown]), **lacking, "caveats": notes,
    }  # fmt: skip
    with lock(folder / ".report.lock", wait=True):
        write_report(folder, summary, what)
    return summary


def _with_external(
    scored: list[Scored], planned: Mapping[str, Sequence[int]], given: Path | None, remembered: str | None
) -> tuple[list[Scored], list[str], Path | None]:
    """Runs with their scores from elsewhere, what is to be said of these, and where they come from."""
    path = given or (Path(remembered) if remembered else None)
    if path is None:
        return scored, [], None
    try:
        found = read_external(path, planned)
    except ConfigError as error:
        if given is not None:
            raise
        return scored, [f"Without scores from elsewhere: {error}"], None
    merged, waiting = merge_external(scored, found)
    notes = [f"Scores in {path} of runs that are not finished: {'; '.join(waiting)}."] if waiting else []
    return merged, notes, path


def _environment(run: Run) -> dict[str, Any]:
    # An environment knows the teachers and images of one row.
    return {name: value for name, value in run.environment().items() if name not in ("store", "images")}


def _store(statement: Mapping[str, Any], tested: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The features behind the figures: those of the statement, and of runs that were made before it."""
    store = statement.get("store") or {}
    teachers = dict(store.get("teachers") or {})
    for name, teacher in [pair for one in tested for pair in one.get("teachers", {}).items()]:
        # A warning must not get lost behind a record of the same name.
        if name not in teachers or teacher["weights"] == "random":
            teachers[name] = teacher
    return {**store, "teachers": teachers}


def _scored(run: Run, tested: Mapping[str, Any]) -> Scored:
    return Scored(
        row=run.row, seed=run.seed, teachers=run.teachers, options=run.options,
        scores={**tested["after"], **tested["scores"], **run.speed()},
    )  # fmt: skip


_SHOWN = 3
_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """A bar over the optimisation steps of all runs; elsewhere than on a terminal, a line every half minute.

    Args:
        runs: All of the sweep, the finished ones too.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = runs
        self._failed: set[str] = set()
        self._last_line = float("-inf")
        self._started = time.monotonic()
        self._initial = sum(run.progress()[0] for run in runs)
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=sum(run.steps for run in runs), initial=self._initial, unit="step", desc="sweep", dynamic_ncols=True,
            smoothing=0.05, disable=not self._terminal,
        )  # fmt: skip

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._last_line = float("-inf")
        self.update()
        self._bar.close()

    def fail(self, run: Run) -> None:
        """Counts a run as failed."""
        self._failed.add(run.name)

    def say(self, line: str) -> None:
        """Writes a line above the bar."""
        tqdm.write(line, file=sys.stderr)

    def update(self) -> None:
        """Looks at the run folders."""
        if not self._terminal and time.monotonic() - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = time.monotonic()
        steps, total, running, finished = 0, 0, [], 0
        for run in self._runs:
            step, loss = run.progress()
            steps += step
            total += step if run.name in self._failed else run.steps  # what failed is no longer waited for
            if run.finished:
                finished += 1
            elif run.running:
                at = "tests" if run.trained.exists() else f"{step}/{run.steps}"
                running.append(f"{run.name} {at}" + ("" if loss is None else f" loss {loss:.3f}"))
        parts = [f"{finished} of {len(self._runs)} runs done"]
        if self._failed:
            parts.append(f"{len(self._failed)} failed")
        parts += running[:_SHOWN]
        if len(running) > _SHOWN:
            parts.append(f"{len(running) - _SHOWN} more running")
        text = "; ".join(parts)
        if self._terminal:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.total = total
            self._bar.update(steps - self._bar.n)
            self._bar.refresh()
        else:
            elapsed = time.monotonic() - self._started
            # Steps that were there before are no measure of the time left.
            logger.info("%s", tqdm.format_meter(
                steps, total, elapsed, prefix="sweep", unit="step", postfix=text, initial=self._initial, ncols=0,
            ))  # fmt: skip


def forecast(runs: Sequence[Run], arguments: Sequence[str]) -> str:
    """The runs, their commands, what is finished, and the cost, for people.

    Args:
        runs: Of the sweep, at least one.
        arguments: Of ``theia fit``, for all rows.
    """
    lines = [
        tabulate(
            [(run.row, run.seed, _state(run), run.steps, "+".join(run.teachers)) for run in runs],
            ("row", "seed", "state", "steps", "teachers"),
        )
    ]
    lines += ["", "Each is trained, then tested; trained by:"]
    for run in runs:
        own = [*arguments_of(run.options), f"--seed_everything={run.seed}", f"--data.seed={run.seed}"]
        lines.append(shlex.join(["theia", "fit", *arguments, *own, f"--run_folder={run.folder}"]))
    lines += ["", "The first one is tested by this, the others alike:"]
    lines.append(shlex.join(["theia", *Job(runs[0]).commands()[1]]))
    return "\n".join([*lines, "", _cost(runs)])


def _state(run: Run) -> str:
    if run.finished:
        return "finished"
    step, _ = run.progress()
    return f"at step {step}" if step else "to do"


def _cost(runs: Sequence[Run]) -> str:
    finished = [run for run in runs if run.finished]
    left = [(run, run.steps - run.progress()[0]) for run in runs if not run.finished]
    images = sum(steps * run.batch for run, steps in left)
    line = (
        f"{len(finished)} of {len(runs)} runs are finished. To do: {len(left)} runs, "
        f"{sum(steps for _, steps in left):,} steps, {images:,} images"
    )
    if any(run.config["trainer"].get("max_time") for run, _ in left):
        line += " (at most: trainer.max_time may end them before)"
    rates = [rate for run in finished if (rate := run.speed().get("images_per_s"))]
    if not left:
        return line + "."
    if not rates:
        return line + ". How long that takes is known after the first run."
    rate = sum(rates) / len(rates)
    return (
        f"{line}: {_duration(images / rate)} of training, one run after the other, at {rate:,.0f} images/s as in those "
        "that are finished; the tests come on top."
    )


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
