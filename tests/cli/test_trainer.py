"""How the trainer of a run is set up."""

from collections.abc import Iterator

import lightning as L
import pytest
import torch
import torch._inductor.config as inductor
from torch import nn

from theia.cli import trainer as trainer_options
from theia.cli.trainer import set_up_processes


class _Model(L.LightningModule):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.register_buffer("statistics", torch.ones(3))


def two_processes(strategy: str = "ddp") -> L.Trainer:
    return L.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_checkpointing=False)


@pytest.fixture
def compile_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    monkeypatch.setattr(trainer_options, "core_count", lambda: 12)
    with inductor.patch(compile_threads=32):
        yield


@pytest.mark.usefixtures("compile_threads")
def test_processes_send_buffers_around_only_if_training_changes_them() -> None:
    fixed, changed = two_processes(), two_processes()
    set_up_processes(fixed, _Model(nn.LayerNorm(3)))
    set_up_processes(changed, _Model(nn.BatchNorm2d(3)))

    assert fixed.strategy._ddp_kwargs == {"broadcast_buffers": False, "gradient_as_bucket_view": True}
    assert changed.strategy._ddp_kwargs == {"broadcast_buffers": True, "gradient_as_bucket_view": True}


@pytest.mark.usefixtures("compile_threads")
def test_options_of_a_strategy_stay() -> None:
    trainer = two_processes("ddp_find_unused_parameters_true")
    trainer.strategy._ddp_kwargs["broadcast_buffers"] = True
    set_up_processes(trainer, _Model(nn.LayerNorm(3)))

    assert trainer.strategy._ddp_kwargs == {
        "broadcast_buffers": True, "gradient_as_bucket_view": True, "find_unused_parameters": True,
    }  # fmt: skip


@pytest.mark.usefixtures("compile_threads")
def test_processes_of_a_node_compile_on_its_cores_together(monkeypatch: pytest.MonkeyPatch) -> None:
    set_up_processes(two_processes(), _Model())
    assert inductor.compile_threads == 6

    inductor.compile_threads = 32
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "32")
    set_up_processes(two_processes(), _Model())
    assert inductor.compile_threads == 32  # as was asked for
