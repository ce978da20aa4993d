import io
import logging
import multiprocessing
import os
import pickle
import subprocess
import tarfile

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from theia.errors import ConfigError, ImageError
from theia.extraction.images import UnreadableImageError
from theia.extraction.sources import open_source
from theia.extraction.user_files import HAS_HEIF


def image_bytes(seed, format="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def write(root, *names):
    """Writes an image of its own under each name; returns the bytes by name."""
    contents = {}
    for seed, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        contents[name] = image_bytes(seed)
        path.write_bytes(contents[name])
    return contents


def pack(path, members, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, options.pop("mode", "w"), **options) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def same(image, data):
    return np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def assert_reads(source, contents):
    assert [same(source.read(index), contents[name]) for index, name in enumerate(source.ids)] == [True] * len(contents)


# Folders


def test_folder_is_read_at_any_depth_in_sorted_order(tmp_path):
    names = ["b.png", "a/z.jpg", "a/deep/er/y.JPEG", "c.PNG", "d.webp", "e.bmp", "f.tif", "g.TIFF"]
    contents = write(tmp_path, *names)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    source = open_source(str(tmp_path), "train")
    assert source.ids == ["a/deep/er/y.JPEG", "a/z.jpg", "b.png", "c.PNG", "d.webp", "e.bmp", "f.tif", "g.TIFF"]
    assert source.labels is None
    assert source.classes is None
    assert_reads(source, contents)


def test_hidden_files_and_folders_are_ignored(tmp_path):
    write(tmp_path, "a.jpg", "._a.jpg", ".b.jpg", ".cache/c.jpg", "x/.thumbs/d.jpg", "x/._e.jpg")
    assert open_source(str(tmp_path), "train").ids == ["a.jpg"]


def test_sub_folders_are_the_classes(tmp_path):
    write(tmp_path, "dog/1.jpg", "cat/deep/2.jpg", "cat/3.jpg")
    (tmp_path / "bird").mkdir()
    (tmp_path / ".git").mkdir()
    source = open_source(str(tmp_path), "train", labels=True)
    # As torchvision's ImageFolder: sorted. A class without images keeps its number.
    assert source.classes == ["bird", "cat", "dog"]
    assert list(zip(source.ids, source.labels, strict=True)) == [
        ("cat/3.jpg", 1),
        ("cat/deep/2.jpg", 1),
        ("dog/1.jpg", 2),
    ]


def test_labels_without_sub_folders_are_refused(tmp_path):
    write(tmp_path, "cat/1.jpg", "2.jpg")
    with pytest.raises(ImageError, match=r"2\.jpg lies in no sub-folder"):
        open_source(str(tmp_path), "train", labels=True)


def test_linked_folders_are_followed(tmp_path):
    contents = write(tmp_path / "elsewhere", "1.jpg")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "elsewhere")
    source = open_source(str(tmp_path / "set"), "train")
    assert source.ids == ["cat/1.jpg"]
    assert same(source.read(0), contents["1.jpg"])


def test_a_link_in_a_circle_is_refused(tmp_path):
    write(tmp_path, "a/1.jpg")
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    with pytest.raises(ImageError, match="reached twice"):
        open_source(str(tmp_path), "train")


def test_unlistable_folder_is_an_error_not_a_gap(tmp_path, monkeypatch):
    write(tmp_path, "a.jpg", "locked/b.jpg")
    scandir = os.scandir

    def refuse(path):
        # Permission bits would not stop the superuser.
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ImageError, match=r"locked cannot be listed: Permission denied"):
        open_source(str(tmp_path), "train")


def test_a_damaged_file_is_unreadable_and_the_others_are_not(tmp_path):
    contents = write(tmp_path, "a.jpg", "c.jpg")
    (tmp_path / "b.jpg").write_text("text")
    source = open_source(str(tmp_path), "train")
    with pytest.raises(UnreadableImageError, match="not a JPEG"):
        source.read(1)
    assert same(source.read(2), contents["c.jpg"])


def test_a_file_that_vanished_is_unreadable(tmp_path):
    write(tmp_path, "a.jpg", "b.jpg")
    source = open_source(str(tmp_path), "train")
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(UnreadableImageError, match="cannot be read"):
        source.read(0)


def test_an_unmounted_disk_is_no_fault_of_its_images(tmp_path):
    write(tmp_path / "set", "a.jpg", "b.jpg")
    source = open_source(str(tmp_path / "set"), "train")
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "set" / name).unlink()  # the mount point stays
    with pytest.raises(ImageError, match=r"set is gone or empty: b\.jpg cannot be read.*same command again") as error:
        source.read(1)
    assert not isinstance(error.value, UnreadableImageError)
    (tmp_path / "set").rmdir()
    with pytest.raises(ImageError, match="is gone or empty"):
        source.read(1)


def test_what_is_no_regular_file_is_listed_and_the_others_are_read(tmp_path, never_waits):
    contents = write(tmp_path, "a.jpg", "c.jpg")
    os.mkfifo(tmp_path / "b.jpg")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "folder.jpg").mkdir()
    source = open_source(str(tmp_path), "train")
    assert source.ids == ["a.jpg", "b.jpg", "c.jpg", "self.jpg"]
    assert same(source.read(2), contents["c.jpg"])
    for index in (1, 3):
        with pytest.raises(UnreadableImageError):
            source.read(index)


def test_a_link_to_itself_among_class_folders_is_no_class(tmp_path):
    write(tmp_path, "cat/1.jpg")
    (tmp_path / "self").symlink_to("self")
    assert open_source(str(tmp_path), "train", labels=True).classes == ["cat"]


# What is passed over


def write_odd(root):
    """Names of every kind that is not read, beside one image."""
    write(root, "a.jpg", "b.psd", "x/c.PSD", "d.jxl", "e.pjp", "f.tar.gz", "._g.jpg", "x/.h.jpg", ".thumbs/i.jpg")
    for name in ("a.json", "x/b.json", "README", ".DS_Store"):
        (root / name).touch()


def passed_over(caplog):
    (record,) = [record for record in caplog.records if "Passed over" in record.getMessage()]
    return record.levelname, record.getMessage().partition(": ")[2]


def test_what_is_passed_over_in_a_folder_is_said_once(tmp_path, caplog):
    write_odd(tmp_path)
    with caplog.at_level(logging.INFO, "theia"):
        assert open_source(str(tmp_path), "train").ids == ["a.jpg"]
    level, said = passed_over(caplog)
    assert level == "WARNING"
    assert said.startswith(
        "2 .psd, 1 .jxl (not JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF or JPEG 2000); "
        "1 .pjp (JPEG by another ending: rename to .jpg); 1 .tar.gz (compressed: decompress first); "
        "2 .json, 1 without ending; 2 hidden, such as "
    )
    assert said.endswith("; 1 hidden folder, such as .thumbs")


def test_what_is_passed_over_in_tar_files_is_said_once_for_all(tmp_path, caplog):
    image = image_bytes(0)
    names = ["./a.jpg", "b.psd", "b.json", "../c.jpg", "x/../../d.jpg", ".x/e.jpg", "x/._f.jpg", "x/.DS_Store", "a.jpg"]
    for shard in ("0.tar", "1.tar"):
        with tarfile.open(tmp_path / shard, "w") as tar:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = len(image)
                tar.addfile(info, io.BytesIO(image))
    (tmp_path / "index.json").touch()
    with caplog.at_level(logging.INFO, "theia"):
        # As "tar -C FOLDER -cf x.tar ." writes them.
        assert open_source(str(tmp_path), "train").ids == ["0.tar/a.jpg", "1.tar/a.jpg"]
    assert passed_over(caplog) == (
        "WARNING",
        "2 .psd (not JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF or JPEG 2000); 3 .json; 4 with '..' in the path (pack with "
        "tar -C FOLDER), such as 0.tar/../c.jpg; 4 hidden, such as 0.tar/.x/e.jpg; 2 replaced by a later member of the "
        "same name, such as 0.tar/a.jpg",
    )


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (False, "2 .cls, 2 .json, 1 .a, 1 .b and 2 others"),
        (True, "2 .json, 1 .a, 1 .b, 1 .c and 1 other"),
    ],
)
def test_what_is_usual_beside_images_is_no_warning(tmp_path, caplog, labels, said):
    members = {f"{index}.{ending}": b"1" for index in range(2) for ending in ("cls", "json")}
    images = {f"{index}.jpg": image_bytes(index) for index in range(2)}
    pack(tmp_path / "a.tar", {**images, **members, **{f"0.{ending}": b"" for ending in "abcd"}})
    with caplog.at_level(logging.INFO, "theia"):
        open_source(str(tmp_path), "train", labels=labels)
    assert passed_over(caplog) == ("INFO", said)


def test_nothing_is_said_where_nothing_is_passed_over(tmp_path, caplog):
    write(tmp_path / "folder", "a.jpg")
    pack(tmp_path / "tars" / "a.tar", {"0.jpg": image_bytes(0), "0.cls": b"1"})
    with caplog.at_level(logging.INFO, "theia"):
        open_source(str(tmp_path / "folder"), "train")
        open_source(str(tmp_path / "tars"), "train", labels=True)
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "said"),
    [("a.jxl", r"1 \.jxl \(not JPEG"), ("a.pjp", r"1 \.pjp .*rename"), (".x.jpg", r"1 hidden, such as .*\.x\.jpg")],
)
def test_where_no_image_is_left_the_error_says_what_there_is(tmp_path, name, said):
    write(tmp_path / "folder", name)
    pack(tmp_path / "a.tar", {name: image_bytes(0)})
    for place in ("folder", "a.tar"):
        with pytest.raises(ImageError, match=rf"No image in .*{place}\. There are: {said}.*Names that count end in"):
            open_source(str(tmp_path / place), "train")


# Tar files

LONG = "class/" + "n" * 180 + ".jpg"  # more than the 100 bytes of a plain header


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_tar_members_are_the_bytes_that_tarfile_reads(tmp_path, format):
    members = {name: image_bytes(seed) for seed, name in enumerate(["z.png", "a/b.jpg", LONG, "é/ü.jpeg"])}
    path = pack(tmp_path / "set.tar", {**members, "notes.txt": b"x", "z.json": b"{}"}, format=format)
    source = open_source(str(path), "train")
    with tarfile.open(path) as tar:
        upstream = {
            f"set.tar/{member.name}": tar.extractfile(member).read()
            for member in tar
            if not member.name.endswith(("txt", "json"))
        }
    assert source.ids == list(upstream)
    assert list(upstream.values()) == list(members.values())
    assert_reads(source, upstream)


def test_tar_made_by_the_tar_command(tmp_path):
    contents = write(tmp_path / "set", "a/1.jpg", "a/2.png", "b/._3.jpg", ".hidden/4.jpg", LONG)
    subprocess.run(["tar", "-cf", "set.tar", "-C", "set", "."], cwd=tmp_path, check=True)
    source = open_source(str(tmp_path / "set.tar"), "train")
    assert sorted(source.ids) == ["set.tar/a/1.jpg", "set.tar/a/2.png", f"set.tar/{LONG}"]
    assert all(
        same(source.read(index), contents[name.removeprefix("set.tar/")]) for index, name in enumerate(source.ids)
    )


def test_folder_of_tars(tmp_path):
    contents = {}
    for shard in ("train-1.tar", "train-0.tar", "more/train-0.TAR", "._train-1.tar"):
        members = {"0.jpg": image_bytes(len(contents)), "1.jpg": image_bytes(100 + len(contents))}
        pack(tmp_path / shard, members)
        contents |= {f"{shard}/{name}": data for name, data in members.items()}
    contents = {name: data for name, data in contents.items() if not name.startswith(".")}
    source = open_source(str(tmp_path), "train")
    assert source.ids == [
        "more/train-0.TAR/0.jpg",
        "more/train-0.TAR/1.jpg",
        "train-0.tar/0.jpg",
        "train-0.tar/1.jpg",
        "train-1.tar/0.jpg",
        "train-1.tar/1.jpg",
    ]
    assert_reads(source, contents)


def test_tar_labels(tmp_path):
    pack(tmp_path / "a.tar", {"x/0.jpg": image_bytes(0), "x/0.cls": b"7", "1.cls": b"12\n", "1.png": image_bytes(1)})
    pack(tmp_path / "b.tar", {"0.jpg": image_bytes(2), "0.cls": b"0"})
    source = open_source(str(tmp_path), "train", labels=True)
    assert dict(zip(source.ids, source.labels, strict=True)) == {
        "a.tar/x/0.jpg": 7,
        "a.tar/1.png": 12,
        "b.tar/0.jpg": 0,
    }
    assert source.classes is None
    assert open_source(str(tmp_path), "train").labels is None


def test_missing_tar_label_is_refused(tmp_path):
    path = pack(tmp_path / "a.tar", {"0.jpg": image_bytes(0), "0.cls": b"7", "1.jpg": image_bytes(1)})
    with pytest.raises(ImageError, match=r"no member '1\.cls' beside '1\.jpg'"):
        open_source(str(path), "train", labels=True)


@pytest.mark.parametrize("label", [b"cat", b"-1", b"1.5", b""])
def test_tar_label_that_is_no_class_index_is_refused(tmp_path, label):
    path = pack(tmp_path / "a.tar", {"0.jpg": image_bytes(0), "0.cls": label})
    with pytest.raises(ImageError, match=r"'0\.cls' .* integer from 0"):
        open_source(str(path), "train", labels=True)


def test_a_later_member_of_the_same_name_replaces_the_first(tmp_path):
    path = pack(tmp_path / "a.tar", {"0.jpg": image_bytes(0), "1.jpg": image_bytes(1)})
    pack(path, {"0.jpg": image_bytes(2)}, mode="a")
    source = open_source(str(path), "train")
    assert source.ids == ["a.tar/0.jpg", "a.tar/1.jpg"]
    assert same(source.read(0), image_bytes(2))


def test_a_link_in_a_tar_is_refused(tmp_path):
    write(tmp_path, "0.jpg")
    (tmp_path / "1.jpg").hardlink_to(tmp_path / "0.jpg")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "0.jpg", "0.jpg")
        tar.add(tmp_path / "1.jpg", "1.jpg")
    with pytest.raises(ImageError, match="is a link"):
        open_source(str(tmp_path / "a.tar"), "train")


def test_what_never_was_a_file_in_a_tar_is_listed_as_unreadable(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("0.jpg", tarfile.FIFOTYPE), ("1.jpg", tarfile.CHRTYPE), ("2.jpg", tarfile.REGTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind == tarfile.REGTYPE:
                info.size = len(image_bytes(0))
            tar.addfile(info, io.BytesIO(image_bytes(0)))
        label = tarfile.TarInfo("2.cls")
        label.size = 1
        tar.addfile(label, io.BytesIO(b"7"))
    source = open_source(str(tmp_path / "a.tar"), "train", labels=True)
    assert source.ids == ["a.tar/0.jpg", "a.tar/1.jpg", "a.tar/2.jpg"]
    assert source.labels[2] == 7
    for index, kind in enumerate(("FIFO", "device")):
        with pytest.raises(UnreadableImageError, match=f"cannot be read: a {kind}, not a regular file"):
            source.read(index)
    assert same(source.read(2), image_bytes(0))


def test_an_archive_that_never_was_one_is_listed_as_unreadable(tmp_path, never_waits):
    os.mkfifo(tmp_path / "0.tar")
    (tmp_path / "1.tar").symlink_to("1.tar")
    (tmp_path / "2.tar").mkdir()
    pack(tmp_path / "3.tar", {"0.jpg": image_bytes(0), "0.cls": b"7"})
    source = pickle.loads(pickle.dumps(open_source(str(tmp_path), "train", labels=True)))
    assert source.ids == ["0.tar", "1.tar", "3.tar/0.jpg"]
    assert source.labels[2] == 7
    for index, why in enumerate(("a FIFO", "Too many levels of symbolic links")):
        with pytest.raises(UnreadableImageError, match=f"cannot be read: .*{why}"):
            source.read(index)
    assert same(source.read(2), image_bytes(0))


def test_an_archive_that_is_missing_is_refused_at_once(tmp_path):
    # It stands for all of its images, so it must not pass for one that cannot be read.
    pack(tmp_path / "0.tar", {"0.jpg": image_bytes(0)})
    (tmp_path / "1.tar").symlink_to("unmounted/1.tar")
    with pytest.raises(
        ImageError, match=r"1\.tar cannot be read: .*\(a link to unmounted/1\.tar\)\. It stands for all"
    ):
        open_source(str(tmp_path), "train")


@pytest.mark.parametrize("cut", ["in data", "in a header", "between members", "at the end mark"])
def test_truncated_tar_is_refused(tmp_path, cut):
    data = os.urandom(3000)  # six blocks after a header of one
    path = pack(tmp_path / "a.tar", {"0.jpg": data, "1.jpg": data})
    size = {"in data": 10 * 512, "in a header": 7 * 512 + 100, "between members": 7 * 512, "at the end mark": 14 * 512}
    os.truncate(path, size[cut])
    with pytest.raises(ImageError, match=r"a\.tar.*cut short"):
        open_source(str(path), "train")


def test_tar_with_a_damaged_header_is_refused(tmp_path):
    path = pack(tmp_path / "a.tar", {f"{index}.jpg": os.urandom(3000) for index in range(3)})
    with path.open("r+b") as file:
        file.seek(7 * 512 + 20)
        file.write(b"damage")
    with tarfile.open(path) as tar:
        assert len(tar.getnames()) == 1  # what would be lost in silence
    with pytest.raises(ImageError, match=r"byte 3584.*damaged there"):
        open_source(str(path), "train")


def test_two_tars_in_one_file_are_refused(tmp_path):
    first, second = (pack(tmp_path / name, {"0.jpg": image_bytes(0)}) for name in ("a.tar", "b.tar"))
    first.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(ImageError, match="several archives in one file"):
        open_source(str(first), "train")


def test_text_named_tar_is_refused(tmp_path):
    (tmp_path / "a.tar").write_text("text " * 1000)
    with pytest.raises(ImageError, match=r"a\.tar cannot be read as a tar file"):
        open_source(str(tmp_path), "train")


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar"])
@pytest.mark.parametrize("whole_folder", [True, False])
def test_compressed_tar_is_refused(tmp_path, name, whole_folder):
    path = pack(tmp_path / name, {"0.jpg": image_bytes(0)}, mode="w:gz")
    with pytest.raises(ImageError, match="by offset"):
        open_source(str(tmp_path if whole_folder else path), "train")


# Places


def test_missing_place(tmp_path):
    with pytest.raises(ImageError, match=r"There is no .*nowhere"):
        open_source(str(tmp_path / "nowhere"), "train")


def test_a_single_image_file_is_refused(tmp_path):
    write(tmp_path, "a.jpg")
    with pytest.raises(
        ImageError, match=r"neither a folder nor a \.tar, \.parquet or \.txt file.*folder that holds it"
    ):
        open_source(str(tmp_path / "a.jpg"), "train")


def test_a_place_without_images_names_the_endings(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("text")
    pack(tmp_path / "tars" / "a.tar", {"notes.txt": b"x"})
    for place in ("folder", "tars", "tars/a.tar"):
        with pytest.raises(ImageError, match=r"No image in .*\.jpg, \.jpeg, \.png.*\.tiff"):
            open_source(str(tmp_path / place), "train")


def test_tars_and_images_in_one_folder_are_refused(tmp_path):
    write(tmp_path, "a.jpg")
    pack(tmp_path / "b.tar", {"0.jpg": image_bytes(0)})
    with pytest.raises(ImageError, match=r"both images \(a\.jpg\) and tar files \(b\.tar\)"):
        open_source(str(tmp_path), "train")


def test_a_name_that_is_no_utf_8_is_refused(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg")  # noqa: PTH118 (bytes)
    with open(path, "wb") as file:  # noqa: PTH123 (bytes)
        file.write(image_bytes(0))
    with pytest.raises(ImageError, match=r"'caf\\udce9\.jpg'.*UTF-8.*Rename"):
        open_source(str(tmp_path), "train")


# Worker processes


class _Read(Dataset):
    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source.ids)

    def __getitem__(self, index):
        return np.asarray(self.source.read(index))


def folder_source(tmp_path):
    write(tmp_path / "folder", *(f"{index}.jpg" for index in range(6)))
    return open_source(str(tmp_path / "folder"), "train")


def tar_source(tmp_path):
    for shard in range(2):
        pack(
            tmp_path / "tars" / f"{shard}.tar", {f"{index}.jpg": image_bytes(10 * shard + index) for index in range(3)}
        )
    return open_source(str(tmp_path / "tars"), "train")


def sample_source(tmp_path):
    return open_source("sample:6", "val")


@pytest.mark.parametrize("make", [folder_source, tar_source, sample_source])
def test_source_survives_pickling(tmp_path, make):
    source = make(tmp_path)
    source.read(0)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.ids == source.ids
    assert copy.description == source.description
    for index in range(len(source.ids)):
        np.testing.assert_array_equal(np.asarray(copy.read(index)), np.asarray(source.read(index)))


@pytest.mark.parametrize(
    "method",
    # A worker of a fork server inherits nothing, as a spawned one, which would import torch first.
    ["fork", pytest.param("forkserver", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("make", [folder_source, tar_source, sample_source])
def test_source_reads_the_same_in_worker_processes(tmp_path, make, method):
    source = make(tmp_path)
    source.read(0)  # whatever is held open or cached before the workers start must not be shared by accident
    multiprocessing.set_forkserver_preload(["torch.utils.data", "theia.extraction.sources"])
    loader = DataLoader(_Read(source), batch_size=None, num_workers=2, multiprocessing_context=method)
    loaded = [np.asarray(image) for image in loader]
    assert len(loaded) == len(source.ids)
    for index, image in enumerate(loaded):
        np.testing.assert_array_equal(image, np.asarray(source.read(index)))


def test_description_does_not_depend_on_where_the_images_lie(tmp_path, monkeypatch):
    write(tmp_path / "here" / "set", "a.jpg")
    (tmp_path / "there").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here" / "set")
    descriptions = [
        open_source(place, "train").description for place in (str(tmp_path / "there" / "set"), "../set", ".")
    ]
    assert descriptions == [{"kind": "folder", "name": "set"}] * 3


@pytest.mark.skipif(HAS_HEIF, reason="HEIC counts as an image where pillow-heif is installed")
def test_without_its_package_heic_is_passed_over_with_what_to_install(tmp_path, caplog):
    write(tmp_path, "a.jpg", "b.heic")
    with caplog.at_level(logging.INFO, "theia"):
        assert open_source(str(tmp_path), "train").ids == ["a.jpg"]
    assert passed_over(caplog) == ("WARNING", "1 .heic (to read them: pip install pillow-heif)")


# Lists of paths, and several places


def test_a_list_names_images_relative_to_itself(tmp_path):
    contents = write(tmp_path / "sets", "x/a.png", "y/b.png", "c.png")
    (tmp_path / "sets/some.txt").write_text("y/b.png\n\nx/a.png\n")
    source = open_source(str(tmp_path / "sets/some.txt"), "train", labels=True)
    assert source.ids == ["y/b.png", "x/a.png"]
    assert source.labels == [1, 0]
    assert_reads(source, {name: contents[name] for name in source.ids})


def test_a_list_with_a_repeated_or_a_missing_image_is_said(tmp_path):
    write(tmp_path, "a.png")
    (tmp_path / "twice.txt").write_text("a.png\na.png\n")
    with pytest.raises(ImageError, match=r"twice\.txt names a\.png twice"):
        open_source(str(tmp_path / "twice.txt"), "train")
    (tmp_path / "missing.txt").write_text("gone.png\n")
    with pytest.raises(UnreadableImageError, match="No such file"):
        open_source(str(tmp_path / "missing.txt"), "train").read(0)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ImageError, match="UTF-8"):
        open_source(str(tmp_path / "binary.txt"), "train")


def test_several_places_are_joined_under_their_names(tmp_path):
    first, second = write(tmp_path / "one", "a.png", "b.png"), write(tmp_path / "deep/two", "a.png")
    source = open_source([str(tmp_path / "one"), f"other={tmp_path / 'deep/two'}", "sample:2"], "train")
    assert source.ids[:3] == ["one/a.png", "one/b.png", "other/a.png"]
    assert len(source.ids) == 5
    source = pickle.loads(pickle.dumps(source))
    assert same(source.read(1), first["b.png"])
    assert same(source.read(2), second["a.png"])
    assert np.array_equal(np.asarray(source.read(4)), np.asarray(open_source("sample:2", "train").read(1)))


def test_two_places_of_one_name_need_another(tmp_path):
    write(tmp_path / "a/train", "x.png")
    write(tmp_path / "b/train", "x.png")
    with pytest.raises(ConfigError, match=r"would be called 'train'.*NAME="):
        open_source([str(tmp_path / "a/train"), str(tmp_path / "b/train")], "train")


def test_joined_labels_must_number_classes_alike(tmp_path):
    write(tmp_path / "one", "cat/a.png", "dog/b.png")
    write(tmp_path / "two", "dog/a.png", "cat/b.png")
    source = open_source([str(tmp_path / "one"), str(tmp_path / "two")], "train", labels=True)
    assert (source.classes, list(source.labels)) == (["cat", "dog"], [0, 1, 0, 1])
    write(tmp_path / "three", "eel/a.png")
    with pytest.raises(ImageError, match="one and three number their classes differently"):
        open_source([str(tmp_path / "one"), str(tmp_path / "three")], "train", labels=True)


def test_images_of_one_sample_share_its_label(tmp_path):
    pack(
        tmp_path / "a.tar",
        {
            "7.left.png": image_bytes(0),
            "7.right.png": image_bytes(1),
            "7.cls": b"3",
            "8.png": image_bytes(2),
            "8.cls": b"1",
        },
    )
    source = open_source(str(tmp_path / "a.tar"), "train", labels=True)
    assert list(zip(source.ids, source.labels, strict=True)) == [
        ("a.tar/7.left.png", 3), ("a.tar/7.right.png", 3), ("a.tar/8.png", 1),
    ]  # fmt: skip
