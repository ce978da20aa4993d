"""Casts one ray per pixel: picture, depth, normals and labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.probing.camera import Camera, Floats
from benchmarks.probing.scenes.shapes import Shape
from benchmarks.probing.scenes.texture import Texture

CLASSES = ("floor", "wall", "ceiling", "sphere", "box")

_AMBIENT = 0.4
_LIFT = 1e-4  # metres that a shadow's ray starts above the surface


@dataclass(frozen=True)
class Thing:
    """A shape with its looks.

    Attributes:
        shape: Its geometry.
        texture: Its colours.
        label: Place in :data:`CLASSES`.
    """

    shape: Shape
    texture: Texture
    label: int


@dataclass(frozen=True)
class Scene:
    """Things and a light.

    Attributes:
        things: What there is; every ray must meet one.
        light: Position of a lamp.
    """

    things: Sequence[Thing]
    light: Floats


@dataclass(frozen=True)
class View:
    """What a camera sees.

    Attributes:
        image: RGB, uint8, shape ``(3, H, W)``.
        depth: Metres along the optical axis at the centre of each pixel, shape ``(H, W)``; 0 where there is nothing.
        normals: Unit length, in the camera's axes, towards the camera, shape ``(3, H, W)``.
        labels: Places in :data:`CLASSES`, shape ``(H, W)``; 255 where there is nothing.
    """

    image: NDArray[np.uint8]
    depth: Floats
    normals: Floats
    labels: NDArray[np.uint8]


def render(scene: Scene, camera: Camera) -> View:
    """Renders a view; geometry is exact to float64.

    Args:
        scene: What to render.
        camera: From where; sets the size.
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
