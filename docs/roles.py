"""Sphinx's roles, which docstrings use so that editors understand them, as the code font of the site."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|exc):`(~?)([\w.]+)`")


class Roles(griffe.Extension):
    """Rewrites every docstring once it is loaded; ``~`` keeps the last part of a name, as in Sphinx."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """See ``griffe.Extension``."""
        if obj.docstring is not None:
            # Two colons before an example are Sphinx's, too.
            obj.docstring.value = re.sub("::$", ":", _ROLE.sub(_code, obj.docstring.value), flags=re.MULTILINE)


def _code(found: re.Match[str]) -> str:
    return f"`{found[2].rpartition('.')[2] if found[1] else found[2]}`"
