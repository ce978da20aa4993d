import itertools
import math
from dataclasses import astuple

import numpy as np
import pytest

from benchmarks.cortexbench.scenes import Scene, View, check_factors, draw_pattern, draw_scene, view_from
from theia.errors import ConfigError

OWN = View(-90.0, -60.0, 0.7, (0.0, 0.6, 0.0))
BOTH = ("camera", "light")


def test_a_scene_is_a_function_of_seed_and_task() -> None:
    scene = draw_scene(OWN, BOTH, "hammer-v3", 3)
    assert scene == draw_scene(OWN, BOTH, "hammer-v3", 3)
    assert len({scene, draw_scene(OWN, BOTH, "hammer-v3", 4), draw_scene(OWN, BOTH, "assembly-v3", 3)}) == 3


def test_camera_and_light_are_drawn_independently_of_each_other() -> None:
    both = draw_scene(OWN, BOTH, "hammer-v3", 3)
    assert draw_scene(OWN, ("camera",), "hammer-v3", 3) == Scene(both.view)
    assert draw_scene(OWN, ("light",), "hammer-v3", 3) == Scene(OWN, both.light)
    assert draw_scene(OWN, (), "hammer-v3", 3) == Scene(OWN)


def test_scenes_are_spread_over_their_whole_range() -> None:
    scenes = [draw_scene(OWN, BOTH, "hammer-v3", seed) for seed in range(500)]
    views = np.array([[*astuple(scene.view)[:3], *scene.view.look_at_m] for scene in scenes])
    away = views - [-90, -60, 0.7 + 0.35, 0, 0.6, 0]
    most = np.array([15, 8, 0.15, 0.05, 0.05, 0.05])
    assert (np.abs(away) <= most).all()
    assert (away.max(0) > 0.95 * most).all()
    assert (away.min(0) < -0.95 * most).all()
    lights = np.array([scene.light for scene in scenes])
    assert lights.min(0) == pytest.approx([0.4] * 3, abs=0.03)
    assert lights.max(0) == pytest.approx([1.4] * 3, abs=0.03)


def test_a_camera_stands_where_it_was_put_and_looks_at_its_target() -> None:
    position, target = np.array([0.2, 0.9, 0.6]), np.array([0.0, 0.6, 0.1])
    view = view_from(position, target)
    azimuth, elevation = math.radians(view.azimuth_deg), math.radians(view.elevation_deg)
    forward = np.array(
        [math.cos(elevation) * math.cos(azimuth), math.cos(elevation) * math.sin(azimuth), math.sin(elevation)]
    )
    assert target - view.distance_m * forward == pytest.approx(position)
    assert view.look_at_m == pytest.approx(tuple(target))


def test_a_narrower_range_has_the_same_middle() -> None:
    whole, half, none = (draw_scene(OWN, BOTH, "hammer-v3", 3, spread) for spread in (1.0, 0.5, 0.0))
    for one in ("azimuth_deg", "elevation_deg", "distance_m", "look_at_x_m", "light_red", "light_blue"):
        ends = whole.record()[one] + none.record()[one]
        assert half.record()[one] == pytest.approx(ends / 2)
    assert none == Scene(View(-90, -60, pytest.approx(0.7 + 0.35), (0.0, 0.6, 0.0)), (pytest.approx(0.9),) * 3)


def test_what_can_be_varied_is_listed() -> None:
    assert check_factors(["light", "camera"]) == ("camera", "light")
    with pytest.raises(ConfigError, match=r"'lite'.*camera, light"):
        check_factors(["lite"])


def test_distractors_stay_away_from_the_task_and_from_each_other() -> None:
    places = set()
    for seed in range(200):
        things = draw_scene(OWN, ("distractor",), "hammer-v3", seed).distractors
        assert len(things) == 3
        for thing in things:
            assert 0.22 <= math.hypot(*thing.from_middle_m) <= 0.32
            assert 0.02 <= thing.size_m <= 0.05
            assert all(0 <= value <= 1 for value in thing.colour)
        for first, second in itertools.combinations(things, 2):
            # Corners of boxes reach out furthest.
            assert math.dist(first.from_middle_m, second.from_middle_m) > math.sqrt(2) * (first.size_m + second.size_m)
        places |= {thing.from_middle_m for thing in things}
    assert len(places) == 600


def test_a_pattern_has_two_colours_and_is_another_each_time() -> None:
    patterns = [draw_pattern(48, 64, np.random.default_rng(seed)) for seed in range(30)]
    assert {(one.shape, one.dtype) for one in patterns} == {((48, 64, 3), np.dtype(np.uint8))}
    assert len({one.tobytes() for one in patterns}) == 30
    assert sum(len(np.unique(one.reshape(-1, 3), axis=0)) == 2 for one in patterns) > 10  # blotches have shades
