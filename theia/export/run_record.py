"""What the run folder of a training says about it, for a model card."""

import json
import logging
import re
import shlex
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml

from theia.errors import ConfigError
from theia.models import older
from theia.training.optim import ADAMW
from theia.utils.files import file_sha256

logger = logging.getLogger(__name__)

# Training options that make up the recipe, and where they stand in config.yaml.
_RECIPE = {
    "trainer": ("max_epochs", "max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val"),
    "data": ("batch_size", "fraction", "image_sizes", "teachers_per_step"),
    "model": (
        "optimizer", "optimizer_options", "learning_rate", "weight_decay", "decay_rule", "betas", "warmup", "schedule",
        "ema", "loss", "cls_loss", "teacher_weights", "balance", "teacher_dropping", "normalizer",
        "normalizer_exponent", "patch_dropout", "shift", "backbone", "backbone_stage", "translator", "distill_cls",
        "registers", "lift", "wide_last",
    ),
}  # fmt: skip
# Options that have an effect only beside a certain value of another.
_ONLY_WITH = {"model.betas": ("model.optimizer", ADAMW), "model.normalizer_exponent": ("model.normalizer", "power")}
_METRICS = ("cosine", "explained_variance")
_FILES = (".pth", ".pt", ".bin", ".safetensors", ".ckpt")


def run_record(run: Path, checkpoint: Path) -> dict[str, Any]:
    """Collects what a run folder says about a training, for a model card.

    Args:
        run: Path of the run folder.
        checkpoint: Path of the exported checkpoint. Held-out figures count only if they were measured on this very
            file.

    Returns:
        Record for :func:`theia.export.card.text`. Anything that the folder lacks is left out.
    """
    config = older.config(_read(run / "config.yaml"))
    data = config.get("data") or {}
    # A class of data that is named has its options a level below.
    config["data"] = data.get("init_args") or data
    environment = _read(run / "environment.json")
    report = _read(run / f"test_{checkpoint.stem}.json")
    store = environment.get("store") or {}
    record: dict[str, Any] = {name: environment[name] for name in ("versions", "git_commit") if name in environment}
    if "teachers" in store:
        record["teachers"] = {name: _without_paths(teacher) for name, teacher in store["teachers"].items()}
    if "manifest_sha256" in store:
        name = Path(str(config["data"].get("store", "store"))).name
        images = environment.get("images")
        record["data"] = {"name": name, "images": images, "manifest_sha256": store["manifest_sha256"]}
    recipe = {
        f"{part}.{option}": config[part][option]
        for part, options in _RECIPE.items()
        for option in options
        if config.get(part, {}).get(option) is not None
    }
    for option, (beside, value) in _ONLY_WITH.items():
        if recipe.get(beside, value) != value:
            recipe.pop(option, None)
    if recipe:
        record["recipe"] = {"seed": config.get("seed_everything"), **recipe}
    if environment.get("changes"):
        record["changes"] = environment["changes"]
    # Only figures of this very file, which a longer training replaces, and of the features that it was trained on.
    same = report.get("store", {}).get("manifest_sha256") == store.get("manifest_sha256")
    if same and report.get("checkpoint_sha256") == file_sha256(checkpoint):
        record["held_out_images"] = report.get("samples")
        record["held_out"] = _figures(report["after"])
    else:
        named = checkpoint.stem if checkpoint.stem in ("last", "best") else str(checkpoint)
        command = ["theia", "test", "--config", str(run / "config.yaml"), "--ckpt_path", named]
        logger.warning(
            "The model card will have no held-out figures: there is no test_%s.json of it in %s. Make it, then export "
            "again: %s",
            checkpoint.stem, run, shlex.join(command),
        )  # fmt: skip
    return record


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read ({error}). Mend it, or move it away to export without it.") from error
    return found if isinstance(found, dict) else {}


def _without_paths(teacher: dict[str, Any]) -> dict[str, Any]:
    """Removes paths of the machine that computed the features, since they mean nothing elsewhere."""
    weights = str(teacher.get("weights"))
    # A name with a single slash is an id on the hub or a folder beside the user's; only files have such endings.
    is_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", weights) and not weights.endswith(_FILES)
    return {**teacher, "weights": weights if is_id else f"local, {PureWindowsPath(weights).name}"}


def _figures(metrics: dict[str, float]) -> dict[str, dict[str, float]]:
    figures: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        _, metric, *teacher = name.split("/", 2)
        if metric in _METRICS and teacher:
            figures.setdefault(teacher[0], {})[metric] = value
    return figures
