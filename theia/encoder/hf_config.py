"""The ``config.json`` of an exported folder as transformers sees it."""

from typing import Any

from transformers.configuration_utils import PretrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from theia.encoder.load import MODEL_TYPE


class TheiaConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """The ``config.json`` of an exported folder.

    Args:
        architecture: Options of :class:`~theia.models.architecture.Architecture`.
        pool: Pooling of ``pooler_output``; the mean of the patch tokens for ``"none"``.
        record: Facts about the training.
        options: Options of ``PretrainedConfig``.
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
    """Registers the config with ``AutoConfig``."""
    AutoConfig.register(MODEL_TYPE, TheiaConfig, exist_ok=True)
