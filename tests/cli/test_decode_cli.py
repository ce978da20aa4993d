import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder.small import TEACHERS, small
from huggingface_hub import constants
from PIL import Image

import theia
from theia import registry
from theia.cli.main import main
from theia.decoding.frames import Video, video_writer
from theia.decoding.output import Output
from theia.decoding.viewer import View, Viewer, depth_error, feature_cosine
from theia.encoder.encoder import Encoder
from theia.encoder.published import HUB_IDS
from theia.export.export import export

PLUGIN = '''
from dataclasses import replace

import torch
from torch.nn import functional as F

from theia.errors import WeightsError
from theia.teacher import Teacher
from theia.types import Depth, Masks, TeacherFeatures, TeacherSpec


class Odd(Teacher):
    """Five channels on 3x7, with a depth of its own."""

    spec = TeacherSpec(name="odd", channels=5, grid_hw=(3, 7), licence="MIT", weights="none")

    def __init__(self, weights: str = "none", fault: str = "", revision: str | None = None):
        super().__init__()
        self.spec = replace(self.spec, revision=revision)
        self.fault = fault
        if weights != "none":
            raise WeightsError(f"cannot fetch {weights}")

    def forward(self, images):
        cells = F.adaptive_avg_pool2d(images.float(), (3, 7)).flatten(2).transpose(1, 2)
        return TeacherFeatures(F.pad(cells, (0, 2), value=1.0))

    def decode(self, patches, images):
        if self.fault == "raises":
            raise RuntimeError("no idea")
        if self.fault == "shape":
            return Depth(patches[0])
        depth = patches.sum(-1).reshape(-1, 3, 7)
        if self.fault == "nan":
            return Depth(depth / 0 * 0)
        if self.fault == "masks":  # a third and all of the image; 4x6 of 224x224 pixels
            rows = torch.arange(4)[:, None].expand(4, 6)
            return Masks([torch.stack([rows < 1, rows < 4])], [torch.ones(2)])
        if self.fault == "sizes":
            own = bool((patches[..., 3] == 1).all())
            return Masks([torch.ones(1, 4 + 4 * own, 6, dtype=torch.bool)], [torch.ones(1)])
        return Depth(depth)
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Installs a third party's teacher 'odd', whose translations the small encoder has."""
    info = tmp_path / "site/odd_teacher-1.0.dist-info"
    info.mkdir(parents=True)
    (tmp_path / "site/odd_teacher.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-teacher\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[theia.teachers]\nodd = odd_teacher:Odd\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    registry.find.cache_clear()
    yield
    registry.find.cache_clear()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three photographs of different sizes."""
    folder = tmp_path / "images"
    (folder / "b").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, size in {"a.png": (40, 60), "b/c.jpg": (31, 17), "d.png": (224, 224)}.items():
        small = Image.fromarray(random.integers(0, 256, (5, 5, 3), np.uint8))
        small.resize(size[::-1], Image.Resampling.BICUBIC).save(folder / name)
    return folder


def decode(model: Path, images: Path | str, out: Path, *more: str) -> dict[str, Any]:
    assert main(["decode", f"--encoder={model}", f"--images={images}", f"--out={out}", "--device=cpu", *more]) == 0
    record: dict[str, Any] = json.loads((out / "decoded.json").read_text())
    return record


def test_a_folder_of_mixed_sizes_gives_a_row_per_image_and_names_what_is_unreadable(
    checkpoint: Callable[..., Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")

    record = decode(checkpoint(), images, tmp_path / "out")

    assert sorted(path.name for path in (tmp_path / "out").rglob("*.png")) == ["a.png", "c.png", "d.png"]
    assert record["images"].keys() == {"a.png", "b/c.jpg", "d.png"}
    assert record["finished"]
    said = capsys.readouterr()
    assert "Skipped broken.png: " in said.err
    assert "3 images, 1 skipped" in said.out
    # An uninstalled teacher and one of another size: their translations are shown all the same.
    assert {teacher["shown_as"] for teacher in record["teachers"].values()} == {"tokens"}
    assert "distilled from a 'clip'" not in said.err  # colours need no weights
    assert "No teacher named 'odd'" in said.err


def test_a_third_partys_decode_is_used_and_scored_against_its_own(
    plugin: None, encoder: Encoder, checkpoint: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    record = decode(
        checkpoint(), images / "d.png", tmp_path / "out", "--teachers=odd", "--teachers-side-by-side",
        "--teacher_options={odd: {weights: none}}",
    )  # fmt: skip

    pixels = torch.from_numpy(np.array(Image.open(images / "d.png"))).permute(2, 0, 1)[None]
    with torch.no_grad():
        translated = encoder.translate(pixels, denormalize=True)["odd"]
        own = registry.create("odd")(pixels).patches
        normalised = encoder.translate(pixels)["odd"], encoder.distiller.normalize("odd", own)
    wanted = {
        "cosine": feature_cosine(*(each[0].numpy() for each in normalised)),
        "depth_error": depth_error(*(each[0].sum(-1).reshape(3, 7).numpy() for each in (translated, own))),
    }
    assert record["images"] == {"d.png": {"odd": pytest.approx(wanted, rel=1e-5)}}
    assert record["teachers"]["odd"]["mean_scores"] == pytest.approx(wanted, rel=1e-5)
    assert record["teachers"]["odd"]["shown_as"] == "depth"
    plain = decode(checkpoint(), images / "d.png", tmp_path / "plain", "--teachers=odd")
    assert (plain["images"], plain["teachers"]["odd"]["shown_as"]) == ({"d.png": {"odd": {}}}, "depth")
    widths = [Image.open(tmp_path / folder / "d.png").width for folder in ("plain", "out")]
    assert widths[0] < widths[1]


@pytest.mark.parametrize("fault", ["masks", "sizes"])
def test_masks_may_have_any_size(
    fault: str, plugin: None, checkpoint: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    record = decode(
        checkpoint(), images / "d.png", tmp_path / "out", "--teachers=odd", "--teachers_side_by_side",
        f"--teacher_options={{odd: {{fault: {fault}}}}}",
    )  # fmt: skip
    assert record["teachers"]["odd"]["shown_as"] == "masks"
    assert record["images"]["d.png"]["odd"]["mask_iou"] == 1


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Lets a command be stopped when so many pictures are written."""
    save, done = Output.save, iter(range(after))

    def stop(self: Output, *arguments: Any) -> None:
        if next(done, None) is None:
            raise KeyboardInterrupt
        save(self, *arguments)

    monkeypatch.setattr(Output, "save", stop)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_interrupted_call_starts_over_and_gives_the_same(
    plugin: None, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options = ["--teachers_side_by_side", "--batch_size=1", "--teacher_options={odd: {weights: none}}"]
    whole = decode(checkpoint(), "sample:20", tmp_path / "whole", *options)
    out = tmp_path / "out"
    call = [f"--encoder={checkpoint()}", "--images=sample:20", "--device=cpu", f"--out={out}", *options]
    with monkeypatch.context() as patch:
        interrupted(patch, 7)
        assert main(["decode", *call]) == 130
    assert len([*out.rglob("*.png")]) == 7
    assert not json.loads((out / "decoded.json").read_text())["finished"]

    assert decode(checkpoint(), "sample:20", out, *options) == whole

    assert contents(out) == contents(tmp_path / "whole")
    assert main(["decode", *call]) == 1
    assert "holds decoded pictures already" in capsys.readouterr().err


def test_every_picture_is_shown_once(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[int] = []
    views = Viewer.views

    def noted(self: Viewer, *args: Any) -> Iterator[View]:
        for view in views(self, *args):
            shown.append(view.index)
            yield view

    monkeypatch.setattr(Viewer, "views", noted)
    record = decode(checkpoint(), "sample:20", tmp_path / "out", "--batch_size=3")
    assert sorted(shown) == [*range(20)]
    assert len(record["images"]) == 20


def test_an_interruption_costs_none_of_the_earlier_pictures(
    checkpoint: Callable[..., Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    decode(checkpoint(), images, out)
    before = contents(out)
    call = [f"--encoder={checkpoint()}", "--images=sample:4", "--device=cpu", f"--out={out}", "--overwrite"]
    with monkeypatch.context() as patch:
        interrupted(patch, 1)
        assert main(["decode", *call]) == 130
    after = contents(out)
    assert {name: after[name] for name in before if name != "decoded.json"} == {
        name: content for name, content in before.items() if name != "decoded.json"
    }
    assert len(after) == len(before) + 1

    record = decode(checkpoint(), "sample:4", out)
    assert len(contents(out)) == len(record["images"]) + 1 == 5


def test_an_interrupted_video_leaves_the_earlier_one(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with video_writer(tmp_path / "film.gif", Fraction(5)) as add:
        for level in (30, 90, 200):
            add(np.full((32, 64, 3), level, np.uint8))
    out = tmp_path / "out"
    decode(checkpoint(), tmp_path / "film.gif", out)
    before = (out / "film.gif").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("theia.decoding.panels.row", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        call = [f"--encoder={checkpoint()}", f"--images={tmp_path}/film.gif", f"--out={out}", "--overwrite"]
        assert main(["decode", *call, "--device=cpu"]) == 130
    assert (out / "film.gif").read_bytes() == before
    assert len(decode(checkpoint(), tmp_path / "film.gif", out, "--limit=2")["images"]) == 2


def test_a_published_models_teachers_go_by_their_short_names(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = Encoder(small(teachers={HUB_IDS["clip"]: TEACHERS["clip"], HUB_IDS["sam"]: TEACHERS["odd"]}))
    state = {f"distiller.{name}": value for name, value in published.distiller.state_dict().items()}
    path = tmp_path / "last.ckpt"
    torch.save({"hyper_parameters": published.architecture.as_dict(), "state_dict": state, "global_step": 1}, path)
    shape = "{hidden_size: 12, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 2}"
    options = ["--teachers_side_by_side", f"--teacher_options={{clip: {{weights: random, architecture: {shape}}}}}"]

    record = decode(path, images / "d.png", tmp_path / "out", f"--teachers=clip,{HUB_IDS['sam']}", *options)

    assert [(name, one["own_shown"]) for name, one in record["teachers"].items()] == [("clip", True), ("sam", False)]
    said = capsys.readouterr().err
    assert "No teacher named" not in said
    assert said.count("published models have none") == said.count("clip, sam: the model has no statistics") == 1


def test_a_silent_hub_is_said_once_for_all_teachers(
    checkpoint: Callable[..., Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    shape = {"channels": 1024, "grid_hw": [16, 16], "has_cls": False}
    untold = Encoder(small(teachers={"clip": shape, "dinov2": shape}))
    state = {f"distiller.{name}": value for name, value in untold.distiller.state_dict().items()}
    path = tmp_path / "last.ckpt"
    torch.save({"hyper_parameters": untold.architecture.as_dict(), "state_dict": state, "global_step": 1}, path)

    decode(path, images / "d.png", tmp_path / "out", "--teachers_side_by_side")

    said = capsys.readouterr().err
    assert said.count("as HF_HUB_OFFLINE is set") == said.count("clip, dinov2: the teacher cannot be loaded") == 1


def test_absent_weights_are_said_and_the_translation_is_shown(
    plugin: None, checkpoint: Callable[..., Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = decode(
        checkpoint(), images, tmp_path / "out", "--teachers_side_by_side", "--teacher_options={odd: {weights: far}}"
    )

    odd = record["teachers"]["odd"]
    assert (odd["shown_as"], odd["own_shown"]) == ("tokens", False)
    said = capsys.readouterr().err
    assert "own output is not shown: cannot fetch far" in said
    assert "distilled from a 'clip' of 12 channels on 16x16, the default one has 1024 channels" in said


def test_a_model_without_statistics_has_its_translations_shown(
    plugin: None, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    untold = Encoder(small())
    state = {f"distiller.{name}": value for name, value in untold.distiller.state_dict().items()}
    path = tmp_path / "last.ckpt"
    torch.save({"hyper_parameters": untold.architecture.as_dict(), "state_dict": state, "global_step": 1}, path)

    record = decode(path, images, tmp_path / "out", "--teachers=odd", "--teachers_side_by_side")

    odd = record["teachers"]["odd"]
    assert (odd["shown_as"], odd["own_shown"], odd["mean_scores"]) == ("tokens", True, {})
    assert "no statistics" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["film.gif", "film.mp4"])
def test_a_video_gives_a_video_of_the_same_length_in_the_same_order(
    name: str, plugin: None, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    count = 19  # more than what colours are fitted on
    with video_writer(tmp_path / name, Fraction(5)) as add:
        for index in range(count):
            add(np.full((32, 64, 3), 10 * index + 30, np.uint8))

    record = decode(checkpoint(), tmp_path / name, tmp_path / "out", "--teachers=odd", "--batch_size=3")

    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["decoded.json", name]
    video = Video(tmp_path / "out" / name)
    assert (len(video.ids), video.frames_per_s) == (count, 5)
    levels = [int(np.asarray(frame)[180, 200].mean()) for _, frame in video.pick(range(count))]
    assert levels == pytest.approx([10 * index + 30 for index in range(count)], abs=6)
    assert list(record["images"]) == video.ids


def test_the_first_ones_alone(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    record = decode(checkpoint(), "sample:3", tmp_path / "out", "--limit=2")
    assert len(record["images"]) == len(list((tmp_path / "out").rglob("*.png"))) == 2


def test_pictures_are_not_replaced_by_nothing(
    checkpoint: Callable[..., Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decode(checkpoint(), images, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/x.png").write_bytes(b"no image")
    again = [f"--encoder={checkpoint()}", f"--out={tmp_path}/out", "--overwrite"]
    assert main(["decode", *again, f"--images={tmp_path}/broken"]) == 1
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before

    assert main(["decode", *again, f"--images={images}/d.png"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["d.png", "decoded.json"]


def test_a_teacher_of_other_weights_than_the_models_is_said(
    plugin: None, checkpoint: Callable[..., Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "exported"
    record = {"teachers": {"odd": {"weights": "far/odd", "revision": "old", "licence": "MIT"}}}
    export(str(checkpoint()), model, ["safetensors"], record)
    for revision, said in (("old", False), ("new", True)):
        options = f"--teacher_options={{odd: {{revision: {revision}}}}}"
        decode(model, images, tmp_path / revision, "--teachers=odd", options)
        assert ("learned from other weights (far/odd, old)" in capsys.readouterr().err) == said


def test_teacher_options_come_from_a_config_of_an_extraction(
    plugin: None, checkpoint: Callable[..., Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "extract.yaml").write_text("images: somewhere\nodd: {weights: far}\n")
    decode(checkpoint(), images, tmp_path / "out", f"--teacher_options={tmp_path}/extract.yaml")
    assert "cannot fetch far" in capsys.readouterr().err


def test_teacher_options_from_a_file_are_settled_like_typed_ones(
    plugin: None, checkpoint: Callable[..., Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HOME", "/somewhere/home")
    for weights, said in (("''", "--teacher_options.odd.weights is empty"), ("~/far", "fetch /somewhere/home/far")):
        (tmp_path / "extract.yaml").write_text(f"odd: {{weights: {weights}}}\n")
        main(["decode", f"--encoder={checkpoint()}", f"--images={images}", f"--out={tmp_path}/out", "--device=cpu",
              f"--teacher_options={tmp_path}/extract.yaml"])  # fmt: skip
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images={tmp}/empty"], "No image in"),
        (["--images={tmp}/absent.mp4"], "There is no video"),
        (["--images={tmp}/broken"], "None of 1 pictures can be read (x.png: "),
        (["--teachers=sam"], "no translator for 'sam'. It has: clip, odd"),
        (["--teachers="], "--teachers is empty"),
        (["--limit=0"], "--limit is 0"),
        (["--encoder=teacher:clip"], "only a Theia model has translators"),
        (["--out={tmp}/images/a.png/out"], "out cannot be written"),
        (["--out={tmp}/images"], "is not empty and holds no decoded pictures"),
        (["--teacher_options={{sam: {{}}}}"], "--teacher_options has 'sam'"),
        (["--teacher_options={{odd: far}}"], "odd is 'far'"),
        (["--teacher_options={{odd: {{}}}}", "--teachers=clip"], "--teacher_options has 'odd', but nothing is shown"),
        (["--teacher_options={{clip: {{weights: x}}}}"], "--teacher_options has 'clip', but nothing is shown"),
        (["--teacher_options={tmp}/absent.yaml"], "absent.yaml cannot be read"),
        (["--teacher_options={{odd: {{colour: red}}}}"], "no option 'colour'"),
        (["--teacher_options={{odd: {{fault: raises}}}}"], "Teacher 'odd' cannot decode: RuntimeError: no idea"),
        (["--teacher_options={{odd: {{fault: shape}}}}"], "neither Depth, Masks nor Pictures"),
        (["--teacher_options={{odd: {{fault: nan}}}}"], "Teacher 'odd' decoded features to depth that is not finite"),
        (
            [
                "--teachers_side_by_side",
                "--teacher_options={{clip: {{weights: random, architecture: {{hidden_size: 8, intermediate_size: 8, "
                "num_hidden_layers: 1, num_attention_heads: 2}}}}}}",
            ],
            "these --teacher_options make one of 8 channels on 16x16",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(
    options: list[str], message: str, plugin: None, checkpoint: Callable[..., Path], images: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/x.png").write_bytes(b"no image")
    given = {"--encoder": str(checkpoint()), "--images": str(images), "--out": str(tmp_path / "out")}
    for option in options:
        name, _, value = option.format(tmp=tmp_path).partition("=")
        given[name] = value or ("" if "=" in option else "true")
    arguments = [f"{name}={value}" for name, value in given.items()]

    assert main(["decode", "--device=cpu", *arguments]) == 1

    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_teachers_without_weights_are_compared_with_nothing_given(images: Path, tmp_path: Path) -> None:
    teachers = {"hog": {"channels": 108, "grid_hw": [14, 14], "has_cls": False}, "clip": TEACHERS["clip"]}
    untrained = Encoder(small(teachers=teachers))
    untrained.distiller.set_statistics("hog", torch.full((108,), 0.1), torch.ones(108))
    state = {f"distiller.{name}": value for name, value in untrained.distiller.state_dict().items()}
    path = tmp_path / "last.ckpt"
    torch.save({"hyper_parameters": untrained.architecture.as_dict(), "state_dict": state, "global_step": 1}, path)

    record = decode(path, images, tmp_path / "out", "--teachers_side_by_side", "--teachers=hog")

    assert (record["teachers"]["hog"]["shown_as"], record["teachers"]["hog"]["own_shown"]) == ("pictures", True)
    assert record["teachers"]["hog"]["mean_scores"].keys() == {"cosine"}
    assert theia.load(path).teachers == ["hog", "clip"]
