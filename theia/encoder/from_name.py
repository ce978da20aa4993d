"""Opens any encoder by one name: trained and untrained students, teachers, timm's models, teachers side by side."""

import difflib
import inspect
import os
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import timm
import torch
import torch.nn.functional as F
import yaml
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from theia import hub, registry
from theia.encoder import FORMS
from theia.encoder.encoder import Encoder
from theia.encoder.load import load, local_path
from theia.errors import ConfigError, ShapeError, WeightsError
from theia.models.architecture import Architecture
from theia.models.backbone import THEIA_SHAPES, StudentTokens, of_map, resized
from theia.models.timm_backbone import TimmBackbone
from theia.teacher import Teacher, check_features
from theia.utils.arguments import MOST_PIXELS
from theia.utils.files import at_home

_STUDENTS = {name: name for name in THEIA_SHAPES} | {name.replace("theia", "vit"): name for name in THEIA_SHAPES}
_SEED = 0
_OF_THEIA = re.compile(r"(.*?)(@random)?(?:@(\d+))?")  # a model, whether untrained, and the size of its pictures
# A comma outside of braces: no unmatched closing brace follows it. One inside braces separates options.
_OUTER_COMMA = re.compile(r",(?![^{}]*(?:{[^{}]*}[^{}]*)*})")


class NamedEncoder(nn.Module):
    """An encoder as analyses and probes see it: images in, spatial tokens out. Frozen, in evaluation mode.

    Args:
        name: Name of the encoder, as the user gave it.
        inner: Model that gives :class:`~theia.models.backbone.StudentTokens` for uint8 images ``(B, 3, H, W)``.
        distilled: Whether it is a Theia model with the weights of its training.

    Attributes:
        name: Name of the encoder, for reports.
        distilled: As above. An untrained student is an ordinary encoder, if not a good one.
        source: The model behind the name: a :class:`~theia.encoder.encoder.Encoder` for Theia models.
    """

    def __init__(self, name: str, inner: nn.Module, distilled: bool = False) -> None:
        super().__init__()
        self.name = name
        self.distilled = distilled
        self.inner = inner.eval().requires_grad_(False)

    @property
    def source(self) -> nn.Module:
        """The model behind it."""
        return self.inner.inner if isinstance(self.inner, _OfTheia | _OfTeacher | _OfTimm) else self.inner

    @property
    def size(self) -> int | None:
        """Pixels along each side to which a Theia model's pictures are resized, if its name says so."""
        return self.inner.size if isinstance(self.inner, _OfTheia) else None

    @torch.no_grad()
    def forward(self, images: Tensor) -> StudentTokens:
        """Spatial tokens, float32.

        Args:
            images: RGB images, uint8, shape ``(B, 3, H, W)``. Theia models take them as they are, so both sides must be
                multiples of the stride, unless a size was given with the name; other models resize them to their own.

        Returns:
            ``patches`` of shape ``(B, N, C)``, row by row; ``grid``, ``(H, W)``; ``cls`` if the model has it.

        Raises:
            ShapeError: If the encoder does not take images of this shape or size.
        """
        tokens: StudentTokens = self.inner(images)
        cls = None if tokens.cls is None else tokens.cls.float()
        return StudentTokens(cls, tokens.registers.float(), tokens.patches.float(), tokens.grid)


def open_encoder(
    name: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    controls: Mapping[str, str] = MappingProxyType({}),
) -> NamedEncoder:
    """Builds the encoder that a name stands for.

    Args:
        name: Name in one of the forms of :data:`theia.encoder.FORMS`, or the path of a folder or file.
        device: Device of the encoder.
        controls: Names that the caller knows besides, with what they mean: what to offer if the name has no form.

    Raises:
        ConfigError: If the name has none of the forms, a model has no spatial features, or it does not take pictures
            of the size in its name.
        UnknownTeacherError: If no such teacher is installed.
        WeightsError: If weights cannot be loaded.
    """
    name = os.fspath(name)
    kind, colon, rest = name.partition(":")
    if colon and kind in _KINDS and rest:
        return NamedEncoder(name, _KINDS[kind](rest)).to(device)
    model, untrained, size = theia_parts(name)
    # A single word, or one before an unknown colon, is neither path nor id: somebody forgot a prefix.
    is_word = colon or "/" not in model
    if not model.strip() or (is_word and not model.endswith(".ckpt") and not local_path(model).exists()):
        forms = "\n".join(f"{form:<34}{meaning}" for form, meaning in {**FORMS, **controls}.items())
        raise ConfigError(f"{name!r} names no encoder{_hint(name if colon else model)}. The forms are:\n{forms}")
    before, at, added = model.rpartition("@")
    if at and not local_path(model).exists() and local_path(before).exists():
        raise ConfigError(
            f"{name!r}: {added!r} means nothing there. After @ there can be 'random' or a size such as 448: "
            f"{before}@random, {before}@448, or {before}@random@448."
        )
    encoder = load(model)
    inner = _OfTheia(_untrained(encoder.architecture) if untrained else encoder, size)
    if size is not None:
        _check_size(name, encoder, size)
    return NamedEncoder(name, inner, not untrained).to(device)


def of_model(encoder: Encoder, name: str) -> NamedEncoder:
    """A Theia model that is open already, as analyses and probes see it."""
    return NamedEncoder(name, _OfTheia(encoder), distilled=True)


def _hint(name: str) -> str:
    meant = name.partition(":")[2] or name
    if "," in meant:
        return " (put blanks between several)"
    if meant in registry.names():
        return f"; teacher:{meant} does"
    return f"; timm:{meant} does" if timm.is_model(meant) else ""


def theia_parts(name: str) -> tuple[str, bool, int | None]:
    """Splits the name of a Theia model.

    Args:
        name: Name in one of the first three of :data:`theia.encoder.FORMS`.

    Returns:
        Its path or id, whether it is meant without its training, and the size of its pictures in pixels, if the name
        has one.
    """
    found = _OF_THEIA.fullmatch(name)
    if found is None or found[1] == name or local_path(name).exists():
        return name, False, None
    return found[1], found[2] is not None, None if found[3] is None else int(found[3])


def _check_size(name: str, encoder: Encoder, size: int) -> None:
    if size > MOST_PIXELS:
        raise ConfigError(f"{name!r} asks for pictures of {size} pixels along each side; give at most {MOST_PIXELS}.")
    try:
        encoder.distiller.student.backbone.check_size(size, size)
    except ShapeError as error:
        raise ConfigError(f"{name!r}: {error}") from error


class _OfTheia(nn.Module):
    def __init__(self, inner: Encoder, size: int | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.size = size

    def forward(self, images: Tensor) -> StudentTokens:
        return self.inner.forward_features(resized(images, self.size))


class _OfTeacher(nn.Module):
    def __init__(self, inner: Teacher) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> StudentTokens:
        features = self.inner(images)
        check_features(self.inner.spec, features, len(images))
        return StudentTokens(features.cls, features.patches[:, :0], features.patches, self.inner.spec.grid_hw)


class _OfTimm(nn.Module):
    mean: Tensor  # (3, 1, 1), of values in 0..1
    std: Tensor

    def __init__(self, inner: nn.Module, name: str) -> None:
        super().__init__()
        config = resolve_model_data_config(inner)  # type: ignore[no-untyped-call]
        self._size: tuple[int, int] = tuple(config["input_size"][1:])
        self._backbone = TimmBackbone(name, inner, self._size)
        self.register_buffer("mean", torch.tensor(self._backbone.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self._backbone.std).view(3, 1, 1), persistent=False)

    @property
    def inner(self) -> nn.Module:
        return self._backbone.model  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> StudentTokens:
        pixels = images.float()
        if tuple(pixels.shape[2:]) != self._size:
            pixels = F.interpolate(pixels, self._size, mode="bicubic", antialias=True).clamp(0, 255)
        return self._backbone.tokens((pixels / 255 - self.mean) / self.std)


class _Concatenation(nn.Module):
    """The paper's naive combination: channels of several teachers on one grid, resampled bilinearly where needed.

    Features keep their scale, so the largest ones dominate norms, components and similarity.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, images: Tensor) -> StudentTokens:
        every = [part(images) for part in self.parts]
        grid = every[0].grid
        maps = [
            tokens.as_map().float()
            if tokens.grid == grid
            else F.interpolate(tokens.as_map().float(), grid, mode="bilinear", antialias=True)
            for tokens in every
        ]
        return of_map(torch.cat(maps, 1).permute(0, 2, 3, 1))


def _teacher(text: str) -> nn.Module:
    name, at, weights = text.partition("@")
    if "," in name:
        raise ConfigError(f"teacher:{text} has a comma. Put blanks between encoders, or give concat:NAME,NAME.")
    if at and not weights.strip():
        raise ConfigError(
            f"teacher:{text} has nothing after @. Is a shell variable unset? Give weights, or leave it out."
        )
    found = registry.find(name)
    options = _options(weights) if weights.startswith("{") else {"weights": weights} if weights else {}
    # Neither the shell nor a parser replaces a ~ that stands behind a prefix.
    options = {key: at_home(value) if isinstance(value, str) else value for key, value in options.items()}
    if "weights" in options and "weights" not in inspect.signature(found).parameters:
        raise ConfigError(f"Teacher {name!r} has no weights to choose. Leave out '@{weights}'.")
    with hub.known_to_answer(str(options.get("weights", found.spec.weights))):
        return _OfTeacher(registry.create(name, options))


def _options(text: str) -> dict[str, Any]:
    try:
        options = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"The options {text} cannot be read ({error}). Write them as {{weights: PATH}}.") from error
    if not isinstance(options, dict):
        raise ConfigError(f"The options {text} have no values. Write them as {{weights: PATH}}.")
    return options


def _timm(text: str) -> nn.Module:
    name, at, weights = text.partition("@")
    if at and weights != "random":
        raise ConfigError(f"timm:{text}: after @ there can only be 'random'. Without it, timm's weights are fetched.")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 5)
        raise ConfigError(f"timm has no model {name!r}. Similar names: {', '.join(near) or 'none'}.")
    try:
        with hub.known_to_answer(weights or name), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_SEED)
            model = timm.create_model(name, pretrained=not weights, num_classes=0)
    except Exception as error:
        # Between here and the weights lie several libraries, each with its own exceptions.
        what = f"timm cannot build {name}" if weights else f"timm's weights of {name} cannot be loaded"
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}".rstrip(".")
        said = str(error) if isinstance(error, WeightsError) else f"{what} ({reason})."
        instead = "" if weights else f" Without them, take timm:{name.split('.')[0]}@random."
        raise WeightsError(said + instead) from error
    return _OfTimm(model, name)


def _concat(text: str) -> nn.Module:
    parts = [part.strip() for part in _OUTER_COMMA.split(text)]
    if not all(parts):
        raise ConfigError(f"concat:{text} has an empty name. Give teachers with single commas: concat:NAME,NAME.")
    prefixed = [part for part in parts if part.partition(":")[0] in _KINDS and ":" in part.partition("@")[0]]
    if prefixed:
        bare = f" Leave out the prefix: {prefixed[0].removeprefix('teacher:')}." if "teacher:" in prefixed[0] else ""
        raise ConfigError(f"concat:{text} has {prefixed[0]!r}; only teachers go side by side, by bare names.{bare}")
    return _Concatenation([_teacher(part) for part in parts])


def _random(text: str) -> nn.Module:
    if text not in _STUDENTS:
        sized = " A size can only follow a path or an id." if "@" in text else ""
        raise ConfigError(f"There is no student {text!r}. Choose one of: {', '.join(THEIA_SHAPES)}.{sized}")
    teachers = {"none": {"channels": 1, "grid_hw": [1, 1], "has_cls": False}}  # a model needs one
    return _OfTheia(_untrained(Architecture(teachers=teachers, backbone=_STUDENTS[text], translator="linear")))


def _untrained(architecture: Architecture) -> Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)
        return Encoder(architecture)


_KINDS = {"teacher": _teacher, "timm": _timm, "concat": _concat, "random": _random}
