"""Behaviour cloning: what is fitted, in which order, and that an interruption changes nothing."""

import numpy as np
import pytest
import torch

from theia import Encoder
from theia.errors import CheckpointError
from theia.models.architecture import Architecture
from theia.policies import cloning
from theia.policies.action_heads import ChunkHead, DiffusionHead, MLPHead
from theia.policies.cloning import FineTuning, Training, load_head, save_head
from theia.policies.demonstrated import Demonstrations
from theia.policies.sight import Sight
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


@pytest.mark.parametrize("make", [ChunkHead, DiffusionHead])
def test_other_heads_go_on_exactly_where_they_were_interrupted(tmp_path, make):
    data, _ = seen()

    def head():
        return make(4, (6, 6), 2, 2, 3)

    whole = Training(head, data, 100, tmp_path / "whole.pt", CPU, 3)
    whole.advance(2)
    Training(head, data, 100, tmp_path / "part.pt", CPU, 3).advance(0)
    rest = Training(head, data, 100, tmp_path / "part.pt", CPU, 3)
    rest.advance(2)
    assert rest.losses == whole.losses
    for one, other in zip(rest.head.state_dict().values(), whole.head.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    save_head(whole.head, tmp_path / "policy.pt", {})
    again, _ = load_head(tmp_path / "policy.pt")
    assert type(again) is make
    frames, known = data.batch(again, np.arange(4), CPU)
    assert torch.equal(again(frames, known), whole.head.eval()(frames, known))


def test_learning_rates_follow_half_a_cosine(tmp_path):
    data, _ = blind(np.zeros((64, 2)))
    training = Training(lambda: DiffusionHead(0, (1, 1), 1, 2), data, 0, tmp_path / "none", CPU, 4)
    rates = []
    step = training._optimizer.step
    training._optimizer.step = lambda: rates.append(training._optimizer.param_groups[0]["lr"]) or step()
    training.advance(3)  # two updates each
    assert rates == pytest.approx([3e-4 * (1 + np.cos(np.pi * update / 8)) / 2 for update in range(8)])


def small_sight():
    torch.manual_seed(0)
    teachers = {"alpha": {"channels": 4, "grid_hw": [4, 4], "has_cls": False}}
    return Sight("small", Encoder(Architecture(teachers=teachers, width=32, depth=2, heads=2, image_size=32)), "mean")


def pictures(steps):
    return np.random.default_rng(0).integers(0, 256, (steps, 3, 32, 32), np.uint8)


def test_an_encoder_that_is_trained_too_gets_the_gradient_of_the_whole_batch(tmp_path, monkeypatch):
    """Encoding a few pictures at a time, twice, is exact."""
    monkeypatch.setattr(cloning, "_AT_ONCE", 5)
    images, rng = pictures(12), np.random.default_rng(1)
    known, actions = rng.normal(size=(12, 2)).astype(np.float32), rng.normal(size=(12, 2)).astype(np.float32)
    data = Demonstrations.of(None, known, actions, [7, 5], lambda rows: images[rows])
    sight = small_sight()
    sight.encoder.unfreeze()
    training = Training(
        lambda: MLPHead(32, (1, 1), 2, 2), data, 0, tmp_path / "none", CPU, tuning=FineTuning(sight, 1e-3)
    )
    training.head.train()
    monkeypatch.setattr(training._optimizer, "step", lambda: None)
    loss = training.step(np.arange(12))
    found = {name: one.grad.clone() for name, one in sight.named_parameters() if one.grad is not None}
    training._optimizer.zero_grad()
    tokens = sight(torch.from_numpy(images)).patches
    frames = training.head.look(tokens, (1, 1))[torch.from_numpy(data.rows)]
    whole = training.head.loss(frames, torch.from_numpy(known), torch.from_numpy(actions)[:, None])
    whole.backward()
    assert loss == pytest.approx(whole.item(), rel=1e-5)
    assert found
    for name, one in sight.named_parameters():
        if one.requires_grad:
            torch.testing.assert_close(found[name], one.grad, rtol=1e-3, atol=1e-7)


def test_fine_tuning_lowers_the_loss_further_than_a_frozen_encoder_and_goes_on_where_it_stopped(tmp_path):
    images = pictures(32)
    actions = np.random.default_rng(1).normal(size=(32, 2)).astype(np.float32)
    data = Demonstrations.of(None, np.zeros((32, 0), np.float32), actions, [16, 16], lambda rows: images[rows])

    def train(name, free, epochs):
        sight = small_sight()
        if free:
            sight.encoder.unfreeze()
        training = Training(
            lambda: MLPHead(32, (1, 1), 0, 2), data, 0, tmp_path / name, CPU, tuning=FineTuning(sight, 1e-3)
        )
        training.advance(epochs - 1)
        return training, sight

    frozen, same = train("frozen", False, 12)
    tuned, changed = train("tuned", True, 12)
    assert tuned.losses[-1] < 0.9 * frozen.losses[-1]
    assert all(torch.equal(one, two) for one, two in zip(same.parameters(), small_sight().parameters(), strict=True))
    train("part", True, 5)
    rest, also = train("part", True, 12)
    assert rest.losses == tuned.losses
    assert all(torch.equal(one, two) for one, two in zip(also.parameters(), changed.parameters(), strict=True))


def test_a_head_of_an_earlier_version_has_no_scale_and_is_read(tmp_path):
    head = MLPHead(0, (1, 1), 3, 2).eval()
    state = {name: tensor for name, tensor in head.state_dict().items() if not name.endswith(("_offset", "_factor"))}
    options = {"channels": 0, "grid": (1, 1), "known": 3, "actions": 2, "components": None}
    torch.save({"options": options, "policy": state, "encoder": "blind"}, tmp_path / "policy.pt")
    again, about = load_head(tmp_path / "policy.pt")
    assert about == {"encoder": "blind"}
    known = torch.randn(4, 3)
    assert torch.equal(again(None, known), head(None, known))
