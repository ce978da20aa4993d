import numpy as np
import pytest
import torch

from benchmarks import precision
from benchmarks.precision import Error, RoundedFactors, measure, to_tf32


def test_tf32_has_ten_bits() -> None:
    values = torch.tensor([1, 1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-11, -(1 + 2**-12), 3e38, 0])
    assert to_tf32(values).tolist() == pytest.approx([1, 1 + 2**-10, 1, 1 + 2**-9, -1, 3e38, 0], rel=2**-11)
    assert to_tf32(values)[:4].tolist() == [1, 1 + 2**-10, 1, 1 + 2**-9]  # halves to even
    assert to_tf32(values.double()) is not None


def test_the_factors_of_products_are_rounded_and_nothing_else() -> None:
    left, right = torch.full((2, 2), 1 + 2**-11), torch.ones(2, 2)
    with RoundedFactors():
        assert (left @ right).tolist() == [[2, 2], [2, 2]]
        assert torch.nn.functional.linear(left, right, bias=left[0])[0, 0] == 2 + 1 + 2**-11
        assert (left + 0)[0, 0] == 1 + 2**-11


def test_an_error_is_in_units_of_the_channels_deviation() -> None:
    true = torch.from_numpy(np.random.default_rng(0).normal(5, [1, 10, 100], (2, 500, 3)).astype(np.float32))
    error = Error.of(true + torch.tensor([0.1, 0.1, 0.1]), true)
    assert error.worst == pytest.approx(0.1, rel=0.1)
    assert error.median == pytest.approx(0.01, rel=0.1)


def test_every_precision_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 224, 224), np.uint8))
    errors = measure("vit", {"weights": "random", "architecture": small}, images)
    assert 0 < errors["TF32"].worst < errors["bfloat16"].worst < 0.1
    assert 0 < errors["float16"].median < 1e-3
    monkeypatch.setattr(precision, "WIDE", {"vit": small})
    assert precision.run(["vit"], images=1).count("\n") == 2


def test_the_built_in_teachers_are_measured() -> None:
    assert precision.WIDE.keys() == precision.DEEP.keys() == {"clip", "dinov2", "vit", "sam", "depth_anything"}
