import math

import numpy as np
import pytest

from theia.decoding.viewer import depth_error, feature_cosine, mask_iou

RNG = np.random.default_rng(0)


def test_depth_error_equals_an_explicit_least_squares_fit() -> None:
    prediction, noise = RNG.normal(size=(2, 20, 30))
    target = 2 * prediction + noise + 5

    design = np.stack([prediction.ravel(), np.ones(600)], 1)
    solution = np.linalg.lstsq(design, target.ravel(), rcond=None)[0]
    remainder = design @ solution - target.ravel()

    wanted = np.sqrt((remainder**2).mean()) / target.std()
    assert depth_error(prediction, target) == pytest.approx(wanted, rel=1e-9)


def test_depth_error_ignores_scale_and_shift_but_not_sign() -> None:
    target = RNG.normal(size=(8, 8))
    assert depth_error(3 * target - 7, target) == pytest.approx(0, abs=1e-6)
    assert depth_error(-target, target) == 1
    assert depth_error(np.ones((8, 8)), target) == 1


def test_depth_error_of_a_constant_target_is_undefined() -> None:
    assert math.isnan(depth_error(RNG.normal(size=(8, 8)), np.full((8, 8), 0.1)))


def boxes(*spans: tuple[int, int]) -> np.ndarray:
    masks = np.zeros((len(spans), 2, 12), bool)
    for mask, (start, end) in zip(masks, spans, strict=True):
        mask[:, start:end] = True
    return masks


@pytest.mark.parametrize(
    ("prediction", "target", "wanted"),
    [
        (boxes((0, 4), (6, 10)), boxes((6, 10), (0, 4)), 1),  # in any order
        (boxes((0, 4)), boxes((0, 4), (6, 10)), 1 / 2),  # one is missing
        (boxes((0, 4), (6, 10)), boxes((0, 4)), 1 / 2),  # one too many
        (boxes((0, 4)), boxes((2, 6)), 2 / 6),
        (boxes((0, 4)), boxes(), 0),
    ],
)
def test_mask_iou_is_the_mean_over_the_best_matching(prediction: np.ndarray, target: np.ndarray, wanted: float) -> None:
    assert mask_iou(prediction, target) == pytest.approx(wanted)


def test_mask_iou_takes_the_best_sum_and_not_the_best_pair_first() -> None:
    # IoUs: a with A 4/5, a with B 3/4; b with A 3/5 (b is within A), b with B 0.
    a, b = (0, 4), (0, 3)
    big, small = (0, 5), (1, 4)
    iou = {(a, big): 4 / 5, (a, small): 3 / 4, (b, big): 3 / 5, (b, small): 2 / 4}
    wanted = max(iou[a, big] + iou[b, small], iou[a, small] + iou[b, big]) / 2
    assert wanted > (iou[a, big] + iou[b, small]) / 2  # what a greedy matching finds
    assert mask_iou(boxes(a, b), boxes(big, small)) == pytest.approx(wanted)


def test_mask_iou_of_no_masks_at_all_is_undefined() -> None:
    assert math.isnan(mask_iou(boxes(), boxes()))


def test_feature_cosine_is_of_the_whole_map() -> None:
    a, b = RNG.normal(size=(2, 9, 4))
    wanted = np.corrcoef(np.concatenate([a.ravel(), -a.ravel()]), np.concatenate([b.ravel(), -b.ravel()]))[0, 1]
    assert feature_cosine(a, b) == pytest.approx(wanted)
    assert math.isnan(feature_cosine(a, 0 * b))
