"""Runs of a sweep whose `theia` is a small program: it trains by writing lines, and tests by writing a report.

Training stands still before a step that is held, until it is let go or asked to stop.
"""

import sys
from pathlib import Path

from theia.ablation.launch import Job
from theia.ablation.sweep_run import Run

PROGRAM = """
import json, pathlib, signal, sys, time
command, config = sys.argv[1], pathlib.Path(sys.argv[3])
run, steps = config.parent, int(config.read_text())
sys.stderr.write(f"{command} begins\\n")
if command == "fit":
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    path = run / "metrics.csv"
    done = len(path.read_text().splitlines()) - 1 if path.exists() else 0
    with path.open("a") as file:
        if not done:
            file.write("epoch,step,train/images_per_s,train/loss\\n")
        for step in range(done, steps):
            while (run / f"hold_{step}").exists() and not stopped:
                time.sleep(0.01)
            if stopped:
                sys.exit(143)
            file.write(f"0,{step},100.0,{1 / (1 + step)}\\n")
            file.flush()
    (run / "checkpoints").mkdir(exist_ok=True)
    (run / "checkpoints/last.ckpt").touch()
    (run / "environment.json").write_text(json.dumps({"processes": 1, "versions": {}}))
    if (run / "bad").exists():
        sys.exit("the loss is not finite")
else:
    names = sys.argv[-1].split(",")
    store = {"manifest_sha256": "abc"}
    report = {"store": store, "after": {"test/loss": 1.0}, "scores": {}, "scorers": names}
    (run / "test_last.json").write_text(json.dumps(report))
"""


def make_run(folder: Path, row: str = "a", seed: int = 0, steps: int = 4) -> Run:
    config = {"data": {"teachers": ["x"], "batch_size": 8}, "trainer": {"accumulate_grad_batches": 1}}
    run = Run(
        row=row, seed=seed, folder=folder / row / f"seed_{seed}", options={}, config=config, steps=steps,
        scorers=("readout",), store_sha256="abc",
    )  # fmt: skip
    run.folder.mkdir(parents=True, exist_ok=True)
    run.config_file.write_text(str(steps))
    return run


def make_job(run: Run) -> Job:
    return Job(run, program=(sys.executable, "-c", PROGRAM))


def hold(run: Run, step: int) -> Path:
    """Has a training stand still before a step, as long as the file is there that this gives."""
    path = run.folder / f"hold_{step}"
    path.touch()
    return path


def steps(run: Run) -> list[int]:
    """The steps that were trained, in the order in which they were."""
    lines = (run.folder / "metrics.csv").read_text().splitlines()
    return [int(line.split(",")[1]) for line in lines[1:]]


def count(run: Run, command: str) -> int:
    """How often a command was started."""
    return run.log.read_text().count(f"{command} begins\n")
