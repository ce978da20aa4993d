from pathlib import Path

import numpy as np
from PIL import Image

from theia.utils.pictures import board, colour_basis, norm_map, pca_colours, short_labels, wrapped


def test_colours_follow_the_principal_axes() -> None:
    rng = np.random.default_rng(0)
    spread = rng.normal(size=(400, 3)) * [9, 3, 1]
    directions = np.linalg.qr(rng.normal(size=(6, 6)))[0][:3]
    tokens = spread @ directions + 5

    basis = colour_basis(tokens)

    np.testing.assert_allclose(np.abs(basis.axes @ directions.T), np.eye(3), atol=0.1)
    np.testing.assert_allclose(basis.mean, tokens.mean(0))


def test_the_same_features_have_the_same_colours_whatever_is_shown_beside_them() -> None:
    tokens = np.random.default_rng(1).normal(size=(40, 5))
    basis = colour_basis(tokens)

    alone, together = (pca_colours(each, (len(each) // 4, 4), basis) for each in (tokens[:8], tokens))

    np.testing.assert_array_equal(alone, together[:2])
    assert together.shape == (10, 4, 3)
    assert together.dtype == np.uint8
    assert together.min() == 0
    assert together.max() == 255


def test_fewer_than_three_channels_and_constant_features_have_colours() -> None:
    for tokens in (np.random.default_rng(2).normal(size=(16, 2)), np.ones((16, 4))):
        assert pca_colours(tokens, (4, 4), colour_basis(tokens)).shape == (4, 4, 3)


def test_the_norm_map_is_brightest_at_the_largest_norm() -> None:
    patches = np.ones((12, 3))
    patches[7] *= 4
    patches[2] *= 0.1

    luminance = norm_map(patches, (3, 4)).astype(float) @ [0.299, 0.587, 0.114]

    assert np.unravel_index(luminance.argmax(), (3, 4)) == (1, 3)
    assert np.unravel_index(luminance.argmin(), (3, 4)) == (0, 2)


def test_a_board_is_a_picture_with_a_row_per_image(tmp_path: Path) -> None:
    pictures = [np.full((4, 6, 3), value, np.uint8) for value in (10, 240)]

    board([("one", pictures), ("two", pictures)]).savefig(tmp_path / "board.png")

    with Image.open(tmp_path / "board.png") as image:
        shown = np.asarray(image.convert("L"))
    assert {10, 240} <= set(np.unique(shown))


def test_paths_are_called_by_what_tells_them_apart() -> None:
    names = ["runs/a/exported", "/x/CDiV/seed_0/checkpoints/last.ckpt", "timm:vit@random", "concat:hog,color", "./m"]
    assert [*short_labels(names).values()] == ["runs/a", "CDiV/seed_0", "timm:vit@random", "concat:hog,color", "m"]


def test_what_is_added_to_a_path_stays() -> None:
    run = "runs/a/seed_0/checkpoints/last.ckpt"
    names = [run, f"{run}@random", f"{run}@448", f"{run}@random@448", "runs/b/exported@112", "teacher:clip@random"]
    assert [*short_labels(names).values()] == [
        "a/seed_0", "a/seed_0@random", "a/seed_0@448", "a/seed_0@random@448", "runs/b@112", "teacher:clip@random"
    ]  # fmt: skip
    for name in ("exported", "last.ckpt@random", "exported@448"):
        assert short_labels([name]) == {name: name}


def test_weights_and_options_behind_a_name_are_shortened() -> None:
    names = ["teacher:clip@/data/models/clip", "teacher:sam@{weights: /a/b, model: vit_b}", "timm:vit", "c:/x/y/z"]
    assert [*short_labels(names).values()] == ["teacher:clip@models/clip", "teacher:sam@...", "timm:vit", "c:/x/y/z"]


def test_two_that_would_be_called_alike_keep_their_names() -> None:
    names = ["x/runs/a/exported", "y/runs/a/exported", "b"]
    assert [*short_labels(names).values()] == names


def test_long_labels_are_broken_behind_signs_and_lose_nothing() -> None:
    label = "timm:vit_tiny_patch16_224@random"
    assert wrapped(label).replace("\n", "") == label
    assert max(map(len, wrapped(label).split("\n"))) <= 20
    assert wrapped("short") == "short"
