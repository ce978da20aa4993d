"""Solid shapes and where rays meet them."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from benchmarks.probing.camera import Floats

_LEAST = 1e-6  # nearer hits are the ray's own start


class Shape(Protocol):
    """Something that rays meet from outside."""

    def hit(self, origins: Floats, directions: Floats) -> Floats:
        """How many times its direction each ray goes until it meets the shape.

        Args:
            origins: Shape ``(..., 3)``, or one for all rays.
            directions: Shape ``(..., 3)``, of any length.

        Returns:
            Shape ``(...)``; infinite where it misses.
        """

    def normals(self, points: Floats) -> Floats:
        """Unit normals outwards at points of the surface, ``(..., 3)`` each."""

    def local(self, points: Floats) -> Floats:
        """World points as the shape's texture sees them, ``(..., 3)`` each."""


@dataclass(frozen=True)
class Plane:
    """All points of a plane.

    Attributes:
        point: One of them.
        normal: Unit length.
    """

    point: Floats
    normal: Floats

    def hit(self, origins: Floats, directions: Floats) -> Floats:
        """See :class:`Shape`."""
        slope = directions @ self.normal
        parallel = np.abs(slope) < 1e-12
        distance = ((self.point - origins) @ self.normal) / np.where(parallel, 1, slope)
        return np.where(parallel | (distance < _LEAST), np.inf, distance)

    def normals(self, points: Floats) -> Floats:
        """See :class:`Shape`."""
        return np.broadcast_to(self.normal, points.shape)

    def local(self, points: Floats) -> Floats:
        """See :class:`Shape`."""
        return points - self.point


@dataclass(frozen=True)
class Sphere:
    """A ball.

    Attributes:
        centre: World point.
        radius: Metres.
    """

    centre: Floats
    radius: float

    def hit(self, origins: Floats, directions: Floats) -> Floats:
        """See :class:`Shape`. Solves ``|origin + t direction - centre| = radius`` for the lesser t."""
        from_centre = origins - self.centre
        a = (directions**2).sum(-1)
        b = (directions * from_centre).sum(-1)
        root = b**2 - a * ((from_centre**2).sum(-1) - self.radius**2)
        nearest = (-b - np.sqrt(np.maximum(root, 0))) / a
        return np.where((root < 0) | (nearest < _LEAST), np.inf, nearest)

    def normals(self, points: Floats) -> Floats:
        """See :class:`Shape`."""
        return (points - self.centre) / self.radius

    def local(self, points: Floats) -> Floats:
        """See :class:`Shape`."""
        return points - self.centre


@dataclass(frozen=True)
class Box:
    """A cuboid, turned about the vertical.

    Attributes:
        centre: World point.
        half: Half of its three edges, in metres.
        turn: Radians.
    """

    centre: Floats
    half: Floats
    turn: float

    @property
    def axes(self) -> Floats:
        """Its own axes as rows, ``(3, 3)``."""
        cosine, sine = np.cos(self.turn), np.sin(self.turn)
        return np.array([[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1]])

    def hit(self, origins: Floats, directions: Floats) -> Floats:
        """See :class:`Shape`. The ray is inside where it is between all three pairs of faces (slabs)."""
        origin, direction = self.local(origins), directions @ self.axes.T
        # A ray along a face: so far away that it is between that pair of faces always or never.
        direction = np.where(np.abs(direction) < 1e-12, 1e-12, direction)
        one, other = (-self.half - origin) / direction, (self.half - origin) / direction
        enter, leave = np.minimum(one, other).max(-1), np.maximum(one, other).min(-1)
        return np.where((enter > leave) | (enter < _LEAST), np.inf, enter)

    def normals(self, points: Floats) -> Floats:
        """See :class:`Shape`."""
        local = self.local(points) / self.half
        axis = np.abs(local).argmax(-1)[..., None]
        sign = np.sign(np.take_along_axis(local, axis, -1))
        found: Floats = sign * self.axes[axis[..., 0]]
        return found

    def local(self, points: Floats) -> Floats:
        """See :class:`Shape`."""
        found: Floats = (points - self.centre) @ self.axes.T
        return found
