import torch
from torch import Tensor, nn

from theia.analysis.figures import draw_norms, draw_similarity, draw_spectra
from theia.analysis.measure import EncoderFigures, ImageBatch, measure
from theia.models.backbone import StudentTokens

LABELS = {"random": "random", "zero": "zero"}


class Times(nn.Module):
    """Random tokens, all alike in each call, times a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, images: Tensor) -> StudentTokens:
        patches = self.factor * torch.randn(len(images), 6, 8, generator=torch.Generator().manual_seed(0))
        return StudentTokens(None, patches[:, :0], patches, (2, 3))


def figures() -> dict[str, EncoderFigures]:
    pixels = torch.zeros(5, 3, 8, 12, dtype=torch.uint8)
    encoders = {"random": Times(1), "zero": Times(0)}
    return measure(encoders, [ImageBatch([*"abcde"], pixels)]).encoders


def test_an_encoder_without_values_is_named_all_the_same() -> None:
    for draw in (draw_similarity, draw_spectra):
        (axes,) = draw(figures(), LABELS).axes
        assert [text.get_text().partition(":")[0] for text in axes.get_legend().get_texts()] == ["random", "zero"]


def test_no_cosine_beyond_one_and_no_norm_behind_the_axis() -> None:
    (axes,) = draw_similarity(figures(), LABELS).axes
    assert axes.get_xlim()[1] == 1
    panels = draw_norms(figures(), LABELS).axes
    assert all(panel.get_xlim()[0] < 0 for panel in panels)
    sizes = {label.get_size() for panel in panels for label in panel.get_xticklabels()}
    assert len(sizes) == 1
