"""``python -m benchmarks.precision``: what TF32 and bfloat16 do to the features of the built-in teachers.

The measure of both is what storing does to features anyway, which is to round them to float16. On a GPU the arithmetic
is its own. On a CPU, bfloat16 is that of its autocast, and TF32 is imitated: the factors of every matrix product and
convolution are rounded to its 10 bits.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from theia import registry
from theia.cli.main import carry_out
from theia.cli.parser import Parser
from theia.extraction.computing import arithmetic
from theia.extraction.images import to_square
from theia.extraction.sources import open_source
from theia.types import Precision
from theia.utils.arguments import check_number, comma_list

logger = logging.getLogger(__name__)

# As wide as the published models, and a few blocks deep.
WIDE: dict[str, dict[str, int]] = {
    "clip": {"num_hidden_layers": 4},
    "dinov2": {"num_hidden_layers": 4},
    "vit": {"num_hidden_layers": 4},
    "sam": {"depth": 2},
    "depth_anything": {"num_hidden_layers": 4},
}
# As deep as the published models (SAM: 12 blocks), and narrow.
_NARROW = {"hidden_size": 128, "num_attention_heads": 4}
DEEP: dict[str, dict[str, int]] = {
    "clip": {**_NARROW, "intermediate_size": 512},
    "dinov2": _NARROW,
    "vit": {**_NARROW, "intermediate_size": 512},
    "sam": {"depth": 12, "width": 64, "heads": 4, "image_size": 512},
    "depth_anything": {**_NARROW, "fusion_hidden_size": 64},
}

_PRODUCTS = {  # positions of the factors
    torch.ops.aten.mm.default: (0, 1),
    torch.ops.aten.bmm.default: (0, 1),
    torch.ops.aten.addmm.default: (1, 2),
    torch.ops.aten.baddbmm.default: (1, 2),
    torch.ops.aten.convolution.default: (0, 1),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: (0, 1, 2),
}


@dataclass(frozen=True)
class Error:
    """Error of a teacher's patch tokens, root mean square per channel in units of the channel's standard deviation.

    Attributes:
        worst: Error of the worst channel.
        median: Error of the median channel.
    """

    worst: float
    median: float

    @classmethod
    def of(cls, found: Tensor, true: Tensor) -> "Error":
        """Compares tokens, shape ``(B, N, C)``, with those in float32."""
        wanted = true.double().flatten(0, 1)
        ratio = (found.double().flatten(0, 1) - wanted).square().mean(0).sqrt() / wanted.std(0).clamp_min(1e-12)
        return cls(float(ratio.max()), float(ratio.median()))


class RoundedFactors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Rounds the float32 factors of products to TF32, as a GPU does, on any device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the operation with rounded factors if it is a product."""
        places = _PRODUCTS.get(func, ())
        rounded = [to_tf32(value) if place in places else value for place, value in enumerate(args)]
        return func(*rounded, **(kwargs or {}))


def to_tf32(values: Tensor) -> Tensor:
    """Rounds float32 to the 10 bits of TF32, halves to even."""
    if values.dtype != torch.float32:
        return values
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def measure(name: str, options: Mapping[str, Any], images: Tensor) -> dict[str, Error]:
    """Errors of one teacher's features, by what causes them.

    Args:
        name: Name of the teacher.
        options: Arguments of its constructor.
        images: Images, uint8, shape ``(B, 3, H, W)``, on the device to measure.
    """
    teacher = registry.create(name, options).to(images.device)

    def features(precision: Precision) -> Tensor:
        imitated = precision == "tf32" and images.device.type == "cpu"
        mode: AbstractContextManager[object] = RoundedFactors() if imitated else nullcontext()  # type: ignore[no-untyped-call]
        with torch.no_grad(), arithmetic(precision, images.device), mode:
            patches: Tensor = teacher(images).patches
        return patches.float().cpu()

    true = features("32-true")
    return {
        "float16": Error.of(true.half(), true),
        "TF32": Error.of(features("tf32"), true),
        "bfloat16": Error.of(features("bf16-mixed"), true),
    }


def table(teachers: Sequence[str], count: int, device: str, architectures: Mapping[str, Mapping[str, int]]) -> str:
    """Measures teachers with random weights, and formats the errors of their worst channels as Markdown."""
    source = open_source(f"sample:{count}", "train")
    pixels = np.stack([to_square(source.read(place), 224, "squash") for place in range(count)])
    rows = []
    for name in teachers:
        options = {"weights": "random", "architecture": architectures[name]}
        errors = measure(name, options, torch.from_numpy(pixels).to(device))
        sizes = ", ".join(f"{size} {value}" for size, value in architectures[name].items())
        rows.append((name, sizes, *(f"{error.worst:.1e} ({error.median:.1e})" for error in errors.values())))
        logger.info("%s", rows[-1])  # the next one may take minutes
    text: str = tabulate(rows, ("teacher", "architecture", "rounding to float16", "TF32", "bfloat16"), "github")
    return text


def run(teachers: str = ",".join(WIDE), images: int = 2, device: str = "cpu", deep: bool = False) -> str:
    """Measures what TF32 and bfloat16 do to the features of the built-in teachers, with random weights.

    Args:
        teachers: Names of the teachers, separated by commas.
        images: Number of sample images.
        device: Device to measure, such as cpu or cuda.
        deep: Whether the models are deep and narrow, instead of wide and shallow.

    Returns:
        Table of the errors of the worst channel, and in brackets of the median one, in units of the channel's standard
        deviation.
    """
    check_number("images", images, 1, 10000)
    return table(comma_list(teachers), images, device, DEEP if deep else WIDE)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        Exit status.
    """
    parser = Parser(prog="python -m benchmarks.precision", description="Measures what lower precisions cost.")
    parser.add_function_arguments(run)
    return carry_out("benchmarks.precision", lambda: print(run(**parser.parse_args(argv).as_dict())))


if __name__ == "__main__":
    sys.exit(main())
