"""A sweep: its folder, what it consists of, and carrying it out."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from theia.ablation.external import merge
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

SWEEP = "sweep.json"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other sweeps out of a folder.

    Raises:
        ConfigError: If one is at work there.
    """
    with lock(folder / ".lock") as descriptor:
        if descriptor is None:
            raise ConfigError(f"Another sweep is at work in {folder}. Wait for it, or choose another --out.")
        yield


def prepare(folder: Path, runs: Sequence[Run], statement: Mapping[str, Any]) -> None:
    """Writes down what the sweep consists of. Runs that are there already are kept.

    Args:
        folder: Of the sweep.
        runs: All of it.
        statement: Where it comes from, as plain values.

    Raises:
        ConfigError: If a folder of a run holds one with other options.
    """
    check(runs)
    # More seeds and rows add to what is there.
    asked = {(run.row, run.seed) for run in runs}
    try:
        kept = read(folder)[0] if (folder / SWEEP).exists() else []
    except ConfigError as error:
        logger.warning("%s It is written anew, without rows that are not asked for now.", error)
        kept = []
    everything = [*(run for run in kept if (run.row, run.seed) not in asked), *runs]
    for run in runs:
        run.prepare()
    content = {
        "statement": statement,
        "runs": [
            {
                "row": run.row, "seed": run.seed, "folder": str(run.folder.relative_to(folder)),
                "options": run.options, "steps": run.steps, "scorers": run.scorers, "store_sha256": run.store_sha256,
            }
            for run in everything
        ],
    }  # fmt: skip
    temporary = folder / f"{SWEEP}.tmp"
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(folder / SWEEP)


def check(runs: Sequence[Run]) -> None:
    """Sees that the folders of runs are theirs.

    Raises:
        ConfigError: Lists all that hold a run with other options.
    """
    problems = []
    for run in runs:
        try:
            run.check()
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))


def read(folder: Path) -> tuple[list[Run], dict[str, Any]]:
    """Runs and statement of a sweep.

    Raises:
        ConfigError: If the folder holds none.
    """
    path = folder / SWEEP
    try:
        content = json.loads(path.read_text())
        runs = [
            Run(
                row=run["row"], seed=run["seed"], folder=folder / run["folder"], options=run["options"],
                config=yaml.safe_load((folder / run["folder"] / "fit.yaml").read_text()), steps=run["steps"],
                scorers=tuple(run["scorers"]), store_sha256=run["store_sha256"],
            )
            for run in content["runs"]
        ]  # fmt: skip
        return runs, content["statement"]
    except FileNotFoundError as error:
        raise ConfigError(
            f"{folder} is not the folder of a sweep: there is no {error.filename}. Give the --out of 'theia ablate'."
        ) from error
    except (ValueError, KeyError, TypeError, OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read ({error!r}). Start the sweep again: its runs are kept.") from error


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
            progress.say(f"{job.run.name} failed (exit status {status}); the end of {job.run.log}:")
            progress.say(job.run.last_lines())

        if launcher == "slurm":
            run_on_slurm(jobs, parallel, progress.update, ended, folder / "slurm", slurm)
        else:
            run_locally(jobs, parallel, progress.update, ended)
    return failed


def report(folder: Path, sort_by: str | None = None, scores: Path | None = None) -> Summary | None:
    """Writes table, picture and the rest from what is finished.

    Args:
        folder: Of the sweep.
        sort_by: Column that ranks the rows.
        scores: CSV of external scores.

    Returns:
        What was written; ``None`` if no run is finished.

    Raises:
        ConfigError: If the folder holds no sweep, or a column or row is unknown.
    """
    runs, statement = read(folder)
    scored = [_scored(run) for run in runs if run.finished]
    if not scored:
        return None
    if scores is not None:
        scored = merge(scored, scores)
    reference = statement["reference"] if statement["reference"] in {run.row for run in scored} else None
    if sort_by is None and statement["sort_by"] is not None:
        if any(statement["sort_by"] in run.scores for run in scored):
            sort_by = statement["sort_by"]
        else:
            logger.warning("No finished run has the score %r; rows are ranked by another.", statement["sort_by"])
    summary = summarise(scored, reference=reference, sort_by=sort_by)
    lacking: dict[str, list[str]] = {"failed": [], "unfinished": []}
    for run in runs:
        if not run.finished:
            lacking["failed" if run.failed.exists() else "unfinished"].append(run.name)
    first = next(run for run in runs if run.finished)
    environment = first.environment()
    # Of the whole store, which the statement knows; an environment knows the teachers of one row.
    write_report(folder, summary, {**environment, **statement, **lacking})
    write_hparams(folder, scored)
    return summary


def _scored(run: Run) -> Scored:
    report = run.report
    if report is None:
        raise ValueError(f"{run.name} is not finished")
    return Scored(
        row=run.row, seed=run.seed, teachers=run.teachers, options=run.options,
        scores={**report["after"], **report["scores"], **run.speed()},
    )  # fmt: skip
