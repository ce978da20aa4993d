"""Environments that are seen through a camera of their own model, and through others around it."""

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from benchmarks.cortexbench.scenes import Factor, View
from benchmarks.cortexbench.simulation import Environment, Quality
from benchmarks.cortexbench.tasks import Task


class FixedCamera(Environment):
    """An environment with a camera in its model, which may follow the robot.

    Args:
        task: See :class:`benchmarks.cortexbench.simulation.Environment`.
        model: See there.
        data: See there.
        size: See there.
        quality: See there.
        vary: See there.
        camera: Number of the camera.
        looked_at_m: A point near which the camera looks, around which others are drawn. A camera that follows a body
            looks at that body.
    """

    def __init__(
        self, task: Task, model: Any, data: Any, size: int, quality: Quality, vary: Collection[Factor], camera: int,
        looked_at_m: Sequence[float],
    ) -> None:  # fmt: skip
        super().__init__(task, model, data, size, quality, vary)
        self._number, self._looked_at_m = camera, looked_at_m
        self._begun_at_m = np.zeros(3)
        model.vis.global_.fovy = model.cam_fovy[camera]  # which drawn cameras have

    def _find_view(self) -> View:
        self._begun_at_m = np.array(self._data.cam_xpos[self._number])
        follows = self._model.cam_mode[self._number] != 0
        target = self._data.subtree_com[self._model.cam_bodyid[self._number]] if follows else self._looked_at_m
        return view_of_camera(self._begun_at_m, np.reshape(self._data.cam_xmat[self._number], (3, 3)), target)

    def _camera(self, view: View) -> Any:
        if view == self.own_view:
            return self._number
        # A camera that was drawn follows the robot as the task's own does.
        moved = np.add(view.look_at_m, self._data.cam_xpos[self._number] - self._begun_at_m)
        x, y, z = moved.tolist()
        return super()._camera(View(view.azimuth_deg, view.elevation_deg, view.distance_m, (x, y, z)))


def view_of_camera(position: Sequence[float] | Any, axes: Any, target: Sequence[float] | Any) -> View:
    """Describes a camera of a model by a point that it looks at.

    Args:
        position: Position of the camera, in metres.
        axes: Its axes as columns, shape ``(3, 3)``: to the right, which is level, upwards, and backwards.
        target: A point, in metres. The view looks at the point of the camera's axis that is as far away.
    """
    up, forward = np.asarray(axes)[:, 1], -np.asarray(axes)[:, 2]
    elevation = math.asin(float(np.clip(forward[2], -1, 1)))
    # Straight downwards, what is above in the picture says where the camera is turned to.
    level = forward if abs(forward[2]) < 1 - 1e-9 else -np.sign(forward[2]) * up
    distance = float((np.asarray(target) - position) @ forward)
    x, y, z = (np.asarray(position) + distance * forward).tolist()
    azimuth = math.atan2(float(level[1]), float(level[0]))
    return View(math.degrees(azimuth), math.degrees(elevation), distance, (x, y, z))
