"""Numbers that a user gives: whether they lie in the range in which they mean something."""

import math

from theia.errors import ConfigError

# Above these a number is a slip of the finger: images of a gigabyte each, more processes than a machine can start.
MOST_PIXELS = 16384
MOST_PROCESSES = 4096


def check_number(
    option: str, value: float | None, least: float, most: float = math.inf, *, above: bool = False, below: bool = False
) -> None:
    """Refuses a number outside its range, and what is infinite or no number.

    Args:
        option: Its name, without dashes.
        value: As it was given; ``None`` if it was not.
        least: Smallest that is allowed.
        most: Greatest that is allowed.
        above: The smallest itself is too small.
        below: The greatest itself is too great.

    Raises:
        ConfigError: Names the option and its bound.
    """
    if value is None:
        return
    enough = value > least if above else value >= least
    little = value < most if below else value <= most
    if enough and little and math.isfinite(value):
        return
    if enough and most < math.inf:
        bound = f"{'below' if below else 'at most'} {most}"
    else:
        bound = f"{'above' if above else 'at least'} {least}" + (" and finite" if enough else "")
    raise ConfigError(f"--{option} is {value}; it must be {bound}.")


def comma_list(value: str | list[str] | None) -> list[str]:
    """Splits ``"clip,dinov2"``; leaves a list as it is.

    Args:
        value: A comma-separated string or a list of strings; ``None`` is a list without items.

    Returns:
        The items without surrounding blanks; empty ones are dropped.
    """
    items = value.split(",") if isinstance(value, str) else value or []
    return [item.strip() for item in items if item.strip()]
