import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch._dynamo.utils
import torch._inductor.config
from torch._inductor.utils import run_and_get_code

from theia.data.datamodule import FeatureData
from theia.errors import ConfigError
from theia.models.backbone import StudentOptions
from theia.models.distiller import Distiller
from theia.models.student import Student
from theia.training import losses
from theia.training.distillation import Distillation
from theia.training.losses import FeatureLoss, Objective, mse_loss
from theia.types import FeatureBatch

TEACHERS = {"alpha": {"channels": 8, "grid_hw": [4, 4], "has_cls": False}}


def fit(store: Path, accelerator: str = "cpu", accumulate: int = 1, **options: Any) -> dict[str, torch.Tensor]:
    L.seed_everything(0)
    data = FeatureData(str(store), batch_size=16, workers=0)
    model = Distillation(data.teacher_shapes, image_size=32, width=16, depth=1, heads=2, learning_rate=1e-3, **options)
    trainer = L.Trainer(
        accelerator=accelerator, devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=2, accumulate_grad_batches=accumulate,
    )  # fmt: skip
    trainer.fit(model, data)
    return model.state_dict()


@pytest.mark.parametrize("options", [{}, {"distill_cls": True, "loss": {"mse": 1.0}}], ids=["default", "cls and mse"])
def test_compiled_training_ends_with_the_weights_of_plain_training(store: Path, options: dict[str, Any]) -> None:
    plain, compiled = (fit(store, compile=on, **options) for on in (False, True))

    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        torch.testing.assert_close(
            compiled[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, at=name: f"{at}: {text}"
        )


@pytest.mark.parametrize("options", [{"compile": False}, {"compile": True, "accumulate": 2}], ids=["plain", "summed"])
def test_graphs_are_refused_where_they_cannot_be(store: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cuda_graphs needs a compiled step"):
        fit(store, cuda_graphs=True, **options)


@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "graphs"])
def test_each_step_of_a_gpu_begins_its_graphs_before_the_forward_pass(
    monkeypatch: pytest.MonkeyPatch, graphs: bool
) -> None:
    calls, asked = [], []
    real = torch.compile

    def compile(function: Any, **options: Any) -> Any:
        real(function, **options)  # refuses options that the compiler does not know
        asked.append(options["options"])

        def call(*args: Any) -> Any:
            calls.append(function.__name__)
            return function(*args)

        return call

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: calls.append("begin"))
    monkeypatch.setattr(losses, "_check_compiler", lambda device: None)
    distiller = Distiller(Student(StudentOptions(image_size=32, width=16, depth=1, heads=2)), TEACHERS)
    distiller.set_statistics("alpha", torch.zeros(8), torch.ones(8))
    objective = Objective(distiller, mse_loss)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)

    objective.compile(torch.device("cuda"), graphs)
    for _ in range(2):
        objective(FeatureBatch(images, {"alpha": torch.zeros(2, 16, 8)}))
    objective.translate(images)

    step = ["begin", "forward", "_losses"] if graphs else ["forward", "_losses"]
    # A graph of held-out images would overwrite what the step gave.
    assert calls == [*step, *step] + ([] if graphs else ["forward"])
    assert [options.get("triton.cudagraphs", False) for options in asked] == [graphs, graphs]


@pytest.mark.gpu
def test_graphs_do_not_change_what_a_gpu_learns(store: Path) -> None:
    without, graphs = (fit(store, accelerator="gpu", compile=True, cuda_graphs=on) for on in (False, True))

    for name, value in without.items():
        torch.testing.assert_close(graphs[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, at=name: f"{at}: {text}")


def test_a_machine_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any) -> Any:
        def call(*args: Any) -> Any:
            raise RuntimeError("No working C++ compiler found\nand a long trace")

        return call

    monkeypatch.setattr(torch, "compile", broken)

    with pytest.raises(ConfigError, match=r"No working C\+\+ compiler found.*model.compile false"):
        Objective(Distiller(Student(StudentOptions(width=16, depth=1, heads=2)), TEACHERS), mse_loss).compile(
            torch.device("cpu")
        )


def test_held_out_batches_are_compiled_if_the_step_is_but_for_a_smaller_last_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    distiller = Distiller(Student(StudentOptions(image_size=32, width=16, depth=1, heads=2)), TEACHERS)
    objective = Objective(distiller, mse_loss)
    compiled = []
    monkeypatch.setattr(objective, "_translate", lambda images: compiled.append(len(images)) or distiller(images))
    batches = [torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8) for size in (4, 4, 3, 4)]

    translated = [objective.translate(images) for images in batches]

    assert compiled == [4, 4, 4]
    for images, (tokens, patches, _) in zip(batches, translated, strict=True):
        assert torch.equal(tokens.patches, distiller(images)[0].patches)
        assert torch.equal(patches["alpha"], distiller(images)[1]["alpha"])


def test_what_a_gpu_compiles_gives_the_same_features_in_one_graph() -> None:
    torch.manual_seed(0)
    distiller = Distiller(Student(StudentOptions(image_size=32, width=16, depth=1, heads=2)), TEACHERS)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)

    tokens, patches, _ = torch.compile(distiller.forward, dynamic=False, fullgraph=True)(images)

    expected_tokens, expected, _ = distiller(images)
    torch.testing.assert_close(patches["alpha"], expected["alpha"])
    torch.testing.assert_close(tokens.patches, expected_tokens.patches)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_int8_features_are_compared_without_a_copy_in_float32(device: str) -> None:
    torch.manual_seed(0)
    images, tokens, channels = 3, 16, 24
    values = torch.randint(-127, 128, (images, tokens, channels), dtype=torch.int8, device=device)
    scales = torch.rand(images, 2, channels, device=device) / 40
    mean, std = torch.randn(channels, device=device), torch.rand(channels, device=device) + 0.5
    prediction = torch.randn(images, tokens, channels, device=device, requires_grad=True)
    shape = {"channels": channels, "grid_hw": [4, 4], "has_cls": False}
    distiller = Distiller(Student(StudentOptions(width=16, depth=1, heads=2)), {"alpha": shape}).to(device)
    distiller.set_statistics("alpha", mean, std)
    objective = Objective(distiller, FeatureLoss())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    objective.compile(torch.device(device))
    batch = FeatureBatch(torch.empty(0), {"alpha": values}, {"alpha": scales})

    def step() -> None:
        loss = objective.compare({"alpha": prediction}, {}, batch)["alpha"]
        (gradient,) = torch.autograd.grad(loss, prediction)
        results.extend((loss.detach(), gradient))

    results: list[torch.Tensor] = []
    with torch._inductor.config.patch(force_disable_caches=True):  # the code itself is looked at
        _, programs = run_and_get_code(step)

    target = (values.double() * scales[:, :1] + scales[:, 1:] - mean) / std
    exact = prediction.detach().double().requires_grad_()
    cosine = torch.cosine_similarity(exact.flatten(1), target.flatten(1)).mean()
    expected = 0.9 * (1 - cosine) + 0.1 * torch.nn.functional.smooth_l1_loss(exact, target)
    (gradient,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(results[0].double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[1].double(), gradient, rtol=1e-4, atol=1e-8)
    assert not torch._dynamo.utils.counters["graph_break"]
    # Of all that is as large as the features, only the gradient is stored.
    large = rf"empty_strided_{device}\(\((3, 16, 24|1152)"
    assert [len(re.findall(large, program)) for program in programs] == [0, 1]  # of the forward and the backward pass
    if device == "cuda":
        assert [program.count("'*i8'") for program in programs] == [1, 1]  # one kernel of each reads the features
