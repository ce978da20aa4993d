"""What a command imports before it works: torch takes seconds, and a sweep starts hundreds of processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

HEAVY = {
    "torch", "lightning", "torchmetrics.text", "torchmetrics.image", "torchmetrics.functional.text", "transformers",
    "timm", "torchvision", "scipy", "sklearn", "skimage", "matplotlib", "tensorboard", "pandas", "onnx",
}  # fmt: skip
# Runs commands one after the other in one process and tells which of the modules above are there after each.
SCRIPT = """
import contextlib, io, json, sys
from theia.cli.main import main

def imported(*command):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        assert not main(command)
    return sorted(set(json.loads(sys.argv[1])) & sys.modules.keys())

commands = (["--help"], ["store", "info", sys.argv[2]], ["store", "verify", sys.argv[2]], ["teachers", "--help"],
            ["ablate", "--help"], ["teachers"], ["fit", "--help"])
print(json.dumps([imported(*command) for command in commands]))
"""


def test_commands_import_what_they_use_only(store: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(sorted(HEAVY)), str(store)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    *light, teachers, fit = [set(modules) for modules in json.loads(done.stdout)]
    assert light == [set()] * 5
    assert teachers == {"torch"}
    # timm imports torchvision; torchmetrics' base of all metrics draws with matplotlib.
    assert fit == {"torch", "lightning", "timm", "torchvision", "matplotlib"}
