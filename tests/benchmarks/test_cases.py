import pytest
import torch

from benchmarks.throughput.cases import ALL_FIVE, CDIV, OurStep, PlainStep, check_parity, make_case
from benchmarks.throughput.gpu import hours, step_bytes, step_flop
from benchmarks.throughput.measure import ParityError
from benchmarks.throughput.step import kept_for_backward

SMALL = {"width": 32, "depth": 1, "heads": 1}


def test_our_step_is_the_plain_step_with_all_five_teachers() -> None:
    difference = check_parity(make_case(ALL_FIVE, "tiny", 2, **SMALL), compiled=False)

    assert difference["loss_relative_difference"] < 1e-5


def test_a_step_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Half the weight of the cosine: F is torch's own, which ours does not call for it.
    cosine = torch.nn.functional.cosine_similarity
    monkeypatch.setattr("benchmarks.throughput.plain.F.cosine_similarity", lambda *maps: cosine(*maps) / 2)

    with pytest.raises(ParityError, match="Losses"):
        check_parity(make_case(CDIV, "tiny", 2, **SMALL), compiled=False)


def test_both_steps_lower_the_loss_alike() -> None:
    case = make_case(CDIV, "tiny", 2, **SMALL)
    ours, plain = OurStep(case, compiled=False), PlainStep(case)

    losses = [[float(step()) for _ in range(3)] for step in (ours, plain)]

    assert losses[0][2] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # the weight decay of the two is not quite the same


@pytest.mark.parametrize(
    ("teachers", "size", "paper"),
    [(CDIV, "tiny", 13.2), (CDIV, "base", 183), (ALL_FIVE, "small", 74.3)],
    ids=["tiny", "base", "small with five"],
)
def test_the_work_of_a_step_is_that_of_the_published_architecture(teachers: dict, size: str, paper: float) -> None:
    assert step_flop(make_case(teachers, size, 1, "meta")) / 1e9 == pytest.approx(paper, rel=0.05)  # GFLOP for an image


def test_only_what_backward_needs_is_counted_and_each_tensor_once() -> None:
    case = make_case({"one": (8, 16)}, "tiny", 1, **SMALL)
    weight = torch.ones(1000, requires_grad=True)

    def loss() -> torch.Tensor:
        activation = weight * 2
        return (activation.sin() + activation.cos()).sum()  # both keep the same 4000 bytes

    assert kept_for_backward(loss, [weight], case) == 4000


def test_hours_are_those_of_fifty_epochs_of_imagenet() -> None:
    assert hours(images_per_s=1_281_167 / 3600) == pytest.approx(50)


def test_the_least_traffic_of_a_step_counts_batch_and_parameters() -> None:
    case = make_case({"one": (8, 16)}, "tiny", 1, **SMALL)
    parameters = sum(parameter.numel() for parameter in case.distiller.parameters())

    assert step_bytes(case, kept=100) == 200 + 2 * (3 * 224 * 224 + 256 * 8 * 2) + 40 * parameters
