"""``python -m benchmarks.evidence``: what helps a small encoder for robots, with seeds and intervals."""

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.command import run_command
from benchmarks.evidence.faults import measure, plant
from benchmarks.evidence.stages import (
    BY_DEFAULT,
    NEEDS,
    SETTINGS,
    WITHOUT_RECORDINGS,
    Plan,
    PresetName,
    chosen,
    command,
    shown,
)
from theia.errors import ConfigError, TheiaError
from theia.utils.arguments import MOST_PROCESSES, check_number, comma_list, seed_numbers
from theia.utils.files import alone, check_folder, read_json, write_whole

_PROG = "python -m benchmarks.evidence"


class EvidenceError(TheiaError):
    """A stage did not come to its end."""


def run(
    data: str | None = None,
    teachers: str | list[str] = "efficientnet,hog,color",
    out: Path = Path("runs/evidence"),
    preset: PresetName = "small",
    seeds: str = "0,1,2",
    stages: str | list[str] | None = None,
    scorers: str = "readout,dense",
    jobs: int = 1,
    options: str | None = None,
    dry_run: bool = False,
) -> str:
    """Trains students of several sets of teachers and with several ingredients, and scores them on recordings.

    The images are frames of the recordings and photographs. Each stage is some commands, which are shown;
    all go on where an interrupted run stopped; finished trainings are kept.

    Args:
        data: Data set folder of LeRobot, FOLDER or FOLDER#CAMERA. Students see frames of its training episodes, and
            are scored by 'theia probe dynamics' on those that are held out. The stage faults needs none.
        teachers: Teachers to distil from, comma-separated or a YAML list. Ingredients are compared with the first two;
            the others are then read out of students that were not distilled from them.
        out: Folder for the store, the sweeps, the probes and the report.
        preset: small trains a student of 0.4 million parameters, minutes a run on a CPU; full trains
            configs/cdiv_tiny.yaml, for a GPU.
        seeds: Seeds of the trainings, separated by commas. Intervals need two or more.
        stages: Any of store, teachers, ingredients, views, sizes, beyond, faults, bounds, proxy and tasks,
            comma-separated; by default all but tasks, which is the robot benchmark with the first seed's students: it
            takes hours and needs the simulator.
        scorers: Scorers of 'theia test', comma-separated, beside the probe on the recordings.
        jobs: Number of trainings at a time.
        options: Further options of 'theia fit' for all trainings, as one text: --options='--trainer.max_epochs 4'.
        dry_run: Only show the commands.

    Returns:
        The report.

    Raises:
        ConfigError: If an option is wrong, or the folder is in use or was made with others.
        TrajectoryError: If the recordings cannot be read.
        EvidenceError: If a command fails.
    """
    check_number("jobs", jobs, 1, MOST_PROCESSES)
    check_folder(out, "--out")
    names = comma_list(teachers)
    if len(names) < 2:
        raise ConfigError(f"--teachers names {', '.join(names) or 'none'}. Give two or more, whose sets are compared.")
    if len(set(names)) < len(names):
        raise ConfigError(f"--teachers names one twice: {', '.join(names)}.")
    wanted = chosen(comma_list(stages) or BY_DEFAULT)
    data = None if data is None else data.removeprefix("lerobot:")
    plan = Plan(
        data or "", _frames(data, wanted), names, seed_numbers(seeds), preset, out, jobs, comma_list(scorers),
        shlex.split(options or ""),
    )  # fmt: skip
    commands = [parts for stage in wanted for parts in plan.commands(stage)]
    if dry_run:
        return "\n".join(map(shown, commands))
    from theia import registry  # imports torch, for which --help should not wait

    for name in names:
        registry.find(name)
    for stage in wanted:
        lacking = [need for need in NEEDS.get(stage, ()) if need not in wanted and not (out / need).is_dir()]
        if lacking:
            every = ",".join(chosen([*wanted, *lacking]))
            raise ConfigError(f"The stage {stage} needs {' and '.join(lacking)}, not found in {out}: --stages {every}.")
    settings = {"data": data, "teachers": list(plan.teachers), "preset": preset, "options": options}
    with alone(out):
        _same_settings(out / SETTINGS, settings)
        for parts in commands:
            print(f"$ {shown(parts)}", flush=True)
            status = subprocess.run(command(parts), check=False).returncode
            if status:
                raise EvidenceError(
                    f"This command ended with status {status}, and said why above. What is finished is kept; run the "
                    "same command again."
                )
    return report(out)


def report(out: Path) -> str:
    """Writes the report of what is finished: evidence.md, evidence.png and evidence.json.

    Args:
        out: Folder of a run.

    Returns:
        The page.

    Raises:
        ConfigError: If the folder is of no run.
    """
    from benchmarks.evidence import findings
    from benchmarks.evidence.report import page, write
    from theia.utils.provenance import machine, versions

    if not (out / SETTINGS).is_file():
        raise ConfigError(f"There is no evidence in {out}. Collect some with: {_PROG} run --data FOLDER --out {out}")
    found = findings.find(out)
    settings = read_json(out / SETTINGS)
    settings["data"] = settings["data"] and Path(settings["data"]).name  # paths mean nothing on another machine
    record = {"settings": settings, "versions": versions(), "machine": machine()}
    return "\n".join([page(found), "", *map(str, write(out, found, record))])


def _frames(data: str | None, stages: Sequence[str]) -> int:
    from theia.trajectories.lerobot import LeRobotFolder

    if data is not None:
        return LeRobotFolder(Path(data.partition("#")[0])).frame_count
    needy = [stage for stage in stages if stage not in WITHOUT_RECORDINGS]
    if needy:
        raise ConfigError(
            f"The stage {needy[0]} needs recordings: give --data FOLDER, or choose --stages "
            f"{','.join(WITHOUT_RECORDINGS)}, which needs none."
        )
    return 0


def _same_settings(path: Path, settings: Mapping[str, object]) -> None:
    if path.is_file():
        earlier = read_json(path)
        different = [name for name, value in settings.items() if earlier.get(name) != value]
        if different:
            raise ConfigError(
                f"{path.parent} was made with {earlier.get(different[0])!r} as --{different[0]}. Give the same, or "
                "another --out."
            )
    else:
        write_whole(path, json.dumps(settings, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        Exit status: 0, 1 for a failure with a message, 130 after Ctrl-C.
    """
    about = "What helps a small encoder for robots, with seeds and intervals."
    return run_command(
        "benchmarks.evidence", about, {"run": run, "report": report, "plant": plant, "measure": measure}, argv
    )


if __name__ == "__main__":
    sys.exit(main())
