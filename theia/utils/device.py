"""Where a command computes."""

import os
from typing import TYPE_CHECKING, Literal

from theia.errors import ConfigError

if TYPE_CHECKING:
    import torch

Device = Literal["auto", "cpu", "cuda"]


def choose_device(wanted: Device) -> "torch.device":
    """Chooses the device for an option ``--device``; auto takes a GPU if there is one.

    Raises:
        ConfigError: If a GPU is wanted and there is none.
    """
    import torch  # takes seconds; --help does not need it

    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU here. Take --device cpu, or auto.")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def has_bfloat16_cpu() -> bool:
    """Whether the CPU has instructions for products in bfloat16: AVX512-BF16 or AMX."""
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def core_count() -> int:
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_of_process(processes: int) -> int:
    """Number of processor cores that this process may use beside others of the same work on this machine.

    Where each process is bound to cores of its own, as SLURM does it, it may use all of those.

    Args:
        processes: Number of the processes on this machine, with this one.
    """
    return max(1, min(core_count(), (os.cpu_count() or 1) // processes))
