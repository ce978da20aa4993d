"""ONNX: uint8 images in, features out, for any batch and size; checked by ONNX Runtime on photographs."""

import importlib.util
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from theia.encoder.encoder import Encoder
from theia.errors import ConfigError, ExportError
from theia.extraction.sources import HELD_OUT_PHOTOS, SampleSource
from theia.utils.files import mount_of

logger = logging.getLogger(__name__)

MODEL = "encoder.onnx"
INT8_MODEL = "encoder.int8.onnx"
# Height and width in pixels of the images that a graph is checked on: the training size, a smaller oblong and a larger
# one, or the sizes nearest to them that the backbone takes.
SIZES = ((224, 224), (160, 240), (320, 256))
LEAST_COSINE = 0.99999
LEAST_INT8_COSINE = 0.999

_OPSET = 18
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_OUTPUTS = ("patches", "cls", "registers")

Parity = dict[str, dict[str, float]]


def check_installed() -> None:
    """Checks that the packages for ONNX are installed.

    Raises:
        ConfigError: If packages are missing; the message names them and how to install them.
    """
    missing = [package for package in _PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f"ONNX needs {', '.join(missing)}. Install them: pip install 'theia[onnx]'.")


def export(encoder: Encoder, folder: Path, int8: bool = False) -> dict[str, Parity]:
    """Writes a graph, and compares what it gives for photographs with what the encoder gives.

    The graph has one input, ``images``, uint8 ``(batch, height, width, 3)`` from 0 to 255, both sides multiples of the
    stride, and the outputs ``patches`` ``(batch, N, C)``, ``cls`` ``(batch, C)`` and ``registers`` ``(batch, R, C)``,
    the last two if the model has them. With a few timm backbones it takes the training size only.

    Args:
        encoder: Encoder on the CPU, in float32.
        folder: Folder for the files.
        int8: Whether to write a second graph with int8 weights, which quantises activations at run time.

    Returns:
        Result of :func:`parity` for each file.

    Raises:
        ConfigError: If packages are missing.
        ExportError: If a graph gives other features than the encoder; the message says how far off they are.
    """
    check_installed()
    folder.mkdir(parents=True, exist_ok=True)
    write_graph(encoder, folder / MODEL)
    found = {MODEL: parity(encoder, folder / MODEL)}
    _refuse_below(LEAST_COSINE, found[MODEL], "The ONNX graph", "Export without 'onnx', and report this model.")
    if int8:
        quantise(folder / MODEL, folder / INT8_MODEL)
        found[INT8_MODEL] = parity(encoder, folder / INT8_MODEL)
        _refuse_below(LEAST_INT8_COSINE, found[INT8_MODEL], "The int8 graph", "Export without --int8.")
    return found


def write_graph(encoder: Encoder, path: Path) -> None:
    """Writes the graph without comparing it.

    Args:
        encoder: Encoder on the CPU.
        path: Path of the graph to write.
    """
    graph = _Graph(encoder)
    backbone = encoder.distiller.student.backbone
    batch, rows, columns = (torch.export.Dim(name, min=1) for name in ("batch", "rows", "columns"))
    # Neither square nor of the size of training, so that nothing is taken for a constant.
    height, width = (15 * backbone.stride, 13 * backbone.stride) if backbone.any_size_exported else backbone.image_hw
    shape = {0: batch}
    if backbone.any_size_exported:
        shape |= {1: backbone.stride * rows, 2: backbone.stride * columns}
    example = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript"):
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            graph,
            (example,),
            dynamo=True,
            opset_version=_OPSET,
            external_data=False,
            verbose=False,
            input_names=["images"],
            output_names=graph.outputs,
            dynamic_shapes={"images": shape},
        )
    _forget_sources(program.model)
    program.save(str(path))


def quantise(path: Path, target: Path) -> None:
    """Writes a graph with int8 weights, by ONNX Runtime's dynamic quantisation.

    Args:
        path: Path of the float graph.
        target: Path of the int8 graph to write.

    Raises:
        ExportError: If ONNX Runtime fails.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet("root"):
        # The patch embedding, a convolution, stays as it is: its input is pixels. Weights have 7 of their 8 bits: sums
        # of two full products overflow on CPUs without VNNI instructions.
        try:
            quantize_dynamic(
                path,
                target,
                weight_type=QuantType.QInt8,
                per_channel=True,
                reduce_range=True,
                op_types_to_quantize=["MatMul", "Gemm"],
            )
        except OSError:
            raise
        except Exception as error:
            # It writes copies of the graph. On a full disk they are cut short, and it fails when it reads them back.
            reason = str(error).strip().partition("\n")[0]
            size = f"{path.stat().st_size:,} bytes"
            raise ExportError(
                f"ONNX Runtime made no int8 graph of {path.name} ({type(error).__name__}: {reason}). Check that "
                f"file system {mount_of(path)} has room for two more copies of the graph, {size} each; if it "
                "has, export without --int8."
            ) from error


def parity(encoder: Encoder, path: Path) -> Parity:
    """Compares a graph with the encoder on photographs that no training saw.

    Args:
        encoder: Encoder on the CPU.
        path: Path of the graph.

    Returns:
        By size, ``HEIGHTxWIDTH``: ``largest_difference`` of a value, and ``least_cosine`` of an image, over images
        and outputs: its patches together, its CLS token, its registers together.
    """
    session = start_session(path)
    found = {}
    for height, width in _sizes(encoder):
        images = photographs(height, width)
        given = dict(zip(_names(session), session.run(None, {"images": images}), strict=True))
        with torch.inference_mode():
            expected = _outputs(encoder, torch.from_numpy(images).permute(0, 3, 1, 2))
        differences = [float(np.abs(given[name] - value.numpy()).max()) for name, value in expected.items()]
        cosines = [
            float(cosine_similarity(value.flatten(1).double(), torch.as_tensor(given[name]).flatten(1).double()).min())
            for name, value in expected.items()
        ]
        found[f"{height}x{width}"] = {"largest_difference": max(differences), "least_cosine": min(cosines)}
    return found


def _sizes(encoder: Encoder) -> Iterable[tuple[int, int]]:
    backbone = encoder.distiller.student.backbone
    if not backbone.any_size_exported:
        return [backbone.image_hw]
    return dict.fromkeys(backbone.nearest_size(*size) for size in SIZES)


def start_session(path: Path, threads: int = 0) -> Any:
    """Loads a graph into ONNX Runtime, on the CPU.

    Args:
        path: Path of the graph.
        threads: Number of threads; 0 for one per core.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def photographs(height: int, width: int) -> NDArray[np.uint8]:
    """Held-out sample photographs, uint8 ``(4, height, width, 3)``."""
    source = SampleSource("val", len(HELD_OUT_PHOTOS))
    return np.stack([np.asarray(source.read(index).resize((width, height))) for index in range(len(source.ids))])


class _Graph(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        has = {
            "patches": True,
            "cls": encoder.distiller.student.has_cls,
            "registers": encoder.distiller.student.backbone.prefix > int(encoder.distiller.student.has_cls),
        }
        self.outputs = [name for name in _OUTPUTS if has[name]]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        batch, height, width, _ = images.shape
        side = self.encoder.distiller.student.backbone.stride
        rows, columns = height // side, width // side
        # Cut into patches and joined again only so that a runtime refuses a size that is not a multiple of the stride:
        # the patch embedding alone would crop it silently.
        pieces = images.reshape(batch, rows, side, columns, side, 3).permute(0, 5, 1, 2, 3, 4)
        found = _outputs(self.encoder, pieces.reshape(batch, 3, height, width))
        return tuple(found[name] for name in self.outputs)


def _forget_sources(model: Any) -> None:
    """The exporter notes, for every node, which line of which file of this machine it comes from."""
    for graph in (model.graph, *model.functions.values()):
        for node in graph.all_nodes():
            for part in (node, *node.outputs):
                part.metadata_props.clear()
        for value in graph.inputs:
            value.metadata_props.clear()
        graph.metadata_props.clear()
    model.metadata_props.clear()


def _outputs(encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
    tokens = encoder.distiller.student.encode(images)
    found = {"patches": tokens.patches, "cls": tokens.cls, "registers": tokens.registers}
    return {name: value for name, value in found.items() if value is not None and value.shape[1]}


def _names(session: Any) -> Sequence[str]:
    return [output.name for output in session.get_outputs()]


def _refuse_below(least: float, found: Mapping[str, Mapping[str, float]], what: str, step: str) -> None:
    size, worst = min(found.items(), key=lambda item: item[1]["least_cosine"])
    if not worst["least_cosine"] >= least:
        raise ExportError(
            f"{what} is refused: on photographs of {size} its features have a cosine of {worst['least_cosine']:.6f} "
            f"with the encoder's, and {least} is the least. {step}"
        )


class _quiet:
    """Raises the level of loggers for a while: what the exporter logs is for its own developers."""

    def __init__(self, *names: str) -> None:
        self._loggers = [logging.getLogger(None if name == "root" else name) for name in names]

    def __enter__(self) -> None:
        self._levels = [logger.level for logger in self._loggers]
        for logger in self._loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        for logger, level in zip(self._loggers, self._levels, strict=True):
            logger.setLevel(level)
