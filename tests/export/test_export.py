import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from transformers import AutoModel

import theia
from theia.errors import ConfigError, ExportError
from theia.export import formats
from theia.export.card import strictest_licence
from theia.export.export import export
from theia.export.onnx import start_session
from theia.models.architecture import Architecture

Checkpoint = Callable[..., Path]
RECORD = {
    "teachers": {
        "clip": {"weights": "openai/clip-vit-large-patch14", "revision": "32bd64", "licence": "MIT"},
        "odd": {"weights": "none", "revision": None, "licence": "CC-BY-NC-4.0"},
    },
    "data": {"name": "imagenet", "images": 12345, "manifest_sha256": "abc123"},
    "recipe": {"model.learning_rate": 5e-4, "trainer.max_epochs": 50},
    "changes": [{"step": 1234, "option": "trainer.max_epochs", "old": 40, "new": 50}],
    "held_out": {"clip": {"cosine": 0.81234, "explained_variance": 0.5}},
    "held_out_images": 678,
    "versions": {"torch": "2.9.9"},
    "git_commit": "c0ffee",
}


def state_of(encoder: theia.Encoder) -> dict:
    state = {f"distiller.{name}": value for name, value in encoder.distiller.state_dict().items()}
    return {"hyper_parameters": encoder.architecture.as_dict(), "state_dict": state}


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_folder_is_there_whole_and_says_what_it_holds(checkpoint: Checkpoint, tmp_path: Path) -> None:
    lines = export(checkpoint(), tmp_path / "out", ["safetensors"], RECORD)

    assert listing(tmp_path / "out") == ["README.md", "config.json", "model.safetensors"]
    assert lines == ["config.json, model.safetensors, README.md"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]
    assert (tmp_path / "out/model.safetensors").stat().st_mode & 0o044


def test_names_are_those_of_a_checkpoint(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = checkpoint()
    export(path, tmp_path / "out", ["safetensors"])
    state = torch.load(path)["state_dict"]
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert tensors.keys() == {name for name in state if name.startswith("distiller.")}
    assert all(torch.equal(tensors[name], state[name]) for name in tensors)


def test_the_card_says_where_the_model_comes_from(checkpoint: Checkpoint, tmp_path: Path) -> None:
    export(checkpoint(), tmp_path / "out", ["safetensors"], RECORD)
    card = (tmp_path / "out/README.md").read_text()
    for fact in (
        "openai/clip-vit-large-patch14", "32bd64", "**CC-BY-NC-4.0**", "`imagenet`", "abc123", "0.812", "0.0005",
        "1234", "224 x 224", "theia.load", "12,345 images", "678 images",
        "torch 2.9.9", "c0ffee", "license: cc-by-nc-4.0",
    ):  # fmt: skip
        assert fact in card
    assert "authors/" not in card


def test_the_card_names_the_other_formats(tmp_path: Path) -> None:
    architecture = Architecture(teachers={"odd": {"channels": 2, "grid_hw": [16, 16], "has_cls": False}})
    torch.save(state_of(theia.Encoder(architecture)), tmp_path / "last.ckpt")
    export(tmp_path / "last.ckpt", tmp_path / "out", ["safetensors", "timm", "authors"], RECORD)
    card = (tmp_path / "out/README.md").read_text()
    for fact in ("`authors/`", 'create_model("deit_tiny_patch16_224"', "mean [0.5, 0.5, 0.5]"):
        assert fact in card
    assert "`onnx/`" not in card

    export(tmp_path / "out/authors", tmp_path / "published", ["safetensors"])
    card = (tmp_path / "published/README.md").read_text()
    for fact in ("published model `authors`", "non-commercial", "license: other"):
        assert fact in card
    assert "theia test" not in card


def test_a_record_travels_with_the_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    export(checkpoint(), tmp_path / "one", ["safetensors"], RECORD)
    export(tmp_path / "one", tmp_path / "two", ["safetensors"])
    assert (tmp_path / "one/README.md").read_text() == (tmp_path / "two/README.md").read_text()


@pytest.mark.parametrize(
    ("licences", "strictest"),
    [(["MIT", "Apache-2.0"], "Apache-2.0"), (["CC-BY-NC-4.0", "MIT"], "CC-BY-NC-4.0"), (["MIT", "ask us"], "ask us")],
)
def test_the_strictest_licence(licences: list[str], strictest: str) -> None:
    assert strictest_licence(licences) == strictest


def test_timm_loads_its_file_strictly_and_gives_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    architecture = Architecture(teachers={"odd": {"channels": 2, "grid_hw": [3, 3], "has_cls": False}})
    encoder = theia.Encoder(architecture)
    torch.save(state_of(encoder), tmp_path / "last.ckpt")

    (line,) = export(tmp_path / "last.ckpt", tmp_path / "out", ["timm"])

    path = tmp_path / "out/timm/deit_tiny_patch16_224.safetensors"
    model = timm.create_model("deit_tiny_patch16_224", checkpoint_path=str(path)).eval()
    images = torch.randint(256, (1, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        theirs = model.forward_features(images / 127.5 - 1)[:, 1:]
        torch.testing.assert_close(theirs, encoder(images), atol=1e-2, rtol=0)  # another epsilon in the norms
    assert "mean [0.5, 0.5, 0.5]" in line


@torch.no_grad()
@pytest.mark.parametrize("end", ["lift", "wide_last"])
def test_every_form_of_a_student_with_a_wider_end_gives_its_tokens(tmp_path: Path, end: str) -> None:
    teachers = {"odd": {"channels": 2, "grid_hw": [3, 3], "has_cls": True}}
    torch.manual_seed(0)
    small = {"width": 32, "depth": 2, "heads": 2}
    encoder = theia.Encoder(Architecture(teachers=teachers, distill_cls=True, **{end: 48}, **small))
    torch.save(state_of(encoder), tmp_path / "last.ckpt")
    images = torch.randint(256, (2, 224, 160, 3), dtype=torch.uint8)
    expected = encoder.forward_features(images)
    assert expected.patches.shape == (2, 14 * 10, 48)

    export(tmp_path / "last.ckpt", tmp_path / "out", ["hf", "onnx"], RECORD)

    assert "(B, 48)" in (tmp_path / "out/README.md").read_text()
    for place in ("last.ckpt", "out"):
        loaded = theia.load(tmp_path / place)
        assert loaded.width == 48
        assert torch.equal(loaded.forward_features(images).patches, expected.patches)
        squares = images[:, :, :1].expand(2, 224, 224, 3)
        assert torch.equal(loaded.translate(squares)["odd"], encoder.translate(squares)["odd"])
    hidden = AutoModel.from_pretrained(tmp_path / "out")(pixel_values=images).last_hidden_state
    assert torch.equal(hidden, torch.cat([expected.cls[:, None], expected.patches], 1))
    session = start_session(tmp_path / "out/onnx/encoder.onnx")
    (patches,) = session.run(["patches"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(patches), expected.patches, atol=1e-4, rtol=0)


@pytest.mark.parametrize("end", [{"lift": 48}, {"wide_last": 384}], ids=str)
@pytest.mark.parametrize("name", ["timm", "authors"])
def test_forms_of_others_that_cannot_hold_a_wider_end_are_refused(tmp_path: Path, name: str, end: Any) -> None:
    teachers = {"odd": {"channels": 2, "grid_hw": [16, 16], "has_cls": False}}
    torch.save(state_of(theia.Encoder(Architecture(teachers=teachers, **end))), tmp_path / "last.ckpt")
    with pytest.raises(ExportError, match=r"no model for this student|its student has a (lift|wide last block)"):
        export(tmp_path / "last.ckpt", tmp_path / "out", [name])
    assert not (tmp_path / "out").exists()


def test_what_timm_has_no_model_for_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no model for this student"):
        export(checkpoint(), tmp_path / "out", ["timm"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["gguf"], {}, "no format 'gguf'.*safetensors"),
        ("gguf", {}, "no format 'gguf'"),
        (3, {}, "no format '3'"),
        ([], {}, "no format"),
        (["hf"], {"int8": True}, "Add it: --formats"),
    ],
)
def test_formats_that_cannot_be_are_refused_first(
    names: list[str], options: dict, message: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        export(checkpoint(), tmp_path / "out", names, **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_a_model_is_replaced_only_when_asked(checkpoint: Checkpoint, tmp_path: Path) -> None:
    export(checkpoint(), tmp_path / "out", ["safetensors"], RECORD)
    before = (tmp_path / "out/README.md").read_text()
    with pytest.raises(ExportError, match="--overwrite"):
        export(checkpoint(), tmp_path / "out", ["safetensors"])
    assert (tmp_path / "out/README.md").read_text() == before

    export(checkpoint(), tmp_path / "out", ["safetensors"], overwrite=True)
    assert (tmp_path / "out/README.md").read_text() != before
    assert listing(tmp_path / "out") == ["README.md", "config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_a_kill_between_two_renames_moved_away_is_put_back(checkpoint: Checkpoint, tmp_path: Path) -> None:
    export(checkpoint(), tmp_path / "out", ["safetensors"], RECORD)
    (tmp_path / "out").rename(tmp_path / ".out.old")
    with pytest.raises(ExportError, match="holds a model already"):
        export(checkpoint(), tmp_path / "out", ["safetensors"])
    assert listing(tmp_path / "out") == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["thesis.tex", "config.json", "onnx/resnet.onnx", "README.md"])
def test_a_folder_with_anything_else_is_never_replaced(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text('{"model_type": "vit"}')
    with pytest.raises(ExportError, match=f"something else: {name}"):
        export(checkpoint(), tmp_path / "out", ["safetensors"], overwrite=True)
    assert (tmp_path / "out" / name).exists()


def test_a_file_in_the_way_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    for place in ("out", "out/deeper", "out/deeper/still"):
        with pytest.raises(ExportError, match="/out is a file"):
            export(checkpoint(), tmp_path / place, ["safetensors"])


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in listing(folder)}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize(
    ("overwrite", "function", "call"),
    [
        (False, "mkdir", 2),  # after that of a folder that is there already
        (False, "fsync", 1),
        (False, "fsync", 4),
        (False, "replace", 1),
        (True, "fsync", 1),
        (True, "rename", 1),
        (True, "replace", 1),
    ],
)
def test_a_full_disk_is_told_and_leaves_what_was_there(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, function: str, call: int,
    overwrite: bool,
) -> None:  # fmt: skip
    path, out = checkpoint(), tmp_path / "out"
    if overwrite:
        export(path, out, ["safetensors"], RECORD)
    before = contents(out)
    real, calls = getattr(os, function), iter(range(1, 1 << 30))

    def full(*args: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise OSError(code, os.strerror(code))
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(
            ExportError, match=rf"Disk full while writing {out} \(.*file system /.*What was there before"
        ):
            export(path, out, ["safetensors"], overwrite=overwrite)
    assert contents(out) == before
    assert [other.name for other in tmp_path.iterdir() if other.name.startswith(".")] == []
    export(path, out, ["safetensors"], overwrite=overwrite)
    assert contents(out) != before


def test_a_disk_that_is_full_in_the_middle_of_the_weights_is_told(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = checkpoint()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ExportError, match=r"Cannot write .*out: File too large"):
            export(path, tmp_path / "out", ["safetensors"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [other for other in tmp_path.iterdir() if other != path] == []


def test_all_that_is_written_is_on_the_disk_before_it_has_its_name(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, done = checkpoint(), []
    sync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").resolve())
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *places: (done.append("named"), replace(*places)))
    export(path, tmp_path / "out", ["safetensors"])
    part = tmp_path / ".out.part"
    assert set(done[:4]) == {part, *(part / name for name in listing(tmp_path / "out"))}
    assert done[4:] == ["named", tmp_path]


def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = checkpoint()
    export(path, tmp_path / "new", ["safetensors"])
    new = contents(tmp_path / "new")
    call, killed, moved_away = 0, True, 0
    while killed:
        call += 1
        out = tmp_path / str(call) / "out"
        export(path, out, ["safetensors"], RECORD)
        old = contents(out)
        child = os.fork()
        if child == 0:
            kill_at(call)
            export(path, out, ["safetensors"], overwrite=True)
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        moved_away += not out.exists()
        assert contents(out if out.exists() else out.with_name(".out.old")) in (old, new), f"killed before call {call}"
        export(path, out, ["safetensors"], overwrite=True)
        assert contents(out) == new
        assert [other.name for other in out.parent.iterdir()] == ["out"]
    assert call > 8  # else the calls are not counted where they are made
    assert moved_away == 1


def kill_at(call: int) -> None:
    """Makes this process kill itself before its n-th system call that changes the disk and its names."""
    calls = iter(range(1, 1 << 30))

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*args: object, **options: object) -> object:
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return wrapper

    for name in ("fsync", "rename", "replace", "rmdir", "unlink"):
        setattr(os, name, counted(getattr(os, name)))


def test_half_a_folder_that_was_being_removed_is_never_put_back(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = checkpoint(), tmp_path / "out"
    export(path, out, ["safetensors"], RECORD)
    with monkeypatch.context() as patch:
        patch.setattr("theia.export.export.shutil.rmtree", lambda *_, **__: None)  # as if killed in it
        export(path, out, ["safetensors"], overwrite=True)
    shutil.rmtree(out)
    export(path, out, ["safetensors"])
    assert (out / "README.md").read_text() != ""
    export(path, out, ["safetensors"], overwrite=True)
    assert [other.name for other in tmp_path.iterdir() if other.name.startswith(".")] == []


def test_what_came_while_it_was_written_is_not_replaced(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(*_: object) -> list[str]:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/thesis.tex").write_text("")
        return []

    monkeypatch.setitem(formats.FORMATS, "authors", meanwhile)
    monkeypatch.setattr("theia.export.export.check", lambda *_: None)
    with pytest.raises(ExportError, match=r"something else: thesis\.tex"):
        export(checkpoint(), tmp_path / "out", ["safetensors", "authors"], overwrite=True)
    assert listing(tmp_path / "out") == ["thesis.tex"]


@pytest.mark.parametrize(
    "names", ["safetensors, hf", "hf", iter(["hf"]), ("safetensors",)], ids=["two", "one", "it", "tuple"]
)
def test_formats_and_places_of_any_kind(
    names: Any, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    export(str(checkpoint()), "~/out", names, RECORD)
    assert listing(tmp_path / "out") == ["README.md", "config.json", "model.safetensors"]
    export("~/out/config.json", tmp_path / "again", "hf")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")  # with its record


def test_what_a_killed_export_left_is_cleared_away(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "half").write_text("")
    export(checkpoint(), tmp_path / "out", ["safetensors"])
    assert listing(tmp_path / "out") == ["README.md", "config.json", "model.safetensors"]
    assert not (tmp_path / ".out.part").exists()


def test_two_exports_into_one_folder_do_not_mix(checkpoint: Checkpoint, tmp_path: Path, monkeypatch) -> None:
    path = checkpoint()
    refused = []

    def second(*_: object) -> list[str]:
        with pytest.raises(ExportError, match="Another export is writing"):
            export(path, tmp_path / "out", ["safetensors"])
        refused.append(True)
        return []

    monkeypatch.setitem(formats.FORMATS, "authors", second)
    monkeypatch.setattr("theia.export.export.check", lambda *_: None)
    export(path, tmp_path / "out", ["safetensors", "authors"])
    assert refused
    assert listing(tmp_path / "out") == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = checkpoint()
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(ExportError, match="Cannot write"):
        export(path, tmp_path / "closed" / "out", ["safetensors"])


def test_the_config_holds_builtins_and_no_path(checkpoint: Checkpoint, tmp_path: Path) -> None:
    export(checkpoint(), tmp_path / "out", ["safetensors"], RECORD)
    text = (tmp_path / "out/config.json").read_text()
    assert json.loads(text)["architecture"]["teachers"]["odd"]["grid_hw"] == [3, 7]
    assert str(tmp_path) not in text
