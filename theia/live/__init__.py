"""Training without a feature store: teachers run beside the student."""

from theia.live.data import LiveData

__all__ = ["LiveData"]
