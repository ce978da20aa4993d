"""The option ``--data`` of ``theia fit``, ``validate`` and ``test``: which class of data, with which options.

jsonargparse keeps a class as ``{"class_path": ..., "init_args": {...}}``. Where it is not named it is
:class:`FeatureData`, whose options stand in configs by themselves: ``data: {store: ...}``. They are written so, too.
"""

from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from theia.cli.parser import OneLineErrors
from theia.data.datamodule import FeatureData

CLASS, OPTIONS_OF_CLASS = "class_path", "init_args"
_NAME = FeatureData.__qualname__
_PATH = f"{FeatureData.__module__}.{_NAME}"


def flat(data: Namespace | Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of the data side by side, and the class among them under ``class_path``.

    Args:
        data: What stands under ``data``, in a parsed command line or a ``config.yaml``.
    """
    values = dict(vars(data) if isinstance(data, Namespace) else data or {})
    named = values.pop(CLASS, _PATH)
    options = values.pop(OPTIONS_OF_CLASS, None) or values
    return {CLASS: _NAME if named == _PATH else named} | dict(
        vars(options) if isinstance(options, Namespace) else options
    )


def is_feature_data(data: Mapping[str, Any]) -> bool:
    """Whether flat options are those of :class:`FeatureData`."""
    return bool(data[CLASS] == _NAME)


def data_last(words: Sequence[str]) -> list[str]:
    """A command line that names a class of data has all that it says of the data behind its configs.

    Options of another class, in a config that comes later, would be refused; so those that the class does not have are
    dropped, wherever it is named.
    """
    if not any(word == "--data" or word.startswith("--data=") for word in words):
        return list(words)
    rest: list[str] = []
    of_data: list[str] = []
    to = rest
    for word in words:
        if word.startswith("--"):
            to = of_data if word.partition("=")[0].partition(".")[0] == "--data" else rest
        to.append(word)
    return [*rest, *of_data]


class DataParser(OneLineErrors, LightningArgumentParser):
    """Lightning's, for a class of data that need not be named.

    Attributes:
        hidden: Options of :class:`FeatureData` that the command does not use.
    """

    hidden: frozenset[str] = frozenset()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.allow_abbrev = False  # a misspelt option is not the beginning of another one

    def add_lightning_class_args(
        self, lightning_class: Any, nested_key: str, subclass_mode: bool = False, required: bool = True
    ) -> list[str]:
        """See Lightning. Its own class of data may be null, and hides the errors of a class that is made."""
        if not subclass_mode:
            added: list[str] = super().add_lightning_class_args(lightning_class, nested_key, required=required)
            return added
        self.add_subclass_arguments(
            lightning_class, nested_key, fail_untyped=False, required=required, default={CLASS: _NAME}
        )
        return []

    def get_defaults(self, *args: Any, **options: Any) -> Namespace:
        """See jsonargparse. Only the class of the data is a default: its options would become those of another."""
        defaults = super().get_defaults(*args, **options)
        if isinstance(defaults.get("data"), Namespace):
            defaults.data.pop(OPTIONS_OF_CLASS, None)
        return defaults

    def dump(self, *args: Any, **options: Any) -> str:
        """See jsonargparse. The options of :class:`FeatureData` stand by themselves."""
        text = str(super().dump(*args, **options))
        values = None if options.get("with_comments") else yaml.safe_load(text)
        if not isinstance(values, dict) or not isinstance(values.get("data"), dict):
            return text
        if values["data"].get(CLASS) == _PATH:
            values["data"] = values["data"].get(OPTIONS_OF_CLASS, {})
        header = [line for line in text.splitlines(keepends=True) if line.startswith("#")]
        return "".join(header) + str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))

    def format_help(self, *args: Any, **options: Any) -> str:
        """See argparse. The options of :class:`FeatureData` are listed, too."""
        text = str(super().format_help(*args, **options))
        if not any(action.dest == "data" for action in self._actions):
            return text
        listed = ArgumentParser(usage=SUPPRESS, add_help=False, formatter_class=self.formatter_class)
        listed.add_class_arguments(FeatureData, "data")
        for action in listed._actions:
            if action.dest in {"data", *self.hidden}:
                action.help = SUPPRESS
        return f"{text}\n{listed.format_help()}"
