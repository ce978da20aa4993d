"""What an episode looks like: as the task does, or with another camera, light, textures and bystanders, by its seed."""

import math
import zlib
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from theia.errors import ConfigError

Factor = Literal["camera", "light", "texture", "distractor"]
FACTORS: tuple[Factor, ...] = get_args(Factor)
Shape = Literal["box", "ball", "cylinder"]

# The greatest difference from the task's own camera, either way. The distance is greater than its own, since what the
# task is about must stay in the picture.
_AZIMUTH_DEG, _ELEVATION_DEG, _LOOK_AT_M = 15.0, 8.0, 0.05
_NEARER_M, _FARTHER_M = 0.2, 0.5
# Brightness of each colour, as a multiple of the task's own.
_DARKEST, _BRIGHTEST = 0.4, 1.4
# Distractors lie around what the robot works on: half their size, and where their middles may be on the table.
_DISTRACTORS, _SMALLEST_M, _LARGEST_M = 3, 0.02, 0.05
_NEAREST_M, _FARTHEST_M = 0.22, 0.32


@dataclass(frozen=True)
class View:
    """A camera on a sphere around the point that it looks at; the picture's upper edge is towards +z.

    Attributes:
        azimuth_deg: Direction that the camera looks in, around the z axis, counted from +x.
        elevation_deg: The same above the horizon; negative if the camera looks down.
        distance_m: Distance of the camera from the point.
        look_at_m: The point.
    """

    azimuth_deg: float
    elevation_deg: float
    distance_m: float
    look_at_m: tuple[float, float, float]


@dataclass(frozen=True)
class Distractor:
    """A thing beside the task, which is seen but cannot be touched.

    Attributes:
        shape: Its shape.
        size_m: Half of its height and width.
        from_middle_m: Where it lies on the table, along x and y from the middle of the picture.
        colour: Red, green and blue, from 0 to 1.
    """

    shape: Shape
    size_m: float
    from_middle_m: tuple[float, float]
    colour: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """What one episode looks like.

    Attributes:
        view: The camera.
        light: Brightness of red, green and blue, as multiples of the task's own.
        texture: Seed of the patterns of table, floor and walls; ``None`` for the task's own.
        distractors: Things beside the task.
    """

    view: View
    light: tuple[float, float, float] = (1.0, 1.0, 1.0)
    texture: int | None = None
    distractors: tuple[Distractor, ...] = ()

    def record(self) -> dict[str, float]:
        """Camera and light by name. Textures and distractors are functions of the episode's seed."""
        values = asdict(self.view)
        x, y, z = values.pop("look_at_m")
        red, green, blue = self.light
        values |= {"look_at_x_m": x, "look_at_y_m": y, "look_at_z_m": z}
        return {**values, "light_red": red, "light_green": green, "light_blue": blue}


def view_from(position: Sequence[float], target: Sequence[float]) -> View:
    """Aims a camera.

    Args:
        position: Position of the camera, in metres.
        target: The point that it looks at, in metres.
    """
    x, y, z = (float(there - here) for here, there in zip(position, target, strict=True))
    distance = math.hypot(x, y, z)
    azimuth, elevation = math.degrees(math.atan2(y, x)), math.degrees(math.asin(z / distance))
    return View(azimuth, elevation, distance, (float(target[0]), float(target[1]), float(target[2])))


def draw_scene(own: View, vary: Collection[Factor], task: str, seed: int, spread: float = 1.0) -> Scene:
    """Draws what an episode looks like.

    Args:
        own: The task's own camera.
        vary: What is drawn; the rest stays as it is in the task. What is drawn of one does not depend on the others.
        task: Name of the task: episodes of two tasks differ even if their seeds do not.
        seed: Seed of the episode.
        spread: How far camera and light may be from the middle of what is drawn, as a share of the whole range.
    """
    view, light = own, (1.0, 1.0, 1.0)
    if "camera" in vary:
        rng = generator(task, seed, "camera")
        azimuth, elevation = spread * rng.uniform(-1, 1, 2) * (_AZIMUTH_DEG, _ELEVATION_DEG)
        distance = _narrowed(rng.uniform(_NEARER_M, _FARTHER_M), _NEARER_M, _FARTHER_M, spread)
        x, y, z = np.add(own.look_at_m, spread * rng.uniform(-_LOOK_AT_M, _LOOK_AT_M, 3)).tolist()
        view = View(
            own.azimuth_deg + float(azimuth), own.elevation_deg + float(elevation), own.distance_m + float(distance),
            (x, y, z),
        )  # fmt: skip
    if "light" in vary:
        red, green, blue = (
            _narrowed(value, _DARKEST, _BRIGHTEST, spread)
            for value in generator(task, seed, "light").uniform(_DARKEST, _BRIGHTEST, 3).tolist()
        )
        light = (red, green, blue)
    texture = int(generator(task, seed, "texture").integers(2**31)) if "texture" in vary else None
    distractors = _draw_distractors(generator(task, seed, "distractor")) if "distractor" in vary else ()
    return Scene(view, light, texture, distractors)


def draw_pattern(height: int, width: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draws a texture: squares, stripes or blotches of two colours.

    Args:
        height: Rows of the texture.
        width: Columns of the texture.
        rng: Random numbers.

    Returns:
        RGB, shape ``(height, width, 3)``.
    """
    rows, columns = np.mgrid[:height, :width] / max(height, width)
    count = int(rng.integers(2, 9))  # along the longer side
    kind = int(rng.integers(3))
    if kind == 0:
        second = (np.floor(count * rows) + np.floor(count * columns)) % 2
    elif kind == 1:
        angle = rng.uniform(0, math.pi)
        second = np.floor(2 * count * (math.cos(angle) * rows + math.sin(angle) * columns)) % 2
    else:
        coarse = rng.random((count, count))
        second = coarse[(count * rows).astype(int), (count * columns).astype(int)]
    colours = rng.uniform(0, 255, (2, 3))
    mixed = colours[0] + second[..., None] * (colours[1] - colours[0])
    return np.asarray(mixed.round(), np.uint8)


def _narrowed(value: float, low: float, high: float, spread: float) -> float:
    """Moves a value towards the middle of its range."""
    middle = (low + high) / 2
    return middle + spread * (value - middle)


def _draw_distractors(rng: np.random.Generator) -> tuple[Distractor, ...]:
    found = []
    shapes: tuple[Shape, ...] = get_args(Shape)
    first = rng.uniform(0, 2 * math.pi)
    for number in range(_DISTRACTORS):
        # A third of a turn apart, so that they do not stand inside each other.
        angle = first + (number + rng.uniform(-0.3, 0.3)) * 2 * math.pi / _DISTRACTORS
        away = rng.uniform(_NEAREST_M, _FARTHEST_M)
        place = (float(away * math.cos(angle)), float(away * math.sin(angle)))
        red, green, blue = rng.uniform(0, 1, 3).tolist()
        size = float(rng.uniform(_SMALLEST_M, _LARGEST_M))
        found.append(Distractor(shapes[int(rng.integers(len(shapes)))], size, place, (red, green, blue)))
    return tuple(found)


def generator(task: str, seed: int, purpose: str) -> np.random.Generator:
    """Random numbers for one purpose in one episode, independent of those for any other."""
    return np.random.default_rng([seed, zlib.crc32(task.encode()), zlib.crc32(purpose.encode())])


def check_factors(names: Sequence[str], option: str = "--vary") -> tuple[Factor, ...]:
    """Puts factors in their fixed order.

    Args:
        names: Names as a user gives them.
        option: The option that they were given with, for the message.

    Raises:
        ConfigError: If there is no such factor.
    """
    unknown = [name for name in names if name not in FACTORS]
    if unknown:
        raise ConfigError(f"{option} has {unknown[0]!r}. What can be varied: {', '.join(FACTORS)}.")
    return tuple(factor for factor in FACTORS if factor in names)
