"""Every error that Theia raises on purpose. Each message says what is wrong, where, and the next step."""


class TheiaError(Exception):
    """Base of all errors of Theia. The command line prints the message without a traceback and exits with 1."""


class ConfigError(TheiaError):
    """Options that do not fit together or do not fit the data."""


class FileError(TheiaError):
    """A file cannot be written, for instance on a full disk."""


class UnknownTeacherError(TheiaError):
    """No installed distribution registers a teacher of that name."""


class UnknownScorerError(TheiaError):
    """No installed distribution registers a scorer of that name."""


class PluginError(TheiaError):
    """A registered teacher or scorer cannot be used: it fails, is of another kind, or shares its name with another."""


class WeightsError(TheiaError):
    """Pretrained weights cannot be fetched, read, or do not fit the architecture."""


class ImageError(TheiaError):
    """An image source is missing, empty, or has too many unreadable images."""


class FeatureError(TheiaError):
    """A teacher gave features of a wrong shape, or values that cannot be stored."""


class StoreError(TheiaError):
    """A feature store is missing, unfinished, of another schema, damaged, or inconsistent."""


class WorkerError(TheiaError):
    """A reading process ended while it was still needed."""


class ShapeError(TheiaError):
    """Tensors or images have shapes that do not fit."""


class CheckpointError(TheiaError):
    """A checkpoint is missing, damaged, or belongs to another architecture."""


class DivergenceError(TheiaError):
    """A loss is no longer finite."""


class ExportError(TheiaError):
    """A model cannot be written in a format, or the written model gives other results than the original."""


class TrajectoryError(TheiaError):
    """Recorded robot data are missing, damaged, or do not fit together."""


class ObservationError(TheiaError):
    """What a robot reports to a policy cannot be used: an image is missing, or a state is no number."""
