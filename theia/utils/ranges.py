"""Numbers that a user gives, checked where they enter."""

import math

from theia.errors import ConfigError


def check_number(
    name: str, value: float | None, least: float, most: float = math.inf, *, above: bool = False, below: bool = False
) -> None:
    """Refuses a number outside its range, also one that is none or infinite.

    Args:
        name: Option, as the user writes it, without dashes.
        value: Its value; ``None`` is an option that was left out.
        least: Smallest value.
        most: Largest value.
        above: The smallest value itself is too small.
        below: The largest value itself is too large.

    Raises:
        ConfigError: Says what the option may be.
    """
    if value is None:
        return
    enough = value > least if above else value >= least
    little = value < most if below else value <= most
    if enough and little and math.isfinite(value):
        return
    lower = f"{'above' if above else 'at least'} {least:g}"
    upper = "" if most == math.inf else f" and {'below' if below else 'at most'} {most:g}"
    raise ConfigError(f"{name} is {value:g}; it must be {lower}{upper}.")
