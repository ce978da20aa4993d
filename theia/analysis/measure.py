"""One pass over images: every figure of every encoder."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from theia.analysis.maps import NormMaps
from theia.analysis.norms import EntropyFigures, EntropyOfNorms, NormSketch, RelativeNorms
from theia.analysis.similarity import CKA, SimilarityFigures, SimilarityToMean, Spectrum, SpectrumFigures
from theia.errors import FeatureError
from theia.models.backbone import StudentTokens


@dataclass(frozen=True)
class ImageBatch:
    """A few images.

    Attributes:
        ids: Sample ids of the images.
        images: RGB, uint8, shape ``(B, 3, H, W)``.
    """

    ids: list[str]
    images: Tensor


@dataclass(frozen=True)
class EncoderFigures:
    """All figures of one encoder.

    Attributes:
        width: Channels of a token.
        grid: Rows and columns of tokens.
        entropy: Entropy of norms, in units of the root of the width.
        relative: Norms in units of their median.
        spectrum: Variance that the principal components explain.
        similarity: Cosine of tokens to the mean token of their image.
    """

    width: int
    grid: tuple[int, int]
    entropy: EntropyFigures
    relative: RelativeNorms
    spectrum: SpectrumFigures
    similarity: SimilarityFigures


@dataclass(frozen=True)
class Measured:
    """Result of a pass over the images.

    Attributes:
        images: Number of images.
        encoders: Figures by name.
        cka: CKA of all pairs, in the order of ``encoders``; ``None`` where it is not defined.
        maps: Norm maps of the images that were to be shown.
    """

    images: int
    encoders: dict[str, EncoderFigures]
    cka: list[list[float | None]]
    maps: NormMaps


@torch.no_grad()
def measure(
    encoders: Mapping[str, nn.Module],
    batches: Iterable[ImageBatch],
    shown: Collection[str] | int = 0,
    device: torch.device | None = None,
) -> Measured:
    """Runs all encoders over each batch, so that images are decoded once and memory does not grow with them.

    What is held is, per encoder, its weights, a covariance matrix of its width, and histograms.

    Args:
        encoders: Encoders by name; each gives :class:`~theia.models.backbone.StudentTokens` for uint8 images.
        batches: At least one image, in random order for the sake of :class:`~theia.analysis.similarity.CKA`.
        shown: Ids of the images to make norm maps of, or the number of first images to make them of.
        device: Device of the encoders, to which images are moved.

    Raises:
        FeatureError: If an encoder gives values that are not finite.
    """
    collected: dict[str, _Collected] = {}
    cka = CKA([*encoders])
    maps = NormMaps()
    count = 0
    for batch in batches:
        images = batch.images.to(device)
        wanted = _wanted(batch.ids, shown, count)
        for row in wanted:
            maps.add_image(batch.ids[row], batch.images[row])
        pooled = {}
        for name, encoder in encoders.items():
            tokens: StudentTokens = encoder(images)
            norms = _norms(name, tokens, batch.ids)
            if name not in collected:
                collected[name] = _Collected(tokens)
            collected[name].update(tokens, norms)
            pooled[name] = tokens.patches.double().mean(1)
            for row in wanted:
                maps.add_norms(name, norms[row], tokens.grid)
        cka.update(pooled)
        count += len(batch.ids)
    return Measured(count, {name: one.compute() for name, one in collected.items()}, cka.compute(), maps)


class _Collected:
    """The accumulators of one encoder."""

    def __init__(self, tokens: StudentTokens) -> None:
        self._width, self._grid = tokens.patches.shape[-1], tokens.grid
        self._entropy, self._sketch, self._similarity = EntropyOfNorms(), NormSketch(), SimilarityToMean()
        self._spectrum = Spectrum(self._width, tokens.patches.device)

    def update(self, tokens: StudentTokens, norms: Tensor) -> None:
        self._entropy.update(norms)
        self._sketch.update(norms)
        self._similarity.update(tokens.patches)
        self._spectrum.update(tokens.patches)

    def compute(self) -> EncoderFigures:
        return EncoderFigures(
            width=self._width,
            grid=self._grid,
            entropy=self._entropy.compute(),
            relative=self._sketch.compute(),
            spectrum=self._spectrum.compute(),
            similarity=self._similarity.compute(),
        )


def _norms(name: str, tokens: StudentTokens, ids: list[str]) -> Tensor:
    """L2 norms in units of the root of the width, ``(B, N)``."""
    norms: Tensor = tokens.patches.norm(dim=-1) / tokens.patches.shape[-1] ** 0.5
    good = norms.isfinite().all(1)
    if not good.all():
        bad = ids[int((~good).nonzero()[0])]
        raise FeatureError(
            f"Encoder {name} gives values that are not finite on image {bad}. Leave out the encoder, or the image."
        )
    return norms


def _wanted(ids: list[str], shown: Collection[str] | int, before: int) -> list[int]:
    """Rows of a batch to make maps of."""
    if isinstance(shown, int):
        return [*range(min(len(ids), max(0, shown - before)))]
    return [row for row, sample_id in enumerate(ids) if sample_id in shown]
