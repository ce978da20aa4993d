"""The parser of Theia's own commands."""

from typing import Any

from jsonargparse import ArgumentParser


class Parser(ArgumentParser):
    """jsonargparse's, but ``--switch`` alone means ``--switch true``, as people expect of a command line."""

    def add_argument(self, *args: Any, **options: Any) -> Any:
        """See ``argparse``."""
        action = super().add_argument(*args, **options)
        if options.get("type") is bool:
            action.nargs, action.const = "?", True
        return action
