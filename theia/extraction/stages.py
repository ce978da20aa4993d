"""The two stages of an extraction: images are decoded and stored, then teachers run over the stored images."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, ParamSpec

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from theia import registry
from theia.errors import ImageError, PluginError
from theia.extraction.computing import compute, fitting, placed
from theia.extraction.config import ExtractConfig
from theia.extraction.images import UnreadableImageError, to_square
from theia.extraction.processes import Processes
from theia.extraction.sources import ImageSource
from theia.store.features import ShardWriter, StoredRows, convert
from theia.store.schema import IMAGE, ImageSet, Resize
from theia.store.shard import Shard
from theia.store.writer import SplitWriter
from theia.teacher import Teacher
from theia.types import Precision, TeacherFeatures, TeacherSpec
from theia.utils.device import cores_of_process
from theia.utils.progress import Progress

P = ParamSpec("P")

_DECODED_TOGETHER = 16  # number of images
_REASONS_SHOWN = 5
_MOST_HELPERS = 4


class Handover:
    """Calls functions in one thread, in order, and is never more than one piece of work behind.

    The thread has one piece of work at a time and no queue: whoever gives the next piece waits until the last one is
    done. So memory is needed for two pieces, the one in work and the one that the caller prepares.

    As a context manager, it ends the thread on leaving, and raises the error of the last piece if there is no other
    error.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "handover")
        self._last: Future[object] | None = None

    def __enter__(self) -> "Handover":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish_last()
        finally:
            self._thread.shutdown()

    def give(self, work: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Hands over the next piece of work, once the last one is done.

        Args:
            work: Function to call in the thread.
            args: Positional arguments of the function.
            kwargs: Keyword arguments of the function.

        Raises:
            BaseException: Error that the last piece of work raised. The next piece is not begun then.
        """
        self._finish_last()
        # The executor drops its arguments a moment after the work is done, which is too late for a bound on memory.
        piece = [partial(work, *args, **kwargs)]
        self._last = self._thread.submit(lambda: piece.pop()())

    @contextmanager
    def done(self) -> Iterator[None]:
        """Makes sure that work given inside the block has ended, well or not, when the block is left for any reason.

        This is for work on something that the caller is going to close: an error of the caller, or Ctrl-C, must not
        take it away while the thread uses it.

        Raises:
            BaseException: Error of the last piece of work, if the block itself ends well.
        """
        try:
            yield
        except BaseException:
            if self._last is not None:
                wait([self._last])
            raise
        self._finish_last()

    def _finish_last(self) -> None:
        if self._last is None:
            return
        wait([self._last])
        # Kept until it is done, whatever interrupts the wait; its error is raised once.
        last, self._last = self._last, None
        last.result()


@dataclass(frozen=True)
class DecodedImages:
    """A few images that are neighbours in the list. The loader passes on an object of this kind as it is.

    Attributes:
        images: Pixels of the readable images, uint8, shape ``(n, 3, size, size)``.
        listed: Places of the readable images in the list.
        skipped: Id of each unreadable image, and the reason.
    """

    images: Tensor
    listed: list[int]
    skipped: list[tuple[str, str]]


class _Decoder(Dataset[DecodedImages | ImageError]):
    def __init__(self, source: ImageSource, size: int, resize: Resize) -> None:
        self._source, self._size, self._resize = source, size, resize

    def __getitem__(self, places: range) -> DecodedImages | ImageError:
        images = np.empty((len(places), 3, self._size, self._size), np.uint8)
        listed: list[int] = []
        skipped: list[tuple[str, str]] = []
        for place in places:
            try:
                images[len(listed)] = to_square(self._source.read(place), self._size, self._resize)
            except UnreadableImageError as error:
                skipped.append((self._source.ids[place], str(error)))
            except ImageError as error:
                return error  # raised in the main process: a worker's own traceback would bury the message
            else:
                listed.append(place)
        return DecodedImages(torch.from_numpy(images[: len(listed)]), listed, skipped)


def store_images(
    split: str,
    source: ImageSource,
    images: ImageSet,
    writer: SplitWriter,
    config: ExtractConfig,
    processes: Processes,
) -> None:
    """Decodes and stores the image shards of one split that this process is to make and that are missing.

    Raises:
        ImageError: As soon as more images are unreadable than ``max_skipped`` allows, or the file system fails.
    """
    missing = [shard for shard in processes.mine(images.shard_count) if not writer.has_shard(IMAGE, shard)]
    if not missing:
        return
    skipped_before = writer.skipped()
    pieces = {shard: _pieces(images, shard) for shard in missing}
    loader = DataLoader(
        _Decoder(source, images.size, images.resize),
        sampler=[piece for shard in missing for piece in pieces[shard]],
        batch_size=None,
        num_workers=config.workers,
        worker_init_fn=end_quietly,
    )
    decoded = iter(loader)
    total = sum(images.listed_in(shard) for shard in missing)
    skipped_here: list[tuple[str, str]] = []
    with Progress(f"{split}: images", total, shown=processes.rank == 0) as progress:
        for shard in missing:
            pixels = np.empty((images.listed_in(shard), 3, images.size, images.size), np.uint8)
            listed: list[int] = []
            skipped: list[tuple[str, str]] = []
            for _ in pieces[shard]:
                part = next(decoded)
                if isinstance(part, ImageError):
                    raise part
                pixels[len(listed) : len(listed) + len(part.listed)] = part.images.numpy()
                listed += part.listed
                skipped += part.skipped
                check_skipped(split, skipped_before + skipped_here + skipped, images, config.max_skipped)
                progress.advance(len(part.listed) + len(part.skipped), part.images.numel())
            writer.write_images(
                shard,
                [source.ids[place] for place in listed],
                pixels[: len(listed)],
                None if source.labels is None else np.array([source.labels[place] for place in listed], np.int64),
                skipped,
            )
            skipped_here += skipped


def end_quietly(_: int) -> None:
    """Keeps a decoding process silent when the main process, interrupted, leaves in the middle of a transfer.

    A thread of multiprocessing hands the images over, and prints what goes wrong there: it cannot know that it is the
    end.
    """

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, ConnectionError | EOFError):
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook


def check_skipped(split: str, skipped: Sequence[tuple[str, str]], images: ImageSet, max_skipped: float) -> None:
    """Stops the work when too many images are unreadable.

    Args:
        split: Name of the split.
        skipped: Id and reason of each unreadable image so far.
        images: Image set that they are from.
        max_skipped: Largest share of the list that may be unreadable.

    Raises:
        ImageError: If more images are unreadable, or all are.
    """
    if len(skipped) <= max_skipped * images.listed and len(skipped) < images.listed:
        return
    shown = "".join(f"\n  {sample}: {reason}" for sample, reason in skipped[:_REASONS_SHOWN])
    more = f"\n  and {len(skipped) - _REASONS_SHOWN} more" if len(skipped) > _REASONS_SHOWN else ""
    allowed = f"more than --max_skipped {max_skipped} allows" if len(skipped) < images.listed else "which is all"
    raise ImageError(
        f"{len(skipped)} of the {images.listed} images of split {split!r} cannot be read, {allowed}:{shown}{more}\n"
        "Repair or remove them and give a new --store, or allow a larger share with --max_skipped."
    )


def _pieces(images: ImageSet, shard: int) -> list[range]:
    start = shard * images.shard_size
    stop = start + images.listed_in(shard)
    return [range(first, min(first + _DECODED_TOGETHER, stop)) for first in range(start, stop, _DECODED_TOGETHER)]


def store_features(
    specs: Sequence[TeacherSpec],
    built: Mapping[str, Teacher],
    image_sets: Mapping[str, ImageSet],
    writers: Mapping[str, SplitWriter],
    precisions: Mapping[str, Mapping[str, Precision]],
    config: ExtractConfig,
    processes: Processes,
) -> None:
    """Runs teachers that are in memory together over those shards of this process that lack their features.

    While a teacher computes the features of one batch, those of the batch before are stored; there are never more. So
    memory is needed for two batches of features as a teacher gives them and for one of them in its stored form, on the
    CPU; on a GPU, for two of each there, and for two in stored form, pinned, in the memory of the host.

    Args:
        specs: Specs of these teachers, as process 0 found them.
        built: Those teachers that this process already has in memory, by name.
        image_sets: Image sets of the splits, by split.
        writers: Writers of the splits, by split. Every image shard is there.
        precisions: Precision of each teacher, by split and teacher.
        config: Options of the extraction.
        processes: The processes that share the work, and their devices.
    """
    missing: dict[str, dict[int, list[str]]] = {}
    for split, images in image_sets.items():
        lacking = {
            shard: [spec.name for spec in specs if not writers[split].has_shard(spec.name, shard)]
            for shard in processes.mine(images.shard_count)
        }
        missing[split] = {shard: names for shard, names in lacking.items() if names}
    needed = {name for shards in missing.values() for names in shards.values() for name in names}
    teachers = {
        spec.name: placed(built.get(spec.name) or _load(spec, config, processes), processes.device)
        for spec in specs
        if spec.name in needed
    }
    for split, shards in missing.items():
        if not shards:
            continue
        total = sum(image_sets[split].listed_in(shard) for shard in shards)
        label = f"{split}: {', '.join(name for name in teachers if any(name in names for names in shards.values()))}"
        with (
            Progress(label, total, shown=processes.rank == 0) as progress,
            _Threads(_helper_count(config, processes)) as threads,
        ):
            for shard, names in shards.items():
                chosen = {name: teachers[name] for name in names}
                rows = _store_shard(
                    shard, chosen, writers[split], precisions[split], config, processes.device, progress, threads
                )
                # Images that could not be read count as done, too.
                progress.advance(image_sets[split].listed_in(shard) - rows, 0)


def build_teacher(name: str, options: Mapping[str, Any] | None) -> Teacher:
    """Builds one teacher.

    Args:
        name: Name of the teacher.
        options: Arguments of its constructor.

    Raises:
        UnknownTeacherError: If the teacher is not installed.
        PluginError: If the teacher's plugin is broken.
        WeightsError: If the teacher's weights cannot be loaded.
    """
    # A plugin that draws weights must draw the same ones in every process and on every resume.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return registry.create(name, options)


def _load(spec: TeacherSpec, config: ExtractConfig, processes: Processes) -> Teacher:
    teacher = build_teacher(spec.name, config.teacher_options.get(spec.name))
    if teacher.spec != spec:
        raise PluginError(
            f"Teacher {spec.name!r} is {teacher.spec} in process {processes.rank}, but {spec} in process 0. "
            "Give all nodes the same weights and the same version of its plugin."
        )
    return teacher


class _Threads:
    """The threads beside the one that calls the teachers. All have ended when the block is left.

    Attributes:
        reading: Reads and pins the next batch of images.
        storing: Converts the features of the last batch, and waits for the helpers; syncs a shard that is complete.
        helpers: Compute checksums and write.
    """

    def __init__(self, helpers: int) -> None:
        self._stack = ExitStack()
        self.helpers = self._stack.enter_context(ThreadPoolExecutor(helpers, "handover-helper"))
        self.reading = self._stack.enter_context(ThreadPoolExecutor(1, "handover-reader"))
        self.storing = self._stack.enter_context(Handover())

    def __enter__(self) -> "_Threads":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


def _helper_count(config: ExtractConfig, processes: Processes) -> int:
    """More than four gain nothing: then the digest of a file, which one thread computes, is what takes longest."""
    here = max(1, processes.world // config.num_nodes)
    return min(_MOST_HELPERS, cores_of_process(here))


@torch.inference_mode()
def _store_shard(
    shard: int,
    teachers: Mapping[str, Teacher],
    writer: SplitWriter,
    precisions: Mapping[str, Precision],
    config: ExtractConfig,
    device: torch.device,
    progress: Progress,
    threads: _Threads,
) -> int:
    images = writer.images(shard)
    bases = {name: writer.basis(name) for name in teachers}
    row_bytes = sum(writer.row_bytes(name) for name in teachers)
    with ExitStack() as opened:
        files = {name: opened.enter_context(writer.open_shard(name, shard, threads.helpers)) for name in teachers}
        with threads.storing.done():
            for batch in _batches(images, config.batch_size, device, threads.reading):
                for name, teacher in teachers.items():
                    features = compute(teacher, batch, precisions[name])
                    if batch.device.type != "cuda":
                        threads.storing.give(_append_given, files[name], features)
                    else:
                        with fitting(teacher, len(batch), batch.device):
                            rows = convert(config.dtype, features.patches, features.cls, basis=bases[name]).to_host()
                        copied = torch.cuda.current_stream(batch.device).record_event()
                        threads.storing.give(_append, files[name], rows, copied)
                progress.advance(len(batch), row_bytes * len(batch))
        # A slow disk takes long to sync a shard; the first batch of the next shard need not wait for it.
        threads.storing.give(opened.pop_all().close)
    return images.rows


def _batches(images: Shard, batch_size: int, device: torch.device, reading: Executor) -> Iterator[Tensor]:
    """Batches of stored images on a device, uint8, shape ``(B, 3, H, W)``; the next one is read meanwhile."""

    def read(start: int) -> Tensor:
        batch = torch.from_numpy(images.read("data", start, start + batch_size))
        return batch.pin_memory() if device.type == "cuda" else batch

    # Batches are cut at the same rows in every run: a batch of another size may round differently.
    starts = range(0, images.rows, batch_size)
    ahead = reading.submit(read, 0)
    for start in starts:
        batch = ahead.result()
        if start + batch_size < images.rows:
            ahead = reading.submit(read, start + batch_size)
        yield batch.to(device, non_blocking=True)


def _append_given(file: ShardWriter, features: TeacherFeatures) -> None:
    file.append(features.patches.cpu(), None if features.cls is None else features.cls.cpu())


def _append(file: ShardWriter, rows: StoredRows, copied: torch.cuda.Event) -> None:
    copied.synchronize()
    file.append_stored(rows)
