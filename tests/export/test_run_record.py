from pathlib import Path
from typing import Any

import pytest
import yaml

from theia.export.run_record import _without_paths, run_record
from theia.training.optim import ADAMW


@pytest.mark.parametrize("weights", ["/data/clip", "../clip", "models/clip/", "C:\\models\\clip", "vit_b/clip.pth"])
def test_paths_do_not_leave_the_machine(weights: str) -> None:
    assert _without_paths({"weights": weights})["weights"].startswith("local, clip")
    assert _without_paths({"weights": "openai/clip-vit-large-patch14"})["weights"] == "openai/clip-vit-large-patch14"


@pytest.mark.parametrize(
    ("options", "there", "absent"),
    [
        ({"optimizer": ADAMW}, {"betas"}, {"normalizer_exponent"}),
        ({"optimizer": "timm.optim.Muon", "optimizer_options": {"nesterov": False}}, {"optimizer_options"}, {"betas"}),
        ({"normalizer": "power"}, {"normalizer_exponent", "betas"}, set()),
    ],
)
def test_a_recipe_has_what_has_an_effect(
    tmp_path: Path, options: dict[str, Any], there: set[str], absent: set[str]
) -> None:
    model = {"betas": [0.9, 0.999], "normalizer": "std", "normalizer_exponent": 0.3, **options}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    (tmp_path / "last.ckpt").touch()

    recipe = run_record(tmp_path, tmp_path / "last.ckpt")["recipe"]

    assert {f"model.{name}" for name in there} <= recipe.keys()
    assert not {f"model.{name}" for name in absent} & recipe.keys()
