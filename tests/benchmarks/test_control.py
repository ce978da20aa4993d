"""The rate of control of a policy: what is counted."""

import json

import numpy as np
import pytest

from benchmarks.latency import __main__ as command
from benchmarks.latency import control
from theia.policies.action_heads import ChunkHead, MLPHead
from theia.policies.policy import About, Policy, save_policy
from theia.policies.sight import open_sight


@pytest.fixture
def folder(tmp_path):
    policy = Policy(MLPHead(3, (16, 16), 2, 2, 2), open_sight("pixels", "spatial"), About(32, 20.0))
    save_policy(policy, tmp_path / "policy")
    return tmp_path / "policy"


class Clock:
    """A clock that a policy moves on by a hundredth of a second, and by a tenth where it decides."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


def test_all_actions_of_whole_chunks_are_counted(tmp_path, monkeypatch):
    save_policy(Policy(ChunkHead(0, (1, 1), 1, 1, chunk=5), None, About(32)), tmp_path / "policy")
    clock, act = Clock(), Policy.act

    def slow(self, image=None, state=None):
        clock.now += 0.1 if not self._memories or not self._memories[0].left else 0.01
        return act(self, image, state)

    monkeypatch.setattr(control, "time", clock)
    monkeypatch.setattr(Policy, "act", slow)
    found = control.measure(tmp_path / "policy", 2, 3.0)
    assert found.measures[0].values == pytest.approx([5 / 0.14] * 2)  # four without a decision, and one with it
    assert found.measures[1].values == pytest.approx([10] * 2)
    assert found.measures[2].values == pytest.approx([100] * 2)
    assert np.asarray(found.details["seconds"]).max() == pytest.approx(0.1)


def test_the_command_prints_actions_per_second_and_keeps_every_time(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(control, "_TURN_S", 0.01)
    assert command.main([f"--policy={folder}", "--pairs=2", f"--results={tmp_path / 'results'}"]) == 0
    said = capsys.readouterr().out
    assert "actions/s" in said
    assert "20 actions/s" in said
    (path,) = (tmp_path / "results").glob("control-*.json")
    assert "mlp on pixels, 1 of 1 actions carried out" in json.dumps(json.loads(path.read_text()))


def test_a_policy_and_an_encoder_are_not_measured_together(folder, capsys):
    assert command.main([f"--policy={folder}", "--encoder=x"]) == 1
    assert "Give one of" in capsys.readouterr().err


def test_a_folder_without_a_policy_is_named(tmp_path, capsys):
    assert command.main([f"--policy={tmp_path}", f"--results={tmp_path / 'results'}"]) == 1
    assert "config.json" in capsys.readouterr().err
