"""How the trainer of a run is set up."""

import os
import platform
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import pytest
import torch
import torch._inductor.config as inductor
from jsonargparse import Namespace
from torch import nn

from theia.cli import trainer as trainer_options
from theia.cli.trainer import choose_precision, set_up_processes
from theia.utils.device import has_bfloat16_cpu


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
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
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
def test_parameters_without_a_gradient_are_looked_for_only_if_there_are_any() -> None:
    trainer = two_processes()
    set_up_processes(trainer, _Model(nn.LayerNorm(3)), every_parameter=False)

    assert trainer.strategy._ddp_kwargs["find_unused_parameters"] is True


@pytest.mark.usefixtures("compile_threads")
def test_options_of_a_strategy_stay() -> None:
    trainer = two_processes("ddp_find_unused_parameters_true")
    trainer.strategy._ddp_kwargs["broadcast_buffers"] = True
    set_up_processes(trainer, _Model(nn.LayerNorm(3)))

    assert trainer.strategy._ddp_kwargs == {
        "broadcast_buffers": True, "gradient_as_bucket_view": True, "find_unused_parameters": True,
    }  # fmt: skip


@pytest.mark.usefixtures("compile_threads")
@pytest.mark.parametrize("own", [12, 6], ids=["shared cores", "bound to cores of its own"])
def test_processes_of_a_node_compile_on_its_cores_together(monkeypatch: pytest.MonkeyPatch, own: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(own)))
    set_up_processes(two_processes(), _Model())
    assert inductor.compile_threads == 6

    inductor.compile_threads = 32
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "32")
    set_up_processes(two_processes(), _Model())
    assert inductor.compile_threads == 32  # as was asked for


BF16, FLOAT32 = "bf16-mixed", "32-true"


@pytest.mark.parametrize(
    ("options", "cpu_has_it", "gpu", "chosen"),
    [
        ({}, True, False, BF16),
        ({}, False, False, FLOAT32),
        ({}, True, True, FLOAT32),  # a GPU is as before
        ({"accelerator": "cpu"}, True, True, BF16),
        ({"accelerator": "gpu"}, True, True, FLOAT32),
        ({"precision": FLOAT32}, True, False, "32-true"),
        ({"precision": BF16}, False, False, BF16),
        ({"plugins": ["MixedPrecision"]}, True, False, None),
    ],
)
def test_a_new_run_is_in_bfloat16_on_a_cpu_that_computes_in_it(
    options: dict[str, object], cpu_has_it: bool, gpu: bool, chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_options, "has_bfloat16_cpu", lambda: cpu_has_it)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
    given = Namespace(**{"precision": None, "accelerator": "auto", "plugins": None, **options})

    assert choose_precision(given, {}) == chosen


def test_what_the_cpu_can_do_is_what_the_kernel_says() -> None:
    flags = Path("/proc/cpuinfo")
    if not flags.is_file() or platform.machine() != "x86_64":
        pytest.skip("only Linux on x86 lists them")

    assert has_bfloat16_cpu() == bool({"avx512_bf16", "amx_bf16"} & set(flags.read_text().split()))
