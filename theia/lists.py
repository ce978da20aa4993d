"""Lists as options: YAML lists in configs, comma-separated on the command line."""


def comma_list(value: str | list[str] | None) -> list[str]:
    """Splits ``"clip,dinov2"``; leaves a list as it is.

    Args:
        value: A comma-separated string or a list of strings; ``None`` is a list without items.

    Returns:
        The items without surrounding blanks; empty ones are dropped.
    """
    items = value.split(",") if isinstance(value, str) else value or []
    return [item.strip() for item in items if item.strip()]
