import builtins
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from theia.decoding.frames import Video, video_writer
from theia.errors import ConfigError, ImageError

LEVELS = [20, 90, 160, 230, 60, 130]


def write(path: Path, frames_per_s: Fraction = Fraction(10), levels: list[int] = LEVELS) -> Path:
    """A video whose frames are grey, each of another level, the lower half black."""
    with video_writer(path, frames_per_s) as add:
        for level in levels:
            picture = np.full((32, 48, 3), level, np.uint8)
            picture[16:] = 0
            add(picture)
    return path


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_frames_come_back_in_order(name: str, tmp_path: Path) -> None:
    video = Video(write(tmp_path / name))

    assert len(video.ids) == len(LEVELS)
    assert video.frames_per_s == 10
    frames = {index: np.asarray(frame) for index, frame in video.pick(range(len(LEVELS)))}
    assert list(frames) == list(range(len(LEVELS)))
    for index, level in enumerate(LEVELS):
        assert frames[index].shape == (32, 48, 3)
        assert abs(int(frames[index][4, 24, 0]) - level) <= 4
        assert frames[index][28, 24, 0] <= 4
    assert not video.skipped


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_some_frames_are_those_frames(name: str, tmp_path: Path) -> None:
    video = Video(write(tmp_path / name))
    picked = [(index, int(np.asarray(frame)[4, 24, 0])) for index, frame in video.pick([1, 4, 5])]
    assert [index for index, _ in picked] == [1, 4, 5]
    assert [level for _, level in picked] == pytest.approx([LEVELS[index] for index in (1, 4, 5)], abs=4)


def test_uneven_rates_are_kept(tmp_path: Path) -> None:
    assert Video(write(tmp_path / "ntsc.mp4", Fraction(30000, 1001))).frames_per_s == Fraction(30000, 1001)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.avi"])
@pytest.mark.parametrize("content", [b"", b"no video at all", b"GIF89a"])
def test_a_file_that_is_no_video_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=rf"{name} cannot be read as a video"):
        Video(tmp_path / name)


def test_a_missing_video_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"There is no video .*absent\.mp4"):
        Video(tmp_path / "absent.mp4")


def test_what_is_announced_and_not_there_is_left_out_and_said(tmp_path: Path) -> None:
    video = Video(write(tmp_path / "a.mp4"))
    video.ids += ["frame-000006", "frame-000007"]

    assert [index for index, _ in video.pick(range(8))] == list(range(6))
    assert video.skipped == {"frame-000006": "the video ends here; it announces 8 frames"}


@pytest.mark.parametrize("share", [0.3, 0.55, 0.75, 0.97])
def test_a_gif_that_was_cut_is_shown_up_to_the_damage(share: float, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 32, 48, 3), np.uint8)
    with video_writer(tmp_path / "a.gif", Fraction(10)) as add:
        for picture in noise:
            add(picture)
    content = (tmp_path / "a.gif").read_bytes()
    whole = [np.asarray(frame) for _, frame in Video(tmp_path / "a.gif").pick(range(6))]
    # Of equal noise all frames take equally many bytes.
    expected = int(share * 6)
    (tmp_path / "cut.gif").write_bytes(content[: int(share * len(content))])

    video = Video(tmp_path / "cut.gif")
    assert video.frames_per_s == 10
    frames = [np.asarray(frame) for _, frame in video.pick(range(len(video.ids)))]
    assert len(frames) == expected
    for frame, good in zip(frames, whole, strict=False):
        np.testing.assert_array_equal(frame, good)
    ((sample_id, reason),) = video.skipped.items()
    assert sample_id == f"frame-{expected:06d}"
    assert reason.startswith("damaged from here on: ")


def test_a_gif_that_was_cut_anywhere_has_its_frames_before_or_is_refused(tmp_path: Path) -> None:
    content = write(tmp_path / "a.gif").read_bytes()
    counts = []
    for end in range(1, len(content) - 1):
        (tmp_path / "cut.gif").write_bytes(content[:end])
        try:
            video = Video(tmp_path / "cut.gif")
        except ImageError:
            assert not any(counts)
            continue
        counts.append(len([*video.pick(range(len(video.ids)))]))
        assert video.skipped
    assert counts == sorted(counts)
    assert {*counts} >= {1, 2, 3, 4, 5}


def test_without_pyav_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.mp4")
    plain: Callable[..., Any] = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name == "av":
            raise ImportError(name)
        return plain(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"pip install 'theia\[video\]'"):
        Video(path)
    assert len(Video(write(tmp_path / "a.gif")).ids) == 6
