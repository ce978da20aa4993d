"""``export``: a trained policy of a run as a folder that a robot can run without the benchmark."""

from pathlib import Path
from typing import Any

from benchmarks.cortexbench.encoders import BLIND, STATE
from benchmarks.cortexbench.run_files import ENCODER, POLICY, RECORD
from theia.errors import ConfigError
from theia.policies.cloning import load_head
from theia.policies.policy import About, Policy, same_features, save_policy
from theia.policies.sight import Sight, features_of_noise, open_sight
from theia.probing.datasets import IMAGE_SIZE
from theia.utils.files import jsonable, read_json


def export(policy: Path, out: Path) -> str:
    """Carries out the command; see :func:`benchmarks.cortexbench.commands.export` for the arguments."""
    folder = policy.parent if policy.name == POLICY else policy
    if not (folder / POLICY).is_file():
        below = sorted(str(path.parent) for path in folder.glob(f"**/{POLICY}"))
        hint = f" There is {below[0]}." if below else " A policy that is finished has one."
        raise ConfigError(f"{folder} has no {POLICY}.{hint}")
    head, kept = load_head(folder / POLICY)
    sight: Sight | None = None
    if kept["encoder"] not in (BLIND, STATE):
        sight = _sight(kept, folder)
    about = About(
        int(kept.get("image_size", IMAGE_SIZE)), kept.get("frames_per_s"), tuple(kept.get("state_names", ())),
        tuple(kept.get("action_names", ())), _record(kept, folder),
    )  # fmt: skip
    save_policy(Policy(head, sight, about, execute=kept.get("execute")), out)
    return str(out)


def _sight(kept: dict[str, Any], folder: Path) -> Sight:
    sight = open_sight(kept["encoder"], kept["features"])
    before = read_json(folder.parents[1] / ENCODER).get("features of noise")
    if before is not None and not same_features(before, features_of_noise(sight, IMAGE_SIZE)[1]):
        raise ConfigError(
            f"The policy was trained on {kept['encoder']}, whose weights have changed since. Put them back, or train "
            "it again."
        )
    if "weights" in kept:
        sight.load_state_dict(kept["weights"])
    return sight


def _record(kept: dict[str, Any], folder: Path) -> dict[str, Any]:
    settings = read_json(folder.parents[3] / RECORD).get("settings", {})
    about = {name: kept[name] for name in ("task", "seed", "encoder", "features")}
    return dict(jsonable({**about, "fine-tuned": "weights" in kept, "settings": settings}))
