"""Normalisation of a teacher's features, which makes different teachers comparable targets.

Features are known to everybody in one form: normalised per channel, as in the paper. A normaliser other than that makes
the targets of the training from this form, and its inverse takes the predictions back.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from theia.errors import ConfigError, ShapeError

Statistic = Tensor | npt.NDArray[np.floating]
Matrix = npt.NDArray[np.float64]
Normalizer = Literal["std", "scale", "phi_s", "whiten", "power"]

NEED_COVARIANCE = ("phi_s", "whiten", "power")
POWER = 1 / 3  # exponent of "power"; PHI-S has 1, whitening 0
_FLOOR = 1e-3  # share of the mean variance that is added to each, so that none is divided by next to nothing


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


def training_targets(
    normalizer: Normalizer, std: Matrix, covariance: Matrix | None = None, exponent: float = POWER
) -> tuple[Matrix, Matrix]:
    """What makes training targets from features that are normalised per channel, and its inverse.

    With the covariance ``U diag(v) U^T`` of the features ``x``, and ``m`` for the mean of ``v``, the targets are
    ``s Q diag((v + 0.001 m)^((b - 1) / 2)) U^T (x - mean)``, where ``b`` is 1 for ``"phi_s"``, 0 for ``"whiten"`` and
    the exponent for ``"power"``. ``Q`` is an orthogonal matrix that gives all channels the same variance, and ``s``
    makes it 1. ``"scale"`` only divides by one number, for a mean variance of 1.

    Args:
        normalizer: Name of the normaliser; ``"std"``, which normalises per channel, has no targets of its own.
        std: Standard deviation of each channel, shape ``(C,)``.
        covariance: Population covariance of the channels, shape ``(C, C)``; ``"scale"`` needs none.
        exponent: Power of the spectrum that ``"power"`` keeps.

    Returns:
        Factors of the channels and their reciprocals, shape ``(C,)``, for ``"scale"``; else two matrices, shape
        ``(C, C)``, to multiply a token with from the left.

    Raises:
        ConfigError: If the covariance is missing.

    Source: PHI-S (Ranzinger et al., 2025): ``Q`` is a Hadamard matrix. The power of the spectrum as in SpecMatch.
    """
    if normalizer == "scale":
        factors = std / np.sqrt(np.square(std).mean())
        return factors, 1 / factors
    if covariance is None:
        raise ConfigError(f"The normaliser {normalizer!r} needs covariances: give them to Distiller.set_statistics.")
    variances, axes = np.linalg.eigh(covariance)
    variances = variances.clip(min=0)
    kept = {"phi_s": 1.0, "whiten": 0.0, "power": exponent}[normalizer]
    stretch = (variances + _FLOOR * variances.mean()) ** ((kept - 1) / 2)
    stretch = stretch / np.sqrt(np.mean(variances * stretch**2))
    turn = equaliser(variances * stretch**2)
    forward = (turn * stretch) @ axes.T * std
    return forward, ((axes / stretch) @ turn.T) / std[:, None]


def equaliser(variances: Matrix) -> Matrix:
    """An orthogonal matrix ``Q`` such that all entries on the diagonal of ``Q diag(v) Q^T`` are the mean of ``v``.

    For ``2^k``, ``12 * 2^k`` and ``20 * 2^k`` channels, it is the Hadamard matrix of Sylvester and Paley, which does so
    for any variances. Otherwise, each of ``C - 1`` rotations of two channels brings one of them to the mean.

    Args:
        variances: Variances ``v``, shape ``(C,)``.
    """
    from scipy.linalg import hadamard  # most models need none, and it takes long to import

    channels = len(variances)
    for order in (1, 12, 20):
        power = channels // order
        if power * order == channels and power & (power - 1) == 0:
            return np.asarray(np.kron(hadamard(power), _paley(order - 1)) / np.sqrt(channels))
    mean = variances.mean()
    spread, turn = np.diag(variances), np.eye(channels)
    left = np.arange(channels)
    while len(left) > 1:
        diagonal = spread.diagonal()[left]
        first, second = left[diagonal.argmax()], left[diagonal.argmin()]
        # The rotation by the angle with tangent t puts (a - 2 t c + t^2 b) / (1 + t^2) in the first place.
        above, below, both = spread[first, first] - mean, spread[second, second] - mean, spread[first, second]
        tangent = 0.0
        if below < 0:
            tangent = (both - np.sqrt(max(both**2 - above * below, 0.0))) / below
        cosine = 1 / np.sqrt(1 + tangent**2)
        rotation = np.array([[cosine, -tangent * cosine], [tangent * cosine, cosine]])
        pair = [first, second]
        spread[pair] = rotation @ spread[pair]
        spread[:, pair] = spread[:, pair] @ rotation.T
        turn[pair] = rotation @ turn[pair]
        left = left[left != first]
    return turn


def _paley(prime: int) -> Matrix:
    """Paley's Hadamard matrix of the order ``prime + 1``, for a prime that is 3 modulo 4; the matrix (1) for 0."""
    if prime == 0:
        return np.ones((1, 1))
    squares = {value**2 % prime for value in range(1, prime)}
    signs = np.array([0] + [1 if value in squares else -1 for value in range(1, prime)])
    matrix = np.ones((prime + 1, prime + 1))
    matrix[1:, 1:] = signs[np.subtract.outer(np.arange(prime), np.arange(prime)) % prime]
    matrix[1:, 0] = -1
    return matrix + np.diag([0.0] + [1.0] * prime)


class FeatureScaler(nn.Module):
    """Normalises tokens of one teacher per channel, ``(x - mean) / std``, in float32.

    If it has a normaliser, it also turns such tokens into targets of the training and back.

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
    forth: Tensor | None  # (C,) or (C, C), from tokens normalised per channel to targets; None if those are the targets
    back: Tensor | None  # its inverse

    def __init__(self, name: str, channels: int) -> None:
        super().__init__()
        self.name = name
        self.normalizer: tuple[Normalizer, float] = ("std", POWER)  # with the exponent
        self.register_buffer("forth", None)
        self.register_buffer("back", None)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.register_buffer("is_set", torch.tensor(False))
        self.register_buffer("reciprocal", torch.ones(channels), persistent=False)
        self.register_load_state_dict_post_hook(_refresh)  # type: ignore[no-untyped-call]
        # A copy of is_set on the host: reading the buffer in every step would make the host wait for the device, and is
        # not possible in a compiled or captured step or on fake tensors.
        self._ready = False

    def _apply(self, fn: Any, recurse: bool = True) -> "FeatureScaler":
        names = ["mean", "std", "reciprocal", *(["forth", "back"] if self.forth is not None else [])]
        keep_float32(self, names, lambda: super(FeatureScaler, self)._apply(fn, recurse))  # type: ignore[no-untyped-call]
        return self

    def use(self, normalizer: Normalizer, exponent: float = POWER) -> None:
        """Chooses a normaliser for the targets, before the statistics are set.

        Args:
            normalizer: Name of the normaliser, as for :func:`training_targets`.
            exponent: Power of the spectrum, likewise.
        """
        self.normalizer = normalizer, exponent
        if normalizer != "std":
            channels = self.mean.numel()
            shape = (channels,) if normalizer == "scale" else (channels, channels)
            self.forth, self.back = torch.zeros(shape), torch.zeros(shape)

    @torch.no_grad()
    def set(self, mean: Statistic, std: Statistic, covariance: Matrix | None = None) -> None:
        """Sets the mean and the standard deviation of each channel, both of shape ``(C,)``.

        Args:
            mean: Mean of each channel.
            std: Standard deviation of each channel.
            covariance: Population covariance of the channels, shape ``(C, C)``, if the normaliser needs it.

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
        if self.forth is not None and self.back is not None:
            known = self.std.double().cpu().numpy()
            forth, back = training_targets(self.normalizer[0], known, covariance, self.normalizer[1])
            self.forth.copy_(torch.from_numpy(forth))
            self.back.copy_(torch.from_numpy(back))
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

    def target(self, tokens: Tensor) -> Tensor:
        """Turns tokens ``(..., C)`` that are normalised per channel into targets of the training, float32."""
        return _applied(tokens, self.forth)

    def per_channel(self, targets: Tensor) -> Tensor:
        """Turns targets ``(..., C)``, or predictions of them, into tokens that are normalised per channel."""
        return _applied(targets, self.back)

    @torch.no_grad()
    def fold_into(self, last: nn.Linear) -> None:
        """Has a linear layer that predicts targets predict tokens normalised per channel; then there are no targets.

        Args:
            last: Last layer of the translator into these features.
        """
        if self.back is not None:
            back = self.back.double()
            for parameter in (last.weight, last.bias):
                value = parameter.double()
                rows = back.unsqueeze(1) if value.ndim > back.ndim else back
                parameter.copy_(back @ value if back.ndim == 2 else rows * value)
        self.forth = self.back = None

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


def _applied(tokens: Tensor, change: Tensor | None) -> Tensor:
    if change is None:
        return tokens
    # In bfloat16, what is small beside the rest of a token would drown in its rounding.
    with torch.autocast(tokens.device.type, enabled=False):
        return tokens.float() * change if change.ndim == 1 else tokens.float() @ change.T


# Not a lambda: a model may be pickled.
def _refresh(scaler: FeatureScaler, _: object) -> None:
    scaler.refresh()
