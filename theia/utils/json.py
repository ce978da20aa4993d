"""What JSON can hold, made of what Python has."""

import math
from collections.abc import Mapping
from typing import Any


def jsonable(value: Any) -> Any:
    """A copy of nested values that any reader of JSON takes, since JSON itself knows neither NaN nor infinity.

    Args:
        value: Mappings, lists, tuples and what they hold.

    Returns:
        Dictionaries with text as keys, lists, text, whole numbers, truth values and finite floats. ``None`` stands for
        a float that is not finite; anything else, such as a path, becomes text.
    """
    if isinstance(value, Mapping):
        return {str(name): jsonable(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(part) for part in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
