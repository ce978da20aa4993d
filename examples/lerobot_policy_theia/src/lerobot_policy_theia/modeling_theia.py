"""The policy, as LeRobot trains and runs it."""

import json
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor
from torch.nn import functional as F

import theia
from lerobot_policy_theia.chunk_decoder import ChunkDecoder
from lerobot_policy_theia.configuration_theia import TheiaConfig
from theia import Encoder
from theia.models.architecture import Architecture


class TheiaPolicy(PreTrainedPolicy):
    """A Theia encoder over all cameras, and a decoder that gives a chunk of actions.

    Args:
        config: With features filled in, as LeRobot's ``make_policy`` does.
        options: What else LeRobot hands to policies; not used.

    Raises:
        ValueError: If the features will not do, or there is nothing to take an encoder from.
        TheiaError: If the encoder cannot be loaded.
    """

    config_class = TheiaConfig
    name = "theia"

    def __init__(self, config: TheiaConfig, **options: Any) -> None:
        super().__init__(config)
        config.validate_features()
        self.config: TheiaConfig = config
        self.encoder = _encoder(config).freeze()
        if config.unfreeze_blocks:
            self.encoder.unfreeze(config.unfreeze_blocks)
        state = config.robot_state_feature
        self.decoder = ChunkDecoder(
            channels=self.encoder.width,
            cameras=len(config.image_features),
            state=state.shape[0] if state else 0,
            actions=config.action_feature.shape[0],
            chunk=config.chunk_size,
            dim=config.dim,
            heads=config.heads,
            layers=config.layers,
            dropout=config.dropout,
        )
        self.reset()

    def reset(self) -> None:
        """Forgets what is left of a chunk: a new episode begins."""
        self._queue: deque[Tensor] = deque()

    def get_optim_params(self) -> list[dict[str, Any]]:
        """What is trained: the decoder, and the encoder's free blocks with a learning rate of their own."""
        free = [parameter for parameter in self.encoder.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [{"params": list(self.decoder.parameters())}]
        return [*groups, {"params": free, "lr": self.config.optimizer_lr_encoder}] if free else groups

    def forward(self, batch: dict[str, Tensor], reduction: str = "mean") -> tuple[Tensor, dict[str, float]]:
        """Mean absolute error of normalised actions, without those past the end of an episode.

        Args:
            batch: Preprocessed; images ``(B, 3, H, W)`` from 0 to 1, actions ``(B, chunk, A)``.
            reduction: ``"mean"``, or ``"none"`` for the loss of each sample, shape ``(B,)``.

        Returns:
            The loss, and what to log.
        """
        error = (self._predict(batch) - batch[ACTION]).abs().mean(2)
        padded = batch.get("action_is_pad")
        weight = torch.ones_like(error) if padded is None else (~padded).to(error.dtype)
        samples = (error * weight).sum(1) / weight.sum(1).clamp(min=1)
        mean = (error * weight).sum() / weight.sum().clamp(min=1)
        return samples if reduction == "none" else mean, {"l1_loss": mean.item()}

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor], **options: Any) -> Tensor:
        """Normalised actions for the current observation, shape ``(B, chunk, A)``."""
        self.eval()
        return self._predict(batch)

    @torch.no_grad()
    def select_action(self, batch: dict[str, Tensor], **options: Any) -> Tensor:
        """The next normalised action, shape ``(B, A)``. It looks again when ``n_action_steps`` are used up."""
        if not self._queue:
            self._queue.extend(self.predict_action_chunk(batch)[:, : self.config.n_action_steps].unbind(1))
        return self._queue.popleft()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: TheiaConfig | None = None,
        strict: bool = True,
        **options: Any,
    ) -> "TheiaPolicy":
        """Loads a saved policy; the encoder's own files are not needed.

        Args:
            pretrained_name_or_path: Folder or id on the hub.
            config: In place of the saved one, as in a resumed training.
            strict: Whether every tensor must be there. LeRobot's default is no, which starts from random weights where
                names have changed, and only logs it.
            options: Of LeRobot.
        """
        if config is not None and config.architecture is None:
            where = {name: options[name] for name in ("revision", "cache_dir", "local_files_only") if name in options}
            config.architecture = PreTrainedConfig.from_pretrained(pretrained_name_or_path, **where).architecture
        return super().from_pretrained(pretrained_name_or_path, config=config, strict=strict, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        # In place of a path, which is of this machine, what the encoder is built from.
        config = self.config
        architecture = json.dumps(self.encoder.architecture.as_dict())
        self.config = replace(config, encoder=None, architecture=architecture)
        try:
            super()._save_pretrained(save_directory)
        finally:
            self.config = config

    def _predict(self, batch: dict[str, Tensor]) -> Tensor:
        cameras = [self._resized(batch[name]) for name in self.config.image_features]
        # All cameras in one pass. With nothing to train in the encoder, nothing is kept for a backward pass.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.unfreeze_blocks > 0):
            maps = self.encoder.forward_features(torch.cat(cameras)).as_map().chunk(len(cameras))
        chunk: Tensor = self.decoder(maps, batch.get(OBS_STATE))
        return chunk

    def _resized(self, images: Tensor) -> Tensor:
        size = (self.config.image_size, self.config.image_size)
        if tuple(images.shape[-2:]) == size:
            return images
        # Rounding of the weights may lead a little above 1, which the encoder refuses.
        return F.interpolate(images, size, mode="bilinear", antialias=True).clamp(0, 1)


def _encoder(config: TheiaConfig) -> Encoder:
    if config.architecture is not None:
        return Encoder(Architecture.of(json.loads(config.architecture)))
    if config.encoder is None:
        raise ValueError(
            "A new policy needs an encoder: --policy.encoder PATH, a folder that 'theia export' wrote, a checkpoint of "
            "'theia fit', or an id on the hub."
        )
    return theia.load(config.encoder)
