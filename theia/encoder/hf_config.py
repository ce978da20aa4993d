"""The ``config.json`` of an exported folder as transformers sees it."""

from typing import Any

from transformers.configuration_utils import PretrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from theia.encoder.load import MODEL_TYPE


class TheiaConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """The ``config.json`` of an exported folder.

    Args:
        architecture: Options of :class:`~theia.models.architecture.Architecture`.
        pool: What ``pooler_output`` holds; the mean of the patch tokens for ``"none"``.
        record: What is known of the training.
        options: Of transformers.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        architecture: dict[str, Any] | None = None,
        pool: str = "none",
        record: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.architecture = architecture
        self.pool = pool
        self.record = record or {}
        super().__init__(**options)


def register() -> None:
    """Tells ``AutoConfig`` of it."""
    AutoConfig.register(MODEL_TYPE, TheiaConfig, exist_ok=True)
