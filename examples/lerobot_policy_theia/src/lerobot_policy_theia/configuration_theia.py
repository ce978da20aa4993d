"""Options of the policy. LeRobot finds the policy's class and processors by the names of this module and its class."""

from dataclasses import dataclass, field

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import NormalizationMode
from lerobot.optim.optimizers import AdamWConfig


@PreTrainedConfig.register_subclass("theia")
@dataclass
class TheiaConfig(PreTrainedConfig):
    """Options of :class:`TheiaPolicy`.

    Attributes:
        encoder: For a new policy, what ``theia.load`` takes: an exported folder, a training checkpoint, a hub id.
        architecture: Of the encoder, as JSON. A saved policy has it instead of ``encoder``: it holds the weights.
        unfreeze_blocks: Blocks of the encoder to train, counted from the output; 0 keeps it frozen.
        image_size: Pixels along each side that images are resized to; a multiple of the encoder's stride, 16 for
            the paper's.
        chunk_size: Actions predicted at once.
        n_action_steps: How many of them are carried out before the next look.
        dim: Channels of the decoder.
        heads: Of its attention.
        layers: Of it.
        dropout: In it.
        optimizer_lr: Learning rate of the decoder.
        optimizer_lr_encoder: Of the encoder's free blocks.
        optimizer_weight_decay: Of both.
        normalization_mapping: What LeRobot normalises, and how. Not images: the encoder does that itself.
    """

    encoder: str | None = None
    architecture: str | None = None
    unfreeze_blocks: int = 0
    image_size: int = 224
    chunk_size: int = 50
    n_action_steps: int = 50
    dim: int = 256
    heads: int = 8
    layers: int = 4
    dropout: float = 0.1
    optimizer_lr: float = 1e-4
    optimizer_lr_encoder: float = 1e-5
    optimizer_weight_decay: float = 1e-4
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.MEAN_STD,
            "ACTION": NormalizationMode.MEAN_STD,
        }
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise ValueError(
                f"n_action_steps is {self.n_action_steps}; it must be from 1 to chunk_size, {self.chunk_size}."
            )
        if self.n_obs_steps != 1:
            raise ValueError(f"n_obs_steps is {self.n_obs_steps}; this policy looks at the current step only. Use 1.")
        if self.normalization_mapping.get("VISUAL", NormalizationMode.IDENTITY) is not NormalizationMode.IDENTITY:
            raise ValueError("normalization_mapping changes VISUAL, but the encoder normalises images. Use IDENTITY.")

    def validate_features(self) -> None:
        """Checks that there is something to see and something to do.

        Raises:
            ValueError: If there is no camera or no action.
        """
        if not self.image_features:
            raise ValueError("The data has no camera (observation.images.*); this policy cannot do without.")
        if self.action_feature is None:
            raise ValueError("The data has no 'action' to learn.")

    def get_optimizer_preset(self) -> AdamWConfig:
        """AdamW; the encoder's learning rate comes with its parameters."""
        return AdamWConfig(lr=self.optimizer_lr, weight_decay=self.optimizer_weight_decay)

    def get_scheduler_preset(self) -> None:
        """A constant learning rate."""

    @property
    def observation_delta_indices(self) -> None:
        """The current step only."""
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        """The chunk that begins at the current step."""
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        """No rewards."""
        return None
