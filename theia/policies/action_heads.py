"""Policy heads: from what an encoder gives for three frames, and what is known besides, to the next actions."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from theia.errors import ConfigError
from theia.policies import HeadKind
from theia.policies.diffusion import Diffusion, step_embedding
from theia.policies.fusion import HIDDEN, HISTORY, Convolutions, Reduction, fuse

Scale = Literal["none", "standard", "range"]

_HIDDEN_LAYERS = 3
_LAST_SCALE = 0.01
_NOISING_STEPS, _SAMPLING_STEPS = 100, 10
_STEP_EMBEDDING = 64


class Head(nn.Module, ABC):
    """From what is known of three frames to the next actions.

    A vector is fused as ``[e1 - e0, e2 - e1, e2]``; maps are stacked in channels and go through the convolutions.
    What is known besides is joined to either.

    Args:
        channels: Number of channels of the encoder's tokens; 0 for a policy that sees no picture.
        grid: Rows and columns of the tokens; 1x1 for a vector.
        known: Number of values that are known beside the pictures, such as proprioception.
        actions: Number of values of an action.
        components: Number of principal components of the tokens that are used; ``None`` for the tokens as they are.
        chunk: Number of actions that are predicted together, ``k``; by default, what is usual for the head.
        scale: ``none`` leaves actions and what is known in their own units. ``standard`` fits the head to actions in
            standard deviations, ``range`` to actions from -1 to 1; what is known is standardised then. By default, what
            is usual for the head.

    Attributes:
        options: The arguments, from which the same head can be built again.
        chunk: Number of actions that are predicted together.

    Raises:
        ConfigError: If the grid is too small for the convolutions, or the head predicts another number of actions.

    Source: Theia, appendix on CortexBench.
    """

    kind: ClassVar[HeadKind]
    usual_chunk: ClassVar[int]
    usual_scale: ClassVar[Scale]

    action_offset: Tensor  # (A,)
    action_factor: Tensor  # (A,)
    known_offset: Tensor  # (K,)
    known_factor: Tensor  # (K,)

    def __init__(
        self,
        channels: int,
        grid: tuple[int, int],
        known: int,
        actions: int,
        components: int | None = None,
        chunk: int | None = None,
        scale: Scale | None = None,
    ) -> None:
        super().__init__()
        grid = (grid[0], grid[1])  # from a file, it comes as a list
        self.chunk, self.scale = self.usual_chunk if chunk is None else chunk, scale or self.usual_scale
        if self.chunk < 1:
            raise ConfigError(f"A head predicts at least one action; chunk is {chunk}.")
        self.options: dict[str, Any] = {
            "channels": channels, "grid": grid, "known": known, "actions": actions, "components": components,
            "chunk": self.chunk, "scale": self.scale,
        }  # fmt: skip
        self.reduction = Reduction(channels, grid, components if channels else None)
        self.convolutions: Convolutions | None = None
        outputs = HISTORY * self.reduction.channels
        if channels and grid != (1, 1):
            self.convolutions = Convolutions(outputs, grid)
            outputs = self.convolutions.outputs
        self.inputs = max(1, outputs + known)
        for name, size in (("action", actions), ("known", known)):
            self.register_buffer(f"{name}_offset", torch.zeros(size))
            self.register_buffer(f"{name}_factor", torch.ones(size))

    def fit_scale(self, actions: Tensor, known: Tensor) -> None:
        """Takes the scale of actions and of what is known from demonstrations.

        Args:
            actions: Shape ``(T, A)``.
            known: Shape ``(T, K)``.
        """
        if self.scale == "none":
            return
        if known.shape[1]:
            self._set("known", known.mean(0), known.std(0, correction=0))
        if self.scale == "standard":
            self._set("action", actions.mean(0), actions.std(0, correction=0))
        else:
            least, most = actions.amin(0), actions.amax(0)
            self._set("action", (most + least) / 2, (most - least) / 2)

    def look(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the head keeps of a frame.

        Args:
            patches: Tokens of the encoder, shape ``(B, N, C)``.
            grid: Their rows and columns.

        Returns:
            Maps, shape ``(B, channels, H, W)``.
        """
        maps: Tensor = self.reduction(patches, grid)
        return maps

    @abstractmethod
    def forward(self, frames: Tensor | None, known: Tensor, noise: Tensor | None = None) -> Tensor:
        """The next actions in their own units, shape ``(B, k, A)``.

        Args:
            frames: What :meth:`look` gave for the last but one frame, the last one, and this one, shape
                ``(B, 3, channels, H, W)``; ``None`` for a policy that sees no picture.
            known: Proprioception or state, shape ``(B, K)``.
            noise: Standard normal noise, shape ``(B, k, A)``, for a head that samples; zeros by default.
        """

    @abstractmethod
    def loss(
        self,
        frames: Tensor | None,
        known: Tensor,
        actions: Tensor,
        counted: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """What training makes small, a scalar.

        Args:
            frames: As for :meth:`forward`.
            known: As for :meth:`forward`.
            actions: What was done, shape ``(B, k, A)``.
            counted: Which of the actions count, those after the end of an episode do not; shape ``(B, k)``. All by
                default.
            generator: Random numbers on the CPU, for a head that needs some.
        """

    def _gathered(self, frames: Tensor | None, known: Tensor) -> Tensor:
        """All that is known of each step, shape ``(B, inputs)``."""
        known = (known - self.known_offset) / self.known_factor
        if frames is not None and self.convolutions is not None:
            return torch.cat([self.convolutions(frames.flatten(1, 2)), known], 1)
        if frames is not None:
            return torch.cat([fuse(frames.flatten(2)), known], 1)
        # A layer without inputs is an error in torch: a policy that is given nothing has one that is always zero.
        return known if known.shape[1] else known.new_zeros(len(known), 1)

    def _scaled(self, actions: Tensor) -> Tensor:
        return (actions - self.action_offset) / self.action_factor

    def _in_own_units(self, scaled: Tensor) -> Tensor:
        return scaled * self.action_factor + self.action_offset

    def _set(self, name: str, offset: Tensor, factor: Tensor) -> None:
        getattr(self, f"{name}_offset").copy_(offset)
        # A value that never changes must not be divided by nothing.
        getattr(self, f"{name}_factor").copy_(torch.where(factor > 0, factor, 1.0))


class MLPHead(Head):
    """One action, by an MLP and mean squared error: the head of CortexBench.

    The MLP begins with a batch norm and has three hidden layers of 256; its last layer is scaled by 0.01.
    """

    kind: ClassVar[HeadKind] = "mlp"
    usual_chunk = 1
    usual_scale: ClassVar[Scale] = "none"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.kind == "mlp" and self.chunk != 1:
            raise ConfigError(f"The head 'mlp' predicts one action, not {self.chunk}. Take the head 'chunk'.")
        layers = _hidden_layers(self.inputs, _HIDDEN_LAYERS)
        last = nn.Linear(HIDDEN, self.chunk * self.options["actions"])
        with torch.no_grad():
            last.weight.mul_(_LAST_SCALE)
            last.bias.mul_(_LAST_SCALE)
        self.mlp = nn.Sequential(*layers, last)

    def forward(self, frames: Tensor | None, known: Tensor, noise: Tensor | None = None) -> Tensor:
        """See :meth:`Head.forward`."""
        return self._in_own_units(self._predicted(frames, known))

    def loss(
        self,
        frames: Tensor | None,
        known: Tensor,
        actions: Tensor,
        counted: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See :meth:`Head.loss`."""
        return _mean(self._error(self._predicted(frames, known), self._scaled(actions)), counted)

    def _predicted(self, frames: Tensor | None, known: Tensor) -> Tensor:
        actions: Tensor = self.mlp(self._gathered(frames, known))
        return actions.reshape(len(actions), self.chunk, -1)

    def _error(self, predicted: Tensor, wanted: Tensor) -> Tensor:
        return F.mse_loss(predicted, wanted, reduction="none")


class ChunkHead(MLPHead):
    """The next actions together, by the same MLP and smooth L1: the head of the WidowX arm.

    Source: Theia, appendix on the WidowX arm.
    """

    kind: ClassVar[HeadKind] = "chunk"
    usual_chunk = 10
    usual_scale: ClassVar[Scale] = "standard"

    def _error(self, predicted: Tensor, wanted: Tensor) -> Tensor:
        return F.smooth_l1_loss(predicted, wanted, reduction="none")


class DiffusionHead(Head):
    """The next actions together, sampled by a diffusion model: the head of Spot.

    The model is an MLP that is told the noised actions, the step, and a vector of 256 made of all that is known. Of 100
    steps of noising, sampling visits 10.

    Source: Theia, appendix on Spot; Chi et al., Diffusion policy. The network is smaller than theirs.
    """

    kind: ClassVar[HeadKind] = "diffusion"
    usual_chunk = 4
    usual_scale: ClassVar[Scale] = "range"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        actions = self.options["actions"]
        self.condition = nn.Sequential(*_hidden_layers(self.inputs, 1))
        inputs = self.chunk * actions + _STEP_EMBEDDING + HIDDEN
        hidden = _hidden_layers(inputs, _HIDDEN_LAYERS, norm=False)
        self.denoiser = nn.Sequential(*hidden, nn.Linear(HIDDEN, self.chunk * actions))
        self.diffusion = Diffusion(_NOISING_STEPS, _SAMPLING_STEPS)

    def forward(self, frames: Tensor | None, known: Tensor, noise: Tensor | None = None) -> Tensor:
        """See :meth:`Head.forward`."""
        condition = self.condition(self._gathered(frames, known))
        if noise is None:
            noise = known.new_zeros(len(known), self.chunk, self.options["actions"])
        sampled = self.diffusion.sample(lambda noised, steps: self._noise(noised, steps, condition), noise)
        return self._in_own_units(sampled)

    def loss(
        self,
        frames: Tensor | None,
        known: Tensor,
        actions: Tensor,
        counted: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See :meth:`Head.loss`."""
        scaled = self._scaled(actions)
        # On the CPU, so that every device is given the same.
        noise = torch.randn(scaled.shape, generator=generator).to(scaled)
        steps = torch.randint(self.diffusion.steps, (len(scaled),), generator=generator).to(scaled.device)
        condition = self.condition(self._gathered(frames, known))
        found = self._noise(self.diffusion.noised(scaled, noise, steps), steps, condition)
        return _mean(F.mse_loss(found, noise, reduction="none"), counted)

    def _noise(self, noised: Tensor, steps: Tensor, condition: Tensor) -> Tensor:
        told = torch.cat([noised.flatten(1), step_embedding(steps, _STEP_EMBEDDING), condition], 1)
        noise: Tensor = self.denoiser(told)
        return noise.view_as(noised)


HEADS: Mapping[HeadKind, type[Head]] = {"mlp": MLPHead, "chunk": ChunkHead, "diffusion": DiffusionHead}


def _hidden_layers(inputs: int, count: int, norm: bool = True) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.BatchNorm1d(inputs)] if norm else []
    for _ in range(count):
        layers += [nn.Linear(inputs, HIDDEN), nn.ReLU()]
        inputs = HIDDEN
    return layers


def _mean(errors: Tensor, counted: Tensor | None) -> Tensor:
    """Mean of errors ``(B, k, A)`` over those that count."""
    if counted is None:
        return errors.mean()
    return (errors * counted[..., None]).sum() / (counted.sum() * errors.shape[2])
