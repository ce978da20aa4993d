"""What a sweep is going to do: its runs, their commands, what is finished, and the cost."""

import shlex
from collections.abc import Sequence

from tabulate import tabulate

from theia.ablation.grid import arguments_of
from theia.ablation.job import Job
from theia.ablation.run import Run


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
