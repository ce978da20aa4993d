"""The base of the teachers from transformers: it loads their weights and prepares their pixels."""

import hashlib
import json
import logging
import re
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from theia.errors import ConfigError, ShapeError, WeightsError
from theia.teacher import RANDOM_SEED, Teacher, random_weights
from theia.types import Json, TeacherFeatures

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# What from_pretrained reads, best first: most repositories hold the same weights in several formats.
_FORMATS = (("model", ".safetensors"), ("pytorch_model", ".bin"))


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Turns uint8 images into the input of a model, on their device.

    Attributes:
        size: Side of the square input, in pixels.
        interpolation: Filter of the resize, with antialiasing.
        mean: Mean of each channel, for pixels in ``[0, 1]``.
        std: Standard deviation of each channel, for pixels in ``[0, 1]``.
        short_edge: Length in pixels that the short edge is resized to before the centre is cropped; ``None`` squashes
            the whole image to ``size``.
    """

    size: int
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    short_edge: int | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Resizes, crops and normalises.

        Args:
            images: RGB images, uint8, shape ``(B, 3, H, W)``.

        Returns:
            Pixels, float32, shape ``(B, 3, size, size)``.

        Raises:
            ShapeError: If the images have another type or shape.
        """
        pixels = self.square(images)
        mean, std = (_on_device(values, pixels.device) for values in (self.mean, self.std))
        return (pixels / 255 - mean) / std

    def square(self, images: Tensor) -> Tensor:
        """Resizes and crops, without normalising.

        Args:
            images: RGB images, uint8, shape ``(B, 3, H, W)``.

        Returns:
            Whole grey levels from 0 to 255, float32, shape ``(B, 3, size, size)``.

        Raises:
            ShapeError: If the images have another type or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ShapeError(
                f"A teacher takes uint8 images of shape (B, 3, H, W), not {images.dtype} of shape "
                f"{tuple(images.shape)}. Convert them first."
            )
        if self.short_edge is None:
            return self._resize(images, self.size, self.size)
        height, width = images.shape[-2:]
        short = min(height, width)
        pixels = self._resize(images, self.short_edge * height // short, self.short_edge * width // short)
        top, left = (pixels.shape[-2] - self.size) // 2, (pixels.shape[-1] - self.size) // 2
        return pixels[..., top : top + self.size, left : left + self.size]

    def _resize(self, images: Tensor, height: int, width: int) -> Tensor:
        # The models were trained on images that Pillow resized: columns, then rows, each time to whole grey levels
        # with halves rounded up. The filter overshoots, so clipping only once would be off by several levels.
        pixels = images.float()
        for size in ((images.shape[-2], width), (height, width)):
            if pixels.shape[-2:] != size:
                resized = functional.interpolate(pixels, size=size, mode=self.interpolation, antialias=True)
                pixels = (resized + 0.5).floor().clamp(0, 255)
        return pixels

    def record(self) -> dict[str, Json]:
        """The attributes as plain values, for a spec."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


@cache
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One value per channel, shape ``(C, 1, 1)``, which stays on the device: a GPU would have to wait for a copy."""
    with torch.inference_mode(False):  # so that it can be used where gradients are wanted, too
        return torch.tensor(values, device=device)[:, None, None]


class HuggingFaceTeacher(Teacher):
    """A vision transformer from transformers. Its first token is CLS, and all others are patches.

    Attributes:
        model: The model, in float32.
        preprocess: Preprocessing of images for the model.
    """

    model: Any
    preprocess: Preprocessing

    def load(self, model_class: Any, *, weights: str, preprocess: Preprocessing, **options: Any) -> None:
        """Builds the model, and records its weights and its preprocessing in the spec.

        Args:
            model_class: Subclass of ``transformers.PreTrainedModel``.
            weights: Hub id, local folder in the upstream format, or ``"random"``.
            preprocess: Preprocessing of images for the model.
            **options: Further arguments of :func:`load_model`.

        Raises:
            ConfigError: If the options do not fit together.
            WeightsError: If the weights cannot be loaded or do not fit the architecture completely.
        """
        self.model, found = load_model(self.spec.name, model_class, weights=weights, **options)
        self.preprocess = preprocess
        self.spec = replace(self.spec, weights=weights, revision=found, preprocessing=preprocess.record())

    def take_squares(self, size: int, short_edge: int | None = None) -> None:
        """Sets the size of the square input, and records the grid and the width that follow from it in the spec.

        Args:
            size: Side of the square input, in pixels.
            short_edge: See :class:`Preprocessing`.
        """
        config = self.model.config
        self.preprocess = replace(self.preprocess, size=size, short_edge=short_edge)
        self.spec = replace(
            self.spec,
            channels=config.hidden_size,
            grid_hw=(size // config.patch_size,) * 2,
            preprocessing=self.preprocess.record(),
        )

    def forward(self, images: Tensor) -> TeacherFeatures:
        """See :meth:`theia.teacher.Teacher.forward`."""
        tokens = self.model(pixel_values=self.preprocess(images)).last_hidden_state
        return TeacherFeatures(patches=tokens[:, 1:], cls=tokens[:, 0])


def load_model(
    teacher: str,
    model_class: Any,
    *,
    model_types: tuple[str, ...],
    weights: str,
    revision: str | None,
    architecture: Mapping[str, int] | None,
    build_config: Callable[..., Any],
    sizes: Mapping[str, int],
    **model_options: Any,
) -> tuple[Any, str]:
    """Builds a transformers model with weights from the model hub or a local folder, or with random weights.

    Args:
        teacher: Name of the teacher, for messages.
        model_class: Subclass of ``transformers.PreTrainedModel``.
        model_types: Values of ``model_type`` in ``config.json`` that the class can read.
        weights: Hub id, local folder in the upstream format, or ``"random"``.
        revision: Branch, tag or commit on the hub.
        architecture: Changes to ``sizes``, for random weights only.
        build_config: Function that takes ``sizes`` as arguments and gives the config of a model with random weights.
        sizes: Sizes of the full-size model, by name; ``architecture`` may change these only.
        **model_options: Further arguments of ``model_class``.

    Returns:
        The model in float32, and the revision of its weights: a commit, a digest, or a seed.

    Raises:
        ConfigError: If the options do not fit together.
        WeightsError: If the weights cannot be loaded or do not fit the architecture completely.
    """
    local = Path(weights).expanduser()
    on_hub = weights != "random" and not local.exists()
    if architecture and weights != "random":
        raise ConfigError(
            f"Teacher {teacher!r}: 'architecture' is for random weights; {weights!r} brings its own. Drop "
            f"it, or give --{teacher}.weights random."
        )
    if revision is not None and not on_hub:
        raise ConfigError(
            f"Teacher {teacher!r}: 'revision' is a commit on the model hub; {weights!r} is not from there. Drop it."
        )
    if weights == "random":
        config = _random_config(teacher, build_config, sizes, architecture or {})
        # Sizes too: a store must not mix features of two random models that have the same grid and width.
        drawn = [f"seed {RANDOM_SEED}", *(f"{name} {size}" for name, size in sorted((architecture or {}).items()))]
        with random_weights(teacher):
            return model_class(config, **model_options), ", ".join(drawn)
    folder = fetch(teacher, weights, revision) if on_hub else local
    _check_model_type(teacher, folder, model_types)
    files = _weight_files(teacher, folder)
    model = _read(teacher, model_class, folder, model_options)
    return model, folder.name if on_hub else _digest(files)


def _random_config(
    teacher: str, build_config: Callable[..., Any], sizes: Mapping[str, int], changes: Mapping[str, int]
) -> Any:
    # transformers takes any name and ignores those that it does not know.
    if unknown := sorted(set(changes) - set(sizes)):
        raise ConfigError(
            f"Teacher {teacher!r}: 'architecture' has no {', '.join(map(repr, unknown))}. It takes {', '.join(sizes)}."
        )
    wanted = {**sizes, **changes}
    if min(wanted.values()) < 1 or wanted["hidden_size"] % wanted["num_attention_heads"]:
        raise ConfigError(
            f"Teacher {teacher!r}: 'architecture' needs sizes above 0 and a hidden_size that is a multiple "
            f"of num_attention_heads; got {wanted}."
        )
    return build_config(**wanted)


def fetch(teacher: str, hub_id: str, revision: str | None) -> Path:
    """Downloads what the cache lacks of a model's config and weights.

    Args:
        teacher: Name of the teacher, for messages.
        hub_id: Id of the model on the hub.
        revision: Branch, tag or commit on the hub; the newest by default.

    Returns:
        Folder of the snapshot, which is named after the commit.

    Raises:
        WeightsError: If it is no id, or the hub does not give the files.
    """
    from huggingface_hub import snapshot_download

    if not _HUB_ID.fullmatch(hub_id):
        raise WeightsError(
            f"Teacher {teacher!r}: {hub_id!r} is neither an existing folder, nor a hub id (owner/name), nor 'random'. "
            f"Correct --{teacher}.weights."
        )
    try:
        for stem, suffix in _FORMATS:
            patterns = ["config.json", f"{stem}{suffix}", f"{stem}-*{suffix}", f"{stem}{suffix}.index.json"]
            folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
            if any(folder.glob(f"{stem}*{suffix}")):
                break
    except Exception as error:
        # The errors of the hub client and of the HTTP libraries below it have no base in common.
        raise WeightsError(
            f"Teacher {teacher!r} cannot get {hub_id!r} from the model hub, and no local folder has that "
            f"name: {_describe(error)}. Check the network and the id, or download the repository elsewhere and "
            f"give its path: --{teacher}.weights /path/to/folder."
        ) from error
    return folder


def _check_model_type(teacher: str, folder: Path, model_types: tuple[str, ...]) -> None:
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise WeightsError(
            f"Teacher {teacher!r} cannot read {path}: {_describe(error)}. Give --{teacher}.weights a folder "
            "that holds config.json beside the weights, as transformers saves them."
        ) from error
    if found not in model_types:
        raise WeightsError(
            f"Teacher {teacher!r} takes a model of type {' or '.join(map(repr, model_types))}; {path} says "
            f"{found!r}. Give --{teacher}.weights another folder."
        )


def _weight_files(teacher: str, folder: Path) -> list[Path]:
    """The file, or its parts, that from_pretrained reads."""
    for stem, suffix in _FORMATS:
        whole = folder / f"{stem}{suffix}"
        if files := [whole] if whole.is_file() else sorted(folder.glob(f"{stem}-*-of-*{suffix}")):
            return files
    raise WeightsError(
        f"Teacher {teacher!r}: {folder} holds neither model.safetensors nor pytorch_model.bin. Complete it, "
        f"or give --{teacher}.weights another folder."
    )


def _read(teacher: str, model_class: Any, folder: Path, model_options: Mapping[str, Any]) -> Any:
    # Mismatched sizes are let through here because transformers would raise without saying which they are.
    options = {"local_files_only": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with _silence():
            model, info = model_class.from_pretrained(folder, **options, **model_options)
    except Exception as error:
        # A damaged file raises whatever its reader trips over.
        raise WeightsError(
            f"Teacher {teacher!r} cannot load the weights in {folder}: {_describe(error)}. They are damaged "
            "or do not belong to the config.json beside them. Fetch the folder again."
        ) from error
    # Text towers, poolers and classifiers are left out on purpose; a block that config.json does not count is an error.
    surplus = [key for key in info["unexpected_keys"] if re.search(r"\blayers?\.\d", key) and "text_model." not in key]
    mismatched = [key[0] for key in info["mismatched_keys"]]
    problems = {"missing": info["missing_keys"], "of another shape": mismatched, "too many": surplus}
    if found := [f"{len(keys)} {what} ({_shorten(keys)})" for what, keys in problems.items() if keys]:
        raise WeightsError(
            f"Teacher {teacher!r}: the weights in {folder} do not fit its config.json. Tensors: "
            f"{'; '.join(found)}. Fetch the folder again."
        )
    # transformers 5 keeps the type in which the weights were saved, transformers 4 does not.
    return model.float()


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps transformers from listing every tensor of CLIP's text tower; the caller reports real misfits."""
    from transformers.utils import logging as upstream

    verbosity = upstream.get_verbosity()
    upstream.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        upstream.set_verbosity(verbosity)


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def _describe(error: Exception) -> str:
    """The error and its root, which the hub client and the HTTP library below it wrap in errors of their own."""
    root: BaseException = error
    while below := root.__cause__ or (None if root.__suppress_context__ else root.__context__):
        root = below
    outer, inner = (textwrap.shorten(str(each), 200, placeholder=" ...").rstrip(".!") for each in (error, root))
    return f"{type(error).__name__}: {outer}" + (f" ({inner})" if inner not in outer else "")


def _shorten(keys: Collection[str], limit: int = 5) -> str:
    names = sorted(keys)
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
