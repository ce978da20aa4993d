"""A sweep whose answer is known: what carries nothing of the image harms what is read out of the student."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from theia.ablation.launch import Job
from theia.cli.main import main
from theia.store.schema import ImageSet, hash_ids
from theia.store.writer import SplitWriter
from theia.types import TeacherSpec

pytestmark = pytest.mark.usefixtures("one_parser")

PATCH, GRID = 16, 2
REAL = ("alpha", "beta")
SETS = [["alpha", "beta"], ["alpha", "noise"], ["alpha", "beta", "noise"]]


def write_split(root: Path, split: str, rows: int) -> None:
    """Images whose patches are sums of three patterns. Two teachers give the patterns' strengths, whatever their signs,
    in mixtures of their own: no linear function of pixels. The third gives a random projection of the sample's id."""
    ids = [f"{split}/{row}" for row in range(rows)]
    random = np.random.default_rng(rows)
    strengths = random.normal(size=(rows, GRID, GRID, 3))
    patterns = np.random.default_rng(3).choice([-1.0, 1.0], (3, 4, 4)).repeat(4, 1).repeat(4, 2)
    patches = 127 + 40 * np.einsum("rhwk,kyx->rhwyx", strengths, patterns)
    pixels = patches.transpose(0, 1, 3, 2, 4).reshape(rows, 1, GRID * PATCH, GRID * PATCH).repeat(3, 1)
    content = np.abs(strengths).reshape(rows, GRID * GRID, 3)
    mixing = np.random.default_rng(7)
    features = {name: content @ mixing.normal(size=(3, channels)) for name, channels in (("alpha", 6), ("beta", 8))}
    one_hot = np.eye(2048)[[int(hash_ids([name])[:8], 16) % 2048 for name in ids]]
    features["noise"] = (one_hot @ mixing.normal(size=(2048, GRID * GRID * 6))).reshape(rows, GRID * GRID, 6)

    writer = SplitWriter(root, split)
    images = ImageSet(
        source={"kind": "test"}, size=GRID * PATCH, resize="squash", listed=rows, ids_sha256=hash_ids(ids),
        shard_size=rows,
    )  # fmt: skip
    specs = [
        TeacherSpec(name=name, channels=values.shape[2], grid_hw=(GRID, GRID), licence="MIT", weights="none")
        for name, values in features.items()
    ]
    writer.begin(images, specs, "float16", {"device": "cpu"})
    writer.write_images(0, ids, np.clip(pixels, 0, 255).astype(np.uint8), None, [])
    for name, values in features.items():
        with writer.open_shard(name, 0) as shard:
            shard.append(values.astype(np.float32), None)
    writer.finish()


@pytest.mark.slow
def test_noise_among_the_teachers_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_split(tmp_path / "store", "train", 192)
    write_split(tmp_path / "store", "val", 256)
    (tmp_path / "sweep.yaml").write_text(
        json.dumps({"teachers": SETS, "out": str(tmp_path / "sweep"), "seeds": [0, 1, 2], "scorers": "readout"})
    )
    options = {
        "data.store": tmp_path / "store", "data.batch_size": 32, "data.workers": 0, "model.width": 64,
        "model.depth": 2, "model.heads": 2, "model.learning_rate": 2e-3, "model.translator": "linear",
        "trainer.accelerator": "cpu", "trainer.max_epochs": 28, "trainer.check_val_every_n_epoch": 100,
        "trainer.enable_model_summary": False, "trainer.enable_progress_bar": False, "trainer.log_every_n_steps": 1000,
    }  # fmt: skip

    # A process for each command takes ten times as long, and is tested elsewhere.
    def in_this_process(job: Job, arguments: Sequence[str], held: int) -> int:
        return main(arguments)

    monkeypatch.setattr(Job, "_carry_out", in_this_process)
    arguments = [f"--{name}={value}" for name, value in options.items()]
    assert main(["ablate", f"--config={tmp_path / 'sweep.yaml'}", *arguments]) == 0

    rows = json.loads((tmp_path / "sweep/report.json").read_text())["rows"]
    assert len(rows) == len(SETS)
    for name in REAL:
        column = f"readout/explained_variance/{name}"
        low = {row["name"]: row["columns"][column]["low"] for row in rows if "noise" not in row["teachers"]}
        high = {row["name"]: row["columns"][column]["high"] for row in rows if "noise" in row["teachers"]}
        assert (len(low), len(high)) == (1, 2)
        for without, with_noise in itertools.product(low, high):
            assert low[without] > high[with_noise], (name, without, with_noise, low, high)
    noise = [row["columns"]["readout/explained_variance/noise"]["mean"] for row in rows]
    assert max(noise) < 0.05  # nobody can read out of an image what is not in it
