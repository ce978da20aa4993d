from pathlib import Path

import numpy as np
import pytest

from theia.decoding.output import RECORD, Output, check_free, picture_names
from theia.decoding.render import Group, row
from theia.errors import ConfigError

ENDINGS = (".jpg", ".png")


def test_pictures_are_named_by_image() -> None:
    assert picture_names(["a.jpg", "b/a.PNG", "crop-1", "v1.2"], ENDINGS) == {
        "a.jpg": "a.png", "b/a.PNG": "b/a.png", "crop-1": "crop-1.png", "v1.2": "v1.2.png",
    }  # fmt: skip


def test_images_that_differ_in_their_ending_have_files_of_their_own() -> None:
    names = picture_names(["a.jpg", "a.png", "b.png"], ENDINGS)
    assert names == {"a.jpg": "a.jpg.png", "a.png": "a.png.png", "b.png": "b.png.png"}


@pytest.mark.parametrize("sample_id", ["../../a.jpg", "/etc/a.jpg", "set.tar/../a.jpg"])
def test_no_name_leads_out_of_the_folder(sample_id: str, tmp_path: Path) -> None:
    name = picture_names([sample_id], ENDINGS)[sample_id]
    assert (tmp_path / name).resolve().is_relative_to(tmp_path.resolve())


FILES = {"a": "a.png", "b/c": "b/c.png"}
PICTURE = np.zeros((4, 4, 3), np.uint8)


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="holds no decoded pictures"):
            check_free(tmp_path, overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_ones_own_folder_is_replaced_on_request_only(tmp_path: Path) -> None:
    output = Output(tmp_path, FILES)
    output.begin([*FILES.values()])
    for sample_id in FILES:
        output.save(sample_id, PICTURE)
    output.finish({}, [*FILES.values()])
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(ConfigError, match="--overwrite"):
        check_free(tmp_path, False)
    check_free(tmp_path, True)
    again = Output(tmp_path, {"d": "d.png"})
    again.begin(["d.png"])
    assert {path.name for path in tmp_path.rglob("*.png")} == {"a.png", "c.png"}
    again.save("d", PICTURE)
    again.finish({}, ["d.png"])

    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.png", RECORD, "notes.txt"]


def test_an_edited_record_removes_nothing_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    Output(tmp_path / "out", {}).finish({}, ["../precious"])
    Output(tmp_path / "out", {}).finish({}, [])
    assert (tmp_path / "precious").exists()


def test_pictures_of_a_killed_call_may_be_replaced(tmp_path: Path) -> None:
    output = Output(tmp_path, FILES)
    output.begin([*FILES.values()])
    output.save("b/c", PICTURE)
    check_free(tmp_path, False)
    again = Output(tmp_path, {"a": "a.png"})
    again.begin(["a.png"])
    again.save("a", PICTURE)
    again.finish({}, ["a.png"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", RECORD]


def test_a_row_has_the_same_size_whatever_the_titles_say() -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    sizes = {
        row([Group(title, [(title, picture), ("b", picture)]), Group("c", [("d", picture)])], 1.37).shape
        for title in ("", "a", 300 * "long ")
    }
    assert len(sizes) == 1
    height, width, _ = sizes.pop()
    assert height % 2 == width % 2 == 0


def test_panels_lie_from_left_to_right_and_keep_their_colours() -> None:
    pictures = [np.full((3, 5, 3), colour, np.uint8) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    drawn = row([Group("a", [("", pictures[0])]), Group("b", [("", pictures[1]), ("", pictures[2])])], 1)

    centres = [np.argwhere((drawn == picture[0, 0]).all(2)).mean(0) for picture in pictures]
    assert centres[0][1] < centres[1][1] < centres[2][1]
    assert len({centre[0] for centre in centres}) == 1


@pytest.mark.parametrize("aspect", [0.01, 100])
def test_strips_have_a_row_too(aspect: float) -> None:
    assert max(row([Group("a", [("", np.zeros((4, 4, 3), np.uint8))])], aspect).shape) < 2000
