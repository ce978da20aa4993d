import pytest
import torch

from theia.extraction.computing import arithmetic, choose


@pytest.mark.parametrize(
    ("wanted", "begun", "on_gpu", "chosen"),
    [
        ("auto", None, False, "32-true"),
        ("auto", None, True, "tf32"),
        ("auto", "32-true", True, "32-true"),
        ("auto", "bf16-mixed", False, "bf16-mixed"),
        ("auto", "16-mixed", True, "tf32"),  # of another program
        ("32-true", "tf32", True, "32-true"),  # which the store then refuses
        ("bf16-mixed", None, False, "bf16-mixed"),
    ],
)
def test_what_the_user_asks_for_comes_first_and_then_what_was_begun(wanted, begun, on_gpu, chosen) -> None:
    assert choose(wanted, begun, on_gpu, "tf32") == chosen


@pytest.mark.parametrize(
    ("precision", "tf32", "product"),
    [
        ("32-true", False, torch.float32),
        ("tf32", True, torch.float32),
        ("bf16-mixed", True, torch.bfloat16),
    ],
)
def test_the_arithmetic_holds_inside_of_the_block_only(precision, tf32: bool, product: torch.dtype) -> None:
    def flags() -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = flags()
    with arithmetic(precision, torch.device("cpu")):
        assert flags() == (tf32, tf32)
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == product
    assert flags() == before


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "least", "most"), [("32-true", 0, 1e-6), ("tf32", 1e-5, 2e-3), ("bf16-mixed", 1e-3, 2e-2)]
)
def test_a_gpu_rounds_the_factors_as_the_precision_says(precision, least: float, most: float) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    with arithmetic(precision, torch.device("cuda")):
        error = (left.cuda() @ right.cuda()).cpu().double() - exact
    assert least <= error.std() / exact.std() <= most
