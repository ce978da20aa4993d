"""A trained student as a teacher: of a smaller student, or beside other teachers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from theia.errors import ConfigError
from theia.teacher import RANDOM_SEED, Teacher, random_weights
from theia.types import TeacherFeatures, TeacherSpec
from theia.utils.files import file_sha256

from ._huggingface import Preprocessing, fetch

_PUBLISHED = "theaiinstitute/theia-base-patch16-224-cdiv"
_LICENCE = "The AI Institute's, non-commercial"
_HALF = (0.5, 0.5, 0.5)


class Theia(Teacher):
    """Patch tokens of a Theia model after the final layer norm, and its CLS token if it has one.

    Source: Shang et al., "Theia: Distilling Diverse Vision Foundation Models for Robot Learning", 2024.
    """

    spec = TeacherSpec(
        name="theia",
        channels=768,
        grid_hw=(14, 14),
        licence=_LICENCE,
        weights=_PUBLISHED,
        has_cls=True,
        preprocessing=Preprocessing(size=224, interpolation="bicubic", mean=_HALF, std=_HALF).record(),
    )

    def __init__(self, weights: str = _PUBLISHED, revision: str | None = None) -> None:
        """Loads the student without its translators. Channels, grid, image size and pixel statistics are its own.

        Args:
            weights: Folder that "theia export" wrote, checkpoint of "theia fit", hub id, or "random" for an untrained
                theia_base.
            revision: Branch, tag or commit on the hub; the newest by default.

        Raises:
            ConfigError: If there is a revision of weights that are not on the hub.
            WeightsError: If the weights cannot be loaded or do not fit.
            CheckpointError: If a file is not a checkpoint.
        """
        super().__init__()
        encoder, found, licence = _open(self.spec.name, weights, revision)
        self.student = encoder.distiller.student
        backbone = self.student.backbone
        self.preprocess = Preprocessing(
            size=encoder.image_size, interpolation="bicubic", mean=backbone.mean, std=backbone.std
        )
        self.spec = replace(
            self.spec,
            channels=encoder.width,
            grid_hw=backbone.grid_hw,
            licence=licence,
            weights=weights,
            revision=found,
            has_cls=backbone.has_cls,
            preprocessing=self.preprocess.record(),
        )

    def forward(self, images: Tensor) -> TeacherFeatures:
        """See :meth:`theia.teacher.Teacher.forward`."""
        # The student normalises the pixels itself.
        tokens = self.student(self.preprocess.square(images).to(torch.uint8))
        return TeacherFeatures(patches=tokens.patches, cls=tokens.cls)


def _open(name: str, weights: str, revision: str | None) -> tuple[Any, str, str]:
    """The encoder, and revision and licence of its weights."""
    from theia.encoder.from_name import open_encoder

    if weights == "random":
        with random_weights(name):
            return open_encoder("random:theia_base").source, f"seed {RANDOM_SEED}", "none"
    path = Path(weights).expanduser()
    if not path.exists():
        path = fetch(name, weights, revision)
        return open_encoder(path).source, path.name, _licence(path)
    if revision is not None:
        raise ConfigError(
            f"Teacher {name!r}: 'revision' is a commit on the model hub; {weights!r} is not from there. Drop it."
        )
    encoder = open_encoder(path).source  # refuses whatever else lies there
    if path.suffix == ".ckpt":
        return encoder, f"sha256:{file_sha256(path)}", "not recorded in a checkpoint"
    folder = path if path.is_dir() else path.parent
    return encoder, f"sha256:{file_sha256(folder / 'model.safetensors')}", _licence(folder)


def _licence(folder: Path) -> str:
    """The licences of the teachers of an exported model, each once, as on its model card."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "architecture" not in config:  # a published model
        return _LICENCE
    known = config.get("record", {}).get("teachers", {})
    licences = {known.get(name, {}).get("licence") or "not recorded" for name in config["architecture"]["teachers"]}
    return " and ".join(sorted(licences))
