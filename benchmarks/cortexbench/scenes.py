"""How an episode is seen: through the task's own camera and light, or through others, drawn from its seed."""

import math
import zlib
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import numpy as np

from theia.errors import ConfigError

Factor = Literal["camera", "light"]
FACTORS: tuple[Factor, ...] = get_args(Factor)

# The greatest difference from the task's own camera, either way.
_AZIMUTH_DEG, _ELEVATION_DEG, _DISTANCE_M, _LOOK_AT_M = 15.0, 8.0, 0.15, 0.05
# Brightness of each colour, as a multiple of the task's own.
_DARKEST, _BRIGHTEST = 0.4, 1.4


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
class Scene:
    """Camera and light of one episode.

    Attributes:
        view: The camera.
        light: Brightness of red, green and blue, as multiples of the task's own.
    """

    view: View
    light: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def record(self) -> dict[str, float]:
        """All of its values by name."""
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


def draw_scene(own: View, vary: Collection[Factor], task: str, seed: int) -> Scene:
    """Draws camera and light of an episode.

    Args:
        own: The task's own camera.
        vary: What is drawn; the rest stays as it is in the task. What is drawn of one does not depend on the other.
        task: Name of the task: episodes of two tasks differ even if their seeds do not.
        seed: Seed of the episode.
    """
    view, light = own, (1.0, 1.0, 1.0)
    if "camera" in vary:
        rng = generator(task, seed, "camera")
        azimuth, elevation, distance = rng.uniform(-1, 1, 3) * (_AZIMUTH_DEG, _ELEVATION_DEG, _DISTANCE_M)
        x, y, z = np.add(own.look_at_m, rng.uniform(-_LOOK_AT_M, _LOOK_AT_M, 3)).tolist()
        view = View(
            own.azimuth_deg + float(azimuth), own.elevation_deg + float(elevation), own.distance_m + float(distance),
            (x, y, z),
        )  # fmt: skip
    if "light" in vary:
        red, green, blue = generator(task, seed, "light").uniform(_DARKEST, _BRIGHTEST, 3).tolist()
        light = (red, green, blue)
    return Scene(view, light)


def generator(task: str, seed: int, purpose: str) -> np.random.Generator:
    """Random numbers for one purpose in one episode, independent of those for any other."""
    return np.random.default_rng([seed, zlib.crc32(task.encode()), zlib.crc32(purpose.encode())])


def check_factors(names: Sequence[str]) -> tuple[Factor, ...]:
    """Puts factors in their fixed order.

    Raises:
        ConfigError: If there is no such factor.
    """
    unknown = [name for name in names if name not in FACTORS]
    if unknown:
        raise ConfigError(f"--vary has {unknown[0]!r}. What can be varied: {', '.join(FACTORS)}.")
    return tuple(factor for factor in FACTORS if factor in names)
