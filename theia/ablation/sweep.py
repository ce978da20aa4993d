"""A sweep carried out, and its report."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from theia.ablation import external, record
from theia.ablation.caveats import caveats
from theia.ablation.hparams import write_hparams
from theia.ablation.job import Job
from theia.ablation.launch import Launcher, run_locally, run_on_slurm
from theia.ablation.lock import lock
from theia.ablation.progress import Progress
from theia.ablation.report import write as write_report
from theia.ablation.run import Run
from theia.ablation.summary import Scored, Summary, summarise
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
    found = record.read(folder)
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
        write_hparams(folder, scored)
    return summary


def _with_external(
    scored: list[Scored], planned: Mapping[str, Sequence[int]], given: Path | None, remembered: str | None
) -> tuple[list[Scored], list[str], Path | None]:
    """Runs with their scores from elsewhere, what is to be said of these, and where they come from."""
    path = given or (Path(remembered) if remembered else None)
    if path is None:
        return scored, [], None
    try:
        found = external.read(path, planned)
    except ConfigError as error:
        if given is not None:
            raise
        return scored, [f"Without scores from elsewhere: {error}"], None
    merged, waiting = external.merge(scored, found)
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
