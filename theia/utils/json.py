"""Converts Python values to values that JSON can hold."""

import math
from collections.abc import Mapping
from typing import Any


def jsonable(value: Any) -> Any:
    """Copies nested values into a form that any JSON reader takes, since JSON knows neither NaN nor infinity.

    Args:
        value: Mappings, lists and tuples, with whatever they hold.

    Returns:
        Dictionaries with text as keys, lists, text, integers, booleans and finite floats. ``None`` stands for a float
        that is not finite; anything else, such as a path, becomes text.
    """
    if isinstance(value, Mapping):
        return {str(name): jsonable(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(part) for part in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
