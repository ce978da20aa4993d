"""Solid textures: a colour for every point of a shape."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchmarks.probing.camera import Floats

Pattern = Literal["checks", "stripes", "marble", "speckles"]
PATTERNS: tuple[Pattern, ...] = ("checks", "stripes", "marble", "speckles")


@dataclass(frozen=True)
class Texture:
    """A pattern between two colours, on a finer one that makes places of one colour differ.

    Attributes:
        pattern: Which.
        colours: RGB from 0 to 1, shape ``(2, 3)``.
        scale: Periods per metre.
        phase: Of its waves, shape ``(3,)``, radians.
    """

    pattern: Pattern
    colours: Floats
    scale: float
    phase: Floats

    def colour(self, points: Floats) -> Floats:
        """RGB from 0 to 1 at a shape's own points, ``(..., 3)`` each."""
        waves = 2 * np.pi * self.scale * points + self.phase
        share = self._share(waves)[..., None]
        grain = 0.85 + 0.15 * np.sin(2.3 * waves + np.sin(1.1 * waves[..., [1, 2, 0]])).prod(-1)[..., None]
        mixed: Floats = (share * self.colours[0] + (1 - share) * self.colours[1]) * grain
        return mixed

    def _share(self, waves: Floats) -> Floats:
        """Of the first colour, from 0 to 1."""
        sines = np.sin(waves)
        if self.pattern == "checks":
            # Half a period off, so that no face of a box lies on the border of checks.
            share = np.cos(waves / 2).prod(-1) > 0
        elif self.pattern == "stripes":
            share = np.sin(waves @ np.cos(self.phase)) > 0
        elif self.pattern == "marble":
            share = 0.5 + 0.5 * np.sin(waves.sum(-1) / 2 + 2 * sines[..., [1, 2, 0]].sum(-1))
        else:
            share = np.sin(waves + 1.5 * sines[..., [2, 0, 1]]).prod(-1) > 0.1
        return np.asarray(share, np.float64)


def random_texture(random: np.random.Generator) -> Texture:
    """Any pattern in two colours of different brightness; says nothing of the shape that wears it."""
    colours = random.uniform(0.05, 1, (2, 3)) * np.array([[1.0], [0.55]])
    pattern = PATTERNS[random.integers(len(PATTERNS))]
    return Texture(pattern, colours, random.uniform(0.8, 2.2), random.uniform(0, 2 * np.pi, 3))
