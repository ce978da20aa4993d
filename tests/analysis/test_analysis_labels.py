from theia.utils.pictures import short_labels, wrapped


def test_paths_are_called_by_what_tells_them_apart() -> None:
    names = ["runs/a/exported", "/x/CDiV/seed_0/checkpoints/last.ckpt", "timm:vit@random", "concat:hog,color", "./m"]
    assert [*short_labels(names).values()] == ["runs/a", "CDiV/seed_0", "timm:vit@random", "concat:hog,color", "m"]


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
