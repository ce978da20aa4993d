"""Frames of recorded episodes and of videos as images: which are in a split, and that each is the right one."""

import json
import pickle
import re
import shutil
from pathlib import Path

import av
import numpy as np
import pytest

from theia.cli.main import main
from theia.errors import ConfigError, ImageError, TrajectoryError
from theia.extraction.images import UnreadableImageError
from theia.extraction.sources import open_source
from theia.extraction.stream import open_images

STEP = 6  # grey levels between neighbouring frames


def make_video(path: Path, frames: int = 30, codec: str = "libx264", group: int = 12, rate: int = 10) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        stream.codec_context.gop_size = group
        for number in range(frames):
            picture = np.full((48, 64, 3), 16 + STEP * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def level(image: object) -> float:
    return float(np.asarray(image).astype(float).mean())


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.webm", "libvpx"), ("a.gif", "gif")],
)
def test_every_kth_frame_of_a_video_in_any_order(tmp_path: Path, name: str, codec: str) -> None:
    make_video(tmp_path / name, codec=codec)
    source = open_source(f"video:{tmp_path}", "train", every=4)
    assert list(source.ids) == [f"{name}/frame-{number:06d}" for number in range(0, 30, 4)]
    coarse = 20 if codec == "gif" else 4  # a GIF has 256 colours
    for place in [0, 1, 2, 3, 4, 5, 6, 7, 2, 7, 0]:
        assert level(source.read(place).convert("RGB")) == pytest.approx(16 + STEP * 4 * place, abs=coarse)
    again = pickle.loads(pickle.dumps(source))
    assert level(again.read(5)) == level(source.read(5))


def test_videos_are_divided_between_the_splits_and_never_cut(tmp_path: Path) -> None:
    for number in range(6):
        make_video(tmp_path / f"day{number % 2}" / f"{number}.mp4", frames=3)
    train, val = (open_source(f"video:{tmp_path}", split) for split in ("train", "val"))
    names = [{sample.rpartition("/")[0] for sample in source.ids} for source in (train, val)]
    assert names[1] == {"day1/3.mp4"}
    assert names[0] == {"day0/0.mp4", "day0/2.mp4", "day0/4.mp4", "day1/1.mp4", "day1/5.mp4"}


def test_a_video_that_is_cut_short_loses_its_last_frames_only(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.avi", codec="mpeg4")
    path.write_bytes(path.read_bytes()[:-900])
    source = open_source(f"video:{tmp_path}", "train")
    assert level(source.read(0)) == pytest.approx(16, abs=4)
    with pytest.raises(UnreadableImageError, match=r"a\.avi"):
        source.read(len(source.ids) - 1)
    assert level(source.read(1)) == pytest.approx(16 + STEP, abs=4)


@pytest.mark.parametrize("name", ["theirs_v30_video", "theirs_v21_image"])
def test_episodes_are_divided_between_the_splits(written_by_lerobot: Path, name: str) -> None:
    place = f"lerobot:{written_by_lerobot / name}#top"
    train, val = (open_source(place, split, every=5) for split in ("train", "val"))
    # Two episodes of "push" and one of "pull": the second "push" is held out.
    assert list(val.ids) == ["episode-000001/frame-000000", "episode-000001/frame-000005"]
    assert {sample.partition("/")[0] for sample in train.ids} == {"episode-000000", "episode-000002"}
    for place_in_list, sample in enumerate(train.ids):
        episode, frame = (int(part.rpartition("-")[2]) for part in sample.split("/"))
        pixel = np.asarray(train.read(place_in_list))[24, 32].astype(int)
        assert abs(pixel[0] - 12 * frame) < 6
        assert abs(pixel[1] - 80 * episode) < 6


def test_beside_recordings_images_are_taken_as_they_are(written_by_lerobot: Path) -> None:
    robot = f"lerobot:{written_by_lerobot / 'theirs_v30_video'}#top"
    source = open_source(["photographs=sample:4", f"robot={robot}"], "val", every=5)
    assert len(source.ids) == 4 + 2
    assert source.ids[-1] == "robot/episode-000001/frame-000005"


def test_a_split_of_images_beside_one_of_recordings_is_taken_whole(
    written_by_lerobot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    robot = f"lerobot:{written_by_lerobot / 'theirs_v30_video'}#top"
    images = json.dumps({"train": [robot, "photographs=sample:2"], "val": "sample:3"})
    options = ["--teachers", "color", "--store", str(tmp_path / "store"), "--every", "5", "--size", "64"]
    assert main(["extract", "--images", images, *options, "--workers", "0"]) == 0
    assert re.search(r"val +3 +0\n", capsys.readouterr().out)


def test_what_cannot_be_opened_says_so(written_by_lerobot: Path, tmp_path: Path) -> None:
    data = written_by_lerobot / "theirs_v30_video"
    with pytest.raises(ConfigError, match=r"top.*wrist"):
        open_source(f"lerobot:{data}", "train")
    with pytest.raises(TrajectoryError, match="info"):
        open_source(f"lerobot:{tmp_path}", "train")
    with pytest.raises(ImageError, match="labels"):
        open_source(f"lerobot:{data}#top", "train", labels=True)
    with pytest.raises(ImageError, match="No video"):
        open_source(f"video:{tmp_path}", "train")
    with pytest.raises(ImageError, match="nowhere"):
        open_source("video:nowhere", "train")
    with pytest.raises(ConfigError, match="--every"):
        open_source("sample:4", "train", every=2)
    with pytest.raises(ConfigError, match="--every"):
        open_source(["one=sample:4", "two=sample:5"], "train", every=2)
    make_video(tmp_path / "one.mp4", frames=3)
    with pytest.raises(ImageError, match="only video"):
        open_source(f"video:{tmp_path / 'one.mp4'}", "val")
    (tmp_path / "two.mp4").write_bytes(b"not a video at all" * 100)
    with pytest.raises(ImageError, match=r"two\.mp4"):
        open_source(f"video:{tmp_path}", "val")


def test_other_commands_look_at_what_is_held_out(written_by_lerobot: Path) -> None:
    source = open_images(f"lerobot:{written_by_lerobot / 'theirs_v30_video'}#wrist")
    assert len(source.ids) == 7


def test_an_extraction_from_episodes_fills_a_store(
    written_by_lerobot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(written_by_lerobot / "theirs_v30_video", tmp_path / "data")
    place, store = f"lerobot:{data}#top", tmp_path / "store"
    images = f"{{train: '{place}', val: '{place}'}}"
    options = ["--images", images, "--teachers", "color", "--store", str(store), "--every", "4", "--size", "64"]
    assert main(["extract", *options]) == 0
    assert main(["store", "verify", str(store)]) == 0
    capsys.readouterr()
    assert main(["store", "info", str(store)]) == 0
    out = capsys.readouterr().out
    assert "train: 8 images" in out  # every fourth of 12 and of 20
    assert "val: 2 images" in out  # of 7
