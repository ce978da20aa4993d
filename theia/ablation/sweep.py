"""A sweep from its runs to its report: carried out, with its progress; forecast; and reported on."""

import logging
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from tabulate import tabulate
from tqdm import tqdm

from theia.ablation.grid import arguments_of
from theia.ablation.launch import Job, Launcher, run_locally, run_on_slurm
from theia.ablation.record import read_record
from theia.ablation.report import write_report
from theia.ablation.summary import Scored, Summary, caveats, merge_external, read_external, summarise
from theia.ablation.sweep_run import Run
from theia.errors import ConfigError

logger = logging.getLogger(__name__)

_RUNS_SHOWN = 3
_SECONDS_BETWEEN_LINES = 30.0


def carry_out(
    folder: Path, runs: Sequence[Run], launcher: Launcher, parallel: int, slurm: Mapping[str, Any]
) -> list[Run]:
    """Trains and tests the runs that are not finished.

    Args:
        folder: Folder of the sweep.
        runs: All runs of the sweep.
        launcher: Where to run.
        parallel: Number of runs at a time.
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
            how = f"exit status {status}" if status else "scores are missing: the same command tries again"
            progress.say(f"{job.run.name} failed ({how}); the end of {job.run.log}:")
            progress.say(job.run.last_lines())

        if launcher == "slurm":
            run_on_slurm(jobs, parallel, progress.update, ended, folder / "slurm", slurm)
        else:
            run_locally(jobs, parallel, progress.update, ended)
    return failed


class Progress:
    """Shows the optimisation steps of all runs: as a bar on a terminal, elsewhere as a line every half minute.

    Args:
        runs: All runs of the sweep, those that are finished included.
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
        """Writes a line, above the bar if there is one."""
        tqdm.write(line, file=sys.stderr)

    def update(self) -> None:
        """Reads the progress from the run folders."""
        if not self._terminal and time.monotonic() - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = time.monotonic()
        steps, total, running, finished = 0, 0, [], 0
        for run in self._runs:
            step, loss = run.progress()
            steps += step
            total += step if run.name in self._failed else run.steps  # the rest of a failed run will not come
            if run.finished:
                finished += 1
            elif run.running:
                at = "tests" if run.trained.exists() else f"{step}/{run.steps}"
                running.append(f"{run.name} {at}" + ("" if loss is None else f" loss {loss:.3f}"))
        parts = [f"{finished} of {len(self._runs)} runs done"]
        if self._failed:
            parts.append(f"{len(self._failed)} failed")
        parts += running[:_RUNS_SHOWN]
        if len(running) > _RUNS_SHOWN:
            parts.append(f"{len(running) - _RUNS_SHOWN} more running")
        text = "; ".join(parts)
        if self._terminal:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.total = total
            self._bar.update(steps - self._bar.n)
            self._bar.refresh()
        else:
            elapsed = time.monotonic() - self._started
            # The steps of earlier sweeps say nothing about the time left.
            logger.info("%s", tqdm.format_meter(
                steps, total, elapsed, prefix="sweep", unit="step", postfix=text, initial=self._initial, ncols=0,
            ))  # fmt: skip


def forecast(runs: Sequence[Run], arguments: Sequence[str]) -> str:
    """Text about what a sweep would do: its runs, their commands, which are finished, and the cost.

    Args:
        runs: All runs of the sweep, at least one.
        arguments: Arguments of ``theia fit`` for all rows.
    """
    lines = [
        tabulate(
            [(run.row, run.seed, _state(run), run.steps, "+".join(run.teachers)) for run in runs],
            ("row", "seed", "state", "steps", "teachers"),
        )
    ]
    lines += ["", "Each run is trained, then tested. Trained by:"]
    for run in runs:
        own = [*arguments_of(run.options), f"--seed_everything={run.seed}", f"--data.seed={run.seed}"]
        lines.append(shlex.join(["theia", "fit", *arguments, *own, f"--run_folder={run.folder}"]))
    lines += ["", "The first run is tested by this command, the others likewise:"]
    lines.append(shlex.join(["theia", *Job(runs[0]).commands()[1]]))
    return "\n".join([*lines, "", _cost(runs)])


def _state(run: Run) -> str:
    if run.finished:
        return "finished"
    if run.trained.exists():
        return "to test"
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
        line += " (at most: trainer.max_time may end them earlier)"
    rates = [rate for run in finished if (rate := run.speed().get("images_per_s"))]
    if not left:
        return line + "."
    if not rates:
        return line + ". The time that takes is known after the first run."
    rate = sum(rates) / len(rates)
    return (
        f"{line}: {_duration(images / rate)} of training, one run after the other, at {rate:,.0f} images/s as in the "
        "finished runs. The tests come on top."
    )


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def report(
    folder: Path,
    sort_by: str | None = None,
    scores: Path | None = None,
    reference: str | None = None,
    lower_is_better: Sequence[str] = (),
) -> Summary | None:
    """Writes the report from the runs that are finished.

    A choice that is not given is the one in the sweep's record. If that cannot be kept, for instance because no run has
    such a score yet, the report says so; it is not an error.

    Args:
        folder: Folder of the sweep.
        sort_by: Score that ranks the rows.
        scores: CSV file with scores measured elsewhere.
        reference: Row that the others are compared with.
        lower_is_better: Scores for which less is better, beside losses and costs.

    Returns:
        What was written; ``None`` if no run has scores.

    Raises:
        ConfigError: If the folder is not that of a sweep, or a score or row that is given is unknown.
        FileError: If something cannot be written, for instance on a full disk.
    """
    record = read_record(folder)
    kept = record.provenance
    # Each is read once: a run may end meanwhile.
    shown = [(run, tested) for run in record.runs if (tested := run.report) is not None]
    if not shown:
        return None
    scored, notes = [_scored(run, tested) for run, tested in shown], caveats(shown)
    scored, more, scores = _with_external(scored, record.planned, scores, kept.get("scores"))
    notes += more
    names = {name for run in scored for name, value in run.scores.items() if math.isfinite(value)}
    asked = reference or kept.get("reference")
    if reference is None and asked in {run.row for run in scored}:
        reference = asked
    if sort_by is None and (wanted := kept.get("sort_by")) is not None:
        if wanted in names:
            sort_by = wanted
        else:
            notes.append(f"No run has the score `{wanted}`, so rows are ranked by another.")
    lower = list(lower_is_better)
    for name in kept.get("lower_is_better", []):
        if name in names:
            lower.append(name)
        else:
            notes.append(f"No run has the score `{name}`, for which less is better.")
    summary = summarise(scored, sort_by, reference, list(dict.fromkeys(lower)))
    lacking: dict[str, list[str]] = {"failed": [], "unfinished": [], "lost": list(record.lost)}
    there = {run.folder for run, _ in shown}
    for run in record.runs:
        if run.folder not in there:
            lacking["failed" if run.failed.exists() else "unfinished"].append(run.name)
    for note in notes:
        logger.warning("%s", note.replace("*", ""))
    provenance = {
        **_environment(shown[0][0]), **kept, "reference": asked, "sort_by": sort_by, "lower_is_better": lower,
        "scores": scores and str(scores), "seeds": sorted({run.seed for run, _ in shown}),
        "store": _store(kept, [tested["store"] for _, tested in shown]), **lacking, "caveats": notes,
    }  # fmt: skip
    with FileLock(folder / ".report.lock"):
        write_report(folder, summary, provenance)
    return summary


def _scored(run: Run, tested: Mapping[str, Any]) -> Scored:
    return Scored(
        row=run.row, seed=run.seed, teachers=run.teachers, options=run.options,
        scores={**tested["after"], **tested["scores"], **run.speed()},
    )  # fmt: skip


def _with_external(
    scored: list[Scored], planned: Mapping[str, Sequence[int]], given: Path | None, remembered: str | None
) -> tuple[list[Scored], list[str], Path | None]:
    """Adds scores measured elsewhere; also gives notes on them, and the file they come from."""
    path = given or (Path(remembered) if remembered else None)
    if path is None:
        return scored, [], None
    try:
        found = read_external(path, planned)
    except ConfigError as error:
        if given is not None:
            raise
        return scored, [f"Without the scores measured elsewhere: {error}"], None
    merged, waiting = merge_external(scored, found)
    notes = [f"{path} has scores of runs that are not finished: {'; '.join(waiting)}."] if waiting else []
    return merged, notes, path


def _environment(run: Run) -> dict[str, Any]:
    # Of the store and the images it knows what this run used, and another row may differ in that.
    return {name: value for name, value in run.environment().items() if name not in ("store", "images")}


def _store(provenance: Mapping[str, Any], tested: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Provenance of the features: of those in the record, and of runs that were tested before it was written."""
    store = provenance.get("store") or {}
    teachers = dict(store.get("teachers") or {})
    for name, teacher in [pair for one in tested for pair in one.get("teachers", {}).items()]:
        # Random weights must not go unnoticed behind another teacher of the same name.
        if name not in teachers or teacher["weights"] == "random":
            teachers[name] = teacher
    return {**store, "teachers": teachers}
