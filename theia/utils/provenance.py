"""Versions and hardware behind a run or a measurement, without anything that identifies the machine's owner."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from theia.utils.device import core_count

_PACKAGES = (
    "theia", "torch", "lightning", "numpy", "h5py", "timm", "transformers", "safetensors", "webdataset", "litdata",
    "onnx", "onnxscript", "onnxruntime", "openvino",
)  # fmt: skip


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter to a figure, and the commit of this checkout."""
    return {"python": platform.python_version(), **installed(_PACKAGES), "git_commit": git_commit()}


def installed(distributions: Iterable[str]) -> dict[str, str | None]:
    """Installed versions of some distributions, by name; ``None`` for one that is not installed."""
    there: dict[str, str | None] = dict.fromkeys(distributions)
    for name in there:
        with suppress(importlib.metadata.PackageNotFoundError):
            there[name] = importlib.metadata.version(name)
    return there


def git_commit() -> str | None:
    """Commit of the checkout that this code runs from, marked if it has changes; ``None`` for an installed wheel."""
    here = Path(__file__)
    try:
        _git(here, "ls-files", "--error-unmatch", here.name)  # a wheel may be installed inside somebody else's checkout
        return _git(here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def machine() -> dict[str, Any]:
    """Processor, memory, GPU, and the load from other programs."""
    import torch  # takes seconds

    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": core_count(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _git(file: Path, *arguments: str) -> str:
    command = ["git", "-C", str(file.parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
