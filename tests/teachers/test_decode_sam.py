"""SAM's own features through ``decode`` are SAM's own masks."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor, nn

from theia.errors import ConfigError
from theia.types import Masks
from theia_teachers.sam import SAM

SIDE = 128  # pixels; 8x8 features
# Random weights are sure of nothing, and their masks are noise.
SETTINGS = {"points_per_side": 3, "pred_iou_thresh": -1e9, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}


@pytest.fixture(scope="module")
def upstream() -> Sam:
    """A small SAM, put together here from the package's parts."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        grid = SIDE // 16
        sam = Sam(
            ImageEncoderViT(
                img_size=SIDE, patch_size=16, embed_dim=16, depth=4, num_heads=2, mlp_ratio=4, out_chans=256,
                norm_layer=partial(nn.LayerNorm, eps=1e-6), use_rel_pos=True, window_size=14,
                global_attn_indexes=(0, 1, 2, 3),
            ),
            PromptEncoder(256, (grid, grid), (SIDE, SIDE), 16),
            MaskDecoder(transformer_dim=256, transformer=TwoWayTransformer(2, 256, 8, 2048)),
        )  # fmt: skip
        for weight in sam.image_encoder.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return sam.eval()


@pytest.fixture(scope="module")
def teacher(upstream: Sam, tmp_path_factory: pytest.TempPathFactory) -> SAM:
    path = tmp_path_factory.mktemp("sam") / "small.pth"
    torch.save(upstream.state_dict(), path)
    architecture = {"depth": 4, "width": 16, "heads": 2, "image_size": SIDE}
    return SAM(str(path), "vit_b", architecture, SETTINGS).eval().requires_grad_(False)


def assert_masks_equal(decoded: Masks, index: int, wanted: list[dict[str, Any]]) -> None:
    assert len(wanted) > 2
    assert any(0.01 < record["segmentation"].mean() < 0.99 for record in wanted)
    np.testing.assert_array_equal(decoded.masks[index].numpy(), [record["segmentation"] for record in wanted])
    assert decoded.scores[index].tolist() == pytest.approx([record["predicted_iou"] for record in wanted], abs=1e-6)


def test_own_features_give_upstreams_masks_exactly(teacher: SAM, upstream: Sam, images: Tensor) -> None:
    # Of the encoder's own size, as resizing is equal to upstream's within a grey level only; oblong, so padded.
    oblong = images[:, :, 40:120, 40:168]
    decoded = teacher.decode(teacher(oblong).patches, oblong)

    generator = SamAutomaticMaskGenerator(upstream, **SETTINGS)
    for index, image in enumerate(oblong):
        assert_masks_equal(decoded, index, generator.generate(image.permute(1, 2, 0).numpy()))


def test_images_of_another_size_have_upstreams_masks_of_the_same_features(
    teacher: SAM, upstream: Sam, images: Tensor
) -> None:
    image = images[:1, :, :200]
    generator = SamAutomaticMaskGenerator(upstream, **SETTINGS)
    generator.predictor.set_image(image[0].permute(1, 2, 0).numpy())
    patches = generator.predictor.features.flatten(2).transpose(1, 2)

    decoded = teacher.decode(patches, image)

    assert_masks_equal(decoded, 0, generator.generate(image[0].permute(1, 2, 0).numpy()))
    assert decoded.masks[0].shape[1:] == (200, 224)


def test_the_features_decide_and_not_the_image(teacher: SAM, images: Tensor) -> None:
    patches = teacher(images).patches
    given, exchanged = (teacher.decode(patches, each) for each in (images, images.flip(0)))
    for one, other in zip(given.masks, exchanged.masks, strict=True):
        assert torch.equal(one, other)


def test_no_mask_is_a_result_too(upstream: Sam, images: Tensor) -> None:
    architecture = {"depth": 1, "width": 8, "heads": 1, "image_size": 64}
    teacher = SAM("random", "vit_b", architecture, {"points_per_side": 2, "pred_iou_thresh": 1e9}).eval()
    decoded = teacher.decode(teacher(images).patches.detach(), images)
    assert [masks.shape for masks in decoded.masks] == [(0, 224, 224)] * 2
    assert [scores.shape for scores in decoded.scores] == [(0,)] * 2


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'mask_generator' has no crop_n_layers.*points_per_side"):
        SAM("random", "vit_b", {"depth": 1}, {"crop_n_layers": 1})
