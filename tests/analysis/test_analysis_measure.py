import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from theia.analysis.measure import ImageBatch, measure
from theia.analysis.page import page
from theia.analysis.results import as_json, assemble
from theia.errors import FeatureError
from theia.models.backbone import StudentTokens
from theia.training.metrics import NormEntropy


class Pixels(nn.Module):
    """Every 4x4 patch of an image as a token, through some function."""

    def __init__(self, change: nn.Module | None = None) -> None:
        super().__init__()
        self.change = change or nn.Identity()

    def forward(self, images: Tensor) -> StudentTokens:
        rows, columns = (side // 4 for side in images.shape[2:])
        patches = nn.functional.unfold(images.float() / 255, 4, stride=4).transpose(1, 2)
        changed = self.change(patches)
        return StudentTokens(None, changed[:, :0], changed, (rows, columns))


class Constant(Pixels):
    def forward(self, images: Tensor) -> StudentTokens:
        tokens = super().forward(images)
        return StudentTokens(None, tokens.registers, torch.full_like(tokens.patches, 0.3), tokens.grid)


def images(count: int) -> Tensor:
    return torch.randint(256, (count, 3, 8, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def batches(pixels: Tensor, size: int) -> Iterator[ImageBatch]:
    for start in range(0, len(pixels), size):
        part = pixels[start : start + size]
        yield ImageBatch([f"{start + row}.png" for row in range(len(part))], part)


def test_one_pass_gives_what_all_tokens_at_once_do() -> None:
    pixels = images(20)
    found = measure({"pixels": Pixels()}, batches(pixels, 6)).encoders["pixels"]
    patches = Pixels()(pixels).patches
    tokens = patches.flatten(0, 1).double().numpy()
    metric = NormEntropy()
    metric.update(patches)

    assert (found.width, found.grid) == (48, (2, 3))
    assert found.entropy.value == pytest.approx(float(metric.compute()), abs=1e-6)
    variances = np.linalg.svd(tokens - tokens.mean(0), compute_uv=False) ** 2
    assert found.spectrum.ratio == pytest.approx(variances / variances.sum(), abs=1e-9)
    norms = np.linalg.norm(tokens, axis=1) / math.sqrt(48)
    assert found.relative.median == pytest.approx(np.median(norms), rel=2e-3)


def test_the_size_of_a_batch_changes_nothing() -> None:
    encoders = {"a": Pixels(), "b": Pixels(nn.LayerNorm(48))}
    one, other = (measure(encoders, batches(images(13), size)) for size in (1, 13))
    assert one.cka == [pytest.approx(row, abs=1e-9) for row in other.cka]
    for name in encoders:
        assert one.encoders[name].entropy.low == other.encoders[name].entropy.low
        assert one.encoders[name].spectrum.area == pytest.approx(other.encoders[name].spectrum.area)


def test_the_first_images_or_the_chosen_ones_are_shown() -> None:
    first = measure({"a": Pixels()}, batches(images(9), 2), 3).maps
    assert [*first.images] == ["0.png", "1.png", "2.png"]
    assert [norms.shape for norms in first.norms["a"]] == [(2, 3)] * 3

    chosen = measure({"a": Pixels()}, batches(images(9), 2), ["7.png", "2.png"]).maps
    assert [*chosen.images] == ["2.png", "7.png"]
    expected = Pixels()(images(9)[7:8]).patches[0].norm(dim=1).reshape(2, 3) / 48**0.5
    assert chosen.norms["a"][1] == pytest.approx(expected.numpy())


def test_constant_features_have_no_entropy_and_what_is_undefined_is_null_with_a_note() -> None:
    measured = measure({"constant": Constant(), "a": Pixels()}, batches(images(8), 4))
    analysis = assemble(measured, {"constant": False, "a": True}, {}, [], {})
    constant, other = as_json(analysis)["encoders"]

    assert constant["norm_entropy"]["value"] == 0
    assert constant["pca"] == {"area": None, "for_90": None, "for_99": None, "explained_variance_ratio": None}
    assert constant["similarity"]["mean"] == pytest.approx(1)
    assert measured.cka == [[None, None], [None, pytest.approx(1)]]
    assert other["group"] == "distilled"
    notes = " ".join(analysis.notes)
    assert "constant: all tokens are the same" in notes
    assert "constant: every image gives the same mean token" in notes


def test_the_page_says_what_a_student_is_most_like() -> None:
    class Hash(nn.Module):
        def forward(self, patches: Tensor) -> Tensor:
            return torch.sin(1e4 * patches)

    encoders = {"far": Pixels(Hash()), "near": Pixels(nn.Softmax(2)), "student": Pixels()}
    measured = measure(encoders, batches(images(40), 40))
    far, near, _ = measured.cka[2]
    assert far is not None
    assert near is not None
    assert far < 0.5 < near
    groups = {"far": False, "near": False, "student": True}
    text = page(assemble(measured, groups, {}, [], {}), ["cka.png"])
    assert f"- student is most like, in this order: near ({near:.3f}), far ({far:.3f})." in text


def test_what_a_norm_entropy_does_not_tell_is_noted() -> None:
    class Length(Pixels):
        """Tokens of given lengths, in units of the root of their width."""

        def __init__(self, lengths: list[float]) -> None:
            super().__init__()
            self.lengths = torch.tensor(lengths)

        def forward(self, images: Tensor) -> StudentTokens:
            tokens = super().forward(images)
            patches = self.lengths[None, :, None].expand(tokens.patches.shape)
            return StudentTokens(None, tokens.registers, patches, tokens.grid)

    encoders = {
        "zero": Length([0.0] * 6),
        "four": Length([0.5, 0.6, 0.7, 0.8, 0.8, 0.8]),
        "one": Length([1.0] * 6),
        # Two of 250 bins, one of 50; and two of 50, that are two of all the other numbers, too.
        "near": Length([0.984] * 3 + [1.0] * 3),
        "far": Length([0.5] * 5 + [1.0]),
    }
    notes = assemble(measure(encoders, batches(images(4), 4)), dict.fromkeys(encoders, False), {}, [], {}).notes
    assert sum("one: 100.0% of norms lie in one bin" in note for note in notes) == 1
    assert sum("near: norms spread over 2.0 bins only" in note for note in notes) == 1
    assert sum("four: norms spread over 3.5 bins only" in note for note in notes) == 1  # exp(log 2 / 2 + log 6 / 2)
    assert [note for note in notes if note.startswith("zero")] == [
        "zero: all tokens are 0, so its figures say nothing. Its weights may be broken."
    ]
    # log 2 = 0.69 against 0.45 with 250 bins, 0 against 0.45 with 50.
    assert [note for note in notes if note.endswith("as the number of bins is: near and far.")]


@pytest.mark.parametrize(("count", "said"), [(8, "of 0.22: "), (49, "of 0.03: "), (50, None)])
def test_cka_of_few_images_is_noise_and_that_is_said(count: int, said: str | None) -> None:
    measured = measure({"a": Pixels(), "b": Pixels(nn.LayerNorm(48))}, batches(images(count), 50))
    notes = assemble(measured, {"a": False, "b": False}, {}, [], {}).notes
    found = [note for note in notes if note.startswith(f"With {count} images, CKA of unrelated encoders")]
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_one_image_has_figures_without_spread() -> None:
    analysis = assemble(measure({"a": Pixels()}, batches(images(1), 4)), {"a": False}, {}, [], {})
    (found,) = as_json(analysis)["encoders"]
    assert found["norm_entropy"]["low"] is None
    assert found["similarity"]["std"] is None
    notes = " ".join(analysis.notes)
    for part in ("One image only", "CKA is not defined for fewer than 4", "6 tokens have at most 5 principal"):
        assert part in notes


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_named(value: float) -> None:
    class Broken(Pixels):
        def forward(self, images: Tensor) -> StudentTokens:
            tokens = super().forward(images)
            tokens.patches[1, 2, 3] = value
            return tokens

    with pytest.raises(FeatureError, match=r"Encoder broken .* on image 1\.png"):
        measure({"broken": Broken()}, batches(images(4), 4))
