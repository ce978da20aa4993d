"""A checkpoint that is written beside the training is of one moment, and whole whenever the process is killed."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from theia.training.background import Background, LaterCheckpoints, Snapshot
from theia.training.checkpoints import DurableCheckpoints


def test_a_kill_at_any_time_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    for number in range(4):
        path = tmp_path / str(number) / "last.ckpt"
        child = os.fork()
        if child == 0:
            background = Background()
            for step in range(10000):
                values = {"step": step, "weights": torch.full((1_000_000,), step)}
                LaterCheckpoints(background, DurableCheckpoints().save_checkpoint, lambda: None).save_checkpoint(
                    values, path
                )
            os._exit(0)
        while not path.exists():
            time.sleep(0.001)
        time.sleep(0.013 * number)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

        found = torch.load(path, weights_only=True)
        assert torch.equal(found["weights"], torch.full((1_000_000,), found["step"]))


def test_a_snapshot_keeps_values_types_and_layout() -> None:
    layer = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    values = {"state": layer.state_dict(), "groups": [{"betas": (0.9, 0.99), "lr": 0.1}]}
    before = {name: value.clone() for name, value in layer.state_dict().items()}

    snapshot = Snapshot(values)
    with torch.no_grad():
        layer.weight.zero_()
    values["groups"][0]["lr"] = 0.2

    copied = snapshot.values()
    assert copied["groups"] == [{"betas": (0.9, 0.99), "lr": 0.1}]
    assert type(copied["state"]) is type(values["state"])
    assert copied["state"]._metadata == layer.state_dict()._metadata
    assert copied["state"]["weight"].stride() == layer.weight.stride()
    for name, value in before.items():
        assert torch.equal(copied["state"][name], value)


@pytest.mark.gpu
def test_a_snapshot_of_a_gpu_is_of_the_step_that_was_running() -> None:
    weights = torch.zeros(64, 1_000_000, device="cuda")
    for _ in range(50):
        weights += 1
    snapshot = Snapshot({"weights": weights})
    weights.fill_(-1)

    copied = snapshot.values()["weights"]

    assert copied.is_pinned()
    assert bool((copied == 50).all())
