import numpy as np
import pytest

from theia.probing import scenes
from theia.probing.cameras import Camera, viewpoint_angle
from theia.probing.datasets import Storage
from theia.probing.rendering import CLASSES, Box, Plane, Scene, Sphere, Thing, View, random_texture, render
from theia.probing.scenes import camera_at, cameras_around, random_room

SIZE = 64


def scene(*shapes) -> Scene:
    random = np.random.default_rng(0)
    return Scene([Thing(shape, random_texture(random), 3) for shape in shapes], np.array([0.0, 0, 5]))


@pytest.fixture(scope="module")
def room() -> tuple[Scene, list[Camera], list[View]]:
    random = np.random.default_rng(3)
    found = random_room(random)
    cameras = cameras_around(random, SIZE)
    return found, cameras, [render(found, camera) for camera in cameras]


def test_depth_is_the_analytic_distance_to_a_ball() -> None:
    centre, radius, eye = np.array([0.2, -0.1, 0.4]), 0.6, np.array([3.0, 0.5, 1.2])
    camera = camera_at(eye, centre, SIZE)
    depth = render(scene(Sphere(centre, radius)), camera).depth
    rays = camera.rays(SIZE, SIZE)
    length = np.linalg.norm(rays, axis=-1)
    # Law of cosines: d^2 - 2 d c cos + c^2 = r^2, the nearer of two.
    apart = np.linalg.norm(centre - eye)
    cosine = (rays @ (centre - eye)) / length / apart
    inside = radius**2 - apart**2 * (1 - cosine**2)
    expected = np.where(inside >= 0, (apart * cosine - np.sqrt(np.maximum(inside, 0))) / length, 0)
    assert (depth > 0).mean() > 0.05
    np.testing.assert_allclose(depth, expected, atol=1e-9)


def test_depth_of_a_wall_ahead_is_its_distance_everywhere() -> None:
    camera = camera_at(np.array([0.0, 0, 1]), np.array([2.0, 0, 1]), SIZE)
    view = render(scene(Plane(np.array([2.5, 0, 0]), np.array([-1.0, 0, 0]))), camera)
    np.testing.assert_allclose(view.depth, 2.5)
    np.testing.assert_allclose(view.normals, np.broadcast_to([[[0]], [[0]], [[-1]]], (3, SIZE, SIZE)), atol=1e-12)


def test_hits_of_a_turned_box_lie_on_its_faces() -> None:
    box = Box(np.array([0.1, 0.2, 0.3]), np.array([0.5, 0.3, 0.2]), 0.7)
    camera = camera_at(np.array([2.0, 1.0, 1.5]), box.centre, SIZE)
    view = render(scene(box), camera)
    seen = view.depth > 0
    local = np.abs(box.local(camera.points(view.depth)[seen])) / box.half
    assert seen.mean() > 0.05
    np.testing.assert_allclose(local.max(-1), 1, atol=1e-9)
    # Three faces are seen from a corner, and their normals are at right angles.
    faces = np.unique(view.normals[:, seen].round(6), axis=1)
    np.testing.assert_allclose(np.abs(faces.T @ faces), np.eye(3), atol=1e-5)


def test_where_nothing_is_nothing_is_known() -> None:
    camera = camera_at(np.array([3.0, 0, 1]), np.array([0.0, 0, 0.5]), SIZE)
    view = render(scene(Sphere(np.zeros(3), 0.2)), camera)
    nothing = view.depth == 0
    assert nothing.any()
    assert (view.labels[nothing] == 255).all()
    assert (view.normals[:, nothing] == 0).all()


def test_normals_are_unit_and_towards_the_camera(room) -> None:
    _, cameras, views = room
    for camera, view in zip(cameras, views, strict=True):
        np.testing.assert_allclose(np.linalg.norm(view.normals, axis=0), 1, atol=1e-9)
        rays = camera.rays(SIZE, SIZE) @ camera.to_world[:3, :3]
        assert ((view.normals.transpose(1, 2, 0) * rays).sum(-1) < 0).all()


def test_normals_agree_with_the_slope_of_depth(room) -> None:
    _, cameras, views = room
    points = cameras[0].points(views[0].depth) @ cameras[0].to_world[:3, :3]
    slope = np.cross(np.diff(points, axis=0)[:, :-1], np.diff(points, axis=1)[:-1])
    slope /= np.linalg.norm(slope, axis=-1, keepdims=True)
    flat = views[0].labels[:-1, :-1] == CLASSES.index("floor")
    cosine = (slope * views[0].normals.transpose(1, 2, 0)[:-1, :-1]).sum(-1)[flat]
    assert np.median(np.abs(cosine)) > 0.9999


def test_points_seen_in_two_views_are_the_same_points(room) -> None:
    scene_, cameras, views = room
    points = cameras[0].points(views[0].depth)
    x, y = np.moveaxis(cameras[1].project(points), -1, 0)
    inside = (x > 0.5) & (x < SIZE - 0.5) & (y > 0.5) & (y < SIZE - 0.5)
    # Straight at the projected places: no interpolation of the second depth map.
    origin = cameras[1].to_world[:3, 3]
    towards = points[inside] - origin
    nearest = np.stack([thing.shape.hit(origin, towards) for thing in scene_.things]).min(0)
    assert nearest.max() < 1 + 1e-6  # nothing is seen behind itself
    visible = nearest > 1 - 1e-6
    assert visible.mean() > 0.7
    same = views[0].labels[inside][visible]
    rows, columns = y[inside][visible].astype(int), x[inside][visible].astype(int)
    assert (views[1].labels[rows, columns] == same).mean() > 0.95


def test_projection_undoes_the_points_of_a_depth_map(room) -> None:
    _, cameras, views = room
    found = cameras[2].project(cameras[2].points(views[2].depth))
    centres = np.stack(np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5), -1)
    np.testing.assert_allclose(found, centres, atol=1e-9)
    behind = cameras[2].to_world[:3, 3] - cameras[2].to_world[:3, 2]
    assert np.isinf(cameras[2].project(behind)).all()


def test_pairs_of_views_fall_into_all_bins() -> None:
    cameras = cameras_around(np.random.default_rng(0), SIZE)
    angles = [viewpoint_angle(a, b) for place, a in enumerate(cameras) for b in cameras[place + 1 :]]
    counts, _ = np.histogram(angles, (0, 15, 30, 60, 180))
    assert (counts > 0).all()


def test_the_angle_between_cameras_is_that_of_their_rotation() -> None:
    camera = camera_at(np.array([2.0, 0, 1]), np.array([0.0, 0, 1]), SIZE)
    other = camera_at(np.array([0.0, 5, 1]), np.array([0.0, 0, 1]), SIZE)
    assert viewpoint_angle(camera, camera) == pytest.approx(0, abs=1e-5)
    assert viewpoint_angle(camera, other) == pytest.approx(90)


def test_seeds_decide_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "IMAGE_SIZE", 32)
    one, again = (scenes.scenes(2, 1, Storage()) for _ in range(2))
    more = scenes.scenes(1, 1, Storage())
    other = scenes.scenes(2, 1, Storage(), seed=1)
    for name in ("images", "depth", "normals", "labels"):
        assert np.array_equal(getattr(one.train, name), getattr(again.train, name))
        assert np.array_equal(getattr(one.train, name)[:5], getattr(more.train, name))
    assert not np.array_equal(one.train.images, other.train.images)
    assert not np.array_equal(one.train.images[:5], one.val.images)
    assert len(one.val.pairs) == 10
