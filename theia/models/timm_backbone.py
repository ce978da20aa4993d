"""Any timm model that gives spatial features, as the backbone of a student."""

import difflib
import inspect
import math
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from theia.errors import ConfigError, WeightsError
from theia.models.backbone import TIMM, Backbone, StudentOptions, StudentTokens, check_divides
from theia.models.vit import ViT
from theia.models.weights import existing_file, load_strictly


class TimmBackbone(Backbone):
    """A timm model that gives spatial features, with its own normalisation of the pixels.

    Layers that the features do not depend on are dropped, such as a classifier or stages after the one that is used.

    Args:
        name: Name of the model in timm, for messages and to find its weights.
        model: The timm model.
        image_hw: Height and width of a training image, in pixels.
        stage: Number of the stage whose features are used; the last by default.
        any_size: Whether the model takes images of other sizes.

    Raises:
        ConfigError: If the model gives no spatial features, has no such stage, or does not take images of this size.
    """

    def __init__(
        self, name: str, model: nn.Module, image_hw: tuple[int, int], stage: int | None = None, any_size: bool = True
    ) -> None:
        if type(model) is VisionTransformer and model.pos_embed is not None and model.dynamic_img_size:
            # ViT has the same parameters, and resizes its positions in a way that gives the same result in ONNX.
            model.__class__ = ViT
        super().__init__(model)
        self.name, self.image_hw, self.stage = name, image_hw, stage
        config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        self.any_size = any_size
        self.any_size_exported = any_size and (isinstance(model, ViT) or not hasattr(model, "pos_embed"))
        if stage is not None:
            self.stage = self._number(stage)
        self._survey()

    @classmethod
    def build(cls, options: StudentOptions) -> "TimmBackbone":
        """Builds the backbone of a student, with random weights.

        Args:
            options: Choice of the backbone and its options.

        Raises:
            ConfigError: As for the class; also if timm has no such model or cannot build it, or if an option does not
                apply to timm backbones.
            ShapeError: If the image size does not divide into the stride.
        """
        name, size = options.backbone.removeprefix(TIMM), options.image_size
        if not name.startswith("hf-hub:") and not timm.is_model(name):
            near = difflib.get_close_matches(name, timm.list_models(), 5)
            raise ConfigError(f"timm has no model {name!r}. Similar names: {', '.join(near) or 'none'}.")
        fixed = [option for option in ("width", "depth", "heads", "wide_last") if getattr(options, option) is not None]
        fixed += ["registers"] if options.registers != StudentOptions.registers else []
        if fixed:
            raise ConfigError(
                f"{' and '.join(f'model.{option}' for option in fixed)} do not apply to {options.backbone}: only "
                "theia_* backbones have a choice. Leave them out; to undo what a config file sets, say for instance "
                "--model.width null."
            )
        try:
            model, any_size = _create(name, size)
        except (TypeError, RuntimeError, AssertionError, ValueError) as error:
            raise ConfigError(f"timm cannot build {name} for images of {size} pixels: {error}") from error
        built = cls(name, model, (size, size), options.backbone_stage, any_size)
        # A convolutional network takes any size and rounds its grid, so images of other sizes would not lie on it.
        stages = built._stages
        stride = stages[-1 if built.stage is None else built.stage].get("reduction") if stages else None
        check_divides(size, size, stride or built.stride)
        return built

    def load_weights(self, weights: str) -> None:
        """See :meth:`Backbone.load_weights`."""
        source: dict[str, Any] = {}
        if weights != "pretrained":
            source = {"pretrained_cfg_overlay": {"file": str(existing_file(weights))}}
        try:
            model, _ = _create(self.name, self.image_hw[0], pretrained=True, **source)
        except Exception as error:
            # Three libraries take part in getting the weights, each with its own exceptions.
            what = f"timm's weights of {self.name}" if weights == "pretrained" else f"the weights in {weights!r}"
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise WeightsError(
                f"Cannot get {what}: {reason}. A checkpoint of timm's model on disk works too: weights=PATH."
            ) from error
        own = self.model.state_dict().keys()
        tensors = {name: tensor for name, tensor in model.state_dict().items() if name in own}
        origin = self.name if weights == "pretrained" else weights
        load_strictly(self.model, tensors, origin, advice=f"Give weights of timm's {self.name}.")

    def blocks(self) -> list[nn.Module]:
        """See :meth:`Backbone.blocks`."""
        every = super().blocks()
        return every if self.stage is None else every[: self.stage + 1]

    def tokens(self, pixels: Tensor) -> StudentTokens:
        """See :meth:`Backbone.tokens`."""
        if self.stage is not None:
            return self.intermediates(pixels, [self.stage], norm=self.is_transformer)[0]
        return super().tokens(pixels)

    def _survey(self) -> None:
        """Passes one image to find out the layout of the features and which parameters they depend on."""
        was_training = self.training
        self.eval()
        parameter = next(self.parameters())
        pixels = torch.zeros(1, 3, *self.image_hw, device=parameter.device, dtype=parameter.dtype)
        with torch.inference_mode(False), torch.enable_grad():
            try:
                self.prefix, self.has_cls = 0, False
                if self.stage is None or self.is_transformer:  # stages of other models give maps
                    self._look_at(self.model.forward_features(pixels))
                tokens = self.tokens(pixels)
            except (RuntimeError, AssertionError, ValueError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                size = "{}x{}".format(*self.image_hw)
                raise ConfigError(f"timm's {self.name} does not take images of {size} pixels: {reason}") from error
            self.width = tokens.patches.shape[-1]
            self.stride = self.image_hw[0] // tokens.grid[0]
            if self.grid_hw != tokens.grid:
                size, grid = ("{}x{}".format(*pair) for pair in (self.image_hw, tokens.grid))
                raise ConfigError(
                    f"timm's {self.name} gives a grid of {grid} for images of {size} pixels, which do not divide into "
                    f"squares of {self.stride} pixels. Choose images of another size."
                )
            parameters = list(self.parameters())
            by_patches = _unused(tokens.patches, parameters)
            others = [tokens.registers, *([] if tokens.cls is None else [tokens.cls])]
            by_any = set.intersection(by_patches, *(_unused(other, parameters) for other in others))
        _drop(self.model, by_any)
        # Distributed training would wait for gradients that never come.
        self._never = frozenset(name for name, parameter in self.named_parameters() if id(parameter) in by_patches)
        self.unfreeze()
        self.train(was_training)

    def _look_at(self, features: Any) -> None:
        """Finds out the layout of the features, and refuses features that do not belong to places in the image."""
        if isinstance(features, Tensor) and features.ndim == 4:
            return
        if not isinstance(features, Tensor) or features.ndim != 3:
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ConfigError(f"timm's {self.name} gives no spatial features, but {shape}. Choose another.")
        prefix = getattr(self.model, "num_prefix_tokens", None)
        if prefix is None:
            raise ConfigError(
                f"timm's {self.name} gives tokens of shape {tuple(features.shape)} and does not tell how many of "
                "them are prefix tokens, such as CLS, so that spatial ones cannot be told apart. Choose another"
                f"{', or one of its stages with backbone_stage' if self._has_intermediates else ''}."
            )
        # Not all of timm's transformers tell whether they have a CLS token, but all with one call it cls_token and put
        # it first.
        told = getattr(self.model, "has_class_token", getattr(self.model, "cls_token", None) is not None)
        self.prefix, self.has_cls = prefix, prefix > 0 and bool(told)
        self.stride = self.image_hw[0] // self._grid(features.shape[1] - prefix)[0]

    def _grid(self, tokens: int) -> tuple[int, int]:
        """Rows and columns of the tokens: the grid of the patch embedding if it fits, otherwise a square."""
        grid = getattr(getattr(self.model, "patch_embed", None), "grid_size", None)
        if grid is not None and grid[0] * grid[1] == tokens:
            return grid[0], grid[1]
        side = math.isqrt(tokens)
        if side == 0 or side * side != tokens or self.image_hw[0] != self.image_hw[1]:
            raise ConfigError(f"timm's {self.name} gives {tokens} tokens and does not tell their grid. Choose another.")
        return side, side


def _create(name: str, size: int, **options: Any) -> tuple[nn.Module, bool]:
    """Creates a timm model for one image size, and tells whether it also takes other sizes."""
    # Only transformers have to be told the image size, and only some of them can change it later.
    ways: list[dict[str, Any]] = [{"img_size": size, "dynamic_img_size": True}, {"img_size": size}, {}]
    for way in ways:
        try:
            model = timm.create_model(name, num_classes=0, **way, **options)
            break
        except TypeError as error:
            if not way or "unexpected keyword argument" not in str(error):
                raise
    asks = inspect.signature(type(model)).parameters
    return model, "img_size" not in asks or "dynamic_img_size" in asks


def _unused(features: Tensor, parameters: list[nn.Parameter]) -> set[int]:
    """Ids of the parameters that the features do not depend on."""
    if not features.requires_grad or features.numel() == 0:
        return {id(parameter) for parameter in parameters}
    gradients = torch.autograd.grad(features.sum(), parameters, retain_graph=True, allow_unused=True)
    return {id(parameter) for parameter, given in zip(parameters, gradients, strict=True) if given is None}


def _drop(module: nn.Module, unused: set[int]) -> None:
    """Replaces each layer that has only unused parameters by an identity."""
    for name, child in module.named_children():
        own = {id(parameter) for parameter in child.parameters()}
        if own and own <= unused:
            setattr(module, name, nn.Identity())
        else:
            _drop(child, unused)
