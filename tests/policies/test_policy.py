"""A policy as a robot runs it: what it remembers, what it refuses, and its folder."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import theia
from theia import Encoder
from theia.errors import ConfigError, ExportError, ImageError, ObservationError, ShapeError, TheiaError, WeightsError
from theia.models.architecture import Architecture
from theia.policies.action_heads import ChunkHead, DiffusionHead, MLPHead
from theia.policies.cloning import Training
from theia.policies.demonstrated import Demonstrations
from theia.policies.policy import About, Policy, load_policy, save_policy
from theia.policies.sight import Sight, open_sight

ABOUT = About(32, 20.0, ("x", "y"), ("dx", "dy", "grip"), {"task": "reach"})
RNG = np.random.default_rng(0)


def pictures(count, side=32):
    return RNG.integers(0, 256, (count, side, side, 3), np.uint8)


def small_encoder():
    teachers = {"alpha": {"channels": 4, "grid_hw": [4, 4], "has_cls": False}}
    return Encoder(Architecture(teachers=teachers, width=32, depth=2, heads=2, image_size=32))


def make(kind=MLPHead, execute=None, size=None, **options):
    torch.manual_seed(0)
    head = kind(32, (1, 1), 2, 3, **options)
    for values in head.parameters():  # the last layer begins so small that all actions look alike
        values.data += 0.05 * torch.randn_like(values)
    return Policy(head, Sight("small", small_encoder(), "mean", size), ABOUT, execute=execute)


@pytest.mark.parametrize("kind", [MLPHead, ChunkHead, DiffusionHead])
def test_a_loaded_policy_acts_as_the_one_that_was_saved(tmp_path, kind):
    policy = make(kind)
    policy.head.fit_scale(torch.randn(9, 3), torch.randn(9, 2))
    save_policy(policy, tmp_path / "policy")
    shutil.move(tmp_path / "policy", tmp_path / "elsewhere")  # the folder is whole
    again = theia.load_policy(tmp_path / "elsewhere")
    images, states = pictures(6), RNG.normal(size=(6, 2))
    for one in (policy, again):
        one.reset()
    for image, state in zip(images, states, strict=True):
        expected = policy.act(image, state)
        assert expected.shape == (3,)
        np.testing.assert_array_equal(again.act(image, state), expected)
    assert again.about == ABOUT
    assert theia.load(tmp_path / "elsewhere" / "encoder").width == 32


def test_a_policy_resizes_for_its_encoder_and_keeps_it(tmp_path):
    policies = [make(size=size) for size in (64, None)]
    image, state = pictures(1)[0], np.zeros(2)
    assert not np.array_equal(*(policy.act(image, state) for policy in policies))
    save_policy(policies[0], tmp_path / "policy")
    again = theia.load_policy(tmp_path / "policy")
    assert again.sight.encoder is not None
    np.testing.assert_array_equal(again.act(image, state), policies[0].act(image, state))


def test_an_action_depends_on_the_last_three_frames_and_a_reset_forgets_them():
    policy, images = make(), pictures(5)
    with torch.inference_mode():
        tokens = policy.sight(torch.from_numpy(images).permute(0, 3, 1, 2)).patches[:, 0]
        known = torch.zeros(1, 2)
        for rows in ([0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]):
            expected = policy.head(tokens[rows].view(1, 3, 32, 1, 1), known)[0, 0].numpy()
            np.testing.assert_allclose(policy.act(images[rows[2]], [0, 0]), expected, atol=1e-5)
        policy.reset()
        expected = policy.head(tokens[[4, 4, 4]].view(1, 3, 32, 1, 1), known)[0, 0].numpy()
    np.testing.assert_allclose(policy.act(images[4], [0, 0]), expected, atol=1e-5)


@pytest.mark.parametrize(("execute", "looks"), [(None, [0, 4]), (1, list(range(6))), (3, [0, 3])])
def test_so_many_actions_are_carried_out_before_the_next_decision(execute, looks):
    policy, images = make(ChunkHead, execute, chunk=4), pictures(6)
    assert policy.execute == (execute or 4)
    decided = []
    policy.head.register_forward_hook(lambda head, given, actions: decided.append(actions[0].numpy()))
    actions = [policy.act(image, [0, 0]) for image in images]
    assert len(decided) == len(looks)
    for step, action in enumerate(actions):
        last = max(number for number, look in enumerate(looks) if look <= step)
        np.testing.assert_array_equal(action, decided[last][step - looks[last]])


def test_frames_between_two_decisions_are_encoded_only_if_they_are_needed():
    policy, seen = make(ChunkHead, chunk=8), []
    policy.sight.register_forward_hook(lambda sight, given, tokens: seen.append(len(given[0])))
    for image in pictures(17):
        policy.act(image, [0, 0])
    assert seen == [1, 3, 3]
    # The same three frames as with a decision at every step.
    every, late, images = make(ChunkHead, 1, chunk=8), make(ChunkHead, 8, chunk=8), pictures(9)
    eager = [every.act(image, [0, 0]) for image in images]
    lazy = [late.act(image, [0, 0]) for image in images]
    np.testing.assert_allclose(lazy[8], eager[8], atol=1e-5)


def test_several_robots_act_as_each_would_alone():
    images, states = pictures(8).reshape(4, 2, 32, 32, 3), RNG.normal(size=(4, 2, 2))
    together = make(DiffusionHead)
    found = [together.act(*pair) for pair in zip(images, states, strict=True)]
    for robot in range(2):
        alone = make(DiffusionHead)
        for step in range(4):
            np.testing.assert_allclose(
                alone.act(images[step, robot], states[step, robot]), found[step][robot], atol=1e-5
            )


def test_noise_depends_on_the_seed_of_the_episode_alone():
    policy, image = make(DiffusionHead), pictures(1)[0]
    first = policy.act(image, [0, 0])
    policy.reset()
    np.testing.assert_array_equal(policy.act(image, [0, 0]), first)
    policy.reset(seed=1)
    assert not np.array_equal(policy.act(image, [0, 0]), first)


def test_every_form_of_an_image_is_the_same_image():
    policy, image = make(), pictures(1, 50)[0]
    forms = [
        image, image.transpose(2, 0, 1), torch.from_numpy(image), Image.fromarray(image),
        image.astype(np.float32) / 255,
    ]  # fmt: skip
    actions = []
    for form in forms:
        policy.reset()
        actions.append(policy.act(form, torch.zeros(2)))
    for action in actions[1:]:
        np.testing.assert_array_equal(action, actions[0])


@pytest.mark.parametrize(
    ("image", "state", "error", "message"),
    [
        (None, [0, 0], ObservationError, "was given no image"),
        (np.zeros((32, 32), np.uint8), [0, 0], ShapeError, "RGB images"),
        (np.zeros((32, 32, 4), np.uint8), [0, 0], ShapeError, "fourth channel"),
        (np.zeros((0, 32, 3), np.uint8), [0, 0], ShapeError, "no pixels"),
        (np.zeros((32, 32, 3), np.int64), [0, 0], ImageError, "int64"),
        (np.full((32, 32, 3), 200.0), [0, 0], ImageError, "divide by 255"),
        (np.full((32, 32, 3), np.nan), [0, 0], ImageError, "not numbers"),
        ([[[0, 0, 0]]], [0, 0], ShapeError, "numpy array"),
        (pictures(1)[0], None, ObservationError, r"2 values \(x, y\), and there is none"),
        (pictures(1)[0], [0, 0, 0], ShapeError, r"2 values \(x, y\), and got shape \(3,\)"),
        (pictures(1)[0], 0.0, ShapeError, r"got shape \(\)"),
        (pictures(1)[0], ["a", "b"], ObservationError, "holds no numbers"),
        (pictures(1)[0], [0, np.nan], ObservationError, r"Value 1 \(y\) of the state is not a finite number"),
        (pictures(2), [0, 0], ShapeError, "One of each|one of each"),
        (pictures(2), [[0, 0]], ShapeError, "2 images and 1 states"),
    ],
)
def test_what_a_robot_cannot_mean_is_refused(image, state, error, message):
    with pytest.raises(error, match=message):
        make().act(image, state)


def test_another_number_of_robots_needs_a_reset():
    policy = make()
    policy.act(pictures(1)[0], [0, 0])
    with pytest.raises(ShapeError, match=r"2 robots, but this episode began with 1.*reset"):
        policy.act(pictures(2), [[0, 0], [0, 0]])
    policy.reset()
    assert policy.act(pictures(2), [[0, 0], [0, 0]]).shape == (2, 3)


def test_a_blind_policy_takes_a_state_and_no_image(tmp_path):
    save_policy(Policy(MLPHead(0, (1, 1), 2, 3), None, ABOUT), tmp_path / "policy")
    policy = load_policy(tmp_path / "policy")
    assert policy.act(state=[0, 1]).shape == (3,)
    with pytest.raises(ObservationError, match="sees no image"):
        policy.act(pictures(1)[0], [0, 1])


def test_another_encoder_is_kept_by_its_name_and_known_by_what_it_gives(tmp_path):
    torch.manual_seed(0)
    policy = Policy(MLPHead(3, (16, 16), 0, 2), open_sight("pixels", "spatial"), About(32))
    save_policy(policy, tmp_path / "policy")
    again, image = load_policy(tmp_path / "policy"), pictures(1)[0]
    np.testing.assert_array_equal(again.act(image), policy.act(image))
    assert sorted(path.name for path in (tmp_path / "policy").iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "policy/config.json").read_text())
    config["encoder"]["of_noise"] = [9.0, 9.0, 9.0]
    (tmp_path / "policy/config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="pixels, whose weights have changed"):
        load_policy(tmp_path / "policy")


def without(name):
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def changed(**values):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("config.json"), r"config\.json"),
        (without("model.safetensors"), "cannot be read"),
        (without("encoder"), "encoder"),
        (changed(model_type="theia-encoder"), r"holds no policy.*theia\.load"),
        (changed(head="lstm"), "incomplete or of another version"),
        (changed(options={}), "incomplete or of another version"),
        (changed(execute=9), "predicts 1 actions"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), "cannot be read"),
    ],
)
def test_a_folder_that_is_not_whole_is_named(tmp_path, damage, message):
    save_policy(make(), tmp_path / "policy")
    damage(tmp_path / "policy")
    with pytest.raises(TheiaError, match=message):
        load_policy(tmp_path / "policy")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(WeightsError, match="There is no folder"):
        load_policy(tmp_path / "nothing")


def test_more_actions_than_are_predicted_cannot_be_carried_out(tmp_path):
    save_policy(make(ChunkHead, chunk=4), tmp_path / "policy")
    assert load_policy(tmp_path / "policy", execute=2).execute == 2
    with pytest.raises(ConfigError, match="execute is 5; this policy predicts 4"):
        load_policy(tmp_path / "policy", execute=5)


def test_a_folder_that_holds_something_is_not_written_into(tmp_path, monkeypatch):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy/notes").touch()
    with pytest.raises(ExportError, match="holds something already"):
        save_policy(make(), tmp_path / "policy")

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("theia.policies.policy.write_safetensors", full)
    with pytest.raises(ExportError, match="Disk full"):
        save_policy(make(), tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


@pytest.mark.parametrize("kind", [MLPHead, ChunkHead, DiffusionHead])
def test_a_policy_that_is_given_nothing_needs_no_argument(tmp_path, kind):
    """A blind one, of a robot that does not know itself."""
    steps = Demonstrations.of(None, np.zeros((6, 0), np.float32), np.tile(np.float32([0.25, -0.5, 1]), (6, 1)), [6])
    training = Training(lambda: kind(0, (1, 1), 0, 3), steps, 0, None, torch.device("cpu"))
    training.advance(0)
    save_policy(Policy(training.head, None, ABOUT), tmp_path / "policy")
    policy = load_policy(tmp_path / "policy")
    assert policy.state_size == 0
    assert policy.act().shape == (3,)
    with pytest.raises(ObservationError, match="given no state"):
        policy.act(state=[0.0])
