"""How bytes get from files into buffers: from the page cache if they are there, otherwise by several reads at once.

A read that has to wait for a disk or a server takes from a tenth of a millisecond to several milliseconds, whatever its
size, so one after the other would leave both idle. Rows that are in the page cache are copied without any thread.
"""

import os
import resource
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from errno import EINVAL
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from theia.store.disk import unreadable
from theia.store.shard import read_whole

# Reads that a worker has under way at a time. A local disk needs 8 to 32; a server that answers in a millisecond
# then gives 16 rows in a millisecond, and several workers that many times more.
AT_ONCE = 16
# More than any store has, but not unlimited: some programs close every descriptor that they could have open.
_MANY_FILES = 1 << 16
# Of offset, length and address of a direct read. Some disks need 4096 bytes, and refuse the rows that do not fit.
_ALIGNMENT = 512
# Systems other than Linux lack both.
_DIRECT = getattr(os, "O_DIRECT", 0)
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)


class Read(NamedTuple):
    """One row of one field.

    Attributes:
        path: Path of the file.
        target: Bytes to fill.
        offset: First byte to read.
    """

    path: str
    target: memoryview
    offset: int


class Files:
    """The open files of one process, from which several of its threads may read."""

    def __init__(self) -> None:
        # A file that the cache drops is closed when the last thread that uses it lets go of it, so a thread must hold
        # the file itself, not only its descriptor.
        self._open = lru_cache(_open_files_at_most())(_File)
        self._threads: ThreadPoolExecutor | None = None

    def read(self, read: Read, direct: bool = False) -> None:
        """Fills one buffer.

        Args:
            read: Place and buffer.
            direct: Whether to read past the page cache. Where that is not possible, the page cache is used.

        Raises:
            StoreError: If the file cannot be read to its end.
        """
        path, target, offset = read
        try:
            if direct and offset % _ALIGNMENT == len(target) % _ALIGNMENT == 0:
                try:
                    file = self._open(path, _DIRECT)
                    return read_whole(file.descriptor, target, offset, path)
                except OSError as error:
                    if error.errno != EINVAL:  # the answer to a disk or a buffer with another alignment
                        raise
            file = self._open(path)
            read_whole(file.descriptor, target, offset, path)
        except OSError as error:
            raise unreadable(path, error) from error

    def read_all(self, reads: Sequence[Read], direct: bool, at_once: int) -> None:
        """Fills buffers.

        Args:
            reads: Places and buffers.
            direct: Whether to read past the page cache, where that is possible.
            at_once: Number of reads that may be under way at a time; with 1, there are no threads.

        Raises:
            StoreError: If a file cannot be read to its end. No buffer is written to after that.
        """
        if at_once == 1:
            for read in reads:
                self.read(read, direct)
            return
        waiting = reads if direct else [read for read in reads if not self._from_cache(read)]
        if not waiting:
            return
        if self._threads is None:
            self._threads = ThreadPoolExecutor(at_once)
        parts = [waiting[start::at_once] for start in range(min(at_once, len(waiting)))]
        futures = [self._threads.submit(self.read_all, part, direct, 1) for part in parts]
        wait(futures)
        for future in futures:
            future.result()

    def _from_cache(self, read: Read) -> bool:
        """Fills a buffer if that does not mean waiting; if it does, Linux starts to fetch the bytes from a local disk.

        Network file systems refuse, and an error comes again when the same bytes are read without haste.
        """
        if not _NOWAIT:
            return False
        with suppress(OSError):
            file = self._open(read.path)
            return os.preadv(file.descriptor, (read.target,), read.offset, _NOWAIT) == len(read.target)
        return False


class _File:
    """An open file that is closed with its last reference."""

    __slots__ = ("descriptor",)

    def __init__(self, path: str, more_flags: int = 0) -> None:
        self.descriptor = -1
        flags = os.O_RDONLY | os.O_CLOEXEC
        try:
            self.descriptor = os.open(path, flags | more_flags)
        except OSError as error:
            if not more_flags or error.errno != EINVAL:  # the answer of a file system without direct reads
                raise
            self.descriptor = os.open(path, flags)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _open_files_at_most() -> int:
    # Random order over a large store touches every file again and again. With the usual limit of 1024 descriptors,
    # files would be closed and opened all the time.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, _MANY_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    # A quarter of the limit: there are train and validation splits, and everything else that a process opens.
    return max((_MANY_FILES if soft == resource.RLIM_INFINITY else soft) // 4, 16)


def memory_bytes(groups: Path = Path("/proc/self/cgroup"), limits: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process and the page cache of its files may take: the machine's, or less in a container or job.

    Args:
        groups: File with the control groups of the process.
        limits: Folder with the limits of all groups.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError):  # no Linux, or nobody may look
        for line in groups.read_text().splitlines():
            _, kinds, group = line.split(":", 2)
            if kinds == "":
                root, name = limits, "memory.max"
            elif "memory" in kinds.split(","):
                root, name = limits / "memory", "memory.limit_in_bytes"
            else:
                continue
            inner = root / group.strip("/")
            for folder in (inner, *inner.parents):
                with suppress(OSError, ValueError):  # no such limit, or "max"
                    memory = min(memory, int((folder / name).read_text()))
                if folder == root:
                    break
    return memory
