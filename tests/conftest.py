"""Shared fixtures. The environment is set before torch is imported."""

import os
import tarfile

# Tests run side by side: one thread each is faster than two that fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A GPU's matrix products are the same in every run only with this, which is read before the first of a process.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Before scikit-learn: typing gives every union of int and float the order of the first one in a process, and by it the
# command line reads 3 as a number of batches or as a share of 3.0.
import lightning  # isort: skip  # noqa: F401

import hashlib
import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder.small import TEACHERS, small

from theia.encoder.encoder import Encoder
from theia.store.schema import ImageSet, hash_ids
from theia.store.writer import SplitWriter
from theia.types import TeacherSpec

IMAGE_SIZE = 32
# One square grid without CLS, one oblong grid with CLS.
SPECS = (
    TeacherSpec(name="alpha", channels=8, grid_hw=(4, 4), licence="MIT", weights="none"),
    TeacherSpec(name="beta", channels=5, grid_hw=(3, 6), licence="MIT", weights="none", has_cls=True),
)


def sample_id(split: str, row: int) -> str:
    return f"{split}/{row:05d}.png"


def write_split(
    root: Path,
    split: str,
    rows: int,
    dtype: str = "float16",
    labels: bool = True,
    classes: tuple[str, ...] = ("even", "odd"),
) -> None:
    """A split of random images; the features of a sample are a fixed linear function of its image's mean colours."""
    rng = np.random.default_rng(len(split))
    shard_size = 16
    ids = [sample_id(split, row) for row in range(rows)]
    images = ImageSet(
        source={"kind": "test"}, size=IMAGE_SIZE, resize="squash", listed=rows, ids_sha256=hash_ids(ids),
        shard_size=shard_size, classes=classes if labels else None,
    )  # fmt: skip
    writer = SplitWriter(root, split)
    writer.begin(images, SPECS, dtype, {"device": "cpu"})
    for index, start in enumerate(range(0, rows, shard_size)):
        count = min(shard_size, rows - start)
        coarse = rng.integers(0, 256, (count, 3, 2, 2), dtype=np.uint8)
        pixels = coarse.repeat(IMAGE_SIZE // 2, 2).repeat(IMAGE_SIZE // 2, 3)
        numbers = np.arange(start, start + count, dtype=np.int64) % 2
        writer.write_images(index, ids[start : start + count], pixels, numbers if labels else None, [])
        colours = coarse.reshape(count, -1).astype(np.float32) / 255
        for spec in SPECS:
            tokens = spec.grid_hw[0] * spec.grid_hw[1]
            mixing = np.random.default_rng(spec.channels).normal(size=(12, tokens * spec.channels)).astype(np.float32)
            patches = (colours @ mixing).reshape(count, tokens, spec.channels)
            with writer.open_shard(spec.name, index) as shard:
                shard.append(patches, patches.mean(1) if spec.has_cls else None)
    writer.finish()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store with 80 training and 20 validation samples of two teachers. Not to be changed by a test."""
    root = tmp_path_factory.mktemp("stores") / "store"
    write_split(root, "train", 80)
    write_split(root, "val", 20)
    return root


@pytest.fixture
def make_split() -> Callable[..., None]:
    """``make_split(root, split, rows, ...)`` writes one split; for tests that change a store."""
    return write_split


@pytest.fixture(scope="session", autouse=True)
def _plain_cpu() -> Iterator[None]:
    """Training is in float32 unless a test asks for something else, also on a CPU with instructions for bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("theia.cli.trainer.has_bfloat16_cpu", lambda: False)
        yield


@pytest.fixture(autouse=True)
def _logging_as_found() -> Iterator[None]:
    """The command line sets up logging for a whole process; a test must not leave that to the next."""
    logger = logging.getLogger("theia")
    yield
    logger.handlers, logger.propagate = [], True


@pytest.fixture(autouse=True)
def _signals_as_found() -> Iterator[None]:
    """A command that is stopped turns signals off for the rest of its process, which goes on here; children inherit."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    found = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in found.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def _parser() -> dict[str, Any]:
    """Of ``theia fit``, ``validate`` and ``test``, once it is made."""
    return {}


@pytest.fixture
def one_parser(_parser: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Has commands that train or score share one parser: to make it takes longer than all else of one that refuses."""
    from theia.cli.lightning import TheiaCLI

    make = TheiaCLI.setup_parser

    def setup_parser(self: TheiaCLI, *args: Any, **kwargs: Any) -> None:
        if not _parser:
            make(self, *args, **kwargs)
            names = ("parser", "_subcommand_parsers", "_subcommand_method_arguments")
            _parser.update({name: getattr(self, name) for name in names})
        for parser in _parser["_subcommand_parsers"].values():
            parser.exit_on_error = True  # a sweep takes that of fit for its own
        vars(self).update(_parser)

    monkeypatch.setattr(TheiaCLI, "setup_parser", setup_parser)


@pytest.fixture
def encoder() -> Encoder:
    """A small encoder of two teachers, random in every parameter, with statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = Encoder(small())
        for parameter in built.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    for name, teacher in TEACHERS.items():
        channels = teacher["channels"]
        built.distiller.set_statistics(name, torch.arange(channels) * 10.0, torch.arange(channels) + 1.0)
    return built


@pytest.fixture
def checkpoint(encoder: Encoder, tmp_path: Path) -> Callable[..., Path]:
    """Writes that encoder to a file as ``theia fit`` does, changed by the arguments."""

    def write(**changes: object) -> Path:
        state = {f"distiller.{name}": value for name, value in encoder.distiller.state_dict().items()}
        content = {
            "hyper_parameters": {**encoder.architecture.as_dict(), "learning_rate": 1e-3},
            "state_dict": {**state, "metrics.val.clip": torch.zeros(1)},
            "global_step": 3,
            **changes,
        }
        torch.save(content, tmp_path / "last.ckpt")
        return tmp_path / "last.ckpt"

    return write


@pytest.fixture(scope="session")
def written_by_lerobot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small data sets that LeRobot 0.4.4 (v3.0) and 0.3.3 (v2.1) wrote; see ``trajectories/record.py``."""
    folder = tmp_path_factory.mktemp("lerobot")
    with tarfile.open(Path(__file__).parent / "trajectories" / "lerobot.tar.xz") as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of an object store on this machine, which lives in memory."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of an empty bucket of that object store, which a user's variables of the environment lead to."""
    import s3fs

    for name, value in (("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test"), ("ENDPOINT_URL", s3_server)):
        monkeypatch.setenv(f"AWS_{name}", value)
    s3fs.S3FileSystem.clear_instance_cache()
    name = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:32]
    s3fs.S3FileSystem().mkdir(name)
    yield f"s3://{name}"
    s3fs.S3FileSystem.clear_instance_cache()
