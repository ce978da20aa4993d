"""Theia: distil many vision foundation models into one small visual encoder for robots."""

import importlib
from typing import TYPE_CHECKING, Any

from theia.late import when_imported
from theia.version import __version__

if TYPE_CHECKING:
    from theia.encoder.encoder import Encoder
    from theia.encoder.load import load
    from theia.policies.policy import load_policy
    from theia.teacher import Teacher

__all__ = ["Encoder", "Teacher", "__version__", "load", "load_policy"]

_HOMES = {
    "Encoder": "theia.encoder.encoder",
    "Teacher": "theia.teacher",
    "load": "theia.encoder.load",
    "load_policy": "theia.policies.policy",
}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `theia --help` and `theia --version` do not need it.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'theia' has no attribute {name!r}")


def _register(module: str) -> None:
    importlib.import_module(module).register()


# So that AutoModel.from_pretrained reads what `theia export` wrote. In two files: transformers imports the first of its
# modules while its models are only half imported, so nothing that runs then may import a model.
when_imported("transformers.models.auto.configuration_auto", lambda: _register("theia.encoder.hf_config"))
when_imported("transformers.models.auto.modeling_auto", lambda: _register("theia.encoder.hf_model"))
