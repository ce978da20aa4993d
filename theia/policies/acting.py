"""How a policy acts: it remembers three frames of each episode, and what is left of the actions that it predicted."""

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from theia.errors import ConfigError
from theia.models.backbone import StudentTokens
from theia.policies.action_heads import Head
from theia.policies.fusion import HISTORY


class _Frame:
    """A picture, and what the head keeps of it once it has been encoded."""

    def __init__(self, picture: Tensor) -> None:
        self.picture: Tensor | None = picture
        self.maps: Tensor | None = None


class Memory:
    """What a policy remembers of one episode.

    Args:
        seed: Seed of the noise that a head samples from.
    """

    def __init__(self, seed: int = 0) -> None:
        self.frames: deque[_Frame] = deque(maxlen=HISTORY)
        self.left: deque[Tensor] = deque()
        self.generator = torch.Generator().manual_seed(seed)

    def see(self, picture: Tensor) -> None:
        """Adds a frame; the first one stands for those before it."""
        frame = _Frame(picture)
        self.frames.extend([frame] * (1 if self.frames else HISTORY))

    @property
    def last_maps(self) -> Tensor | None:
        """What the head keeps of the newest frame that was encoded, shape ``(channels, H, W)``."""
        return next((frame.maps for frame in reversed(self.frames) if frame.maps is not None), None)


class Actor:
    """A head and its encoder, which act for several robots at once.

    Frames are encoded when a decision needs them, so that a policy that carries out several actions between two
    decisions encodes no more than three frames for each decision.

    Args:
        head: The head.
        tokens_of: Gives tokens for pictures; ``None`` for a policy that sees none.
        device: Device of both.
        execute: Number of the predicted actions that are carried out before the next decision; by default, all.

    Raises:
        ConfigError: If the head predicts fewer actions.
    """

    def __init__(
        self,
        head: Head,
        tokens_of: Callable[[Tensor], StudentTokens] | None,
        device: torch.device,
        execute: int | None = None,
    ) -> None:
        self.head, self.device = head.eval(), device
        self.execute = head.chunk if execute is None else execute
        if not 1 <= self.execute <= head.chunk:
            raise ConfigError(f"execute is {execute}; this policy predicts {head.chunk} actions at once.")
        self._tokens_of = tokens_of

    @torch.inference_mode()
    def act(self, memories: Sequence[Memory], pictures: Tensor | None, known: Tensor) -> Tensor:
        """The next action of each robot, shape ``(B, A)``, on the CPU.

        Args:
            memories: What is remembered of the robots' episodes.
            pictures: What they see, RGB, uint8, shape ``(B, 3, S, S)``; ``None`` for a policy that sees nothing.
            known: What is known besides, shape ``(B, K)``.
        """
        if self._tokens_of is not None and pictures is not None:
            for memory, picture in zip(memories, pictures, strict=True):
                memory.see(picture)
        deciding = [place for place, memory in enumerate(memories) if not memory.left]
        if deciding:
            chunks = self._decide([memories[place] for place in deciding], known[deciding])
            for place, chunk in zip(deciding, chunks, strict=True):
                memories[place].left.extend(chunk[: self.execute])
        return torch.stack([memory.left.popleft() for memory in memories])

    def _decide(self, memories: Sequence[Memory], known: Tensor) -> Tensor:
        frames: Tensor | None = None
        if self._tokens_of is not None:
            self._encode([frame for memory in memories for frame in memory.frames])
            kept = [[frame.maps for frame in memory.frames if frame.maps is not None] for memory in memories]
            frames = torch.stack([torch.stack(maps) for maps in kept])
        shape = (self.head.chunk, self.head.options["actions"])
        noise = torch.stack([torch.randn(shape, generator=memory.generator) for memory in memories])
        actions: Tensor = self.head(frames, known.to(self.device), noise.to(self.device))
        return actions.cpu()

    def _encode(self, frames: Sequence[_Frame]) -> None:
        new = {id(frame): frame for frame in frames if frame.maps is None}
        if not new or self._tokens_of is None:
            return
        pictures = torch.stack([frame.picture for frame in new.values() if frame.picture is not None])
        tokens = self._tokens_of(pictures.to(self.device))
        for frame, maps in zip(new.values(), self.head.look(tokens.patches.float(), tokens.grid), strict=True):
            frame.maps, frame.picture = maps, None
