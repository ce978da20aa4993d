"""What to call encoders where there is little room."""

import re
from collections.abc import Sequence

_TELLS_NOTHING = ("", ".", "exported", "checkpoints", "last.ckpt")
_LINE = 20  # letters


def short_labels(names: Sequence[str]) -> dict[str, str]:
    """Of a path the last two parts that tell something, of other names all; options in braces are left out.

    Where two would be called alike, both keep their full name.
    """
    short = {}
    for name in names:
        kind, at, path = name.partition("@") if re.match(r"\w+:", name) else ("", "", name)
        parts = [part for part in path.split("/") if part not in _TELLS_NOTHING]
        short[name] = kind + at + ("..." if path.startswith("{") else "/".join(parts[-2:])) or name
    labels = [*short.values()]
    return {name: label if labels.count(label) == 1 else name for name, label in short.items()}


def wrapped(label: str) -> str:
    """The same over several lines of about twenty letters, broken behind signs."""
    lines = [""]
    for piece in re.findall(r"[^:/@,_.-]*[:/@,_.-]?", label):
        if lines[-1] and len(lines[-1]) + len(piece) > _LINE:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)
