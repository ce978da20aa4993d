"""The launcher against a SLURM that consists of three small programs: what it submits is run as a cluster would."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import submitit
from ablation.small_sweep import count, hold, make_job, make_run

from theia.ablation.launch import _still_queued, check_launcher, run_on_slurm
from theia.ablation.sweep_run import Run
from theia.errors import ConfigError

# Runs the array at once, in the background, task by task as job 12_0, 12_1, ...; a file tells each one's state.
SBATCH = """#!/usr/bin/env bash
cp "$1" "$FAKE_SLURM/submitted.sh"
tasks=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
for task in $(seq 0 "${tasks:-0}"); do
  echo "12_$task|RUNNING" >> "$FAKE_SLURM/states"
done
(
  for task in $(seq 0 "${tasks:-0}"); do
    SLURM_JOB_ID=12 SLURM_ARRAY_JOB_ID=12 SLURM_ARRAY_TASK_ID=$task SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 \\
    SLURM_NTASKS=1 SLURM_JOB_NODELIST=here SLURM_JOB_NUM_NODES=1 bash "$FAKE_SLURM/submitted.sh"
    sed -i "s/^12_$task|RUNNING/12_$task|COMPLETED/" "$FAKE_SLURM/states"
  done
) > "$FAKE_SLURM/out" 2>&1 &
echo "Submitted batch job 12"
"""
SRUN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do if [[ $1 == *=* || $1 == --unbuffered ]]; then shift; else shift 2; fi; done
exec "$@"
"""
SACCT = """#!/usr/bin/env bash
echo "JobID|State"
cat "$FAKE_SLURM/states"
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, program in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT), ("scancel", "#!/bin/sh\nexit 0\n")):
        (folder / name).write_text(program)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    return folder


def submit(
    runs: list[Run], folder: Path, watch: Callable[[], None] = lambda: None, **options: object
) -> dict[str, int]:
    ended: dict[str, int] = {}
    run_on_slurm(
        [make_job(run) for run in runs], 2, watch, lambda job, code: ended.update({job.run.row: code}),
        folder / "slurm", options,
    )  # fmt: skip
    return ended


@pytest.mark.slow
def test_an_array_of_jobs_is_submitted_and_followed(slurm: Path, tmp_path: Path) -> None:
    check_launcher("slurm", 1)
    runs = [make_run(tmp_path, name) for name in "ab"]
    (runs[1].folder / "bad").touch()

    assert submit(runs, tmp_path, timeout_min=600, slurm_partition="gpu", gpus_per_node=1) == {"a": 0, "b": 1}

    assert runs[0].finished
    script = (slurm / "submitted.sh").read_text()
    for line in (
        "--array=0-1%2", "--gpus-per-node=1", "--job-name=theia-ablate", "--partition=gpu", "--time=600",
        "--signal=USR2@90", "--open-mode=append",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in script


@pytest.mark.slow
def test_jobs_of_a_sweep_that_is_no_more_are_followed_not_submitted_again(slurm: Path, tmp_path: Path) -> None:
    runs = [make_run(tmp_path, name) for name in "ab"]
    held = hold(runs[0], 3)
    before = signal.getsignal(signal.SIGINT)

    class KilledError(BaseException):
        pass

    def die() -> None:
        if runs[0].progress()[0] == 3:
            raise KilledError

    # The fake scancel does nothing, so that the jobs go on as after kill -9 of the sweep.
    with pytest.raises(KilledError):
        submit(runs, tmp_path, die)
    signal.signal(signal.SIGINT, before)
    # What Ctrl-C takes away stays after kill -9.
    assert not list(tmp_path.rglob("slurm_job"))
    for task, run in enumerate(runs):
        (run.folder / "slurm_job").write_text(f"12_{task}")
    states = (slurm / "states").read_text()
    (slurm / "states").write_text("")  # the accounting has not heard of them yet
    submitit.SlurmJob.watcher.clear()
    submitted = {run.row: _still_queued(make_job(run), tmp_path / "slurm") is not None for run in runs}
    assert submitted == {"a": True, "b": True}
    os.utime(runs[0].folder / "slurm_job", (0, 0))  # or never will: it forgets old jobs
    assert _still_queued(make_job(runs[0]), tmp_path / "slurm") is None
    (slurm / "states").write_text(states)
    submitit.SlurmJob.watcher.clear()
    (slurm / "submitted.sh").rename(slurm / "first.sh")
    (slurm / "submitted.sh").write_text((slurm / "first.sh").read_text())

    held.unlink()
    assert submit(runs, tmp_path) == {"a": 0, "b": 0}
    assert [count(run, "fit") for run in runs] == [1, 1]
    assert len((slurm / "states").read_text().splitlines()) == 2


def test_an_unknown_option_is_refused(slurm: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="submitit does not take"):
        submit([make_run(tmp_path)], tmp_path, partition_="gpu")
