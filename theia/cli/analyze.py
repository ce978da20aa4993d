"""``theia analyze``: compares the representations of any encoders in figures, side by side."""

import logging
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from theia.errors import ConfigError
from theia.utils.arguments import MOST_PIXELS, check_number
from theia.utils.device import Device, choose_device
from theia.version import __version__

if TYPE_CHECKING:
    import torch

    from theia.analysis.measure import ImageBatch, Measured
    from theia.encoder.from_name import NamedEncoder
    from theia.extraction.stream import ImageStream

logger = logging.getLogger(__name__)

_PICTURES = 6


def analyze(
    encoders: list[str],
    images: str,
    out: Path,
    scores: Path | None = None,
    max_images: int | None = None,
    image_size: int = 224,
    batch_size: int = 32,
    device: Device = "auto",
    pictures: int | None = None,
    picture_ids: list[str] | None = None,
    overwrite: bool = False,
) -> int:
    """Compare the representations of encoders: norm entropy and maps, PCA, similarity of tokens, CKA.

    Args:
        encoders: Encoders to compare.
        images: A folder of images, one image, a .tar file or a folder of them, or sample:COUNT for held-out sample
            photographs.
        out: Folder to write: report.md, its pictures, and analysis.json.
        scores: CSV file with the columns encoder, score and optionally group. Figures are correlated with these scores.
        max_images: Number of images to look at, drawn at random but the same each time; all by default.
        image_size: Width and height, in pixels, that images are resized to, as in an extraction; a multiple of 16 for
            Theia models.
        batch_size: Number of images to encode together. Figures do not depend on it.
        device: Device that encoders run on; auto takes a GPU if there is one.
        pictures: Number of images to show norm maps of; 6 by default.
        picture_ids: Images to show norm maps of instead: paths below --images, with blanks between them.
        overwrite: Replace an earlier analysis in the folder once the new one is complete.
    """
    _check(encoders, max_images, image_size, batch_size, pictures, picture_ids)
    shown = picture_ids or (_PICTURES if pictures is None else pictures)

    # torch takes seconds to import; --help does not need it.
    from theia.analysis.page import check_free, write_report
    from theia.analysis.results import assemble
    from theia.analysis.scores import read_scores
    from theia.extraction.stream import ImageStream, open_images

    check_free(out, overwrite)
    read = read_scores(scores, encoders) if scores is not None else {}
    source = open_images(images)
    stream = ImageStream(source, image_size, batch_size, max_images, picture_ids or ())
    chosen = choose_device(device)
    opened = _open(encoders, image_size, chosen)
    started = time.monotonic()
    measured = _measure(opened, stream, shown, chosen)
    if stream.skipped:
        logger.warning("Images that could not be read, named in the report: %d", len(stream.skipped))
    provenance = {
        "images": ", ".join(f"{key}: {_text(value)}" for key, value in source.description.items()),
        "images listed": len(source.ids),
        "max_images": max_images,
        "image_size": image_size,
        **_cost(chosen, time.monotonic() - started),
    }
    distilled = {name: encoder.distilled for name, encoder in opened.items()}
    analysis = assemble(measured, distilled, read, stream.skipped, provenance)
    files = write_report(out, analysis)
    _say(analysis, files[-1])
    return 0


def _check(
    encoders: list[str], max_images: int | None, image_size: int, batch_size: int, pictures: int | None,
    picture_ids: list[str] | None,
) -> None:  # fmt: skip
    twice = sorted({name for name in encoders if encoders.count(name) > 1})
    if twice:
        raise ConfigError(f"--encoders has {twice[0]!r} twice. Give each once.")
    check_number("max_images", max_images, 1)
    check_number("image_size", image_size, 16, MOST_PIXELS)
    check_number("batch_size", batch_size, 1)
    check_number("pictures", pictures, 0)
    if picture_ids and pictures is not None:
        raise ConfigError("--picture_ids says which images are shown, --pictures how many. Give one of the two.")
    if picture_ids and max_images is not None and max_images < len(set(picture_ids)):
        raise ConfigError(
            f"--picture_ids names {len(set(picture_ids))} images, but --max_images looks at {max_images}. Raise it."
        )


def _open(names: list[str], image_size: int, device: "torch.device") -> "dict[str, NamedEncoder]":
    """Opens the encoders and tries each on one grey image, so that no problem comes to light after hours."""
    import torch

    from theia.encoder.from_name import open_encoder

    opened = {}
    for name in names:
        logger.info("Opening %s", name)
        opened[name] = open_encoder(name, device)
        opened[name](torch.full((1, 3, image_size, image_size), 128, dtype=torch.uint8, device=device))
    return opened


def _measure(
    encoders: "Mapping[str, NamedEncoder]", stream: "ImageStream", shown: list[str] | int, device: "torch.device"
) -> "Measured":
    import torch

    from theia.analysis.measure import ImageBatch, measure
    from theia.utils.progress import Progress

    def batches(advance: Callable[[int], object]) -> "Iterator[ImageBatch]":
        skipped = 0
        for ids, pixels in stream:
            yield ImageBatch(ids, pixels)
            advance(len(ids) + len(stream.skipped) - skipped)
            skipped = len(stream.skipped)

    with Progress("analyze", len(stream)) as progress:
        try:
            return measure(encoders, batches(progress.advance), shown, device)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                "The GPU's memory is full. Take a smaller --batch_size, fewer encoders, or --device cpu."
            ) from error


def _cost(device: "torch.device", seconds: float) -> dict[str, Any]:
    import torch

    cost: dict[str, Any] = {"device": device.type, "seconds": round(seconds, 1)}
    if device.type == "cuda":
        cost["device"] = torch.cuda.get_device_name(device)
        cost["peak GPU memory, MB"] = round(torch.cuda.max_memory_allocated(device) / 1e6)
    # Linux counts in kilobytes of 1024.
    cost["peak memory, MB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)
    return {**cost, "theia": __version__, "torch": torch.__version__}


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _say(analysis: Any, report: Path) -> None:
    from theia.analysis.page import main_table

    print(main_table(analysis))
    for note in analysis.notes:
        logger.info("%s", note)
    print(report)
