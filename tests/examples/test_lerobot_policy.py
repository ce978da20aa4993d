"""The plug-in with the real LeRobot, where that is installed; its decoder everywhere."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from theia import Encoder
from theia.models.architecture import Architecture

PLUGIN = Path(__file__).parents[2] / "examples" / "lerobot_policy_theia"
CAMERAS = ("observation.images.top", "observation.images.wrist")
CHUNK = 6

needs_lerobot = pytest.mark.skipif(
    importlib.util.find_spec("lerobot") is None,
    reason="LeRobot is not installed; it holds torch and others back, so give it an environment of its own: "
    "pip install lerobot && pip install '.[dev]'",
)


def load_module(name: str) -> ModuleType:
    """A module of the plug-in by itself: its package imports LeRobot."""
    spec = importlib.util.spec_from_file_location(name, PLUGIN / "src" / "lerobot_policy_theia" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_decoder(**options: Any) -> Any:
    torch.manual_seed(0)
    shape = {"channels": 8, "cameras": 1, "state": 0, "actions": 2, "chunk": 3, "dim": 32, "heads": 2, "layers": 2}
    return load_module("chunk_decoder").ChunkDecoder(**{**shape, "dropout": 0.0, **options})


def test_decoder_learns_where_a_token_is() -> None:
    # Without positions, attention could not tell one place from another.
    decoder = tiny_decoder()
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    maps = torch.zeros(16, 8, 4, 4)
    maps[torch.arange(16), :, places[:, 0], places[:, 1]] = 1
    target = (places.float() / 1.5 - 1)[:, None].expand(-1, 3, -1)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    for _ in range(150):
        loss = (decoder([maps]) - target).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2 * target.abs().mean()


def test_decoder_tells_cameras_and_states_apart() -> None:
    decoder = tiny_decoder(cameras=2, state=3).eval()
    one, other = torch.randn(2, 1, 8, 4, 4)
    state = torch.randn(1, 3)
    chunk = decoder([one, other], state)
    assert chunk.shape == (1, 3, 2)
    assert not torch.allclose(chunk, decoder([other, one], state))
    assert not torch.allclose(chunk, decoder([one, other], -state))


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(PLUGIN / "src"))
    return importlib.import_module("lerobot_policy_theia")


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    teachers: dict[str, Any] = {"alpha": {"channels": 4, "grid_hw": [4, 4], "has_cls": False}}
    model = Encoder(Architecture(teachers=teachers, width=32, depth=2, heads=2, image_size=64))
    tensors = {f"distiller.{name}": tensor for name, tensor in model.distiller.state_dict().items()}
    path = tmp_path / "last.ckpt"
    torch.save({"hyper_parameters": model.architecture.as_dict(), "state_dict": tensors}, path)
    return path


def make_config(encoder: Path, **options: Any) -> Any:
    """As LeRobot's commands make it: by its registered name."""
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.factory import make_policy_config

    images = {camera: PolicyFeature(FeatureType.VISUAL, (3, 48, 80)) for camera in CAMERAS}
    shape = {"image_size": 64, "chunk_size": CHUNK, "n_action_steps": 4, "dim": 32, "heads": 2, "layers": 1}
    return make_policy_config(
        "theia",
        encoder=str(encoder),
        device="cpu",
        input_features=images | {"observation.state": PolicyFeature(FeatureType.STATE, (3,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
        **{**shape, "dropout": 0.0, **options},
    )


def make_policy(config: Any) -> Any:
    from lerobot.policies.factory import get_policy_class

    torch.manual_seed(0)
    return get_policy_class("theia")(config)


def make_batch(samples: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch = {camera: torch.rand(samples, 3, 48, 80, generator=generator) for camera in CAMERAS}
    batch["observation.state"] = torch.randn(samples, 3, generator=generator)
    batch["action"] = torch.randn(samples, CHUNK, 2, generator=generator)
    batch["action_is_pad"] = torch.zeros(samples, CHUNK, dtype=torch.bool)
    return batch


@needs_lerobot
@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("unfreeze_blocks", [0, 1])
def test_loss_falls_with_lerobots_own_optimizer(encoder: Path, unfreeze_blocks: int) -> None:
    policy = make_policy(make_config(encoder, unfreeze_blocks=unfreeze_blocks, optimizer_lr=3e-3))
    before = {name: tensor.clone() for name, tensor in policy.encoder.state_dict().items()}
    optimizer = policy.config.get_optimizer_preset().build(policy.get_optim_params())
    losses = []
    for _ in range(60):
        loss, log = policy.forward(make_batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(log["l1_loss"])
    assert losses[-1] < 0.4 * losses[0]
    changed = {name for name, tensor in policy.encoder.state_dict().items() if not torch.equal(tensor, before[name])}
    assert bool(changed) == bool(unfreeze_blocks)
    assert all("blocks.1." in name or "model.norm." in name for name in changed)


@needs_lerobot
@pytest.mark.usefixtures("plugin")
def test_padded_actions_do_not_count(encoder: Path) -> None:
    policy = make_policy(make_config(encoder)).eval()
    batch = make_batch()
    batch["action_is_pad"][:, 4:] = True
    loss = policy.forward(batch)[0]
    batch["action"][:, 4:] = 1e6
    torch.testing.assert_close(policy.forward(batch)[0], loss)
    torch.testing.assert_close(policy.forward(batch, reduction="none")[0].mean(), loss)


@needs_lerobot
@pytest.mark.usefixtures("plugin")
def test_actions_come_from_a_chunk_until_it_is_used_up_or_reset(encoder: Path) -> None:
    policy = make_policy(make_config(encoder)).eval()
    first, second = make_batch(), {name: value.flip(0) for name, value in make_batch().items()}
    chunk = policy.predict_action_chunk(first)
    assert chunk.shape == (4, CHUNK, 2)
    actions = [policy.select_action(first), *(policy.select_action(second) for _ in range(3))]
    torch.testing.assert_close(torch.stack(actions, 1), chunk[:, :4])
    torch.testing.assert_close(policy.select_action(second), policy.predict_action_chunk(second)[:, 0])
    policy.reset()
    torch.testing.assert_close(policy.select_action(first), chunk[:, 0])


@needs_lerobot
@pytest.mark.usefixtures("plugin")
def test_saved_policy_needs_no_file_of_the_encoder_and_acts_as_before(encoder: Path, tmp_path: Path) -> None:
    from lerobot.policies.factory import get_policy_class

    policy = make_policy(make_config(encoder)).eval()
    policy.save_pretrained(tmp_path / "saved")
    encoder.unlink()
    assert str(tmp_path) not in (tmp_path / "saved" / "config.json").read_text()
    loaded = get_policy_class("theia").from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(loaded.predict_action_chunk(make_batch()), policy.predict_action_chunk(make_batch()))
    # A resumed training comes with a config of its own, which still names the encoder.
    resumed = get_policy_class("theia").from_pretrained(tmp_path / "saved", config=make_config(encoder))
    torch.testing.assert_close(resumed.predict_action_chunk(make_batch()), policy.predict_action_chunk(make_batch()))


@needs_lerobot
@pytest.mark.usefixtures("plugin")
def test_processors_normalise_states_and_give_actions_their_units_back(encoder: Path) -> None:
    from lerobot.policies.factory import make_pre_post_processors

    scale = {"mean": torch.tensor([10.0, 20.0, 30.0]), "std": torch.tensor([2.0, 4.0, 8.0])}
    actions = {name: value[:2] for name, value in scale.items()}
    before, after = make_pre_post_processors(
        make_config(encoder), dataset_stats={"observation.state": scale, "action": actions}
    )
    sample = {name: value[0] for name, value in make_batch(1).items()}
    sample["observation.state"] = torch.tensor([12.0, 16.0, 30.0])
    seen = before(sample)
    torch.testing.assert_close(seen["observation.state"], torch.tensor([[1.0, -1.0, 0.0]]))
    torch.testing.assert_close(seen[CAMERAS[0]], sample[CAMERAS[0]][None])
    torch.testing.assert_close(after(torch.tensor([[1.0, -1.0]])), torch.tensor([[12.0, 16.0]]))


@needs_lerobot
@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    ("change", "message"),
    [({"n_action_steps": 7}, "chunk_size"), ({"n_obs_steps": 2}, "current step only"), ({"encoder": None}, "encoder")],
)
def test_unusable_options_are_refused(encoder: Path, change: dict[str, Any], message: str) -> None:
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot_policy_theia import TheiaConfig, TheiaPolicy

    options = {"encoder": str(encoder), "chunk_size": CHUNK, "n_action_steps": 4, "device": "cpu", **change}
    features = {CAMERAS[0]: PolicyFeature(FeatureType.VISUAL, (3, 48, 80))}
    action = {"action": PolicyFeature(FeatureType.ACTION, (2,))}
    with pytest.raises(ValueError, match=message):
        TheiaPolicy(TheiaConfig(input_features=features, output_features=action, **options))


@needs_lerobot
@pytest.mark.slow
def test_lerobot_train_finds_the_installed_plugin_trains_and_resumes(encoder: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    # A copy: pip leaves what it builds beside the source.
    source, site = shutil.copytree(PLUGIN, tmp_path / "source"), tmp_path / "site"
    subprocess.run([*pip, f"--target={site}", str(source)], check=True)
    write_dataset(tmp_path / "data")
    command = [
        sys.executable, "-m", "lerobot.scripts.lerobot_train", "--policy.type=theia", f"--policy.encoder={encoder}",
        "--policy.image_size=64", f"--policy.chunk_size={CHUNK}", f"--policy.n_action_steps={CHUNK}",
        "--policy.dim=32", "--policy.heads=2", "--policy.layers=1", "--policy.device=cpu", "--policy.push_to_hub=false",
        "--dataset.repo_id=local/tiny", f"--dataset.root={tmp_path / 'data'}", "--batch_size=4", "--steps=3",
        "--num_workers=0", "--save_freq=3", f"--output_dir={tmp_path / 'run'}", "--wandb.enable=false",
    ]  # fmt: skip
    paths = os.pathsep.join([str(site), str(Path(__file__).parents[2])])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    saved = tmp_path / "run" / "checkpoints" / "last" / "pretrained_model"
    assert json.loads((saved / "config.json").read_text())["type"] == "theia"
    assert (saved / "model.safetensors").is_file()
    assert (saved / "policy_preprocessor.json").is_file()
    encoder.unlink()
    resume = [*command[:3], f"--config_path={saved / 'train_config.json'}", "--resume=true", "--steps=5"]
    done = subprocess.run(resume, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "checkpoints" / "000005").is_dir()


def write_dataset(root: Path) -> None:
    """Two episodes of random images, states and actions, as LeRobot stores them."""
    import numpy as np
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    image = {"dtype": "image", "shape": (48, 80, 3), "names": ["height", "width", "channels"]}
    features = {
        CAMERAS[0]: image,
        "observation.state": {"dtype": "float32", "shape": (3,), "names": ["a", "b", "c"]},
        "action": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
    }
    dataset = LeRobotDataset.create("local/tiny", fps=10, root=root, features=features, use_videos=False)
    rng = np.random.default_rng(0)
    for _ in range(2):
        for _ in range(8):
            dataset.add_frame(
                {
                    CAMERAS[0]: rng.integers(0, 256, (48, 80, 3), dtype=np.uint8),
                    "observation.state": rng.normal(size=3).astype(np.float32),
                    "action": rng.normal(size=2).astype(np.float32),
                    "task": "none",
                }
            )
        dataset.save_episode()
    dataset.finalize()
