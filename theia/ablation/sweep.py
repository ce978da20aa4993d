"""A sweep: its folder, what it consists of, and carrying it out."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from theia.ablation import external
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

SWEEP = "sweep.json"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other sweeps out of a folder, which is made if need be.

    Raises:
        ConfigError: If one is at work there, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except OSError as error:
        raise ConfigError(f"Nothing can be written into {folder}: {error.strerror}. Choose another --out.") from error
    with lock(folder / ".lock") as descriptor:
        if descriptor is None:
            raise ConfigError(f"Another sweep is at work in {folder}. Wait for it, or choose another --out.")
        yield


def with_kept(folder: Path, runs: Sequence[Run]) -> list[Run]:
    """The runs of a sweep and those that are in its folder already: more seeds and rows add to what is there."""
    asked = {(run.row, run.seed) for run in runs}
    try:
        kept = read(folder)[0] if (folder / SWEEP).exists() else []
    except ConfigError as error:
        logger.warning("%s It is written anew, without rows that are not asked for now.", error)
        kept = []
    return [*(run for run in kept if (run.row, run.seed) not in asked), *runs]


def seeds_by_row(runs: Sequence[Run]) -> dict[str, list[int]]:
    """Seeds of each row."""
    found: dict[str, list[int]] = {}
    for run in runs:
        found.setdefault(run.row, []).append(run.seed)
    return found


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
    everything = with_kept(folder, runs)
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
    """Runs and statement of a sweep; ``lost`` in the statement lists runs whose folder is gone or damaged.

    Raises:
        ConfigError: If the folder holds none.
    """
    path = folder / SWEEP
    try:
        content = json.loads(path.read_text())
        runs, lost = [], []
        for run in content["runs"]:
            try:
                config = yaml.safe_load((folder / run["folder"] / "fit.yaml").read_text())
            except (OSError, yaml.YAMLError) as error:
                lost.append(f"{run['row']}, seed {run['seed']}")
                logger.warning("The run %s is lost: %s. The sweep trains it anew if it is asked for.", lost[-1], error)
                continue
            runs.append(
                Run(
                    row=run["row"], seed=run["seed"], folder=folder / run["folder"], options=run["options"],
                    config=config, steps=run["steps"], scorers=tuple(run["scorers"]), store_sha256=run["store_sha256"],
                )
            )  # fmt: skip
        return runs, {**content["statement"], "lost": lost}
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
    runs, statement = read(folder)
    shown = [run for run in runs if run.report is not None]
    if not shown:
        return None
    scored, notes = [_scored(run) for run in shown], caveats(shown)
    scored, more = _with_external(scored, runs, scores, statement.get("scores"))
    notes += more
    if reference is None and statement["reference"] in {run.row for run in scored}:
        reference = statement["reference"]
    names = {name for run in scored for name in run.scores}
    if sort_by is None and statement["sort_by"] is not None:
        if statement["sort_by"] in names:
            sort_by = statement["sort_by"]
        else:
            notes.append(f"No run has the score `{statement['sort_by']}`, so rows are ranked by another.")
    lower = [*lower_is_better, *(name for name in statement.get("lower_is_better", []) if name in names)]
    summary = summarise(scored, sort_by, reference, list(dict.fromkeys(lower)))
    lacking: dict[str, list[str]] = {"failed": [], "unfinished": []}
    for run in runs:
        if run.report is None:
            lacking["failed" if run.failed.exists() else "unfinished"].append(run.name)
    for note in notes:
        logger.warning("%s", note.replace("*", ""))
    # Of the whole store, which the statement knows; an environment knows the teachers of one row.
    write_report(folder, summary, {**shown[0].environment(), **statement, **lacking, "caveats": notes})
    write_hparams(folder, scored)
    return summary


def _with_external(
    scored: list[Scored], runs: Sequence[Run], given: Path | None, remembered: str | None
) -> tuple[list[Scored], list[str]]:
    """Runs with their scores from elsewhere, and what is to be said of these."""
    path = given or (Path(remembered) if remembered else None)
    if path is None:
        return scored, []
    try:
        found = external.read(path, seeds_by_row(runs))
    except ConfigError as error:
        if given is not None:
            raise
        return scored, [f"Without scores from elsewhere: {error}"]
    merged, waiting = external.merge(scored, found)
    return merged, [f"Scores in {path} of runs that are not finished: {'; '.join(waiting)}."] if waiting else []


def _scored(run: Run) -> Scored:
    report = run.report
    if report is None:
        raise ValueError(f"{run.name} is not finished")
    return Scored(
        row=run.row, seed=run.seed, teachers=run.teachers, options=run.options,
        scores={**report["after"], **report["scores"], **run.speed()},
    )  # fmt: skip
