import subprocess
import sys
from pathlib import Path

import pytest

from theia import registry
from theia.cli.main import main


def rows(printed: str) -> dict[str, list[str]]:
    """Words of each line, by the first."""
    return {words[0]: words[1:] for words in map(str.split, printed.splitlines()) if words}


def test_lists_what_every_built_in_teacher_gives(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["teachers"]) == 0
    listed = rows(capsys.readouterr().out)
    # Channels and grids of the paper's teachers, and of its largest student.
    expected = {
        "clip": ["1024", "16x16", "yes", "openai/clip-vit-large-patch14"],
        "dinov2": ["1024", "16x16", "yes", "facebook/dinov2-large"],
        "vit": ["1280", "16x16", "yes", "google/vit-huge-patch14-224-in21k"],
        "sam": ["256", "64x64", "no"],
        "depth_anything": ["32", "64x64", "no", "LiheYoung/depth-anything-large-hf"],
        "theia": ["768", "14x14", "yes", "theaiinstitute/theia-base-patch16-224-cdiv"],
    }
    assert {name: listed[name][: len(words)] for name, words in expected.items()} == expected
    assert {"color", "hog"} <= listed.keys()


def test_builds_no_teacher_and_imports_no_model_library() -> None:
    code = (
        "import sys; from theia.cli.main import main; main(['teachers']);"
        "sys.exit(str({'lightning', 'segment_anything', 'skimage', 'timm', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"


def test_broken_plugins_are_listed_below_with_their_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    info = tmp_path / "broken-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text("[theia.teachers]\nlost = a_module_that_is_not_there:Lost\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry.find.cache_clear()
    assert main(["teachers"]) == 0
    table, below = capsys.readouterr().out.split("Cannot be used:")
    assert "lost" not in rows(table)
    assert "clip" in rows(table)
    assert "'lost' of broken 2.0" in below
    assert "No module named 'a_module_that_is_not_there'" in below
