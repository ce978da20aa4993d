import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel

import theia
from theia.encoder.encoder import Encoder
from theia.export.export import export


def images() -> torch.Tensor:
    return torch.randint(256, (2, 224, 160, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    export(checkpoint(), tmp_path / "exported", ["hf"])
    return tmp_path / "exported"


@torch.no_grad()
def test_automodel_gives_the_encoders_tokens(folder: Path, encoder: Encoder) -> None:
    model = AutoModel.from_pretrained(folder)
    tokens = encoder.forward_features(images())
    output = model(pixel_values=images())
    assert torch.equal(output.last_hidden_state, torch.cat([tokens.cls[:, None], tokens.patches], 1))
    assert torch.equal(output.pooler_output, tokens.patches.mean(1))
    plain = model(images(), return_dict=False)
    assert torch.equal(plain[0], output.last_hidden_state)
    assert torch.equal(plain[1], output.pooler_output)
    with pytest.raises(TypeError, match="output_hidden_states"):
        model(images(), output_hidden_states=True)


@torch.no_grad()
def test_what_no_file_holds_is_right_after_loading(folder: Path, encoder: Encoder) -> None:
    model = AutoModel.from_pretrained(folder)
    raw = torch.randn(1, 256, 12)
    assert torch.equal(model.distiller.normalize("clip", raw), encoder.distiller.normalize("clip", raw))


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 narrows buffers")
def test_statistics_stay_float32_in_narrower_models(folder: Path, encoder: Encoder) -> None:
    model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    raw = torch.full((1, 256, 12), 100.3)
    assert torch.equal(model.distiller.normalize("clip", raw), encoder.distiller.normalize("clip", raw))


def test_only_what_tokens_come_from_can_be_trained(folder: Path) -> None:
    model = AutoModel.from_pretrained(folder)
    model(images()).last_hidden_state.sum().backward()
    free = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert free == {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_saved_by_transformers_and_loaded_by_theia(folder: Path, tmp_path: Path, encoder: Encoder) -> None:
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "again")
    again = theia.load(tmp_path / "again").state_dict()
    assert all(torch.equal(again[name], value) for name, value in encoder.state_dict().items())


def test_the_config_alone(folder: Path) -> None:
    assert AutoConfig.from_pretrained(folder).architecture["width"] == 32


ORDERS = (
    "import theia; from transformers import AutoModel",
    "from transformers import AutoModel, AutoConfig; AutoModel.register; import theia",
    "import transformers, theia; transformers.AutoConfig; AutoModel = transformers.AutoModel",
)
# What both import takes long, and comes first for all of them.
EACH_ORDER = """
import os, sys
import timm, torch, torchvision
assert not {"theia", "transformers"} & set(sys.modules)
for order in sys.argv[2:]:
    if os.fork() == 0:
        exec(order)
        print(order, type(AutoModel.from_pretrained(sys.argv[1])).__name__, sep=": ", flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
def test_any_order_of_imports(folder: Path) -> None:
    command = [sys.executable, "-c", EACH_ORDER, str(folder), *ORDERS]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{order}: TheiaModel" for order in ORDERS], done.stderr
