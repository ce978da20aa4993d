import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from theia.cli.main import main
from theia.encoder.from_name import NamedEncoder
from theia.models.backbone import StudentTokens
from theia.probing import comparison as probing
from theia.probing import embedding, probes, scenes
from theia.probing.cameras import Camera
from theia.probing.comparison import PRESETS, Effort, Unfinished
from theia.probing.datasets import IMAGE_SIZE, DenseSplit, Storage, fingerprint, of_files, open_folder
from theia.probing.heads import Fit
from theia.probing.linear_probe import Schedule
from theia.probing.probes import Probed


class Means(torch.nn.Module):
    """A 14x14 grid of mean colours; with ``constant`` all the same, with ``pooled`` one token."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, images: torch.Tensor) -> StudentTokens:
        side = 1 if self.kind == "pooled" else 14
        maps = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, side)
        patches = maps.flatten(2).transpose(1, 2)
        if self.kind == "constant":
            patches = torch.ones_like(patches)
        if self.kind == "infinite":
            patches = patches / 0
        return StudentTokens(None, patches[:, :0], patches, (side, side))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little work, and encoders that cost nothing."""
    monkeypatch.setattr(embedding, "open_encoder", lambda name, _: NamedEncoder(name, Means(name)))
    for name, on_disk, schedule in (("small", False, None), ("full", True, Schedule(8, 204.8, 60, 5))):
        effort = Effort(schedule, Fit(2, 0.5, 4, 5e-3), (1, 1), on_disk)
        monkeypatch.setitem(PRESETS, name, effort)


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run_(*arguments: str) -> tuple[int, str, str]:
        status = main(["probe", *arguments, f"--out={tmp_path / 'results'}"])
        return status, *capsys.readouterr()

    return run_


def classes(root: Path, count: int = 15, names: tuple[str, ...] = ("blue", "red")) -> Path:
    """Folders of classes that differ in colour; sizes are mixed."""
    random = np.random.default_rng(0)
    for place, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number in range(count):
            shape = (20 + number, 30, 3)
            pixels = random.integers(0, 80, shape).astype(np.uint8)
            pixels[..., place % 3] += 150
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@functools.cache
def room(seed: int) -> DenseSplit:
    return scenes._split("val", 1, Storage(), seed)


def folder(root: Path, count: int = 3) -> Path:
    """The layout of folder.py: a rendered room."""
    for split, number in (("train", 0), ("val", 1)):
        found = room(number)
        here = root / split
        for kind in ("rgb", "depth", "normals", "labels", "pose"):
            (here / kind).mkdir(parents=True)
        for place in range(count):
            name = f"{place}.png"
            Image.fromarray(found.images[place].transpose(1, 2, 0)).save(here / "rgb" / name)
            Image.fromarray((1000 * found.depth[place]).round().astype(np.uint16)).save(here / "depth" / name)
            colours = (255 * (found.normals[place] + 1) / 2).round().astype(np.uint8).transpose(1, 2, 0)
            Image.fromarray(colours).save(here / "normals" / name)
            Image.fromarray(found.labels[place]).save(here / "labels" / name)
            np.savetxt(here / "pose" / f"{place}.txt", found.cameras[place].to_world)
        np.savetxt(here / "intrinsics.txt", found.cameras[0].intrinsics)
        (here / "pairs.txt").write_text("0 1\n0.png 2.png\n\n")
    return root


def record(tmp_path: Path) -> dict:
    (path,) = (tmp_path / "results").glob("*.json")
    return json.loads(path.read_text())


def test_classes_are_told_and_every_seed_is_recorded(tmp_path: Path, run) -> None:
    images = classes(tmp_path / "images")
    options = ("--encoders", "a", "b", f"--images={images}", "--seeds=0,1", "--preset=full")
    status, out, err = run("classification", *options)
    assert (status, "Error" in err) == (0, False)
    written = record(tmp_path)
    assert list(written["figures"]) == ["no encoder", "a", "b"]
    measures = {name: figure["values"] for name, figure in written["figures"]["a"].items()}
    assert measures == {"classification/knn": [1.0], "classification/linear": [1.0, 1.0]}
    assert written["settings"]["training images"] == 24
    assert str(tmp_path) not in json.dumps(written)
    assert [line.split()[2:] for line in out.splitlines() if "knn" in line] == [["0.500", "1.000", "1.000"]]


def test_the_small_preset_has_no_seeds(tmp_path: Path, run) -> None:
    images = classes(tmp_path / "images")
    run("classification", "--encoders", "a", f"--images={images}")
    written = record(tmp_path)
    measures = {name: figure["values"] for name, figure in written["figures"]["a"].items()}
    assert measures == {"classification/knn": [1.0], "classification/linear": [1.0]}
    assert written["settings"]["seeds"] == []


def test_a_file_that_is_no_image_is_met_before_the_work(tmp_path: Path, run) -> None:
    images, val = classes(tmp_path / "images"), classes(tmp_path / "val", 2)
    broken = val / "red" / "1.png"
    broken.write_bytes(b"x")
    status, _, err = run("classification", "--encoders", "a", f"--images={images}", f"--val={val}")
    assert status == 1
    assert f"{broken} cannot be read" in err
    assert "a: training images" not in err


def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path, run) -> None:
    images = classes(tmp_path / "images")
    (images / "red" / "0.png").unlink()
    os.mkfifo(images / "red" / "0.png")
    status, _, err = run("classification", "--encoders", "a", f"--images={images}")
    assert status == 1
    assert "FIFO" in err


def test_held_out_images_may_lie_elsewhere(tmp_path: Path, run) -> None:
    images, val = classes(tmp_path / "images"), classes(tmp_path / "val", 2, ("red",))
    assert run("classification", "--encoders", "a", f"--images={images}", f"--val={val}", "--preset=full")[0] == 0
    assert record(tmp_path)["settings"]["held-out images"] == 2


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda root: root.mkdir(), (), "No image"),
        (lambda root: classes(root, 15, ("one",)), (), "one class folder"),
        (lambda root: classes(root, 1), (), "has 1 images, and needs 2"),
        (lambda root: classes(root, 5), (), "8 training images, fewer than the 20"),
        (lambda root: (classes(root), (root / "empty").mkdir()), (), "Class empty"),
        (lambda root: (classes(root), (root / "red" / "0.png").write_bytes(b"x")), (), "red/0.png"),
        (classes, ("--seeds=a",), "--seeds"),
        (classes, ("--neighbours=0",), "--neighbours"),
        (classes, ("--folder=missing", "--preset=full"), "no folder missing"),
        (classes, ("--val=missing",), "no missing"),
    ],
)
def test_classes_that_cannot_be_probed_are_refused(make, options, message: str, tmp_path: Path, run) -> None:
    make(tmp_path / "images")
    status, out, err = run("classification", "--encoders", "a", f"--images={tmp_path / 'images'}", *options)
    assert (status, out) == (1, "")
    assert message in err


def test_held_out_images_of_an_unknown_class_are_refused(tmp_path: Path, run) -> None:
    images, val = classes(tmp_path / "images"), classes(tmp_path / "val", 2, ("green", "red"))
    status, _, err = run("classification", "--encoders", "a", f"--images={images}", f"--val={val}")
    assert status == 1
    assert "class green" in err


@pytest.mark.parametrize(
    ("name", "message"),
    [("constant", "the same features"), ("infinite", "not finite"), ("pooled", "no spatial features")],
)
def test_encoders_that_cannot_be_probed_are_refused_before_the_work(
    name: str, message: str, tmp_path: Path, run
) -> None:
    status, out, err = run("dense", "--encoders", "good", name, "--data=scenes", "--tasks=depth")
    assert (status, out) == (1, "")
    assert f"{name} gives" in err
    assert message in err
    assert "good: " not in err
    # One grey image tells all but whether features differ, before there are data.
    assert ("rendering" in err) == (name == "constant")


def test_one_vector_per_image_is_enough_for_classes(tmp_path: Path, run) -> None:
    images = classes(tmp_path / "images")
    assert run("classification", "--encoders", "pooled", f"--images={images}")[0] == 0


def test_all_tasks_on_rendered_rooms(tmp_path: Path, run) -> None:
    status, out, _ = run("dense", "--encoders", "a", "--data=scenes", "--preset=full", f"--folder={tmp_path}")
    assert status == 0
    for figure in (
        "depth/delta1",
        "normals/under_11.25",
        "segmentation/mean_iou",
        "correspondence/recall_10px_0-15deg",
    ):
        assert figure in out
    assert record(tmp_path)["settings"]["tasks"] == ["depth", "normals", "segmentation", "correspondence"]
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_all_tasks_on_a_folder(tmp_path: Path, run) -> None:
    status, out, _ = run("dense", "--encoders", "a", f"--data={folder(tmp_path / 'nyu')}")
    assert status == 0
    assert "correspondence/recall_5cm" in out
    assert record(tmp_path)["settings"]["data"] == "nyu: 3 train, 3 val"


def test_a_folder_is_read_as_it_was_written(tmp_path: Path) -> None:
    truth = room(1)
    found = open_folder(folder(tmp_path / "nyu"), ["depth", "normals", "segmentation", "correspondence"], Storage()).val
    assert (found.images == truth.images[:3]).all()
    assert np.abs(found.depth - truth.depth[:3]).max() <= 0.000501
    assert np.abs(found.normals - truth.normals[:3]).max() < 0.01
    assert (found.labels == truth.labels[:3]).all()
    assert found.pairs == [(0, 1), (0, 2)]
    for camera, expected in zip(found.cameras, truth.cameras, strict=False):
        np.testing.assert_allclose(camera.to_world, expected.to_world)
        assert isinstance(camera, Camera)


def test_a_folder_with_depth_alone_is_probed_for_depth_alone(tmp_path: Path, run) -> None:
    root = folder(tmp_path / "nyu")
    for split in ("train", "val"):
        (root / split / "normals").rename(root / split / "n")
        (root / split / "labels").rename(root / split / "l")
        (root / split / "pairs.txt").unlink()
    status, out, _ = run("dense", "--encoders", "a", f"--data={root}")
    assert status == 0
    assert "No data for: normals, segmentation, correspondence." in out


def test_maps_of_other_sizes_are_read_at_the_nearest_pixel(tmp_path: Path) -> None:
    root = folder(tmp_path / "nyu")
    depth = np.arange(6, dtype=np.uint16).reshape(2, 3) * 1000
    Image.fromarray(depth).save(root / "train" / "depth" / "0.png")
    Image.new("RGB", (3, 2)).save(root / "train" / "rgb" / "0.png")
    found = open_folder(root, ["depth"], Storage()).train.depth[0]
    assert set(np.unique(found)) == {0, 1, 2, 3, 4, 5}
    third, half = IMAGE_SIZE // 3, IMAGE_SIZE // 2
    assert (found[:half, :third] == 0).all()
    assert (found[half:, -third:] == 5).all()


def damage(path: str, how: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda root: how(root / path)


@pytest.mark.parametrize(
    ("harm", "tasks", "message"),
    [
        (damage("val/depth/1.png", Path.unlink), "depth", "val/depth/1.png is missing"),
        (damage("val/depth/1.png", Path.unlink), "correspondence", "val/depth/1.png is missing"),
        (damage("train/normals", lambda path: path.rename(path.parent / "n")), "normals", "train/normals"),
        (damage("train/depth/0.png", lambda path: Image.new("L", (224, 224)).save(path)), "depth", "16 bits"),
        (damage("train/labels/0.png", lambda path: Image.new("L", (9, 8)).save(path)), "segmentation", "is 9x8"),
        (damage("train/rgb/0.png", lambda path: path.write_bytes(b"x")), "depth", "train/rgb/0.png cannot be read"),
        (damage("val/pose/2.txt", Path.unlink), "correspondence", "2.txt"),
        (damage("val/pose/2.txt", lambda path: path.write_text("1 0")), "correspondence", "4x4"),
        (damage("val/intrinsics.txt", lambda path: np.savetxt(path, np.zeros((3, 3)))), "correspondence", "focal"),
        (damage("val/pairs.txt", lambda path: path.write_text("0 9")), "correspondence", "line 1"),
        (damage("val/pairs.txt", lambda path: path.write_text("")), "correspondence", "no pair"),
        (lambda root: None, "colour", "choose from"),
    ],
)
def test_folders_that_cannot_be_probed_are_refused(harm, tasks: str, message: str, tmp_path: Path, run) -> None:
    root = folder(tmp_path / "nyu")
    harm(root)
    status, out, err = run("dense", "--encoders", "a", f"--data={root}", f"--tasks={tasks}")
    assert (status, out) == (1, "")
    assert message in err


@pytest.mark.parametrize("split", ["train", "val"])
def test_labels_of_which_nothing_can_be_learned_are_refused(split: str, tmp_path: Path, run) -> None:
    root = folder(tmp_path / "nyu")
    for path in (root / split / "labels").iterdir():
        Image.new("L", (IMAGE_SIZE, IMAGE_SIZE), 255).save(path)
    assert "255 does not count" in run("dense", "--encoders", "a", f"--data={root}", "--tasks=segmentation")[2]


@pytest.mark.parametrize("split", ["train", "val"])
def test_depth_in_another_unit_is_refused(split: str, tmp_path: Path, run) -> None:
    root = folder(tmp_path / "nyu")
    for path in (root / split / "depth").iterdir():
        Image.fromarray(np.full((224, 224), 50000, np.uint16)).save(path)
    status, out, err = run("dense", "--encoders", "a", f"--data={root}", "--tasks=depth,segmentation")
    assert (status, out) == (1, "")
    assert f"{root / split / 'depth'} has no pixel of more than 0 and at most 10 m" in err
    assert "greatest is 50 m. Files hold millimetres" in err


@pytest.mark.parametrize("split", ["train", "val"])
def test_normals_of_which_none_is_known_are_refused(split: str, tmp_path: Path, run) -> None:
    root = folder(tmp_path / "nyu")
    for path in (root / split / "normals").iterdir():
        Image.new("RGB", (224, 224), (128, 128, 128)).save(path)
    status, out, err = run("dense", "--encoders", "a", f"--data={root}", "--tasks=depth,normals")
    assert (status, out) == (1, "")
    assert f"{root / split / 'normals'} has no known normal" in err


def test_tokens_are_whitened_once_for_all_heads(run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, whitening = [], probes.whitening
    monkeypatch.setattr(probes, "whitening", lambda tokens: calls.append(1) or whitening(tokens))
    options = ("--data=scenes", "--tasks=depth,segmentation", "--seeds=0,1")
    assert run("dense", "--encoders", "a", *options)[0] == 0
    assert len(calls) == 1


def test_empty_and_single_folders_are_refused(tmp_path: Path, run) -> None:
    assert "no data to probe" in run("dense", "--encoders", "a", f"--data={tmp_path}")[2]
    assert "no folder" in run("dense", "--encoders", "a", "--data=missing")[2]
    root = folder(tmp_path / "nyu", count=1)
    assert "one picture" in run("dense", "--encoders", "a", f"--data={root}", "--tasks=depth")[2]


def test_an_encoder_named_twice_is_refused(run) -> None:
    assert "twice" in run("dense", "--encoders", "a", "a", "--data=scenes")[2]


def test_an_interrupted_run_goes_on(tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--data=scenes", "--tasks=segmentation,depth")
    probe_pixels, probed = probing.probe_pixels, []

    def fails(encoder: NamedEncoder, *rest):
        probed.append(encoder.name)
        if encoder.name == "bad" and probed.count("bad") == 1:
            raise KeyboardInterrupt
        return probe_pixels(encoder, *rest)

    monkeypatch.setattr(probing, "probe_pixels", fails)
    assert run("dense", "--encoders", "a", "bad", *options)[0] == 130
    results = tmp_path / "results"
    assert [path.name for path in results.iterdir()] == ["unfinished"]
    # Something else, of which nothing is known yet.
    assert run("dense", "--encoders", "a", "--data=scenes", "--tasks=segmentation")[0] == 0
    for path in results.glob("*.*"):
        path.unlink()
    status, _, err = run("dense", "--encoders", "a", "bad", *options)
    assert (status, probed) == (0, ["a", "bad", "a", "bad"])
    assert "Encoder 1 of 2: a was finished" in err
    assert sorted(path.suffix for path in results.iterdir()) == [".json", ".png"]
    resumed = record(tmp_path)["figures"]
    for path in results.iterdir():
        path.unlink()
    assert run("dense", "--encoders", "a", "bad", *options)[0] == 0
    assert record(tmp_path)["figures"] == resumed


def test_a_killed_process_leaves_nothing_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_, **__):
        raise KeyboardInterrupt

    found, kept = Probed({"depth/rmse": [1.5]}, {}), Unfinished(tmp_path / "unfinished")
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", killed)
        with pytest.raises(KeyboardInterrupt):
            kept.keep("abc", found)
    assert kept.load("abc") is None
    kept.keep("abc", found)
    assert kept.load("abc") == found
    kept.forget(["abc"])
    assert not any(tmp_path.iterdir())


def test_the_picture_shows_every_map_beside_the_truth(tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("dense", "--encoders", "a", "b", "--data=scenes")[0] == 0
    (path,) = (tmp_path / "results").glob("*.png")
    # Two pictures of three tasks; picture, truth, no encoder, two encoders.
    with Image.open(path) as image:
        assert image.size == (750, 940)
    assert path.stem == next((tmp_path / "results").glob("*.json")).stem


def test_fingerprints_tell_data_apart(tmp_path: Path) -> None:
    one, again = (fingerprint({"a": 1}, np.arange(3)) for _ in range(2))
    assert one == again
    others = [({"a": 2}, np.arange(3)), ({"a": 1}, np.arange(3) + 1), ({"a": 1}, np.arange(3.0))]
    assert len({one, *(fingerprint(*parts) for parts in others)}) == 4
    images = classes(tmp_path / "images", 2)
    before = of_files(str(images), None)
    assert before == of_files(str(images), None)
    (images / "red" / "0.png").write_bytes(b"other")
    assert before != of_files(str(images), None)
