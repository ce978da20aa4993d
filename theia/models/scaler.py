"""Per-channel normalisation of a teacher's features, which makes different teachers comparable targets."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from theia.errors import ConfigError, ShapeError

Statistic = Tensor | npt.NDArray[np.floating]


def keep_float32(module: nn.Module, names: Sequence[str], apply: Callable[[], object]) -> None:
    """Moves or converts a module as asked, except that some of its buffers are moved but never converted.

    In bfloat16 the statistics of an extreme channel would be off by a quarter of its standard deviation.

    Args:
        module: Module that has the buffers.
        names: Names of the buffers to keep in their type.
        apply: Function that does what ``nn.Module._apply`` would do.
    """
    before = {name: module.get_buffer(name) for name in names}
    apply()
    for name, buffer in before.items():
        now = module.get_buffer(name)
        if now.dtype != buffer.dtype:
            module.register_buffer(
                name, buffer.to(now.device), persistent=name not in module._non_persistent_buffers_set
            )


class FeatureScaler(nn.Module):
    """Normalises tokens of one teacher per channel, ``(x - mean) / std``, in float32.

    Its statistics are buffers, so a checkpoint holds them. The scaler refuses to work until they are set: with mean 0
    and standard deviation 1, training would silently aim at a wrong target.

    Args:
        name: Name of the features, for messages.
        channels: Number of channels ``C`` of a token.
    """

    mean: Tensor  # (C,)
    std: Tensor  # (C,), a standard deviation
    is_set: Tensor  # (), bool
    reciprocal: Tensor  # (C,), 1 / std: a division would be the slowest part of a compiled loss

    def __init__(self, name: str, channels: int) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.register_buffer("is_set", torch.tensor(False))
        self.register_buffer("reciprocal", torch.ones(channels), persistent=False)
        self.register_load_state_dict_post_hook(_refresh)  # type: ignore[no-untyped-call]
        # A copy of is_set on the host: reading the buffer in every step would make the host wait for the device, and is
        # not possible in a compiled or captured step or on fake tensors.
        self._ready = False

    def _apply(self, fn: Any, recurse: bool = True) -> "FeatureScaler":
        keep_float32(self, ("mean", "std", "reciprocal"), lambda: super(FeatureScaler, self)._apply(fn, recurse))  # type: ignore[no-untyped-call]
        return self

    @torch.no_grad()
    def set(self, mean: Statistic, std: Statistic) -> None:
        """Sets the mean and the standard deviation of each channel, both of shape ``(C,)``.

        Raises:
            ShapeError: If one has another shape.
            ConfigError: If a value is not finite, or a standard deviation is not positive.
        """
        new_mean, new_std = (torch.as_tensor(value, device=self.mean.device).float() for value in (mean, std))
        if new_mean.shape != self.mean.shape or new_std.shape != self.std.shape:
            raise ShapeError(
                f"Statistics of {self.name} have shapes {tuple(new_mean.shape)} and {tuple(new_std.shape)}, "
                f"its tokens {self.mean.numel()} channels. Use the statistics of the store that holds these "
                "features."
            )
        if not (new_mean.isfinite().all() and new_std.isfinite().all() and (new_std > 0).all()):
            raise ConfigError(
                f"Statistics of {self.name} are unusable: means must be finite, standard deviations "
                "positive. Extract its features again."
            )
        self.mean.copy_(new_mean)
        self.std.copy_(new_std)
        self.is_set.fill_(True)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Updates the values derived from the statistics; needed after the statistics were set from outside."""
        self.reciprocal = self.std.float().reciprocal()
        self._ready = not self.is_set.is_meta and bool(self.is_set)

    def normalize(self, tokens: Tensor) -> Tensor:
        """Turns raw features ``(..., C)`` into normalised ones, float32."""
        self._check()
        return (tokens.float() - self.mean) * self.reciprocal

    def denormalize(self, tokens: Tensor) -> Tensor:
        """Turns normalised features ``(..., C)`` into raw ones, float32."""
        self._check()
        return tokens.float() * self.std + self.mean

    def _check(self) -> None:
        # A compiled step sees a plain Python value here: neither a read of the device nor an assignment, both of which
        # would break its graph.
        if self._ready:
            return
        self.refresh()
        if not self._ready:
            raise ConfigError(
                f"{self.name} has no statistics to normalise with. Set them from the feature store before "
                "training (Distiller.set_statistics), or load a trained checkpoint."
            )


# Not a lambda: a model may be pickled.
def _refresh(scaler: FeatureScaler, _: object) -> None:
    scaler.refresh()
