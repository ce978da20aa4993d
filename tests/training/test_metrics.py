import forked
import numpy as np
import pytest
import torch
from scipy.stats import entropy
from sklearn.metrics import explained_variance_score
from torch.nn.functional import cosine_similarity, mse_loss, smooth_l1_loss

from theia.training.metrics import NormEntropy, feature_metrics


def feature_pair(samples=7):
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(samples, 16, 5, generator=generator)
    return target + torch.randn(samples, 16, 5, generator=generator) * torch.arange(1, 6) / 3, target


def batches(*tensors):
    # of different sizes, as the last one of an epoch is
    return zip(*(tensor.split(3) for tensor in tensors), strict=True)


def expected_metrics(prediction, target):
    flat = prediction.reshape(-1, 5).numpy(), target.reshape(-1, 5).numpy()
    return {
        "val/cosine/clip": cosine_similarity(prediction.flatten(1), target.flatten(1)).mean().item(),
        "val/smooth_l1/clip": smooth_l1_loss(prediction, target).item(),
        "val/mse/clip": mse_loss(prediction, target).item(),
        "val/explained_variance/clip": explained_variance_score(flat[1], flat[0]),
    }


def as_floats(results):
    return {name: value.item() for name, value in results.items()}


def test_metrics_over_batches_equal_those_of_the_whole():
    prediction, target = feature_pair()
    metrics = feature_metrics("val", "clip")
    for batch in batches(prediction, target):
        metrics.update(*batch)
    assert as_floats(metrics.compute()) == pytest.approx(expected_metrics(prediction, target), abs=1e-5)


def test_metrics_start_anew_after_reset():
    prediction, target = feature_pair()
    metrics = feature_metrics("val", "clip")
    metrics.update(target, target)
    metrics.reset()
    metrics.update(prediction, target)
    assert as_floats(metrics.compute()) == pytest.approx(expected_metrics(prediction, target), abs=1e-5)


def test_a_perfect_first_batch_does_not_tie_metrics_together():
    prediction, target = feature_pair()
    metrics = feature_metrics("val", "clip")
    metrics.update(target[:3], target[:3])  # smooth L1 and MSE are both 0
    metrics.update(prediction[3:], target[3:])
    expected = expected_metrics(torch.cat([target[:3], prediction[3:]]), target)
    assert as_floats(metrics.compute()) == pytest.approx(expected, abs=1e-5)


def test_channels_that_are_still_in_the_scored_images_do_not_count():
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(64, 16, 6, generator=generator)
    target[..., 1] = -3.1  # a dead channel: in float32, its variance is rounding
    target[..., 4] = -0.2 + 1e-3 * target[..., 4]
    prediction = target + 0.5 * torch.randn(target.shape, generator=generator)
    metrics = feature_metrics("val", "clip")
    for part in range(0, 64, 8):
        metrics.update(prediction[part : part + 8], target[part : part + 8])
    alive = [0, 2, 3, 5]
    flat = [values.flatten(0, 1)[:, alive].numpy() for values in (target, prediction)]
    expected = explained_variance_score(*flat)
    assert metrics.compute()["val/explained_variance/clip"].item() == pytest.approx(expected, abs=1e-4)
    metrics = feature_metrics("val", "clip")
    metrics.update(prediction[..., [1]], target[..., [1]])
    assert metrics.compute()["val/explained_variance/clip"].item() == 0


def test_explained_variance_takes_cls_tokens():
    prediction, target = (tensor[:, 0] for tensor in feature_pair())
    metrics = feature_metrics("val", "clip")
    metrics.update(prediction, target)
    expected = explained_variance_score(target.numpy(), prediction.numpy())
    assert metrics.compute()["val/explained_variance/clip"].item() == pytest.approx(expected, abs=1e-5)


def tokens():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.rand(7, 16, 1, generator=generator) * 5  # some beyond the range
    directions = torch.nn.functional.normalize(torch.randn(7, 16, 32, generator=generator), dim=-1)
    return directions * lengths * 32**0.5


def expected_entropy(patches):
    norms = np.linalg.norm(patches.numpy().reshape(-1, patches.shape[-1]), axis=-1) / patches.shape[-1] ** 0.5
    counts, _ = np.histogram(np.minimum(norms, 3.999), bins=250, range=(0, 4))
    return entropy(counts)


def test_norm_entropy_equals_scipys_of_a_numpy_histogram():
    metric = NormEntropy()
    for (patches,) in batches(tokens()):
        metric.update(patches)
    assert metric.compute().item() == pytest.approx(expected_entropy(tokens()), abs=1e-5)


def test_norm_entropy_of_equal_norms_is_zero_whatever_the_rounding():
    metric = NormEntropy()
    metric.update(torch.nn.functional.layer_norm(torch.randn(8, 64, 192), [192]))
    assert metric.compute().item() == 0


def test_norm_entropy_of_two_equal_groups_is_log_2():
    metric = NormEntropy()
    metric.update(torch.tensor([1.0, 2.0]).repeat(8).view(1, 16, 1).expand(-1, -1, 4))
    assert metric.compute().item() == pytest.approx(np.log(2))


def test_norm_entropy_counts_what_is_out_of_range_in_the_outer_bins():
    metric = NormEntropy()
    metric.update(torch.tensor([[[1e6], [torch.inf], [5.0], [torch.nan]]]))
    assert metric.counts[-1].item() == 3
    assert metric.counts.sum().item() == 4


def test_merged_states_equal_one_pass():
    prediction, target = feature_pair()
    halves = [feature_metrics("val", "clip") for _ in range(2)]
    halves[0].update(prediction[:2], target[:2])
    halves[1].update(prediction[2:], target[2:])
    for name, metric in halves[0].items(keep_base=True):
        metric.merge_state(halves[1][name])
    assert as_floats(halves[0].compute()) == pytest.approx(expected_metrics(prediction, target), abs=1e-5)


@pytest.mark.slow
def test_two_processes_compute_what_one_would(tmp_path):
    arguments = (str(tmp_path / "rendezvous"), str(tmp_path))
    ranks = [forked.function("training.test_metrics", "_worker", rank, *arguments) for rank in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.err for rank in ranks]
    prediction, target = feature_pair(8)
    expected = {**expected_metrics(prediction, target), "norm_entropy": expected_entropy(tokens())}
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(expected, abs=1e-5)


def _worker(rank, rendezvous, folder):
    torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=2)
    prediction, target = feature_pair(8)
    metrics, norm_entropy = feature_metrics("val", "clip"), NormEntropy()
    mine = slice(0, 3) if rank == 0 else slice(3, None)  # an uneven share
    metrics.update(prediction[mine], target[mine])
    norm_entropy.update(tokens()[mine])
    results = {**as_floats(metrics.compute()), "norm_entropy": norm_entropy.compute().item()}
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
