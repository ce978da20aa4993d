"""The policy heads against closed forms."""

import pytest
import torch
import torch.nn.functional as F

from theia.errors import ConfigError
from theia.policies.action_heads import ChunkHead, DiffusionHead, MLPHead


def test_the_paper_s_spatial_head_written_out():
    torch.manual_seed(0)
    head = MLPHead(channels=4, grid=(14, 14), known=3, actions=2)
    frames, known = torch.randn(5, 3, 4, 14, 14), torch.randn(5, 3)
    weights = list(head.parameters())
    x = frames.reshape(5, 12, 14, 14)
    for number, (stride, padding) in enumerate([(2, 1), (2, 0), (1, 0)]):
        kernel, bias, scale, shift = weights[4 * number : 4 * number + 4]
        x = F.conv2d(x, kernel, bias, stride, padding)
        centred = x - x.mean((1, 2, 3), keepdim=True)
        x = centred / (centred.square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        x = (x * scale + shift).clamp(min=0)
    x = torch.cat([x.flatten(1), known], 1)
    x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    for number in range(3):
        weight, bias = weights[14 + 2 * number : 16 + 2 * number]
        assert weight.shape[0] == 256
        x = (x @ weight.T + bias).clamp(min=0)
    expected = x @ weights[20].T + weights[21]
    assert len(weights) == 22
    torch.testing.assert_close(head.train()(frames, known)[:, 0], expected, rtol=1e-4, atol=1e-6)


def test_the_last_layer_begins_a_hundred_times_smaller():
    torch.manual_seed(0)
    head = MLPHead(channels=0, grid=(1, 1), known=4, actions=50)
    last = head.mlp[-1]
    bound = 1 / 256**0.5  # torch's own for 256 inputs
    assert 0.0098 * bound < float(last.weight.detach().abs().max()) <= 0.01 * bound


def test_a_vector_encoder_goes_through_the_mlp_alone():
    head = MLPHead(channels=6, grid=(1, 1), known=4, actions=3).eval()
    assert head.convolutions is None
    assert head.mlp[0].num_features == 3 * 6 + 4
    seen = head.look(torch.randn(6, 1, 6), (1, 1))
    assert head(seen.unflatten(0, (2, 3)), torch.randn(2, 4)).shape == (2, 1, 3)


def test_a_blind_head_is_given_no_picture():
    head = MLPHead(channels=0, grid=(1, 1), known=4, actions=3).eval()
    assert head.mlp[0].num_features == 4
    assert head(None, torch.randn(2, 4)).shape == (2, 1, 3)


def test_a_chunk_is_fitted_in_standard_deviations_by_smooth_l1():
    torch.manual_seed(0)
    head = ChunkHead(channels=0, grid=(1, 1), known=3, actions=2, chunk=4)
    demonstrated = torch.tensor([[0.0, 10.0], [2.0, 30.0]])
    head.fit_scale(demonstrated, torch.randn(2, 3))
    known, wanted = torch.randn(5, 3), torch.randn(5, 4, 2)
    counted = torch.arange(4) < torch.tensor([4, 4, 3, 2, 1])[:, None]
    errors = ((head(None, known) - wanted) / torch.tensor([1.0, 10.0])).abs()  # deviations around 1 and 20
    smooth = torch.where(errors < 1, errors.square() / 2, errors - 0.5)
    expected = sum(smooth[number, :count].sum() for number, count in enumerate([4, 4, 3, 2, 1])) / (14 * 2)
    torch.testing.assert_close(head.loss(None, known, wanted, counted), expected)


def test_a_value_that_never_changes_is_not_divided_by_nothing():
    head = ChunkHead(channels=0, grid=(1, 1), known=1, actions=1)
    head.fit_scale(torch.full((3, 1), 7.0), torch.zeros(3, 1))
    assert torch.isfinite(head(None, torch.randn(2, 1))).all()


def test_the_head_of_cortexbench_predicts_one_action():
    with pytest.raises(ConfigError, match="Take the head 'chunk'"):
        MLPHead(channels=0, grid=(1, 1), known=1, actions=1, chunk=2)


@pytest.mark.parametrize("chunk", [0, -1])
def test_no_head_predicts_nothing(chunk):
    with pytest.raises(ConfigError, match=f"chunk is {chunk}"):
        ChunkHead(channels=0, grid=(1, 1), known=1, actions=1, chunk=chunk)


def test_a_diffusion_head_that_is_fitted_to_two_ways_samples_either_and_not_their_mean():
    torch.manual_seed(0)
    head = DiffusionHead(channels=0, grid=(1, 1), known=1, actions=1, chunk=2)
    ways = torch.tensor([[[2.0], [4.0]], [[8.0], [10.0]]])[torch.randint(2, (256,))]
    head.fit_scale(ways.flatten(0, 1), torch.zeros(256, 1))
    optimizer = torch.optim.Adam(head.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        optimizer.zero_grad()
        head.loss(None, torch.zeros(256, 1), ways, generator=generator).backward()
        optimizer.step()
    with torch.inference_mode():
        sampled = head.eval()(None, torch.zeros(64, 1), torch.randn(64, 2, 1))[..., 0]
    near = torch.stack([(sampled - torch.tensor(way)).abs().amax(1) for way in ([2.0, 4.0], [8.0, 10.0])], 1)
    assert near.amin(1).median() < 0.7  # their mean is 3 away from both
    assert 0.2 < (near[:, 0] < near[:, 1]).float().mean() < 0.8


def test_the_same_noise_gives_the_same_actions():
    head = DiffusionHead(channels=4, grid=(1, 1), known=2, actions=3).eval()
    frames, known, noise = torch.randn(2, 3, 4, 1, 1), torch.randn(2, 2), torch.randn(2, 4, 3)
    assert head(frames, known, noise).shape == (2, 4, 3)
    assert torch.equal(head(frames, known, noise), head(frames, known, noise))
    assert not torch.equal(head(frames, known, noise), head(frames, known, -noise))


def test_the_spatial_head_has_the_parameters_of_the_paper_and_those_of_the_norms():
    head = MLPHead(channels=32, grid=(14, 14), known=0, actions=3)
    convolutions = (3 * 32 * 16 + 1) * 256 + 2 * (256 * 9 + 1) * 256
    mlp = 3 * (256 + 1) * 256 + (256 + 1) * 3
    norms = 2 * 256 * (7 * 7 + 3 * 3 + 1) + 2 * 256
    assert sum(parameter.numel() for parameter in head.parameters()) == convolutions + mlp + norms
