import logging

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from theia.errors import WeightsError
from theia.models.backbone import StudentOptions
from theia.models.student import Student

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet


def small_deit(**options):
    torch.manual_seed(0)
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10, **options}
    model = VisionTransformer(patch_size=16, **options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def small_student(weights, **options):
    return Student(StudentOptions(width=32, depth=2, heads=2, weights=str(weights), **options)).eval()


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "deit.safetensors"
    save_file(small_deit().state_dict(), path)
    return path


def images():
    return torch.randint(256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("wrapper", [None, "model"])
def test_tokens_equal_those_of_timm_with_imagenet_normalisation(tmp_path, wrapper):
    upstream = small_deit()
    state = upstream.state_dict()
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "deit.pth")
    tokens = small_student(tmp_path / "deit.pth")(images())
    pixels = (images() / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    expected = upstream.forward_features(pixels)
    torch.testing.assert_close(tokens.cls, expected[:, 0])
    torch.testing.assert_close(tokens.patches, expected[:, 1:])


@pytest.mark.parametrize("registers", [0, 4, 8])
def test_only_registers_and_their_positions_start_new(checkpoint, registers, caplog):
    given = small_deit().state_dict()
    with caplog.at_level(logging.INFO):
        student = small_student(checkpoint, registers=registers)
    own = student.backbone.model.state_dict()
    for name in own.keys() - {"pos_embed", "reg_token"}:
        assert torch.equal(own[name], given[name]), name
    assert torch.equal(own["pos_embed"][:, registers:], given["pos_embed"][:, 1:])
    assert ("reg_token" in own) == ("reg_token and its positions" in caplog.text) == (registers > 1)
    if registers:
        assert torch.equal(own["pos_embed"][:, 0], given["pos_embed"][:, 0])
        new = torch.cat([own["reg_token"], own["pos_embed"][:, 1:registers]])
        assert new.std().item() == pytest.approx(0.02, rel=0.3)  # the checkpoint's have 0.1


def test_a_wide_last_block_and_the_norm_start_new_and_the_log_says_so(checkpoint, caplog):
    given = small_deit().state_dict()
    own = small_student(checkpoint, wide_last=64).backbone.model.state_dict()
    new = {name for name in own if name.startswith(("blocks.1.", "norm."))}
    for name in own.keys() - new:
        assert torch.equal(own[name], given[name]), name
    assert "blocks.1 and norm are of another width" in caplog.text
    assert torch.equal(own["norm.weight"], torch.ones(64))
    assert own["blocks.1.block.attn.qkv.weight"].std().item() == pytest.approx(0.02, rel=0.1)  # the checkpoint's: 0.1


def test_positions_are_resized_to_the_students_grid(checkpoint):
    # timm resizes the same checkpoint on its own when it meets a smaller image.
    student = small_student(checkpoint, image_size=96)
    upstream = small_deit(dynamic_img_size=True)
    small = images()[..., :96, :96]
    pixels = (small / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    torch.testing.assert_close(student(small).patches, upstream.forward_features(pixels)[:, 1:])


def test_layer_norms_keep_the_epsilon_of_deit(checkpoint):
    own, upstream = (
        {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)}
        for model in (small_student(checkpoint), small_deit())
    )
    assert own == upstream == {1e-6}


def test_missing_file(tmp_path):
    with pytest.raises(WeightsError, match="No weights file"):
        small_student(tmp_path / "nothing.pth")


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_truncated_file(tmp_path, ending):
    path = tmp_path / f"deit.{ending}"
    save_file(small_deit().state_dict(), path) if ending == "safetensors" else torch.save(
        small_deit().state_dict(), path
    )
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match="Cannot read"):
        small_student(path)


def test_file_that_is_no_checkpoint(tmp_path):
    (tmp_path / "deit.pth").write_text("<html>Not found</html>")
    with pytest.raises(WeightsError, match="Cannot read"):
        small_student(tmp_path / "deit.pth")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"embed_dim": 64}, "shape"),
        ({"depth": 1}, r"blocks\.1\.attn\.proj\.bias is missing"),
        ({"depth": 3}, r"blocks\.2\.attn\.proj\.bias is left over"),
        ({"reg_tokens": 2}, "reg_token is left over"),
        ({"class_token": False, "global_pool": "avg"}, "cls_token is missing"),
        ({"init_values": 0.1}, "left over"),
    ],
    ids=str,
)
def test_other_architectures_are_refused(tmp_path, options, problem):
    save_file(small_deit(**options).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=problem):
        small_student(tmp_path / "other.safetensors")


@pytest.mark.parametrize("depth", [1, 3])
def test_a_wide_last_block_does_not_hide_weights_of_another_depth(tmp_path, depth):
    save_file(small_deit(depth=depth).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"blocks\.\d\..* is (missing|left over)"):
        small_student(tmp_path / "other.safetensors", wide_last=64)


def test_other_patch_size_is_refused(tmp_path):
    state = small_deit().state_dict()
    state["patch_embed.proj.weight"] = torch.zeros(32, 3, 14, 14)
    save_file(state, tmp_path / "patch14.safetensors")
    with pytest.raises(WeightsError, match=r"patch_embed\.proj\.weight has shape"):
        small_student(tmp_path / "patch14.safetensors")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = small_deit().state_dict()
    state["norm.weight"][3] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(WeightsError, match=r"norm\.weight is not finite"):
        small_student(tmp_path / "nan.safetensors")


def test_unreachable_hub_names_model_cause_and_alternative(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nonexistent")
    with pytest.raises(WeightsError, match=r"deit_small_patch16_224.*Error.*weights=PATH"):
        Student(StudentOptions(backbone="theia_small", weights="pretrained"))


def test_pretrained_takes_weights_and_normalisation_of_the_hubs_model(monkeypatch):
    upstream = small_deit()
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: upstream)
    student = small_student("pretrained")
    config = timm.models.get_pretrained_cfg("deit_tiny_patch16_224")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    pixels = (images() / 255 - mean) / std
    torch.testing.assert_close(student(images()).patches, upstream.forward_features(pixels)[:, 1:])
