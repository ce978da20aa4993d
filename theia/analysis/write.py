"""The folder of an analysis: a page to read, its pictures, and everything as JSON."""

import io
import json
from pathlib import Path
from typing import Any

from theia.analysis import figures, maps
from theia.analysis.page import page
from theia.analysis.results import NORM_ENTROPY, Analysis, as_json, scalars
from theia.errors import ConfigError
from theia.utils.files import check_folder, write_whole, writing

JSON, REPORT, TENSORBOARD = "analysis.json", "report.md", "tensorboard"
_PICTURES = ("norms.png", "norm_maps.png", "pca.png", "similarity.png", "cka.png", "scores.png")


def check_free(folder: Path) -> None:
    """Makes sure that an analysis can be written there, before hours are spent on it; leaves no trace.

    Raises:
        ConfigError: If something lies there that is no analysis, or nothing can be written.
    """
    check_folder(folder, "--out")
    if folder.is_dir() and any(folder.iterdir()) and not _is_analysis(folder / JSON):
        raise ConfigError(f"{folder} holds something that is no analysis. Choose another folder with --out.")


def write(folder: Path, analysis: Analysis, tensorboard: bool = False) -> list[Path]:
    """Writes ``report.md``, its pictures and ``analysis.json``, each whole or not at all.

    The files of an earlier analysis are replaced; others in the folder are left alone.

    Args:
        folder: Made if need be.
        analysis: What to write.
        tensorboard: Write pictures and numbers for TensorBoard, too, into ``tensorboard/``.

    Returns:
        The files, the page last.

    Raises:
        ConfigError: If the folder holds something else.
        FileError: If it cannot be written, for instance on a full disk.
    """
    check_free(folder)
    pictures = _draw(analysis)
    contents = {
        # First: it says that the folder is an analysis, which may be written again after a kill.
        JSON: (json.dumps(as_json(analysis), indent=1, allow_nan=False) + "\n").encode(),
        **pictures,
        REPORT: page(analysis, [*pictures]).encode(),
    }
    for name, content in contents.items():
        write_whole(folder / name, content)
    with writing(folder):
        for name in {*_PICTURES} - {*pictures}:
            (folder / name).unlink(missing_ok=True)
        _write_events(folder / TENSORBOARD, analysis, pictures, tensorboard)
    return [folder / name for name in contents]


def _draw(analysis: Analysis) -> dict[str, bytes]:
    measured, labels = analysis.measured, analysis.labels
    drawn: dict[str, Any] = {"norms.png": figures.draw_norms(measured.encoders, labels)}
    if measured.maps.images:
        drawn["norm_maps.png"] = maps.board(measured.maps, labels)
    drawn["pca.png"] = figures.draw_spectra(measured.encoders, labels)
    drawn["similarity.png"] = figures.draw_similarity(measured.encoders, labels)
    if len(measured.encoders) > 1:
        drawn["cka.png"] = figures.draw_cka(measured.cka, [labels[name] for name in measured.encoders])
    if analysis.correlations:
        values = scalars(measured.encoders)[NORM_ENTROPY]
        drawn["scores.png"] = figures.draw_scores(
            NORM_ENTROPY, values, analysis.scores, analysis.groups, labels, analysis.correlations
        )
    return {name: _png(figure) for name, figure in drawn.items()}


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})  # the same figures, the same bytes
    return content.getvalue()


def _write_events(folder: Path, analysis: Analysis, pictures: dict[str, bytes], wanted: bool) -> None:
    for path in folder.glob("events.out.tfevents.*"):
        path.unlink()  # of an earlier analysis: TensorBoard would show both
    if not wanted:
        return
    import numpy as np
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for name, content in pictures.items():
            pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
            writer.add_image(f"analysis/{name.removesuffix('.png')}", pixels, dataformats="HWC")
        for figure, values in scalars(analysis.measured.encoders).items():
            for encoder, value in values.items():
                if value is not None:
                    writer.add_scalar(f"{figure}/{analysis.labels[encoder]}", value)


def _is_analysis(path: Path) -> bool:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "theia_analysis" in content
