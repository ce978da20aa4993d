import pytest
import torch

from theia.models import older


@pytest.mark.parametrize(
    ("given", "now"),
    [
        ({"size": "base"}, {"backbone": "theia_base"}),
        ({"backbone": "timm:resnet18"}, {"backbone": "timm:resnet18"}),
        ({"loss": "mse", "cosine_weight": 0.9, "per_token": False}, {"loss": {"mse": 1.0}}),
        ({"loss": "cosine_smooth_l1", "cosine_weight": 0.9}, {"loss": {"cosine": 0.9, "smooth_l1": 0.1}}),
        ({"cosine_weight": 1, "per_token": True}, {"loss": {"cosine_per_token": 1.0}}),
        ({"loss": {"mse": 1.0}, "width": 8}, {"loss": {"mse": 1.0}, "width": 8}),
        ({}, {}),
    ],
)
def test_options_mean_what_they_meant(given, now):
    assert older.options(given) == now
    assert older.config({"model": given, "data": {}}) == {"model": now, "data": {}}


def test_a_checkpoint_is_converted_whole():
    given = {
        "state_dict": {"distiller.student.vit.norm.bias": 1, "distiller.scalers.a.mean": 2},
        "hyper_parameters": {"size": "tiny", "learning_rate": 1e-3},
        "callbacks": {"Checkpoints": {"options": {"model.size": "tiny", "data.seed": 0}}, "Other": {"step": 3}},
    }
    assert older.checkpoint(given) == {
        "state_dict": {"distiller.student.backbone.model.norm.bias": 1, "distiller.scalers.a.mean": 2},
        "hyper_parameters": {"backbone": "theia_tiny", "learning_rate": 1e-3},
        "callbacks": {
            "Checkpoints": {"options": {"model.backbone": "theia_tiny", "data.seed": 0}},
            "Other": {"step": 3},
        },
    }


def test_a_count_of_steps_for_all_teachers_becomes_one_for_each():
    state = {"running.mean": torch.tensor([0.5, 0.25]), "running.steps": torch.tensor(7)}
    now = older.checkpoint({"state_dict": state, "hyper_parameters": {}})
    assert now["state_dict"]["running.steps"].tolist() == [7, 7]


@pytest.mark.parametrize(
    ("words", "now"),
    [
        (["fit", "--model.size", "small", "--x=1"], ["fit", "--x=1", "--model.backbone=theia_small"]),
        (["fit", "--model.loss=mse"], ["fit", '--model.loss={"mse": 1.0}']),
        (["fit", "--model.loss", "{mse: 1}"], ["fit", "--model.loss", "{mse: 1}"]),
        (
            ["fit", "--model.cosine_weight=0.5", "--model.per_token=true"],
            ["fit", '--model.loss={"cosine_per_token": 0.5, "smooth_l1": 0.5}'],
        ),
    ],
)
def test_command_lines_mean_what_they_meant(words, now):
    assert older.arguments(words) == now
