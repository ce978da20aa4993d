"""The notebook runs from its first cell to its last and shows pictures, of a student that is there and of none."""

import base64
import io
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from events import PATIENCE_S
from nbclient import NotebookClient
from PIL import Image

from theia import registry
from theia.encoder.encoder import Encoder
from theia.models.architecture import Architecture

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "look_inside.ipynb"


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """A small student of the quickstart's teachers, random in every parameter, in a checkpoint."""
    specs = {name: registry.find(name).spec for name in ("efficientnet", "hog", "color")}
    teachers = {
        name: {"channels": spec.channels, "grid_hw": list(spec.grid_hw), "has_cls": spec.has_cls}
        for name, spec in specs.items()
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = Encoder(Architecture(teachers=teachers, width=32, depth=4, heads=2))
        for parameter in encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    for name, spec in specs.items():
        encoder.distiller.set_statistics(name, torch.zeros(spec.channels), torch.ones(spec.channels))
    state = {f"distiller.{name}": value for name, value in encoder.distiller.state_dict().items()}
    path = tmp_path / "last.ckpt"
    torch.save({"hyper_parameters": encoder.architecture.as_dict(), "state_dict": state}, path)
    return path


@dataclass
class Ran:
    """What the cells print, and the pictures that they show."""

    said: str
    pictures: list[Image.Image]


def _run(student: Path) -> dict[str, Ran]:
    """The notebook with that student and with none, one after the other in one process, which starts slowly."""
    parameters: dict[str, dict[str, object]] = {
        "student": {"model": str(student), "images": "sample:2", "count": 2},
        "none": {"model": "nowhere/at/all", "images": "sample:1", "count": 1, "side_by_side": False},
    }
    books = {name: _with(values) for name, values in parameters.items()}
    both = nbformat.v4.new_notebook(cells=[cell for book in books.values() for cell in book])
    patience = {"timeout": int(PATIENCE_S), "startup_timeout": int(PATIENCE_S)}
    NotebookClient(both, **patience, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    return {name: _outputs(book) for name, book in books.items()}


def _with(parameters: dict[str, object]) -> list[Any]:
    cells: list[Any] = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    for cell in cells:
        cell.outputs = []
        cell.id = uuid.uuid4().hex  # of the copies of a cell, each needs its own
    [settable] = (cell for cell in cells if "parameters" in cell.metadata.get("tags", ()))
    settable.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    return cells


def _outputs(cells: list[Any]) -> Ran:
    outputs = [output for cell in cells for output in cell.outputs]
    encoded = [output["data"]["image/jpeg"] for output in outputs if "image/jpeg" in output.get("data", {})]
    return Ran(
        "".join(output["text"] for output in outputs if output.get("name") == "stdout"),
        [Image.open(io.BytesIO(base64.b64decode(each))) for each in encoded],
    )


@pytest.mark.slow
def test_it_shows_what_a_student_learned_and_says_where_there_is_none(student: Path) -> None:
    ran = _run(student)
    said, pictures = ran["student"].said, ran["student"].pictures
    assert "4 blocks of width 32, taught by efficientnet, hog, color" in said
    assert "UNTRAINED" not in said
    norms, components, decoded = pictures
    assert all(np.asarray(picture.convert("L")).std() > 10 for picture in pictures)  # no blank sheets
    assert norms.height > norms.width  # two rows of maps below two photographs
    # A photograph and four blocks; a photograph and three teachers, twice.
    for board, columns in ((components, 5), (decoded, 7)):
        assert board.width / board.height == pytest.approx(columns / 2, rel=0.2)

    said, pictures = ran["none"].said, ran["none"].pictures
    assert "nowhere/at/all" in said
    assert "UNTRAINED" in said
    assert "norm entropy 0.00 nats" in said  # all tokens come out of a fresh layer norm
    assert len(pictures) == 3
