"""Random rooms with things on the floor, and cameras around them."""

import math

import numpy as np

from benchmarks.probing.camera import Camera, Floats
from benchmarks.probing.scenes.render import CLASSES, Scene, Thing
from benchmarks.probing.scenes.shapes import Box, Plane, Shape, Sphere
from benchmarks.probing.scenes.texture import random_texture

# Degrees around the room from the first camera: pairs fall into every bin of viewpoints.
AZIMUTHS = (0.0, 9.0, 26.0, 60.0, 140.0)

_FIELD_OF_VIEW = 60.0  # degrees
_REACH = 1.3  # metres from the middle to the centre of a thing
_TRIES = 100
_HEIGHTS = (0.6, 2.2)  # metres
_DISTANCES = (1.8, 2.8)  # metres from the middle
_AIM = 0.8  # metres that the cameras' aim is off the middle, at most


def random_room(random: np.random.Generator) -> Scene:
    """A closed room with four to seven balls and boxes that stand apart. Colours say nothing of what a thing is.

    Args:
        random: Decides everything.
    """
    half_x, half_y = random.uniform(3.2, 4.2, 2)
    height = random.uniform(2.6, 3.4)
    planes = [
        ("floor", Plane(np.zeros(3), np.array([0.0, 0, 1]))),
        ("ceiling", Plane(np.array([0, 0, height]), np.array([0.0, 0, -1]))),
        ("wall", Plane(np.array([-half_x, 0, 0]), np.array([1.0, 0, 0]))),
        ("wall", Plane(np.array([half_x, 0, 0]), np.array([-1.0, 0, 0]))),
        ("wall", Plane(np.array([0, -half_y, 0]), np.array([0.0, 1, 0]))),
        ("wall", Plane(np.array([0, half_y, 0]), np.array([0.0, -1, 0]))),
    ]
    things = [
        Thing(shape, random_texture(random), CLASSES.index(name)) for name, shape in [*planes, *_furniture(random)]
    ]
    return Scene(things, np.array([*random.uniform(-1.5, 1.5, 2), height - 0.2]))


def cameras_around(random: np.random.Generator, size: int) -> list[Camera]:
    """One camera per azimuth, all looking at one place in the room, each from its own distance.

    Height and aim differ from room to room, so that a place in the picture alone does not tell how far away things are.

    Args:
        random: Decides where the first stands, what they look at, and small differences between them.
        size: Width and height of the pictures, in pixels.
    """
    start = random.uniform(0, 360)
    height = random.uniform(*_HEIGHTS)
    aim = np.array([*random.uniform(-_AIM, _AIM, 2), random.uniform(0, 2 * _AIM)])
    found = []
    for azimuth in AZIMUTHS:
        angle = math.radians(start + azimuth + random.uniform(-2, 2))
        distance = random.uniform(*_DISTANCES)
        eye = np.array([distance * math.cos(angle), distance * math.sin(angle), height + random.uniform(-0.3, 0.3)])
        found.append(camera_at(eye, aim + random.uniform(-0.2, 0.2, 3), size))
    return found


def camera_at(eye: Floats, target: Floats, size: int) -> Camera:
    """A camera with a square picture of 60 degrees and its x axis level.

    Args:
        eye: Its position.
        target: What is in the middle of the picture; not right above or below the eye.
        size: Width and height, in pixels.
    """
    ahead = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(ahead, [0, 0, 1])
    right /= np.linalg.norm(right)
    to_world = np.eye(4)
    to_world[:3] = np.stack([right, np.cross(ahead, right), ahead, eye], 1)
    focal = size / 2 / math.tan(math.radians(_FIELD_OF_VIEW) / 2)
    return Camera(np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]]), to_world, size, size)


def _furniture(random: np.random.Generator) -> list[tuple[str, Shape]]:
    found: list[tuple[str, Shape]] = []
    taken: list[tuple[Floats, float]] = []
    wanted = random.integers(4, 8)
    for _ in range(_TRIES):
        if len(found) == wanted:
            break
        place = random.uniform(-_REACH, _REACH, 2)
        half = random.uniform(0.15, 0.45, 3)
        is_ball = random.random() < 0.5
        room = float(half[0] if is_ball else np.linalg.norm(half[:2]))
        if np.linalg.norm(place) > _REACH or any(np.linalg.norm(place - at) < room + other for at, other in taken):
            continue
        taken.append((place, room))
        if is_ball:
            found.append(("sphere", Sphere(np.array([*place, half[0]]), float(half[0]))))
        else:
            found.append(("box", Box(np.array([*place, half[2]]), half, random.uniform(0, math.pi))))
    return found
