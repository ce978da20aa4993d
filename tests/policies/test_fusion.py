"""What becomes of the tokens of three frames, against closed forms."""

import numpy as np
import pytest
import torch

from theia.errors import ConfigError
from theia.policies.fusion import Convolutions, Reduction, fuse, strides_for
from theia.probing.frame_tokens import FrameTokens


def test_vectors_are_fused_into_differences_and_the_last_one():
    vectors = torch.tensor([[[1.0, 2.0], [4.0, 8.0], [16.0, 32.0]]])
    assert fuse(vectors).tolist() == [[3.0, 6.0, 12.0, 24.0, 16.0, 32.0]]


@pytest.mark.parametrize(
    ("grid", "strides", "outputs"),
    [
        ((14, 14), (2, 2, 1), 256),  # 14 -> 7 -> 3 -> 1
        ((16, 16), (2, 2, 1), 256),  # 16 -> 8 -> 3 -> 1
        ((8, 8), (1, 2, 1), 256),  # 8 -> 7 -> 3 -> 1
        ((7, 7), (1, 1, 1), 4 * 256),  # 7 -> 6 -> 4 -> 2
        ((6, 6), (1, 1, 1), 256),  # 6 -> 5 -> 3 -> 1
    ],
)
def test_convolutions_make_a_vector_of_grids_from_six_on(grid, strides, outputs):
    assert strides_for(grid) == strides
    layers = Convolutions(5, grid)
    assert layers.outputs == outputs
    assert layers(torch.randn(2, 5, *grid)).shape == (2, outputs)


def test_a_grid_that_is_too_small_is_refused_with_the_least():
    with pytest.raises(ConfigError, match="at least 6x6"):
        Convolutions(5, (5, 14))


def test_kept_components_are_those_of_the_demonstrations_whether_averaged_before_or_after():
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(20, 14 * 14, 5)) @ rng.normal(size=(5, 5)) + rng.normal(size=5)
    flat = tokens.reshape(-1, 5)
    found = FrameTokens(tokens.astype(np.float16), (14, 14), flat.mean(0), flat.std(0), np.corrcoef(flat, rowvar=False))
    reduction = Reduction(5, (7, 7), 2)
    reduction.fit(found)
    maps = reduction(torch.from_numpy(tokens).float(), (14, 14))
    standardised = (tokens - flat.mean(0)) / flat.std(0)
    projected = (standardised @ found.components(2)).reshape(20, 7, 2, 7, 2, 2).mean((2, 4))
    np.testing.assert_allclose(maps.permute(0, 2, 3, 1).numpy(), projected, atol=1e-4)
    pooled = torch.from_numpy(tokens.reshape(20, 7, 2, 7, 2, 5).mean((2, 4)).reshape(20, 49, 5)).float()
    torch.testing.assert_close(reduction(pooled, (7, 7)), maps, rtol=1e-4, atol=1e-4)


def test_tokens_as_they_are_stay_as_they_are():
    tokens = torch.randn(2, 14 * 14, 5)
    maps = Reduction(5, (14, 14), None)(tokens, (14, 14))
    assert torch.equal(maps.flatten(2).transpose(1, 2), tokens)
