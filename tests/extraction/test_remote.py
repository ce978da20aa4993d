import io
import pickle
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from theia.cli.main import main
from theia.errors import ConfigError, ImageError
from theia.extraction.images import UnreadableImageError
from theia.extraction.sources import ImageSource, open_source

Upload = Callable[[Path], str]


@pytest.fixture(params=["memory", "s3"])
def upload(request: pytest.FixtureRequest) -> Iterator[Upload]:
    """Copies a folder into a place in memory or an object store, and gives its URL."""
    place = request.getfixturevalue("bucket") if request.param == "s3" else "memory://"
    url = f"{place}/photos" if request.param == "s3" else f"memory://{request.node.name}"

    def copy(folder: Path) -> str:
        fs, path = fsspec.core.url_to_fs(url)
        fs.put(f"{folder}/", f"{path}/", recursive=True)
        return url

    yield copy
    fsspec.filesystem("memory").store.clear()


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 7, 3), np.uint8))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes, a hidden file, and one that is no image."""
    folder = tmp_path / "photos"
    for number, name in enumerate(("cat/b.png", "cat/a.png", "dog/deep/c.png", ".hidden/d.png", "dog/notes.md")):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            picture(number).save(path)
        else:
            path.write_text("words")
    return folder


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    folder = tmp_path / "archives"
    folder.mkdir()
    for archive in range(2):
        with tarfile.open(folder / f"{archive}.tar", "w") as tar:
            for number in range(3):
                content = io.BytesIO()
                picture(10 * archive + number).save(content, "PNG")
                for name, data in ((f"{number}.png", content.getvalue()), (f"{number}.cls", b"%d" % number)):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


def same(one: ImageSource, other: ImageSource) -> None:
    assert list(one.ids) == list(other.ids)
    assert one.labels == other.labels
    assert one.classes == other.classes
    for index in range(len(one.ids)):
        assert one.read(index).tobytes() == other.read(index).tobytes()


@pytest.mark.parametrize("labels", [False, True])
def test_a_folder_elsewhere_is_what_its_copy_here_is(photos: Path, upload: Upload, labels: bool) -> None:
    source = open_source(upload(photos), "train", labels)
    assert list(source.ids) == ["cat/a.png", "cat/b.png", "dog/deep/c.png"]
    same(pickle.loads(pickle.dumps(source)), open_source(str(photos), "train", labels))


@pytest.mark.parametrize("labels", [False, True])
def test_archives_elsewhere_are_what_their_copies_here_are(archives: Path, upload: Upload, labels: bool) -> None:
    url = upload(archives)
    same(open_source(url, "train", labels), open_source(str(archives), "train", labels))
    same(open_source(f"{url}/1.tar", "train", labels), open_source(str(archives / "1.tar"), "train", labels))


def test_extraction_fetches_in_worker_processes(photos: Path, upload: Upload, tmp_path: Path) -> None:
    lines = []
    for place, store in ((upload(photos), "elsewhere"), (str(photos), "here")):
        options = ["--teachers=color", "--size=32", "--workers=2", f"--store={tmp_path / store}"]
        assert main(["extract", "--images", place, *options]) == 0
        lines.append((tmp_path / store / "train/image/shard-000000.h5").read_bytes())
    assert lines[0][-5000:] == lines[1][-5000:]  # pixels and ids; the record names the source


def test_joined_places_are_named_after_their_folders(photos: Path, upload: Upload) -> None:
    url = upload(photos)
    source = open_source([f"far={url}", str(photos)], "train")
    assert {name.partition("/")[0] for name in source.ids} == {"far", "photos"}


def test_an_image_that_vanished_is_skipped_and_a_place_that_fails_is_not(
    photos: Path, upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = upload(photos)
    source = open_source(url, "train")
    fs, place = fsspec.core.url_to_fs(url)
    fs.rm_file(f"{place}/cat/a.png")
    with pytest.raises(UnreadableImageError):
        source.read(0)

    def fail(*_: object, **__: object) -> None:
        raise TimeoutError("no answer")

    monkeypatch.setattr(fs, "cat_file", fail)
    with pytest.raises(ImageError, match=r"TimeoutError: no answer.*run the same command again") as caught:
        source.read(1)
    assert not isinstance(caught.value, UnreadableImageError)


def test_wrong_places_are_said(photos: Path, archives: Path, upload: Upload, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"There is nothing at memory://nowhere\."):
        open_source("memory://nowhere", "train")
    with pytest.raises(ConfigError, match="no place that fsspec opens"):
        open_source("warp://bucket", "train")
    (archives / "x.png").touch()
    with pytest.raises(ImageError, match="holds both images"):
        open_source(upload(archives), "train")
    (photos / "outside.png").touch()
    with pytest.raises(ImageError, match=r"outside\.png of file://.* lies in no sub-folder"):
        open_source(f"file://{photos}", "train", labels=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/readme.md").touch()
    with pytest.raises(ImageError, match="No image in file://"):
        open_source(f"file://{tmp_path / 'empty'}", "train")
