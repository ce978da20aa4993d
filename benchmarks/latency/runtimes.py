"""Ways to run a trained encoder on a CPU: each takes uint8 photographs and gives the patch tokens, float32."""

import copy
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from theia.encoder.encoder import Encoder
from theia.errors import ConfigError
from theia.export import onnx

Photographs = NDArray[np.uint8]  # (B, H, W, 3), in memory
Precision = Literal["float32", "bfloat16", "int8"]


class UnavailableError(Exception):
    """A runtime is not installed or does not work here; the message says what to do about it."""


@dataclass
class Case:
    """What the runtimes run.

    Attributes:
        encoder: Encoder on a CPU, in float32.
        batch_size: Number of images in one call.
        threads: Number of threads of every runtime.
        folder: Folder for graphs, the same for all batch sizes of an encoder.
    """

    encoder: Encoder
    batch_size: int
    threads: int
    folder: Path

    @cached_property
    def graph(self) -> Path:
        """The ONNX graph, for any batch and size; written once per folder.

        Raises:
            UnavailableError: If the packages for it are missing.
        """
        try:
            onnx.check_installed()
        except ConfigError as error:
            raise UnavailableError(str(error)) from error
        path = self.folder / onnx.MODEL
        if not path.exists():
            onnx.write_graph(self.encoder, path)
        return path

    @cached_property
    def int8_graph(self) -> Path:
        """The graph with int8 weights.

        Raises:
            UnavailableError: If the packages for it are missing.
        """
        path = self.folder / onnx.INT8_MODEL
        if not path.exists():
            onnx.quantise(self.graph, path)
        return path


@dataclass(frozen=True)
class Started:
    """A runtime that is ready.

    Attributes:
        run: Function from the result of ``place`` to finished patch tokens ``(B, N, C)``.
        precision: Precision of its matrix products.
        threads: Number of threads that it reports.
        place: Function that puts photographs into the memory that the runtime reads; it is not timed.
    """

    run: Callable[[Any], Tensor | NDArray[np.float32]]
    precision: Precision
    threads: int
    place: Callable[[Photographs], Any] = lambda photographs: photographs


Runtime = Callable[[Case], Started]


def eager(case: Case, bfloat16: bool = False) -> Started:
    """Plain PyTorch.

    Args:
        case: Encoder and batch size to run.
        bfloat16: Whether to run under autocast to bfloat16.
    """
    return _torch(case.encoder, bfloat16)


def compiled(case: Case, bfloat16: bool = False) -> Started:
    """``Encoder.compile``. Its freezing and its max-autotune gain nothing here and are left out.

    Args:
        case: Encoder and batch size to run.
        bfloat16: Whether to run under autocast to bfloat16.

    Raises:
        UnavailableError: If torch.compile does not work here.
    """
    encoder = copy.copy(case.encoder)  # same modules, its own way to call them
    encoder.compile(fullgraph=True)  # an error instead of falling back to eager
    started = _torch(encoder, bfloat16)
    try:
        started.run(np.zeros((case.batch_size, 224, 224, 3), np.uint8))
    # Which error depends on what is missing: a compiler, headers, room for the cache.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnavailableError(f"torch.compile does not work here: {reason} Install a C++ compiler.") from error
    return started


def onnxruntime(case: Case, int8: bool = False) -> Started:
    """ONNX Runtime, with all graph optimisations (its default).

    Args:
        case: Encoder and batch size to run.
        int8: Whether to run the graph with int8 weights.

    Raises:
        UnavailableError: If it is not installed.
    """
    session = onnx.start_session(case.int8_graph if int8 else case.graph, case.threads)

    def run(images: Photographs) -> NDArray[np.float32]:
        (patches,) = session.run(["patches"], {"images": images})
        return np.asarray(patches)

    # Operators follow each other, so there is no second pool of threads.
    return Started(run, "int8" if int8 else "float32", session.get_session_options().intra_op_num_threads)


def openvino(case: Case, float32: bool = False) -> Started:
    """OpenVINO with the graph's input fixed to the batch; a fixed shape is about a tenth faster than an open one.

    Args:
        case: Encoder and batch size to run.
        float32: Whether to compute in float32 throughout. By default OpenVINO takes bfloat16 on a CPU that has
            instructions for it.

    Raises:
        UnavailableError: If it is not installed.
    """
    if importlib.util.find_spec("openvino") is None:
        raise UnavailableError("OpenVINO needs openvino. Install it: pip install openvino.")
    import openvino as ov

    core = ov.Core()
    model = core.read_model(case.graph)
    model.reshape({"images": [case.batch_size, 224, 224, 3]})
    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": case.threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    if float32:
        options["INFERENCE_PRECISION_HINT"] = "f32"
    network = core.compile_model(model, "CPU", options)
    request = network.create_infer_request()
    index = [output.get_any_name() for output in network.outputs].index("patches")

    def run(images: Photographs) -> NDArray[np.float32]:
        request.infer({0: images}, share_inputs=True)
        # The request's own memory, which the next call overwrites.
        return np.array(request.get_output_tensor(index).data)

    precision = network.get_property("INFERENCE_PRECISION_HINT").to_string()
    names: dict[str, Precision] = {"f32": "float32", "bf16": "bfloat16"}
    return Started(run, names[precision], network.get_property("INFERENCE_NUM_THREADS"))


def _torch(encoder: Encoder, bfloat16: bool) -> Started:
    precision: Callable[[], AbstractContextManager[object]] = (
        partial(torch.autocast, "cpu", torch.bfloat16) if bfloat16 else nullcontext
    )

    def run(images: Photographs) -> Tensor:
        with torch.inference_mode(), precision():
            patches: Tensor = encoder(images, pool="none")
            return patches.float()

    return Started(run, "bfloat16" if bfloat16 else "float32", torch.get_num_threads())


BASELINE = "eager"
# The fastest that keeps the tokens' direction: what to deploy on a CPU.
DEFAULT = "OpenVINO, its own precision"
RUNTIMES: dict[str, Runtime] = {
    BASELINE: eager,
    "eager, autocast": partial(eager, bfloat16=True),
    "compiled": compiled,
    "compiled, autocast": partial(compiled, bfloat16=True),
    "ONNX Runtime": onnxruntime,
    "ONNX Runtime, int8": partial(onnxruntime, int8=True),
    "OpenVINO, float32": partial(openvino, float32=True),
    DEFAULT: openvino,
}
