import os
import socket
from pathlib import Path

import pytest
from extraction.tiny_plugin import write_images

from theia.decoding.frames import Video
from theia.errors import ImageError
from theia.extraction.images import UnreadableImageError, read_image
from theia.extraction.stream import open_images
from theia.extraction.user_files import open_regular

pytestmark = pytest.mark.usefixtures("never_waits")

NOT_REGULAR = {
    "folder": "a folder",
    "fifo": "a FIFO",
    "socket": "a socket",
    "device": "a device",
    "link to itself": "Too many levels of symbolic links",
    "link to nothing": r"No such file or directory.*\(a link to nowhere\)",
    "link through a file": "Not a directory",
    "link to a long name": "File name too long",
}


def make(path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is named like an image or a video, and is none that could be read."""
    match kind:
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "socket":
            monkeypatch.chdir(path.parent)  # the name of a socket may have 107 bytes
            with socket.socket(socket.AF_UNIX) as opened:
                opened.bind(path.name)
        case "device":
            path.symlink_to("/dev/null")  # and not to one that never ends, which a mistake here would read into memory
        case "link to itself":
            path.symlink_to(path.name)
        case "link to nothing":
            path.symlink_to("nowhere")
        case "link through a file":
            (path.parent / "file").touch()
            path.symlink_to("file/below")
        case "link to a long name":
            path.symlink_to("n" * 300)
    return path


@pytest.mark.parametrize("kind", NOT_REGULAR)
def test_what_is_no_regular_file_is_one_image_that_cannot_be_read(tmp_path, monkeypatch, kind) -> None:
    path = make(tmp_path / "a.png", kind, monkeypatch)
    with pytest.raises(UnreadableImageError, match=f"cannot be read: .*{NOT_REGULAR[kind]}"):
        read_image(path)


@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "link to itself", "link to nothing"])
@pytest.mark.parametrize("name", ["a.png", "a.tar", "a"])
def test_a_place_that_is_neither_folder_nor_file_says_what_it_is(tmp_path, monkeypatch, kind, name) -> None:
    path = make(tmp_path / name, kind, monkeypatch)
    with pytest.raises(ImageError, match=rf"{name} cannot be read: .*{NOT_REGULAR[kind]}.*Give "):
        open_images(str(path))


def test_one_image_is_a_source_and_a_folder_with_its_ending_is_a_folder(tmp_path) -> None:
    write_images(tmp_path / "set.png", 2)
    assert open_images(str(tmp_path / "set.png")).ids == ["000.png", "001.png"]
    assert open_images(str(tmp_path / "set.png" / "001.png")).ids == ["001.png"]


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
@pytest.mark.parametrize("kind", [kind for kind in NOT_REGULAR if kind != "link to nothing"])
def test_a_video_is_a_regular_file(tmp_path, monkeypatch, kind, name) -> None:
    path = make(tmp_path / name, kind, monkeypatch)
    with pytest.raises(ImageError, match=rf"{name} cannot be read: .*{NOT_REGULAR[kind]}"):
        Video(path)


def test_a_file_that_becomes_a_fifo_after_it_was_looked_at_does_not_wait(tmp_path, monkeypatch) -> None:
    path, regular = tmp_path / "a.png", tmp_path / "b.png"
    os.mkfifo(path)
    regular.touch()
    status = regular.stat()
    with monkeypatch.context() as looked_at_before:
        looked_at_before.setattr(Path, "stat", lambda *arguments, **options: status)
        with pytest.raises(OSError, match="a FIFO, not a regular file"):
            open_regular(path)


def test_a_device_is_not_even_opened(tmp_path, monkeypatch) -> None:
    opened = []
    path = make(tmp_path / "a.png", "device", monkeypatch)
    monkeypatch.setattr(os, "open", lambda *arguments, **options: opened.append(arguments))
    with pytest.raises(OSError, match="a device"):
        open_regular(path)
    assert not opened


def test_no_file_is_left_open(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(b"content")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (one more entry, itself, both times)
    with open_regular(tmp_path / "a.png") as file:
        assert file.read() == b"content"
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
