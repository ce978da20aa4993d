"""Cameras: where a picture was taken from, and how poses are read."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Camera:
    """Axes as in OpenCV: x to the right, y down, z into the picture. The centre of the first pixel is (0.5, 0.5).

    Attributes:
        intrinsics: Focal lengths and centre in pixels, shape ``(3, 3)``.
        to_world: Rotation and position of the camera, shape ``(4, 4)``.
        width: Width of the picture, in pixels.
        height: Height of the picture, in pixels.
    """

    intrinsics: Floats
    to_world: Floats
    width: int
    height: int

    def rays(self, rows: int, columns: int) -> Floats:
        """World directions through the centres of a grid of cells, of one unit of depth each.

        Args:
            rows: Number of rows of cells over the whole picture.
            columns: Number of columns of cells.

        Returns:
            Shape ``(rows, columns, 3)``.
        """
        x = (np.arange(columns) + 0.5) * self.width / columns
        y = (np.arange(rows) + 0.5) * self.height / rows
        pixels = np.stack([*np.meshgrid(x, y), np.ones((rows, columns))], -1)
        return pixels @ np.linalg.inv(self.intrinsics).T @ self.to_world[:3, :3].T

    def points(self, depth: NDArray[np.floating]) -> Floats:
        """World points of a depth map.

        Args:
            depth: Depth along the optical axis, shape ``(H, W)``, over the whole picture at any resolution.

        Returns:
            Shape ``(H, W, 3)``.
        """
        found: Floats = self.to_world[:3, 3] + depth[..., None] * self.rays(*depth.shape)
        return found

    def project(self, points: Floats) -> Floats:
        """Where world points lie in the picture.

        Args:
            points: Points, shape ``(..., 3)``.

        Returns:
            x and y in pixels, shape ``(..., 2)``; infinite for points that are not in front of the camera.
        """
        seen = (points - self.to_world[:3, 3]) @ self.to_world[:3, :3] @ self.intrinsics.T
        depth = seen[..., 2:]
        return np.where(depth > 0, seen[..., :2] / np.where(depth > 0, depth, 1), np.inf)


def viewpoint_angle(first: Camera, second: Camera) -> float:
    """Angle of the rotation from one camera to another, in degrees from 0 to 180.

    Source: probe3D; ``arccos((trace(R) - 1) / 2)``.
    """
    relative = first.to_world[:3, :3].T @ second.to_world[:3, :3]
    return float(np.degrees(np.arccos(np.clip((np.trace(relative) - 1) / 2, -1, 1))))
