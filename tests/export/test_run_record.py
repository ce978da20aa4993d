import pytest

from theia.export.run_record import _without_paths


@pytest.mark.parametrize("weights", ["/data/clip", "../clip", "models/clip/", "C:\\models\\clip", "vit_b/clip.pth"])
def test_paths_do_not_leave_the_machine(weights: str) -> None:
    assert _without_paths({"weights": weights})["weights"].startswith("local, clip")
    assert _without_paths({"weights": "openai/clip-vit-large-patch14"})["weights"] == "openai/clip-vit-large-patch14"
