"""The arithmetic in which teachers run: which one, and how torch is told."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, cast, get_args

import torch

from theia.types import Precision


def choose(wanted: Precision | Literal["auto"], begun: str | None, on_gpu: bool, gpu_precision: Precision) -> Precision:
    """Precision of one teacher.

    Args:
        wanted: What the user asks for.
        begun: Precision of this teacher's features that are in the store already; ``None`` if there are none.
        on_gpu: Whether the teacher runs on a CUDA device.
        gpu_precision: The teacher's own choice for a GPU.
    """
    if wanted != "auto":
        return wanted
    if begun in get_args(Precision):
        return cast(Precision, begun)
    return gpu_precision if on_gpu else "32-true"


@contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """Sets the precision of float32 products for everything that runs in the block, and puts it back."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    # Both are about GPUs only. By default, convolutions would be in TF32 and matrix products would not.
    matmul.allow_tf32 = cudnn.allow_tf32 = precision != "32-true"
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
