import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from extraction.tiny_plugin import SIZE, install, write_images

from theia import registry
from theia.cli.extract import main
from theia.errors import PluginError, UnknownTeacherError

CONFIGS = Path(__file__).parents[2] / "configs" / "extract"

# Every architecture at its smallest; images of 28 pixels are two patches of 14.
SMALL_VIT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL = {
    "clip": {**SMALL_VIT, "intermediate_size": 8, "image_size": 28},
    "dinov2": {**SMALL_VIT, "image_size": 28},
    "vit": {**SMALL_VIT, "intermediate_size": 8, "image_size": 28},
    "sam": {"depth": 1, "width": 8, "heads": 2, "image_size": 64},
    "depth_anything": {
        **SMALL_VIT,
        "num_hidden_layers": 4,
        "fusion_hidden_size": 8,
        "head_hidden_size": 4,
    },
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where distributions are installed; the tiny teachers are."""
    install(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    registry.find.cache_clear()
    yield tmp_path / "site"
    registry.find.cache_clear()


@pytest.fixture
def config(tmp_path: Path, site: Path) -> Path:
    """A configuration that runs."""
    write_images(tmp_path / "images", 5)
    options = {
        "images": str(tmp_path / "images"),
        "teachers": ["pooled"],
        "store": str(tmp_path / "store"),
        "size": SIZE,
        "shard_size": 2,
        "workers": 0,
        "accelerator": "cpu",
        "devices": 1,
    }
    path = tmp_path / "extract.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


def register(site: Path, name: str, source: str) -> None:
    """Installs one more distribution: ``name`` is the class ``Plugin`` of a module with this source."""
    module = f"{name}_of_{site.parent.name}"
    (site / f"{module}.py").write_text(source)
    info = site / f"{name}_teachers-3.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-teachers\nVersion: 3.1\n")
    (info / "entry_points.txt").write_text(f"[theia.teachers]\n{name} = {module}:Plugin\n")


def printed_config(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--print_config"])
    assert stopped.value.code == 0
    printed: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return printed


def sets(store: Path, split: str = "train") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((store / "manifest.json").read_text())["splits"][split]["sets"]
    return found


def test_ends_with_counts_and_the_next_command(config: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "images" / "003.png").write_bytes(b"no image")
    assert main(["--config", str(config), "--max_skipped", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[2].split() == ["train", "4", "1"]
    assert str(tmp_path / "store" / "train" / "skipped.csv") in printed
    assert f"theia fit --config CONFIG --data.store {tmp_path / 'store'} --data.teachers pooled " in printed


def test_the_next_command_is_what_the_store_lacks_for_a_training(config: Path, capsys) -> None:
    def next_command(*options: str) -> str:
        assert main(["--config", str(config), *options]) == 0
        return capsys.readouterr().out.partition("Next: ")[2]

    assert next_command("--split=val").startswith("theia extract --images DIR --split train --teachers pooled ")
    assert next_command("--teachers=pooled,mean").startswith("theia extract --images DIR --split val --teachers mean ")
    assert next_command("--split=val", "--teachers=mean").startswith("theia fit ")


def test_teachers_are_comma_separated_on_the_command_line(config: Path, tmp_path: Path) -> None:
    assert main(["--config", str(config), "--teachers", "mean,pooled"]) == 0
    assert sets(tmp_path / "store").keys() == {"image", "mean", "pooled"}


def test_later_configs_and_options_win(config: Path, tmp_path: Path, capsys) -> None:
    second = tmp_path / "second.yaml"
    second.write_text("shard_size: 7\nbatch_size: 8\npooled: {delay: 0.5}\n")
    arguments = ["--config", str(config), "--config", str(second), "--batch_size", "9"]
    printed = printed_config(arguments, capsys)
    assert (printed["shard_size"], printed["batch_size"], printed["pooled"]["delay"]) == (7, 9, 0.5)
    assert printed["size"] == SIZE


def test_options_under_a_teachers_name_reach_its_constructor(config: Path, tmp_path: Path) -> None:
    main(["--config", str(config), "--pooled.log", str(tmp_path / "log")])
    assert (tmp_path / "log").exists()


def test_an_option_of_a_dictionary_is_one_more_dot(tmp_path: Path, capsys) -> None:
    arguments = ["--images", "x", "--teachers", "clip", "--store", "y", "--clip.architecture.num_hidden_layers", "2"]
    assert printed_config(arguments, capsys)["clip"]["architecture"] == {"num_hidden_layers": 2}


def test_help_shows_the_options_of_every_teacher(site: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "--pooled.delay" in shown
    assert "Seconds that a batch takes." in shown
    assert "--clip.weights" in shown


def test_an_unknown_teacher_suggests_the_nearest(config: Path) -> None:
    with pytest.raises(UnknownTeacherError, match="Did you mean 'pooled'"):
        main(["--config", str(config), "--teachers", "pooledd"])


def test_a_broken_plugin_is_only_a_warning_for_the_others(config: Path, site: Path, caplog) -> None:
    register(site, "broken", "import a_module_that_is_not_there\n")
    assert main(["--config", str(config)]) == 0
    assert "No module named 'a_module_that_is_not_there'" in caplog.text


def test_a_broken_plugin_that_is_asked_for_gives_its_cause(config: Path, site: Path, tmp_path: Path) -> None:
    register(site, "broken", "import a_module_that_is_not_there\n")
    with config.open("a") as file:
        file.write("broken: {weights: random}\n")
    with pytest.raises(PluginError, match="No module named 'a_module_that_is_not_there'"):
        main(["--config", str(config), "--teachers", "broken", "--broken.size", "2"])
    assert not (tmp_path / "store").exists()


def test_a_teacher_named_like_an_option_is_refused(config: Path, site: Path, caplog) -> None:
    source = (site / "tiny_teachers.py").read_text().replace("class Mean", "class Plugin")
    register(site, "workers", source.replace('name="mean"', 'name="workers"'))
    with pytest.raises(PluginError, match=r"'workers' cannot be extracted.*--workers"):
        main(["--config", str(config), "--teachers", "workers"])
    assert main(["--config", str(config)]) == 0


def test_after_ctrl_c_the_same_command_goes_on(
    config: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = registry.find("pooled")
    forward, calls = teacher.forward, []

    def interrupted(self: Any, images: Any) -> Any:
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(self, images)

    monkeypatch.setattr(teacher, "forward", interrupted)
    assert main(["--config", str(config)]) == 130
    assert "run the same command again" in capsys.readouterr().err
    assert not sets(tmp_path / "store")["pooled"]["complete"]
    assert main(["--config", str(config)]) == 0
    assert sets(tmp_path / "store")["pooled"]["complete"]
    assert calls == [2, 2, 2, 1]  # the first shard was whole


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = yaml.safe_load(path.read_text())
    arguments = ["--config", str(path), "--accelerator=cpu", "--devices=1", "--workers=0", "--size=32"]
    images = shipped.get("images", "train")
    splits = list(images) if isinstance(images, dict) else [images]
    arguments += [f"--images.{split}=sample:2" for split in splits]
    real = [name for name in shipped["teachers"] if name in SMALL]
    arguments += [f"--{name}.weights=random" for name in real]
    arguments += [f"--{name}.architecture={json.dumps(SMALL[name])}" for name in real]
    monkeypatch.chdir(tmp_path)  # its store is a relative path
    assert main(arguments) == 0
    for split in splits:
        found = sets(tmp_path / shipped["store"], split)
        assert found.keys() == {"image", *shipped["teachers"]}
        assert all(record["complete"] for record in found.values())
