"""``theia export``: writes a trained model in formats that other programs load."""

import logging
from pathlib import Path

from theia.errors import ConfigError
from theia.utils.arguments import comma_list
from theia.utils.files import check_folder

logger = logging.getLogger(__name__)


def export(
    encoder: str,
    out: Path | None = None,
    formats: str | list[str] = "safetensors",
    overwrite: bool = False,
    int8: bool = False,
) -> int:
    """Write a trained model in formats that other programs load.

    Args:
        encoder: A checkpoint of 'theia fit', an exported folder, a folder of a published model, or its id on the hub.
        out: Folder to write; by default, the folder 'exported' in the run folder of a checkpoint.
        formats: Formats, with commas between them: safetensors (for theia.load, with a model card), hf (the same files,
            which AutoModel reads, too), onnx, timm, and authors (the layout of the published models).
        overwrite: Replace all files that an earlier export wrote into the folder.
        int8: With onnx, also write a model with int8 weights, if its features stay the same (cosine of at least 0.999
            on photographs).
    """
    path = Path(encoder)
    run = path.absolute().parent.parent if path.absolute().parent.name == "checkpoints" else None
    if out is None and run is None:
        if path.suffix == ".ckpt" and not path.exists():
            raise ConfigError(f"There is no checkpoint {path}. Correct --encoder.")
        raise ConfigError(
            "Say where to write the model: --out FOLDER. Only a checkpoint in a run folder has a default."
        )
    target = out or Path(f"{run}/exported")
    check_folder(target, "--out")

    # torch takes seconds to import; --help does not need it.
    from theia.export.export import export as write
    from theia.export.run_record import run_record

    record = run_record(run, path) if run is not None and path.is_file() else None
    for line in write(encoder, target, comma_list(formats), record, overwrite, int8):
        logger.info("%s", line)
    print(target)
    return 0
