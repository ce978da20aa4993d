"""A policy of a run as a folder of its own: what it says, and that it acts in the simulator as in the benchmark."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import theia
from benchmarks.cortexbench import __main__ as command
from benchmarks.cortexbench.encoders import open_all
from theia.policies.action_heads import ChunkHead, MLPHead
from theia.policies.cloning import save_head

needs_simulator = pytest.mark.skipif(
    importlib.util.find_spec("metaworld") is None,
    reason="MetaWorld is not installed: pip install 'theia[simulation]'",
)


def finished(run: Path, name: str, head: torch.nn.Module, **about: object) -> Path:
    """A policy as a run leaves it."""
    (eyes,) = open_all([name], "spatial", torch.device("cpu"))
    folder = run / "policies" / "encoder" / "reach-v3" / "seed-100"
    (run / "run.json").parent.mkdir(parents=True, exist_ok=True)
    (run / "run.json").write_text(json.dumps({"settings": {"preset": "small"}}))
    kept = {"encoder": name, "features": "spatial", "task": "reach-v3", "seed": 100, **about}
    save_head(head, folder / "policy.pt", kept)
    noise = {"name": name, "label": name, "features of noise": eyes.of_noise}
    (folder.parents[1] / "encoder.json").write_text(json.dumps(noise))
    return folder


def test_a_policy_is_exported_with_its_encoder_and_all_that_a_robot_must_know(tmp_path, capsys):
    torch.manual_seed(0)
    head = ChunkHead(192, (7, 7), 4, 4, 24, 5)
    about = {"image_size": 224, "execute": 2, "frames_per_s": 80.0, "state_names": ("x", "y", "z", "grip")}
    folder = finished(tmp_path / "run", "random:theia_tiny", head, **about)
    assert command.main(["export", f"--policy={folder}", f"--out={tmp_path / 'policy'}"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "policy")
    policy = theia.load_policy(tmp_path / "policy")
    assert (policy.execute, policy.about.frames_per_s, policy.about.state_names[3]) == (2, 80.0, "grip")
    assert policy.about.record["settings"] == {"preset": "small"}
    image, state = np.full((100, 100, 3), 90, np.uint8), np.arange(4.0)
    tokens = open_all(["random:theia_tiny"], "spatial", torch.device("cpu"))[0].tokens_of(
        torch.full((1, 3, 224, 224), 90, dtype=torch.uint8)
    )
    maps = head.eval().look(tokens.patches, tokens.grid)
    expected = head(maps[None].expand(1, 3, -1, -1, -1), torch.from_numpy(state[None]).float())[0].detach().numpy()
    np.testing.assert_allclose(policy.act(image, state), expected[0], atol=1e-5)
    np.testing.assert_allclose(policy.act(image, state), expected[1], atol=1e-5)


def test_weights_that_were_trained_with_a_policy_go_with_it(tmp_path):
    (eyes,) = open_all(["random:theia_tiny"], "spatial", torch.device("cpu"))
    weights = {name: tensor + 0.01 for name, tensor in eyes.sight.state_dict().items() if tensor.is_floating_point()}
    weights = {**eyes.sight.state_dict(), **weights}
    folder = finished(tmp_path / "run", "random:theia_tiny", MLPHead(192, (14, 14), 4, 4), weights=weights)
    assert command.main(["export", f"--policy={folder / 'policy.pt'}", f"--out={tmp_path / 'policy'}"]) == 0
    found = theia.load_policy(tmp_path / "policy").sight.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_an_encoder_that_has_changed_since_is_refused(tmp_path, capsys):
    folder = finished(tmp_path / "run", "pixels", MLPHead(3, (16, 16), 4, 4))
    (folder.parents[1] / "encoder.json").write_text(json.dumps({"features of noise": [0.1, 0.2, 0.3]}))
    assert command.main(["export", f"--policy={folder}", f"--out={tmp_path / 'policy'}"]) == 1
    assert "weights have changed since" in capsys.readouterr().err
    assert not (tmp_path / "policy").exists()


def test_the_folder_of_a_run_is_not_that_of_a_policy(tmp_path, capsys):
    folder = finished(tmp_path / "run", "blind", MLPHead(0, (1, 1), 4, 4))
    assert command.main(["export", f"--policy={tmp_path / 'run'}", f"--out={tmp_path / 'policy'}"]) == 1
    assert f"There is {folder}" in capsys.readouterr().err
    assert command.main(["export", f"--policy={folder}", f"--out={tmp_path / 'policy'}"]) == 0
    assert theia.load_policy(tmp_path / "policy").act(state=np.zeros(4)).shape == (4,)


def closed_loop(run: Path, exported: Path, task: str, rollouts: list[dict[str, object]]) -> list[dict[str, object]]:
    """Repeats rollouts with an exported policy, and without anything else of the benchmark than the environment."""
    from benchmarks.cortexbench.simulation import open_environment

    settings = json.loads((run / "run.json").read_text())["settings"]
    policy, found = theia.load_policy(exported), []
    with open_environment(task, settings["size"], settings["quality"], settings["vary"]) as environment:
        for rollout in rollouts:
            observation, held, first, success, steps = environment.reset(rollout["seed"]), 0, None, False, 0
            policy.reset()
            while steps < settings["horizon"] and held < (settings["hold"] or settings["horizon"]):
                action = policy.act(environment.render(), observation[: policy.state_size])
                observation, success = environment.step(action)[:2]
                steps, held = steps + 1, held + 1 if success else 0
                first = steps if success and first is None else first
            seen = {"seed": rollout["seed"], "success": bool(success), "first_success": first, "steps": steps}
            found.append(seen)
    return found


@needs_simulator
@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [(), ("--head=chunk", "--chunk=6", "--execute=4"), ("--head=diffusion",)],
    ids=["mlp", "chunk", "diffusion"],
)
def test_in_the_simulator_the_exported_policy_does_as_in_the_benchmark(tmp_path, options):
    data, run = tmp_path / "data", tmp_path / "run"
    collect = ["collect", "--tasks=reach", f"--out={data}", "--episodes=6", "--size=64", "--pictures=image"]
    assert command.main([*collect, "--workers=2"]) == 0
    train = ["run", "--encoders", "pixels", "--data", str(data), "--out", str(run), "--preset=small", "--epochs=30"]
    assert command.main([*train, "--rollouts=6", "--seeds=100", "--workers=1", *options]) == 0
    (folder,) = (run / "policies").glob("*/*/seed-100")
    assert command.main(["export", f"--policy={folder}", f"--out={tmp_path / 'policy'}"]) == 0
    rollouts = json.loads((folder / "rollouts-029.json").read_text())["rollouts"]
    before = [{name: one[name] for name in ("seed", "success", "first_success", "steps")} for one in rollouts]
    assert closed_loop(run, tmp_path / "policy", "reach-v3", before) == before


@needs_simulator
@pytest.mark.slow
def test_an_encoder_is_trained_with_the_policy_and_exported(tmp_path, capsys):
    data, run = tmp_path / "data", tmp_path / "run"
    collect = ["collect", "--tasks=reach", f"--out={data}", "--episodes=2", "--size=64", "--after_success=2"]
    assert command.main([*collect, "--workers=2", "--pictures=image"]) == 0
    train = ["run", "--encoders", "random:theia_tiny", "--data", str(data), "--out", str(run), "--preset=smoke"]
    options = ["--epochs=2", "--rollouts=2", "--head=chunk", "--chunk=5", "--finetune", "--workers=1"]
    assert command.main([*train, *options]) == 0
    assert "At most about" in capsys.readouterr().err
    (folder,) = (run / "policies").glob("*/*/seed-100")
    assert command.main(["export", f"--policy={folder}", f"--out={tmp_path / 'policy'}"]) == 0
    trained = theia.load_policy(tmp_path / "policy").sight.encoder
    (eyes,) = open_all(["random:theia_tiny"], "spatial", torch.device("cpu"))
    before = dict(eyes.sight.encoder.distiller.student.named_parameters())
    after = dict(trained.distiller.student.named_parameters())
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())
    rollouts = json.loads((folder / "rollouts-001.json").read_text())["rollouts"]
    found = closed_loop(run, tmp_path / "policy", "reach-v3", rollouts)
    assert [one["steps"] for one in found] == [one["steps"] for one in rollouts]
    assert command.main([*train, *options[:-2], "--workers=1"]) == 1
    assert "begun with encoder_learning_rate 1e-05, not None" in capsys.readouterr().err


@needs_simulator
@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--encoders", "teacher:hog", "--finetune"], "--finetune trains Theia models, and teacher:hog is none"),
        (["--encoders", "blind", "--chunk=3"], "--head mlp predicts one action"),
        (["--encoders", "blind", "--head=diffusion", "--execute=5"], "--execute is 5, but the head predicts 4"),
        (["--encoders", "blind", "--encoder_learning_rate=0.1"], "Add --finetune"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, said, capsys):
    data = tmp_path / "data"
    collect = ["collect", "--tasks=reach", f"--out={data}", "--episodes=1", "--size=64", "--after_success=1"]
    assert command.main([*collect, "--workers=1"]) == 0
    assert command.main(["run", *options, "--data", str(data), "--out", str(tmp_path / "run")]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
