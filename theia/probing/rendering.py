"""Casts one ray per pixel: picture, depth, normals and labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from theia.probing.cameras import Camera, Floats

_LEAST = 1e-6  # nearer hits are the ray's own start


class Shape(Protocol):
    """Something that rays meet from outside."""

    def hit(self, origins: Floats, directions: Floats) -> Floats:
        """How many times its direction each ray goes until it meets the shape.

        Args:
            origins: Origins of the rays, shape ``(..., 3)``, or one for all rays.
            directions: Directions of the rays, shape ``(..., 3)``, of any length.

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
        point: Any point of the plane.
        normal: Normal of unit length.
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
        centre: Centre, a world point.
        radius: Radius in metres.
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
        centre: Centre, a world point.
        half: Half of its three edges, in metres.
        turn: Angle of the turn, in radians.
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


Pattern = Literal["checks", "stripes", "marble", "speckles"]
PATTERNS: tuple[Pattern, ...] = ("checks", "stripes", "marble", "speckles")


@dataclass(frozen=True)
class Texture:
    """A pattern between two colours, on a finer one that makes places of one colour differ.

    Attributes:
        pattern: Kind of the pattern.
        colours: RGB from 0 to 1, shape ``(2, 3)``.
        scale: Periods per metre.
        phase: Phase of its waves, shape ``(3,)``, radians.
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
        """Share of the first colour, from 0 to 1."""
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


CLASSES = ("floor", "wall", "ceiling", "sphere", "box")

_AMBIENT = 0.4
_LIFT = 1e-4  # metres that a shadow's ray starts above the surface


@dataclass(frozen=True)
class Thing:
    """A shape and how it looks.

    Attributes:
        shape: Geometry of the thing.
        texture: Colours of the thing.
        label: Index into :data:`CLASSES`.
    """

    shape: Shape
    texture: Texture
    label: int


@dataclass(frozen=True)
class Scene:
    """Things and a light.

    Attributes:
        things: Things in the scene; every ray must meet one.
        light: Position of a lamp.
    """

    things: Sequence[Thing]
    light: Floats


@dataclass(frozen=True)
class View:
    """What a camera sees.

    Attributes:
        image: RGB, uint8, shape ``(3, H, W)``.
        depth: Depth in metres along the optical axis at the centre of each pixel, shape ``(H, W)``; 0 where there is
            nothing.
        normals: Normals of unit length, in the camera's axes, towards the camera, shape ``(3, H, W)``.
        labels: Indices into :data:`CLASSES`, shape ``(H, W)``; 255 where there is nothing.
    """

    image: NDArray[np.uint8]
    depth: Floats
    normals: Floats
    labels: NDArray[np.uint8]


def render(scene: Scene, camera: Camera) -> View:
    """Renders a view; geometry is exact to float64.

    Args:
        scene: Scene to render.
        camera: Camera to render from, which sets the size.
    """
    origin, directions = camera.to_world[:3, 3], camera.rays(camera.height, camera.width)
    hits = np.stack([thing.shape.hit(origin, directions) for thing in scene.things])
    nearest, depth = hits.argmin(0), hits.min(0)
    something = np.isfinite(depth)
    depth = np.where(something, depth, 0)
    points = origin + depth[..., None] * directions
    normals, colours = np.zeros_like(points), np.zeros_like(points)
    labels = np.full(depth.shape, 255, np.uint8)
    for number, thing in enumerate(scene.things):
        here = something & (nearest == number)
        if here.any():
            outwards = thing.shape.normals(points[here])
            # A wall is seen from both sides.
            towards = np.sign(-(outwards * directions[here]).sum(-1, keepdims=True))
            normals[here] = outwards * towards
            colours[here] = thing.texture.colour(thing.shape.local(points[here]))
            labels[here] = thing.label
    lit = colours * (_AMBIENT + (1 - _AMBIENT) * _light(scene, points, normals))[..., None]
    image = np.round(255 * lit.clip(0, 1)).astype(np.uint8).transpose(2, 0, 1)
    return View(image, depth, (normals @ camera.to_world[:3, :3]).transpose(2, 0, 1), labels)


def _light(scene: Scene, points: Floats, normals: Floats) -> Floats:
    """How much of the lamp's light falls on each point, from 0 to 1: Lambert's cosine, with shadows."""
    to_light = scene.light - points
    cosine = (normals * to_light).sum(-1) / np.linalg.norm(to_light, axis=-1)
    starts = points + _LIFT * normals
    shadow = np.zeros(cosine.shape, bool)
    for thing in scene.things:
        shadow |= thing.shape.hit(starts, scene.light - starts) < 1
    return np.where(shadow, 0, cosine.clip(0))
