"""Copies whole stores to and from other places: anything that fsspec opens, such as object stores and other machines.

A place that is being written holds a file that names every shard with its checksum, from the first byte on, and the
manifest only at the end. So an interrupted push goes on, and a store that is not whole is not taken for one.
"""

import posixpath
import shlex
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from theia.errors import StoreError
from theia.store.components import basis_path
from theia.store.disk import file_size, writing
from theia.store.manifest import (
    Manifest,
    check_images,
    check_teacher,
    edit_manifest,
    manifest_bytes,
    parse_manifest,
    read_manifest,
)
from theia.store.schema import IMAGE, MANIFEST, STATISTICS, SetRecord, SplitRecord, statistics_path
from theia.store.sets import SKIPPED, SetLayout, split_layouts
from theia.utils.files import file_sha256, open_url, publish, remove_stale, sync, temporary_path

_PUSHING = "pushing.json"
_PULLING = ".pulling.json"


@dataclass(frozen=True)
class Transferred:
    """What a push or a pull did.

    Attributes:
        files: Number of files that belong to the store.
        copied: Number of files that were copied now; the others were there.
        bytes: Number of bytes that were copied now.
    """

    files: int
    copied: int
    bytes: int


@dataclass(frozen=True)
class _File:
    """A file of a store: its place below the store's folder, and of a shard its size and checksum."""

    name: str
    bytes: int | None = None
    sha256: str | None = None


def push(root: Path, url: str, workers: int = 8) -> Transferred:
    """Copies a store to another place, in whole files, several at a time. The same call goes on after an interruption.

    What the place has besides, such as another teacher of the same images, stays there.

    Args:
        root: Folder of the store. All that was extracted must be complete.
        url: Place to copy it to, such as ``s3://bucket/stores/imagenet``.
        workers: Number of files that are copied at once.

    Raises:
        StoreError: If the store is unfinished or one of its files is damaged, the place holds another store, or it
            cannot be written.
        ConfigError: If what opens such places is not installed.
    """
    manifest = read_manifest(root)
    _check_complete(manifest, root)
    files = list(_files(root, manifest))
    place = _Place(url)
    there = place.read(MANIFEST)
    earlier = there or place.read(_PUSHING)
    known: dict[str, _File] = {}
    if earlier is not None:
        former = parse_manifest(f"{url}/{MANIFEST}", earlier)
        for split, record in former.splits.items():
            if split in manifest.splits:
                check_images(Path(url), split, record.images, manifest.splits[split].images)
        known = {file.name: file for file in _files(root, former)}
        if there is not None:  # of an interrupted push, not all files need be there
            manifest = Manifest({**former.splits, **_with_sets_of(former, manifest)})
    # Content of the file that says what is being written; it identifies the files of an earlier, interrupted push.
    content = manifest_bytes(manifest)
    if there != content:
        place.write(_PUSHING, content)

    def copy(file: _File) -> int:
        path = root / file.name
        size = file_size(path)
        if size is None:
            raise StoreError(f"{path} is missing. See: theia store verify {shlex.quote(str(root))}")
        if file.sha256 is not None:
            if known.get(file.name) == file and place.size(file.name) == file.bytes:
                return 0
            if size != file.bytes or file_sha256(path) != file.sha256:
                raise StoreError(
                    f"{path} is not what the manifest says. See: theia store verify {shlex.quote(str(root))}"
                )
        place.put(path, file.name)
        return size

    done = _all(files, copy, workers, f"push to {url}")
    place.write(MANIFEST, content)
    place.remove(_PUSHING)
    return done


def pull(
    url: str, root: Path, teachers: Sequence[str] | None = None, splits: Sequence[str] | None = None, workers: int = 8
) -> Transferred:
    """Copies a store from another place, and compares every shard with its checksum.

    The same call goes on after an interruption.

    Args:
        url: Place of the store.
        root: Folder to copy it to: a new one, or one that holds other teachers of the same images.
        teachers: Teachers to copy, by default all.
        splits: Splits to copy, by default all.
        workers: Number of files that are copied at once.

    Raises:
        StoreError: If there is no whole store, it lacks a teacher or split, the folder holds other images, a file
            arrives damaged, or it cannot be read or written.
        ConfigError: If what opens such places is not installed.
    """
    place = _Place(url)
    content = place.read(MANIFEST)
    if content is None:
        unfinished = place.read(_PUSHING) is not None
        raise StoreError(
            f"{url} holds a store that is still being pushed. Run its 'theia store push' to its end."
            if unfinished
            else f"{url} is not a feature store: it has no {MANIFEST}. Give the place that 'theia store push' wrote."
        )
    there = parse_manifest(f"{url}/{MANIFEST}", content)
    wanted = Manifest({name: _chosen(url, there, name, teachers) for name in _known(url, there, splits)})
    marker = root / _PULLING
    if not (root / MANIFEST).exists() and not marker.exists() and root.is_dir() and any(root.iterdir()):
        raise StoreError(f"{root} holds something other than a store. Give another folder.")
    if (root / MANIFEST).exists():
        _check_same(root, read_manifest(root), wanted)
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        if not (root / MANIFEST).exists():
            marker.write_bytes(b"")

    def copy(file: _File) -> int:
        path = root / file.name
        if file.sha256 is not None and file_size(path) == file.bytes and file_sha256(path) == file.sha256:
            return 0
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_stale(path.parent, path.name)
            temporary = temporary_path(path)
        place.get(file.name, temporary)
        with writing(path):
            size = temporary.stat().st_size
            if file.sha256 is not None and file_sha256(temporary) != file.sha256:
                temporary.unlink()
                raise StoreError(
                    f"{url}/{file.name} is not what its manifest says. Run the same command again; if it stays so, the "
                    "file is damaged there: push it again."
                )
            sync(temporary)
            publish(temporary, path)
        return size

    done = _all(list(_files(root, wanted)), copy, workers, f"pull from {url}")
    with edit_manifest(root) as manifest:
        _check_same(root, manifest, wanted)
        manifest.splits |= _with_sets_of(manifest, wanted)
    marker.unlink(missing_ok=True)
    return done


def _check_complete(manifest: Manifest, root: Path) -> None:
    if not manifest.splits:
        raise StoreError(f"{root} holds nothing yet. Extract into it first.")
    for split, record in manifest.splits.items():
        for name, part in record.sets.items():
            if not part.complete:
                raise StoreError(
                    f"{name!r} of split {split!r} in {root} is unfinished. Run its theia extract to its end before."
                )


def _files(root: Path, manifest: Manifest) -> Iterator[_File]:
    for split, record in manifest.splits.items():
        for layout in split_layouts(root, split, record):
            for shard in layout.record.shards:
                yield _File(_below(layout, layout.path(shard.index)), shard.bytes, shard.sha256)
            if split == "train" and layout.name != IMAGE:
                yield _File(f"{STATISTICS}/{statistics_path(root, layout.name).name}")
            if layout.record.basis is not None:
                yield _File(f"{STATISTICS}/{basis_path(root, layout.name, layout.record.basis).name}")
        yield _File(f"{split}/{SKIPPED}.csv")


def _below(layout: SetLayout, path: Path) -> str:
    return path.relative_to(layout.root).as_posix()


def _known(url: str, there: Manifest, splits: Sequence[str] | None) -> list[str]:
    missing = [name for name in splits or () if name not in there.splits]
    if missing:
        raise StoreError(f"{url} has no split {missing[0]!r}. It has: {', '.join(there.splits)}.")
    return list(splits or there.splits)


def _chosen(url: str, there: Manifest, split: str, teachers: Sequence[str] | None) -> SplitRecord:
    record = there.splits[split]
    has = [name for name in record.sets if name != IMAGE]
    missing = [name for name in teachers or () if name not in has]
    if missing:
        raise StoreError(f"{url} has no teacher {missing[0]!r} in split {split!r}. It has: {', '.join(has)}.")
    sets: dict[str, SetRecord] = {name: record.sets[name] for name in (IMAGE, *(teachers or has))}
    return replace(record, sets=sets)


def _check_same(root: Path, here: Manifest, wanted: Manifest) -> None:
    for split, record in wanted.splits.items():
        former = here.splits.get(split)
        if former is None:
            continue
        check_images(root, split, former.images, record.images)
        for name in former.sets.keys() & record.sets.keys():
            check_teacher(root, split, name, former.sets[name], record.sets[name])
            if former.sets[name].shards and former.sets[name].shards != record.sets[name].shards:
                raise StoreError(
                    f"{name!r} of split {split!r} in {root} has other files than the place has. Give another folder, "
                    f"or delete {root / split / name} to copy it anew."
                )


def _with_sets_of(former: Manifest, new: Manifest) -> dict[str, SplitRecord]:
    """The splits of a new manifest, with those sets that a former one has besides."""
    there = {name: record.sets for name, record in former.splits.items()}
    return {
        name: replace(record, sets={**there.get(name, {}), **record.sets}) for name, record in new.splits.items()
    }  # fmt: skip


def _all(files: Sequence[_File], copy: Callable[[_File], int], workers: int, label: str) -> Transferred:
    copied = total = 0
    size = sum(file.bytes or 0 for file in files)
    with (
        ThreadPoolExecutor(workers, "copy") as pool,
        tqdm(total=size, unit="B", unit_scale=True, desc=label, disable=None) as bar,
    ):
        futures: dict[Future[int], _File] = {pool.submit(copy, file): file for file in files}
        try:
            for future in as_completed(futures):
                moved = future.result()
                copied, total = copied + bool(moved), total + moved
                bar.update(futures[future].bytes or 0)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return Transferred(len(files), copied, total)


class _Place:
    """A folder that fsspec opens."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs, self._path = open_url(self.url)

    def read(self, name: str) -> bytes | None:
        """Content of a small file; ``None`` if it is not there."""
        with self._telling(name):
            try:
                return bytes(self._fs.cat_file(self._at(name)))
            except FileNotFoundError:
                return None

    def size(self, name: str) -> int | None:
        """Size of a file in bytes; ``None`` if it is not there."""
        with self._telling(name):
            try:
                return int(self._fs.info(self._at(name))["size"])
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file."""
        with self._telling(name):
            self._fs.makedirs(self._path, exist_ok=True)
            self._fs.pipe_file(self._at(name), content)

    def put(self, path: Path, name: str) -> None:
        """Copies a file there."""
        with self._telling(name):
            self._fs.makedirs(posixpath.dirname(self._at(name)), exist_ok=True)
            self._fs.put_file(str(path), self._at(name))

    def get(self, name: str, path: Path) -> None:
        """Copies a file from there."""
        with self._telling(name):
            self._fs.get_file(self._at(name), str(path))

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        with self._telling(name):
            if self._fs.exists(self._at(name)):
                self._fs.rm_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"

    @contextmanager
    def _telling(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # Every kind of place has errors of its own.
            raise StoreError(
                f"{self.url}/{name}: {type(error).__name__}: {error}. Whole files are kept; correct the address or the "
                "permissions, and run the same command again."
            ) from error
