import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from theia.ablation.figure import draw
from theia.ablation.report import main_table, page, write_report
from theia.ablation.summary import Scored, summarise

SCORE = "readout/explained_variance"
PROVENANCE: dict[str, Any] = {
    "command": "theia ablate --config sweep.yaml",
    "base": "tiny.yaml",
    "options": {"trainer.max_epochs": 3},
    "versions": {"torch": "2.9.9"},
    "git_commit": "c0ffee",
    "store": {
        "manifest_sha256": "abc123",
        "teachers": {
            "clip": {"weights": "openai/clip", "revision": "32bd64", "licence": "MIT"},
            "sam": {"weights": "facebook/sam", "revision": None, "licence": "Apache-2.0"},
        },
    },
    "failed": ["both, seed 7"],
    "unfinished": ["both, seed 8"],
}


def runs(seeds: Sequence[int] = (0, 1, 2)) -> list[Scored]:
    """Three rows, 0.1 apart; values of each row 0.01 apart, in another order, so that differences vary."""
    found = []
    for rank, (row, teachers) in enumerate({"clip": ["clip"], "both": ["clip", "sam"], "sam": ["sam"]}.items()):
        for place, seed in enumerate(seeds):
            score = 0.5 + 0.1 * rank + 0.01 * ((place * (rank + 1)) % 3)
            scores = {
                SCORE: score, f"{SCORE}/clip": score - 0.1, f"{SCORE}/sam": score + 0.1, "test/loss": 1 - score,
                "test/norm_entropy": 3 + [0, 0.2, 0.1][rank], "classification/knn_accuracy": 0.25,
                "images_per_s": 2450.0, **{f"test/cosine/{name}": 0.75 for name in teachers},
            }  # fmt: skip
            options = {"data.teachers": teachers, "model": {"registers": 4}}
            found.append(Scored(row=row, seed=seed, teachers=tuple(teachers), scores=scores, options=options))
    return found


def lines(text: str, start: str) -> list[str]:
    """Cells of the first line of a Markdown table that has a cell of this content."""
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return next(cells for cells in table if start in cells)


def test_a_report_is_four_whole_files(tmp_path: Path) -> None:
    paths = write_report(tmp_path / "sweep", summarise(runs()), PROVENANCE)
    assert [path.name for path in paths] == ["report.md", "report.csv", "report.png", "report.json"]
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == sorted(path.name for path in paths)
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_report(tmp_path / "sweep", summarise(runs()), PROVENANCE)] == first


def test_the_page_ranks_and_compares() -> None:
    text = page(summarise(runs(), reference="clip"), PROVENANCE)
    # Scores 0.70, 0.70, 0.70 by 0.01 * (0, 3, 6) mod 3, and 0.60, 0.62, 0.61.
    # Holm: twice 0.00092 is 0.002, once 0.0033 is 0.003.
    sam = ["1", "sam", "sam", "3 (seeds 0, 1, 2)", "0.700 ± 0.000", "+0.190 ± 0.025", "< 0.001", "0.002"]
    assert lines(text, "sam")[:8] == sam
    # 4.303 * 0.01 / sqrt(3) = 0.0248; differences 0.10, 0.11, 0.09.
    both = ["2", "both", "clip, sam", "3 (seeds 0, 1, 2)", "0.610 ± 0.025", "+0.100 ± 0.025", "0.003", "0.003"]
    assert lines(text, "both")[:8] == both
    assert lines(text, "clip")[:8] == ["3", "clip", "clip", "3 (seeds 0, 1, 2)", "0.510 ± 0.025", "reference", "–", "–"]
    assert "`readout/explained_variance` ranks the rows (higher is better; the default" in text
    assert "Holm's correction" in text
    assert "![" in text
    assert "(report.png)" in text


def test_the_page_shows_transfer_and_entropy() -> None:
    text = page(summarise(runs()), PROVENANCE)
    transfer = text[text.index("## Transfer") :]
    assert lines(transfer, "both") == ["both", "**0.510**", "**0.710**"]
    assert lines(transfer, "clip") == ["distilled from \\ read out", "clip", "sam"]
    assert lines(transfer, "**0.410**") == ["clip", "**0.410**", "0.610"]
    # Scores 0.51, 0.61, 0.70 and entropies 3.0, 3.2, 3.1: 0.01 / sqrt(0.018067 * 0.02).
    assert "r = 0.53 (no interval with fewer than four rows; 3 rows)" in text


def test_the_page_says_what_was_run() -> None:
    text = page(summarise(runs()), PROVENANCE)
    for fact in (
        "theia ablate --config sweep.yaml", "tiny.yaml", "trainer.max_epochs 3", "torch 2.9.9", "c0ffee", "abc123",
        "openai/clip", "32bd64", "Apache-2.0", "failed: both, seed 7", "unfinished: both, seed 8", "2,450",
    ):  # fmt: skip
        assert fact in text
    assert "random" not in text
    assert "no confidence intervals" not in text


def test_random_teachers_are_called_so_at_the_top() -> None:
    teachers = {
        **PROVENANCE["store"]["teachers"],
        "sam": {"weights": "random", "revision": "seed 0", "licence": "none"},
    }
    text = page(summarise(runs()), {"store": {"teachers": teachers}})
    assert text.splitlines()[2].startswith("**Teachers with random weights: sam.")


def test_one_seed_gives_no_interval_and_the_page_says_how_to_get_one() -> None:
    text = page(summarise(runs(seeds=[0]), reference="both"), {})
    assert "--seeds 0,1,2" in text
    assert lines(text, "both")[3] == "1 (seed 0)"  # a lone 0 would look like the number of seeds
    assert "±" not in "".join(line for line in text.splitlines() if line.startswith("|"))
    assert lines(text, "sam")[4:7] == ["0.700", "+0.100", "–"]
    assert "Nothing was recorded." in text


def test_missing_and_odd_scores_are_told() -> None:
    scored = [*runs(), Scored(row="odd", seed=0, teachers=("sam",), scores={"test/loss": float("inf")}, options={}),
              Scored(row="odd", seed=1, teachers=("sam",), scores={"test/loss": 2.0}, options={})]  # fmt: skip
    text = page(summarise(scored, sort_by=SCORE), {})
    assert lines(text, "odd")[:5] == ["–", "odd", "sam", "2 (seeds 0, 1)", "–"]
    assert "Rows without a rank" in text
    assert "odd, seed 0: test/loss" in text


def test_a_reference_that_is_not_finished_is_told() -> None:
    text = page(summarise(runs()), {"reference": "all", "caveats": ["Trained with different torch."]})
    assert "No run of the reference `all` is finished" in text
    assert "Trained with different torch." in text


def test_losses_of_different_teachers_are_no_fair_comparison() -> None:
    assert "does not compare rows" in page(summarise(runs(), sort_by="test/loss"), {}).replace("\n", " ")
    assert "does not compare rows" not in page(summarise(runs()), {})
    assert "lower is better" in page(summarise(runs(), sort_by="test/loss"), {})


def test_the_table_for_a_terminal_has_no_markup() -> None:
    text = main_table(summarise(runs(), reference="both"))
    assert "|" not in text
    assert "**" not in text
    assert [line.split()[1] for line in text.splitlines()[2:]] == ["sam", "both", "clip"]


def test_the_csv_has_means_and_intervals(tmp_path: Path) -> None:
    write_report(tmp_path, summarise(runs()), {})
    with (tmp_path / "report.csv").open(newline="") as file:
        sam, both, clip = csv.DictReader(file)
    assert (both["row"], both["teachers"], both["seeds"]) == ("both", "clip+sam", "0 1 2")
    assert float(both[f"{SCORE} mean"]) == pytest.approx(0.61)
    assert float(both[f"{SCORE} high"]) == pytest.approx(0.61 + 0.02484, abs=1e-5)
    assert float(both[f"{SCORE} low"]) == pytest.approx(0.61 - 0.02484, abs=1e-5)
    assert (sam["test/cosine/clip mean"], sam["test/cosine/sam mean"]) == ("", "0.75")
    assert clip["test/cosine/sam high"] == ""


def test_the_json_has_everything(tmp_path: Path) -> None:
    scored = runs()
    scored[0] = Scored(row="clip", seed=0, teachers=("clip",), scores={"x": float("nan"), SCORE: 0.5}, options={})
    write_report(tmp_path, summarise(scored, reference="clip"), {**PROVENANCE, "out": tmp_path})
    content = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert (content["sort_by"], content["higher_is_better"], content["reference"]) == (SCORE, True, "clip")
    assert [row["name"] for row in content["rows"]] == ["sam", "both", "clip"]
    assert content["rows"][1]["difference"]["mean"] == pytest.approx(0.1)
    assert content["rows"][1]["transfer"] == {"clip": pytest.approx(0.51), "sam": pytest.approx(0.71)}
    assert content["rows"][1]["values"][1] == {"seed": 1, "value": pytest.approx(0.62)}
    assert content["runs"][0]["scores"] == {"x": None, SCORE: 0.5}
    assert len(content["runs"]) == 9
    assert content["provenance"] == {**PROVENANCE, "out": str(tmp_path)}


def test_the_figure_has_a_panel_for_what_there_is() -> None:
    scores, transfer, scatter = draw(summarise(runs(), reference="both")).axes
    points = [point.lines[0] for point in scores.containers]
    assert [point.get_xdata()[0] for point in points] == pytest.approx([0.7, 0.61, 0.51])
    colours = [point.get_color() for point in points]
    assert colours[0] == colours[2] != colours[1]
    assert [text.get_text() for text in scores.get_yticklabels()] == ["sam", "both", "clip"]
    assert [text.get_text() for text in transfer.texts] == ["0.60", "0.80", "0.51", "0.71", "0.41", "0.61"]
    assert len(transfer.patches) == 4  # distilled: sam; clip and sam; clip
    assert {text.get_text() for text in scatter.texts} == {"sam", "both", "clip"}
    assert "r = 0.53" in scatter.get_title()

    bare = [
        Scored(row=row, seed=0, teachers=(), scores={"x": value}, options={}) for row, value in [("a", 1), ("b", -1)]
    ]
    assert len(draw(summarise(bare)).axes) == 1


def test_what_is_read_out_nearly_alike_looks_alike() -> None:
    alike = [
        Scored(row=str(value), seed=0, teachers=("clip",), scores={SCORE: value, f"{SCORE}/clip": value}, options={})
        for value in (0.50, 0.51)
    ]
    (shades,) = draw(summarise(alike)).axes[1].images
    first, second = shades.to_rgba(shades.get_array()).reshape(-1, 4)
    assert abs(first - second).max() < 0.02


@pytest.mark.parametrize("values", [[0.0, 0.0], [-0.5, -0.51], [0.5, 0.5], [1.0, None]])
def test_every_range_of_scores_can_be_drawn(tmp_path: Path, values: list[float | None]) -> None:
    scored = [
        Scored(row=str(place), seed=0, teachers=(), scores={"y": 1.0} if value is None else {"x": value}, options={})
        for place, value in enumerate(values)
    ]
    write_report(tmp_path, summarise(scored, sort_by="x"), {})
    assert matplotlib.image.imread(tmp_path / "report.png").ndim == 3
