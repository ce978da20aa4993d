"""Behaviour cloning: both heads, both kinds of training, and the command."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from examples.behaviour_cloning import __main__ as command
from examples.behaviour_cloning.demonstrations import (
    Demonstrations,
    colored_square,
    read_demonstrations,
    read_recording,
)
from examples.behaviour_cloning.training import TrainingOptions, blind_error, evaluate, train
from theia import Encoder, load_policy
from theia.errors import ConfigError, DivergenceError, FeatureError, ShapeError
from theia.models.architecture import Architecture
from theia.policies import HeadKind
from theia.policies.cloning import Training
from theia.policies.demonstrated import tokens_in_memory
from theia.policies.sight import Features, Sight

QUIET = TrainingOptions(epochs=2, batch_size=16, progress=False)


def tiny_encoder(image_size: int = 32) -> Encoder:
    torch.manual_seed(0)
    teachers: dict[str, Any] = {"alpha": {"channels": 4, "grid_hw": [4, 4], "has_cls": False}}
    return Encoder(Architecture(teachers=teachers, width=32, depth=2, heads=2, image_size=image_size)).freeze()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``theia fit`` writes it, as far as a load needs."""
    encoder = tiny_encoder(224)
    path = tmp_path_factory.mktemp("runs") / "last.ckpt"
    tensors = {f"distiller.{name}": tensor for name, tensor in encoder.distiller.state_dict().items()}
    torch.save({"hyper_parameters": encoder.architecture.as_dict(), "state_dict": tensors}, path)
    return path


def random_demonstrations(steps: int = 24, state: int = 0) -> Demonstrations:
    generator = torch.Generator().manual_seed(1)
    return Demonstrations(
        images=torch.randint(0, 256, (steps, 32, 32, 3), generator=generator, dtype=torch.uint8),
        actions=torch.randn(steps, 2, generator=generator),
        episodes=torch.arange(steps) // 4,
        proprioception=torch.randn(steps, state, generator=generator) if state else None,
    )


def arrays_of(data: Demonstrations) -> dict[str, Any]:
    return {name: value.numpy() for name, value in vars(data).items() if isinstance(value, torch.Tensor)}


def sight_of(features: Features = "spatial", image_size: int = 32) -> Sight:
    return Sight("tiny", tiny_encoder(image_size), features)


def test_spatial_policy_on_a_frozen_encoder_beats_the_best_constant_on_new_episodes() -> None:
    seen, unseen = colored_square(episodes=120).split(0.2, seed=0)
    options = TrainingOptions(epochs=6, batch_size=16, progress=False)
    policy, losses = train(sight_of(image_size=224), 224, seen, options)
    assert losses[-1] < 0.3 * losses[0]
    assert evaluate(policy, unseen).mean() < 0.7 * blind_error(seen, unseen).mean()


def test_no_policy_beats_the_best_constant_where_the_square_is_not_in_sight() -> None:
    # If this failed, position would leak through something else than the square.
    seen, unseen = colored_square(episodes=60).split(0.2, seed=0)
    order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))
    shuffled = Demonstrations(seen.images[order], seen.actions, seen.episodes)
    options = TrainingOptions(epochs=3, batch_size=32, progress=False)
    policy, _ = train(sight_of(image_size=224), 224, shuffled, options)
    assert evaluate(policy, unseen).mean() > 0.9 * blind_error(shuffled, unseen).mean()


def test_frozen_encoder_sees_each_image_once_and_stays_as_it_was() -> None:
    sight = sight_of("mean")
    before = {name: tensor.clone() for name, tensor in sight.state_dict().items()}
    seen: list[int] = []
    sight.register_forward_hook(lambda module, given, tokens: seen.append(len(given[0])))
    train(sight, 32, random_demonstrations(24), TrainingOptions(epochs=3, batch_size=16, progress=False))
    assert sum(seen) == 24
    assert all(torch.equal(tensor, before[name]) for name, tensor in sight.state_dict().items())


def test_unfrozen_blocks_learn_and_the_others_do_not() -> None:
    sight = sight_of("mean")
    before = {name: tensor.clone() for name, tensor in sight.state_dict().items()}
    assert sight.encoder is not None
    sight.encoder.unfreeze(1)
    train(sight, 32, random_demonstrations(), QUIET)
    changed = {name for name, tensor in sight.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any("blocks.1." in name for name in changed)
    assert all("blocks.1." in name or "model.norm." in name for name in changed)


@pytest.mark.parametrize("head", ["mlp", "chunk"])
def test_proprioception_alone_can_be_learnt(head: HeadKind) -> None:
    data = random_demonstrations(64, state=2)
    data = Demonstrations(data.images, 100 * data.proprioception + 7, data.episodes, data.proprioception)  # type: ignore[operator]
    options = TrainingOptions(epochs=60, batch_size=16, learning_rate=1e-3, progress=False)
    policy, losses = train(sight_of("mean"), 32, data, options, head, 1)
    assert losses[-1] < 0.2 * losses[0]
    # In the units of the demonstrations, not standardised.
    assert evaluate(policy, data).mean() < 0.5 * data.actions.std()


def test_steps_of_episodes_that_were_recorded_in_turn_are_put_in_order() -> None:
    data = random_demonstrations(12)
    turns = torch.arange(12).reshape(3, 4).T.flatten()
    ordered = data[turns].in_order()
    assert ordered.lengths == [4, 4, 4]
    assert torch.equal(ordered.actions, data.actions)


def test_cached_features_are_those_of_the_encoder() -> None:
    sight, images = sight_of("max"), random_demonstrations(20).images
    batches = (part.permute(0, 3, 1, 2).numpy() for part in images.split(8))
    found = tokens_in_memory(sight, batches, 20, torch.device("cpu"))
    expected = sight.encoder(images, pool="max")  # type: ignore[misc]
    torch.testing.assert_close(torch.from_numpy(found.tokens[:, 0]).float(), expected, atol=2e-3, rtol=2e-3)


def test_images_of_another_size_are_resized() -> None:
    data = Demonstrations(torch.full((1, 50, 70, 3), 130, dtype=torch.uint8), torch.zeros(1, 2), torch.zeros(1))
    assert np.array_equal(data.pictures(np.array([0]), 32), np.full((1, 3, 32, 32), 130))


def test_same_seed_gives_the_same_policy() -> None:
    runs = [train(sight_of("mean"), 32, random_demonstrations(), QUIET, seed=5)[1] for _ in range(2)]
    assert runs[0] == runs[1]
    assert train(sight_of("mean"), 32, random_demonstrations(), QUIET, seed=6)[1] != runs[0]


def test_split_holds_out_whole_episodes() -> None:
    seen, unseen = random_demonstrations(24).split(0.3, seed=0)
    assert set(seen.episodes.tolist()).isdisjoint(unseen.episodes.tolist())
    assert len(seen) + len(unseen) == 24
    assert len(unseen) == 8


@pytest.mark.parametrize("kind", ["npz", "h5"])
def test_demonstrations_come_back_from_a_file(tmp_path: Path, kind: str) -> None:
    data = random_demonstrations(state=3)
    arrays = arrays_of(data)
    path = tmp_path / f"demonstrations.{kind}"
    if kind == "npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for name, value in arrays.items():
                file[name] = value
    read = read_demonstrations(path)
    assert arrays_of(read).keys() == arrays_of(data).keys()
    assert all(np.array_equal(value, arrays_of(read)[name]) for name, value in arrays_of(data).items())


def test_a_recording_of_lerobot_becomes_a_policy_that_knows_its_names_and_rate(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow")
    from theia.trajectories.lerobot import LeRobotFolder
    from theia.trajectories.lerobot_writer import LeRobotWriter

    values = {"action": ["dx", "dy"], "observation.state": ["x"]}
    writer = LeRobotWriter(tmp_path / "data", 20, values, {"observation.images.top": (16, 16)}, ["reach"], "image")
    for number, length in enumerate((3, 5, 4)):
        frames = np.full((length, 16, 16, 3), 10 * number, np.uint8)
        rows = {
            "action": np.full((length, 2), number, np.float32),
            "observation.state": np.ones((length, 1), np.float32),
        }
        writer.write(number, "reach", rows, {"observation.images.top": frames}, {})
    writer.finish()
    data = read_recording(LeRobotFolder(tmp_path / "data"), "top", 32)
    assert data.lengths == [3, 5, 4]
    assert data.images.shape == (12, 32, 32, 3)
    assert torch.equal(data.images[:, 0, 0, 0].int(), 10 * data.episodes.int())
    assert torch.equal(data.actions[:, 1].int(), data.episodes.int())
    options = [f"--demonstrations={tmp_path / 'data'}", "--features=mean", "--training.epochs=1", "--device=cpu"]
    arguments = [f"--encoder={checkpoint}", f"--output={tmp_path / 'policy'}", *options]
    assert command.main(arguments) == 0
    policy = load_policy(tmp_path / "policy")
    assert (policy.about.frames_per_s, policy.about.action_names, policy.about.state_names) == (
        20,
        ("dx", "dy"),
        ("x",),
    )
    assert policy.act(np.zeros((16, 16, 3), np.uint8), [1.0]).shape == (2,)
    assert command.main([*arguments, f"--output={tmp_path / 'other'}", "--camera=wrist"]) == 1
    assert "wrist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a.pop("episodes"), ConfigError, "no array 'episodes'"),
        (lambda a: a.update(images=a["images"].astype(np.float32)), ShapeError, "float32"),
        (lambda a: a.update(actions=a["actions"][:-1]), ShapeError, "one entry for each of the 24 images"),
        (lambda a: a["actions"].__setitem__(0, np.nan), FeatureError, "no numbers"),
    ],
)
def test_unusable_demonstrations_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], error: type[Exception], message: str
) -> None:
    arrays = arrays_of(random_demonstrations())
    change(arrays)
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(error, match=message):
        read_demonstrations(tmp_path / "bad.npz")


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "bad.npz"
    np.savez_compressed(path, **arrays_of(random_demonstrations()))
    content = path.read_bytes()
    flipped = content[:200] + bytes(20) + content[220:]
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "flipped": flipped}[damage])
    with pytest.raises(ConfigError, match=r"bad\.npz cannot be read as \.npz or HDF5"):
        read_demonstrations(path)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"learning_rate": 0.0}, {"epochs": 0}])
def test_training_without_any_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="at least 2, at least 1, and above 0"):
        train(sight_of(), 32, random_demonstrations(), TrainingOptions(**options, progress=False))


def test_grid_too_small_for_the_convolutions_is_refused() -> None:
    with pytest.raises(ConfigError, match="6x6"):
        train(sight_of(), 32, random_demonstrations(), QUIET)


def test_a_loss_that_is_no_number_stops_the_training() -> None:
    options = TrainingOptions(epochs=2, learning_rate=1e30, progress=False)
    with pytest.raises(DivergenceError, match="in epoch"):
        train(sight_of("mean"), 32, random_demonstrations(), options, seed=1)


def test_command_saves_a_policy_that_acts_as_it_did(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random_demonstrations(32)
    np.savez(tmp_path / "d.npz", **arrays_of(data))
    output = tmp_path / "out" / "policy"
    arguments = [
        f"--encoder={checkpoint}", f"--demonstrations={tmp_path / 'd.npz'}", f"--output={output}", "--features=mean",
        "--device=cpu", "--training.epochs=2", "--training.progress=false",
    ]  # fmt: skip
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    policy = load_policy(output)
    error = evaluate(policy, data.split(0.2, seed=0)[1])
    assert all(f"{value:.4g}" in printed for value in error.tolist())
    assert [path.name for path in output.parent.iterdir()] == ["policy"]

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert command.main([*arguments, f"--output={tmp_path / 'full'}"]) == 1
    assert "Disk full while writing" in capsys.readouterr().err
    assert not (tmp_path / "full").exists()
    # A second run must not write over the first.
    assert command.main(arguments) == 1
    assert "exists" in capsys.readouterr().err


def test_an_interrupted_training_goes_on_and_ends_with_the_same_policy(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "d.npz", **arrays_of(random_demonstrations(32)))
    arguments = [
        f"--encoder={checkpoint}", f"--demonstrations={tmp_path / 'd.npz'}", "--features=mean", "--device=cpu",
        "--training.epochs=4", "--training.progress=false",
    ]  # fmt: skip
    assert command.main([*arguments, f"--output={tmp_path / 'whole'}"]) == 0
    advance = Training.advance

    def interrupted(training: Training, epoch: int) -> None:
        if epoch == 2:
            raise KeyboardInterrupt
        advance(training, epoch)

    cut = [*arguments, f"--output={tmp_path / 'cut'}"]
    with monkeypatch.context() as patch:
        patch.setattr(Training, "advance", interrupted)
        assert command.main(cut) == 130
    trained = []
    monkeypatch.setattr(Training, "advance", lambda self, epoch: (trained.append(epoch), advance(self, epoch)))
    assert command.main(cut) == 0

    assert trained == [2, 3]
    assert "Goes on" in capsys.readouterr().err
    assert not list(tmp_path.glob("cut.unfinished*"))
    whole, other = (load_policy(tmp_path / name).head.state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], other[name]) for name in whole)
