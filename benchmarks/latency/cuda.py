"""Ways to run a trained encoder on a GPU; photographs are resident in its memory."""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.latency.runtimes import BASELINE, Case, Photographs, Runtime, Started


def eager(case: Case, bfloat16: bool = False) -> Started:
    """Plain PyTorch.

    Args:
        case: Encoder and batch size to run; the encoder is copied to the GPU.
        bfloat16: Whether the parameters are in bfloat16.
    """
    return _started(case, bfloat16, {})


def compiled(case: Case, bfloat16: bool = False) -> Started:
    """``Encoder.compile`` with CUDA graphs: one launch for all kernels.

    Args:
        case: Encoder and batch size to run; the encoder is copied to the GPU.
        bfloat16: Whether the parameters are in bfloat16.
    """
    return _started(case, bfloat16, {"mode": "reduce-overhead", "fullgraph": True})


def _started(case: Case, bfloat16: bool, compile_options: dict[str, Any]) -> Started:
    encoder = copy.deepcopy(case.encoder).to("cuda", torch.bfloat16 if bfloat16 else torch.float32)
    if compile_options:
        encoder.compile(**compile_options)

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            patches: Tensor = encoder(images, pool="none")
            # With CUDA graphs the result lies in memory that the next call overwrites.
            patches = patches.to(torch.float32, copy=True)
        torch.cuda.synchronize()
        return patches

    def place(photographs: Photographs) -> Tensor:
        return torch.from_numpy(photographs).cuda()

    return Started(run, "bfloat16" if bfloat16 else "float32", torch.get_num_threads(), place)


RUNTIMES: dict[str, Runtime] = {
    BASELINE: eager,
    "eager, bfloat16": partial(eager, bfloat16=True),
    "compiled, CUDA graphs": compiled,
    "compiled, CUDA graphs, bfloat16": partial(compiled, bfloat16=True),
}
