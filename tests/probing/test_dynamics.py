"""Discs that move in a known way: what an encoder that sees them, one that does not, and shuffled frames lead to."""

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor
from trajectories.discs import CAMERA, EPISODES, FRAMES, HORIZON, SIDE, paths, pictures, record

from theia.errors import ConfigError, FileError, TrajectoryError
from theia.models.backbone import StudentTokens
from theia.probing import dynamics as module
from theia.probing.datasets import temporary
from theia.probing.dynamics import dynamics
from theia.probing.frame_tokens import embed, pixel_means
from theia.probing.motion import _compare_states, choose_target, make_pairs, open_recordings, standardised_state
from theia.probing.ridge import Line, absolute_penalty, fit, measure, solve
from theia.probing.token_transformer import Rule, fit_and_predict
from theia.trajectories.lerobot import LeRobotFolder
from theia.trajectories.lerobot_writer import LeRobotWriter


def coordinates(images: Tensor) -> StudentTokens:
    """The perfect encoder: where the red disc is, in 0..1, as two tokens."""
    red = (images[:, 0] > 128).float()
    size = images.shape[-1]
    place = torch.arange(size, dtype=torch.float32) / size
    x = (red.sum(1) * place).sum(1) / red.sum((1, 2))
    y = (red.sum(2) * place).sum(1) / red.sum((1, 2))
    tokens = torch.stack([torch.stack([x, y], 1), torch.stack([y, x], 1)], 1)
    return StudentTokens(None, tokens[:, :0], tokens, (1, 2))


def noise(images: Tensor) -> StudentTokens:
    tokens = torch.ones(len(images), 2, 3)
    return StudentTokens(None, tokens[:, :0], tokens, (1, 2))


@pytest.fixture(autouse=True)
def own_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"perfect": coordinates, "constant": noise}
    monkeypatch.setattr(module, "open_encoder", lambda name, device, controls: known[name])


def run(
    out: Path, train: Path | str, encoders: list[str], tests: list[str] | None = None, **options: Any
) -> dict[str, Any]:
    given: dict[str, Any] = {
        "camera": None, "horizon": HORIZON, "target": None, "readout": "ridge", "preset": "small", "seeds": [0],
        "reference": None, "device": torch.device("cpu"), "batch_size": 8,
    } | options  # fmt: skip
    result = dynamics(encoders, f"lerobot:{train}", tests or [], out, **given)
    assert all(file.is_file() for file in result.files)
    found: dict[str, Any] = json.loads(result.files[0].read_text())
    return found


def blind_error(seed: int = 0) -> float:
    """Mean absolute deviation of the held-out targets from the training mean, in training deviations."""
    moved = paths(seed)[:, HORIZON:] - paths(seed)[:, :-HORIZON]
    held = np.arange(EPISODES) % 5 == 4
    mean, deviation = moved[~held].mean((0, 1)), moved[~held].std((0, 1))
    return float((np.abs(moved[held] - mean) / deviation).mean())


def test_a_perfect_encoder_reaches_zero_and_a_blind_one_the_deviation(tmp_path: Path) -> None:
    found = run(tmp_path / "out", record(tmp_path / "data"), ["perfect", "constant"])["summary"]
    for question in ("plan", "motion"):
        assert found["perfect"][question]["mean"] < 0.08
        assert found["blind"][question]["mean"] == pytest.approx(blind_error(), rel=1e-6)
        assert found["constant"][question]["mean"] == pytest.approx(blind_error(), rel=1e-6)
        assert found["blind"][question]["difference"]["low"] > 0.3
    # The state tells where the disc is, and so what comes.
    assert found["state"]["plan"]["mean"] < 1e-3


def test_intervals_over_too_few_episodes_are_said(tmp_path: Path) -> None:
    few = run(tmp_path / "few", record(tmp_path / "data"), ["constant"], [])["notes"]
    assert not any("intervals say nothing" in note for note in few)
    other = record(tmp_path / "other", seed=3, episodes=2)
    notes = run(tmp_path / "out", record(tmp_path / "again"), ["constant"], [str(other)])["notes"]
    assert any(note.startswith("Only 2 episodes of other are tested on") for note in notes)


def test_frames_shuffled_among_episodes_tell_nothing(tmp_path: Path) -> None:
    found = run(tmp_path / "out", record(tmp_path / "data", shuffled=True), ["perfect"])["summary"]
    blind = found["blind"]["plan"]["mean"]
    assert found["perfect"]["plan"]["mean"] == pytest.approx(blind, abs=0.2 * blind)


def test_a_second_data_set_is_tested_on_and_never_fitted_on(tmp_path: Path) -> None:
    train, other = record(tmp_path / "data"), record(tmp_path / "other", seed=3)
    found = run(tmp_path / "out", train, ["perfect"], [str(other)])
    assert found["tested episodes"] == {"data": [4, 9, 14, 19, 24], "other": list(range(EPISODES))}
    assert found["summary"]["perfect"]["plan, other"]["mean"] < 0.1
    alone = run(tmp_path / "alone", train, ["perfect"])
    assert alone["errors"]["perfect"]["plan"]["data"] == found["errors"]["perfect"]["plan"]["data"]


def test_through_another_camera_held_out_episodes_stay_held_out(tmp_path: Path) -> None:
    train = record_with_two_cameras(tmp_path / "data")
    found = run(tmp_path / "out", f"{train}#top", ["perfect"], [f"{train}/#side"])
    held = [4, 9, 14, 19, 24]
    assert found["tested episodes"] == {"data#top": held, "data#side": held}
    assert found["summary"]["perfect"]["plan, data#top"]["mean"] < 0.1  # the other camera sees nothing
    assert found["summary"]["perfect"]["plan, data#side"]["mean"] > 0.3


@pytest.mark.parametrize("again", ["data", "data/", "other/../data#top"])
def test_a_data_set_is_not_tested_on_twice(tmp_path: Path, again: str) -> None:
    train = record(tmp_path / "data")
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="data with a camera that it is fitted on"):
        run(tmp_path / "out", train, ["perfect"], [f"{tmp_path}/{again}"])
    assert not (tmp_path / "out").exists()


def test_a_camera_for_all_and_one_of_a_data_set_are_refused_together(tmp_path: Path) -> None:
    train = record_with_two_cameras(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"--camera top is for all data sets, and .*data#side names a camera too"):
        open_recordings(str(train), [f"{train}#side"], "top", HORIZON, None)


def test_a_moved_data_set_is_the_same(tmp_path: Path) -> None:
    before = open_recordings(str(record(tmp_path / "data")), [], None, HORIZON, None)[0][0].identity
    (tmp_path / "data").rename(tmp_path / "moved")
    assert open_recordings(f"{tmp_path}/./moved", [], None, HORIZON, None)[0][0].identity == before


def test_the_state_is_standardised_by_the_fitted_episodes(tmp_path: Path) -> None:
    recordings, _, _ = open_recordings(str(record(tmp_path / "data")), [], None, HORIZON, None)
    state = standardised_state(recordings[0], recordings[0]).reshape(EPISODES, FRAMES, 2)
    fitted = state[np.arange(EPISODES) % 5 != 4]
    np.testing.assert_allclose(fitted.mean((0, 1)), 0, atol=1e-12)
    np.testing.assert_allclose(fitted.std((0, 1)), 1, atol=1e-12)


def record_with_two_cameras(root: Path) -> Path:
    """Discs before the first camera, and nothing before the second."""
    side = "observation.images.side"
    writer = LeRobotWriter(
        root, 10, {"observation.state": ["x", "y"]}, {CAMERA: (SIDE, SIDE), side: (SIDE, SIDE)}, ["reach"], "image"
    )
    for index, path in enumerate(paths()):
        seen = pictures(path)
        nothing = np.full_like(seen, 200)
        writer.write(index, "reach", {"observation.state": path}, {CAMERA: seen, side: nothing})
    writer.finish()
    return root


def test_an_interrupted_embedding_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    folder = LeRobotFolder(record(tmp_path / "data"))
    fitted = frozenset(range(EPISODES)) - folder.held_out_episodes()
    calls = 0

    def interrupted(images: Tensor) -> StudentTokens:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return coordinates(images)

    def embedded(encoder: Any, place: str) -> Any:
        return embed(encoder, "x", folder, CAMERA, fitted, tmp_path / place, torch.device("cpu"), 8, 7)

    import theia.probing.frame_tokens as frame_tokens

    whole = embedded(coordinates, "whole")
    before = frame_tokens._SAVE_EVERY_S
    frame_tokens._SAVE_EVERY_S = 0.0
    try:
        with pytest.raises(KeyboardInterrupt):
            embedded(interrupted, "parts")
        calls = -1000
        again = embedded(interrupted, "parts")
    finally:
        frame_tokens._SAVE_EVERY_S = before
    assert calls == -1000 + EPISODES * 2 - 8  # four episodes of two batches were kept
    np.testing.assert_array_equal(whole.tokens, again.tokens)
    np.testing.assert_allclose(whole.mean, again.mean, rtol=1e-12)
    np.testing.assert_allclose(whole.correlation, again.correlation, atol=1e-9)


def test_a_disk_without_room_for_the_tokens_is_named_before_any_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = LeRobotFolder(record(tmp_path / "data"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(FileError, match="Disk full while writing"):
        embed(coordinates, "x", folder, CAMERA, frozenset(), tmp_path / "e", torch.device("cpu"), 8, 7)
    assert not any((tmp_path / "e").iterdir())
    with pytest.raises(FileError, match="Disk full"), temporary(True, tmp_path) as storage:
        storage.empty((4, 4), np.float32)


@pytest.mark.parametrize(("most_rows", "rows"), [(None, 16), (20, 16), (16, 16), (4, 4)])
def test_only_a_grid_that_is_too_fine_is_averaged(tmp_path: Path, most_rows: int | None, rows: int) -> None:
    folder = LeRobotFolder(record(tmp_path / "data"))
    found = embed(pixel_means, "x", folder, CAMERA, frozenset(), tmp_path / "e", torch.device("cpu"), 8, most_rows)
    fine = embed(pixel_means, "x", folder, CAMERA, frozenset(), tmp_path / "f", torch.device("cpu"), 8, None)
    blocks = np.asarray(fine.tokens, np.float64).reshape(-1, rows, 16 // rows, rows, 16 // rows, 3).mean((2, 4))
    assert found.grid == (rows, rows)
    np.testing.assert_allclose(found.tokens.reshape(blocks.shape), blocks, rtol=2e-3)


def test_mean_and_correlation_are_those_of_the_training_tokens(tmp_path: Path) -> None:
    folder = LeRobotFolder(record(tmp_path / "data"))
    fitted = frozenset(range(EPISODES)) - folder.held_out_episodes()
    found = embed(pixel_means, "x", folder, CAMERA, fitted, tmp_path / "e", torch.device("cpu"), 8, None)
    training = np.concatenate([found.tokens[i * FRAMES : (i + 1) * FRAMES] for i in sorted(fitted)]).reshape(-1, 3)
    np.testing.assert_allclose(found.mean, training.astype(np.float64).mean(0), atol=1e-4)
    np.testing.assert_allclose(found.deviation, training.astype(np.float64).std(0), atol=1e-4)
    np.testing.assert_allclose(found.correlation, np.corrcoef(training.astype(np.float64).T), atol=1e-3)


def test_ridge_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    x, noise_of = rng.normal(size=(5000, 12)) * np.arange(1, 13) + 3, rng.normal(size=(5000, 2))
    y = x @ rng.normal(size=(12, 2)) + noise_of
    moments = measure(lambda places: x[places], np.arange(5000), y)
    for penalty in (1e-6, 1e-2, 10.0):
        line = solve(moments, y, penalty)
        peer = Ridge(absolute_penalty(moments, penalty)).fit(x, y)
        np.testing.assert_allclose(line.weights, peer.coef_.T, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(line.offset, peer.intercept_, rtol=1e-8)


def test_the_penalty_is_the_one_that_does_best_on_other_episodes() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 50))
    y = rng.normal(size=(60, 1))  # nothing to learn: the strongest penalty is best
    checked = np.arange(60) >= 40
    _, penalty = fit(lambda places: x[places], np.arange(60), y, checked)
    assert penalty == max(module_penalties())
    y = x @ rng.normal(size=(50, 1)) + 1e-6 * rng.normal(size=(60, 1))
    x_many = rng.normal(size=(600, 50))
    y_many = x_many @ rng.normal(size=(50, 1))
    _, penalty = fit(lambda places: x_many[places], np.arange(600), y_many, np.arange(600) >= 400)
    assert penalty == min(module_penalties())


def module_penalties() -> tuple[float, ...]:
    from theia.probing.ridge import PENALTIES

    return PENALTIES


def test_a_line_does_not_run_off() -> None:
    line = Line(np.eye(1), np.zeros(1), (np.zeros(1), np.ones(1)), (np.zeros(1), np.full(1, 0.5)))
    np.testing.assert_array_equal(line.predict(np.array([[-9.0], [0.2], [0.7], [9.0]]))[:, 0], [0, 0.2, 0.5, 0.5])


def test_targets_follow_from_what_actions_are(tmp_path: Path) -> None:
    absolute, relative = (LeRobotFolder(record(tmp_path / str(kind), absolute=kind)) for kind in (True, False))
    assert choose_target(absolute, None)[0] == "action"
    assert choose_target(relative, None)[0] == "displacement"
    assert choose_target(absolute, "mean_action")[0] == "mean_action"
    # Following positions are where the robot is a frame later: both targets are the same there.
    one, two = make_pairs(absolute, "action", HORIZON), make_pairs(relative, "displacement", HORIZON)
    np.testing.assert_allclose(one.target, two.target, atol=1e-4)
    means = make_pairs(relative, "mean_action", HORIZON)
    np.testing.assert_allclose(means.target * HORIZON, two.target, atol=1e-4)
    folder = LeRobotFolder(tmp_path / "True")
    assert ((two.second - two.first) == HORIZON).all()
    starts = np.array([episode.start for episode in folder.episodes])
    np.testing.assert_array_equal(np.searchsorted(starts, two.second, "right") - 1, two.episode)


def test_a_transformer_learns_where_the_disc_goes(tmp_path: Path) -> None:
    every = paths(0, 24)
    # A token says which one it is: positions are the encoder's business.
    x, y = every.reshape(-1, 2).T
    tokens = np.stack([np.stack([x, y, 0 * x], 1), np.stack([y, x, 0 * x + 1], 1)], 1).astype(np.float16)
    first = np.concatenate([np.arange(FRAMES - HORIZON) + FRAMES * episode for episode in range(24)])
    moved = (every[:, HORIZON:] - every[:, :-HORIZON]).reshape(-1, 2)
    moved /= moved.std(0)
    rule = Rule(width=32, layers=1, hidden=64, epochs=1, least_steps=300, batch_size=64, learning_rate=3e-3)
    flat = tokens.reshape(-1, 3).astype(np.float64)
    fitted, tested = first < FRAMES * 18, first >= FRAMES * 18
    predicted = [
        fit_and_predict(
            rule, lambda places: tokens[places], flat.mean(0), flat.std(0), first[fitted, None], moved[fitted],
            [first[tested, None]], seed, torch.device("cpu"), "test",
        )[0]
        for seed in (0, 0, 1)
    ]  # fmt: skip
    assert np.abs(predicted[0] - moved[tested]).mean() < 0.3 * np.abs(moved[tested] - moved[fitted].mean(0)).mean()
    np.testing.assert_array_equal(predicted[0], predicted[1])
    assert not np.array_equal(predicted[0], predicted[2])


def test_one_episode_is_not_enough(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one episode"):
        run(tmp_path / "out", record(tmp_path / "data", episodes=1), ["perfect"])
    assert not (tmp_path / "out").exists()


def test_a_horizon_beyond_every_episode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{FRAMES} frames"):
        run(tmp_path / "out", record(tmp_path / "data"), ["perfect"], horizon=FRAMES)


def test_a_robot_that_never_moves_is_refused(tmp_path: Path) -> None:
    writer = LeRobotWriter(
        tmp_path / "data", 10, {"observation.state": ["x"]}, {CAMERA: (SIDE, SIDE)}, ["rest"], "image"
    )
    for index in range(3):
        writer.write(
            index, "rest", {"observation.state": np.full((8, 1), 0.5)}, {CAMERA: np.zeros((8, SIDE, SIDE, 3), np.uint8)}
        )
    writer.finish()
    with pytest.raises(TrajectoryError, match="never moves"):
        run(tmp_path / "out", tmp_path / "data", ["perfect"])


def test_finished_encoders_of_an_interrupted_run_are_not_fitted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = record(tmp_path / "data")
    whole = run(tmp_path / "whole", data, ["perfect", "constant"])
    with monkeypatch.context() as patch:
        patch.setattr(module._Problem, "solve", stop_at("constant", module._Problem.solve))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", data, ["perfect", "constant"])
    with monkeypatch.context() as patch:
        patch.setattr(module._Problem, "solve", stop_at("perfect", module._Problem.solve))
        again = run(tmp_path / "out", data, ["perfect", "constant"])
    assert again["summary"] == whole["summary"]
    assert not (tmp_path / "out/unfinished").exists()


def test_what_another_run_has_finished_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = record(tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr(module._Problem, "solve", stop_at("constant", module._Problem.solve))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", data, ["perfect", "constant"])
    run(tmp_path / "out", data, ["perfect"], horizon=HORIZON - 1)
    with monkeypatch.context() as patch:
        patch.setattr(module._Problem, "solve", stop_at("perfect", module._Problem.solve))
        run(tmp_path / "out", data, ["perfect", "constant"])


def stop_at(wanted: str, solve_one: Any) -> Any:
    def solve_or_stop(self: Any, name: str, *rest: Any) -> Any:
        if name == wanted:
            raise KeyboardInterrupt
        return solve_one(self, name, *rest)

    return solve_or_stop


def test_a_robot_with_another_state_is_refused_and_one_without_is_noted(tmp_path: Path) -> None:
    data = record(tmp_path / "data")
    wider = LeRobotFolder(record(tmp_path / "wider", seed=2))
    wider.features["observation.state"] = dataclasses.replace(wider.features["observation.state"], shape=(4,))
    recordings, _, _ = open_recordings(str(data), [], None, HORIZON, "mean_action")
    notes: list[str] = []
    with pytest.raises(ConfigError, match=r"2 values in data, 4 values in wider: they are not of one robot"):
        _compare_states([recordings[0], dataclasses.replace(recordings[0], name="wider", folder=wider)], notes)
    without = LeRobotFolder(record(tmp_path / "without", seed=3))
    del without.features["observation.state"]
    other = dataclasses.replace(recordings[0], name="without", folder=without)
    _compare_states([recordings[0], other], notes)
    assert notes == ["The control 'state' knows nothing where no observation.state was recorded: without."]
    assert standardised_state(other, recordings[0]).shape == (without.frame_count, 2)
    assert standardised_state(recordings[0], other).shape == (without.frame_count, 1)
