"""A small encoder's architecture."""

from theia.models.architecture import Architecture

TEACHERS = {
    "clip": {"channels": 12, "grid_hw": [16, 16], "has_cls": True},
    "odd": {"channels": 5, "grid_hw": [3, 7], "has_cls": False},
}


def small(**options: object) -> Architecture:
    return Architecture(**{"teachers": TEACHERS, "width": 32, "depth": 3, "heads": 2, **options})
