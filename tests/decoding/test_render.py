import numpy as np
import torch

from theia.decoding.render import Tokens, depth_colours, fit_colours, mask_colours, paint
from theia.types import Depth, Masks, Pictures
from theia.utils.pictures import colour_basis, pca_colours

IMAGE = np.full((12, 20, 3), 128, np.uint8)


def test_one_basis_serves_all_images() -> None:
    patches = torch.randn(3, 12, 5, generator=torch.Generator().manual_seed(0))
    items = [Tokens(each[None], (3, 4)) for each in patches]

    colours = fit_colours(items)

    basis = colour_basis(patches.flatten(0, 1).numpy())
    for item, each in zip(items, patches, strict=True):
        np.testing.assert_array_equal(paint(item, colours, IMAGE), pca_colours(each.numpy(), (3, 4), basis))


def test_one_range_of_depth_serves_all_images() -> None:
    maps = torch.arange(200.0).reshape(2, 10, 10)
    colours = fit_colours([Depth(maps[:1]), Depth(maps[1:])])

    assert colours.depth == tuple(np.percentile(np.arange(200), (1, 99)))
    near, far = (paint(Depth(each[None]), colours, IMAGE).astype(int).sum(2).mean() for each in maps.flip(0))
    assert near > far


def test_constant_depth_has_a_picture() -> None:
    depth = torch.ones(1, 4, 4)
    assert paint(Depth(depth), fit_colours([Depth(depth)]), IMAGE).shape == (4, 4, 3)
    assert not np.ptp(depth_colours(depth[0].numpy(), (1, 1)), axis=(0, 1)).any()


def mask(rows: slice, columns: slice) -> np.ndarray:
    made = np.zeros((12, 20), bool)
    made[rows, columns] = True
    return made


def test_small_masks_lie_above_large_ones_whatever_their_order() -> None:
    large, small = mask(slice(0, 12), slice(0, 20)), mask(slice(4, 9), slice(4, 9))
    one, other = (mask_colours(np.stack(each), IMAGE) for each in ([large, small], [small, large]))

    np.testing.assert_array_equal(one, other)
    assert (one[6, 6] != one[1, 1]).any()


def test_the_same_thing_has_the_same_colour_beside_other_things() -> None:
    thing, another = mask(slice(1, 6), slice(1, 6)), mask(slice(5, 12), slice(12, 19))
    alone, together = (mask_colours(np.stack(each), IMAGE) for each in ([thing], [another, thing]))

    np.testing.assert_array_equal(alone[:6, :6], together[:6, :6])
    assert np.abs(together[3, 3].astype(int) - together[8, 15]).max() > 40


def test_without_masks_the_image_is_left() -> None:
    picture = paint(Masks([torch.zeros(0, 12, 20, dtype=torch.bool)], [torch.zeros(0)]), fit_colours([]), IMAGE)
    assert picture.shape == IMAGE.shape
    assert not np.ptp(picture, axis=(0, 1, 2))


def test_a_teachers_own_picture_is_kept() -> None:
    pixels = torch.randint(256, (1, 4, 5, 3), dtype=torch.uint8)
    np.testing.assert_array_equal(paint(Pictures(pixels), fit_colours([]), IMAGE), pixels[0].numpy())
