"""Behaviour cloning: what is fitted, in which order, and that an interruption changes nothing."""

import numpy as np
import pytest
import torch

from theia.errors import CheckpointError
from theia.policies.cloning import Demonstrations, Training, batches, load_head, save_head
from theia.policies.heads import MLPHead
from theia.probing.frame_tokens import FrameTokens

CPU = torch.device("cpu")
LENGTHS = [130, 170]


def seen(components=None):
    """Demonstrations whose action is where a bright token is, and how it moved."""
    rng = np.random.default_rng(0)
    tokens = rng.normal(0, 0.1, (sum(LENGTHS), 36, 4)).astype(np.float16)
    places = rng.integers(0, 36, len(tokens))
    tokens[np.arange(len(tokens)), places, 1] += 2
    actions = np.stack([places // 6 / 5, places % 6 / 5], 1).astype(np.float32)
    flat = tokens.reshape(-1, 4).astype(np.float64)
    kept = FrameTokens(tokens, (6, 6), flat.mean(0), flat.std(0), np.corrcoef(flat, rowvar=False))
    known = rng.normal(size=(len(tokens), 2)).astype(np.float32)
    data = Demonstrations.of(kept, known, actions, LENGTHS)
    return data, lambda: MLPHead(4, (6, 6), 2, 2, components)


def blind(actions):
    known = np.zeros((len(actions), 1), np.float32)
    return Demonstrations.of(None, known, actions.astype(np.float32), [len(actions)]), lambda: MLPHead(0, (1, 1), 1, 2)


@pytest.mark.parametrize("components", [None, 3])
def test_the_tokens_show_more_than_half_of_the_action(tmp_path, components):
    data, make = seen(components)
    training = Training(make, data, 100, tmp_path / "training.pt", CPU)
    training.advance(14)
    assert training.losses[-1] < 0.5 * data.actions.var(0).mean()


def test_without_a_picture_the_loss_ends_at_the_variance_of_the_actions(tmp_path):
    actions = np.random.default_rng(0).normal(size=(512, 2))
    data, make = blind(actions)
    training = Training(make, data, 100, tmp_path / "training.pt", CPU)
    training.advance(99)
    assert training.losses[-1] == pytest.approx(actions.var(0).mean(), rel=0.02)


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path):
    data, make = seen()
    whole = Training(make, data, 100, tmp_path / "whole.pt", CPU)
    whole.advance(3)
    Training(make, data, 100, tmp_path / "part.pt", CPU).advance(1)
    rest = Training(make, data, 100, tmp_path / "part.pt", CPU)
    rest.advance(3)
    assert rest.losses == whole.losses
    for one, other in zip(rest.head.state_dict().values(), whole.head.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_the_seed_decides_weights_and_order(tmp_path):
    data, make = seen()
    losses = []
    for number, seed in enumerate([100, 100, 200]):
        training = Training(make, data, seed, tmp_path / f"{number}.pt", CPU)
        training.advance(0)
        losses.append(training.losses[0])
    assert losses[0] == losses[1] != losses[2]


def test_steps_are_divided_into_batches_of_256_and_none_is_alone():
    assert [len(part) for part in batches(np.arange(600), 256)] == [256, 256, 88]
    assert [len(part) for part in batches(np.arange(513), 256)] == [256, 257]
    assert [len(part) for part in batches(np.arange(3), 256)] == [3]


def test_a_step_is_given_the_frames_before_it_within_its_episode():
    data, make = seen()
    head = make()
    frames, known = data.batch(head, np.array([0, 5, LENGTHS[0]]), CPU)
    tokens = torch.from_numpy(data.tokens.tokens.astype(np.float32))
    maps = head.look(tokens, (6, 6))
    assert torch.equal(frames[0], maps[[0, 0, 0]])
    assert torch.equal(frames[1], maps[[3, 4, 5]])
    assert torch.equal(frames[2], maps[[130, 130, 130]])
    assert torch.equal(known, torch.from_numpy(data.known[[0, 5, 130]]))


def test_a_kept_policy_acts_as_before(tmp_path):
    data, make = seen(3)
    training = Training(make, data, 100, tmp_path / "training.pt", CPU)
    training.advance(0)
    save_head(training.head, tmp_path / "policy.pt", {"encoder": "x"})
    head, about = load_head(tmp_path / "policy.pt")
    frames, known = data.batch(head, np.arange(4), CPU)
    assert about == {"encoder": "x"}
    assert torch.equal(head(frames, known), training.head.eval()(frames, known))


def test_a_damaged_checkpoint_is_named(tmp_path):
    data, make = seen()
    path = tmp_path / "training.pt"
    path.write_bytes(b"PK, no checkpoint")
    with pytest.raises(CheckpointError, match=r"training\.pt cannot be read"):
        Training(make, data, 100, path, CPU)
