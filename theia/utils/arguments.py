"""What a user gives as numbers, lists and seeds: read, and checked that it makes sense."""

import math

from theia.errors import ConfigError

# A number above these is a typing mistake: images of a gigabyte each, more processes than a machine can start.
MOST_PIXELS = 16384
MOST_PROCESSES = 4096


def check_number(
    option: str, value: float | None, least: float, most: float = math.inf, *, above: bool = False, below: bool = False
) -> None:
    """Refuses a number that is outside its range, infinite or not a number.

    Args:
        option: Name of the option, without dashes.
        value: Value that was given; ``None`` if the option was not.
        least: Smallest allowed value.
        most: Greatest allowed value.
        above: Whether the smallest value itself is refused.
        below: Whether the greatest value itself is refused.

    Raises:
        ConfigError: If the number is refused. The message names the option and its bound.
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


def seed_numbers(seeds: int | str | list[int]) -> list[int]:
    """Turns the seeds that a user gives into numbers.

    Args:
        seeds: A number, several in a list, or several with commas between them.

    Raises:
        ConfigError: If one is not a seed, or is given twice.
    """
    given = [str(seed) for seed in seeds] if isinstance(seeds, list) else comma_list(str(seeds))
    numbers = [int(seed) for seed in given if seed.isdecimal()]
    if not given or len(set(numbers)) < len(given) or max(numbers) >= 2**32:
        raise ConfigError(
            f"seeds is {seeds!r}; it must be one or more whole numbers below 2**32, each once: --seeds 0,1,2."
        )
    return numbers
