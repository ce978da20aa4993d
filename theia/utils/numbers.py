"""Numbers that a user gives: whether they lie in the range in which they mean something."""

import math

from theia.errors import ConfigError

# Above these a number is a slip of the finger: images of a gigabyte each, more processes than a machine can start.
MOST_PIXELS = 16384
MOST_PROCESSES = 4096


def check_number(option: str, value: float | None, least: float, most: float = math.inf) -> None:
    """Refuses a number outside its range, and what is no number.

    Args:
        option: Its name, without dashes.
        value: As it was given; ``None`` if it was not.
        least: Smallest that is allowed.
        most: Greatest that is allowed.

    Raises:
        ConfigError: Names the option and its bound.
    """
    if value is None or least <= value <= most:
        return
    bound = f"at most {most}" if value > most else f"at least {least}"
    raise ConfigError(f"--{option} is {value}; it must be {bound}.")
