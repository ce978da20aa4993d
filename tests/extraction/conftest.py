"""An extraction in this process: images of known pixels and the tiny plugin."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extraction.tiny_plugin import SIZE, install, write_images

from theia import registry
from theia.extraction.config import ExtractConfig


@pytest.fixture
def never_waits() -> Iterator[None]:
    """Ends a test whose reader waits for a FIFO, which would be for ever."""

    def give_up(*_: object) -> None:
        pytest.fail("something waits")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    install(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    registry.find.cache_clear()
    yield
    registry.find.cache_clear()


@pytest.fixture
def pixels(tmp_path: Path) -> dict[str, np.ndarray]:
    return write_images(tmp_path / "images", 10)


@pytest.fixture
def config(tmp_path: Path, plugin: None, pixels: dict[str, np.ndarray]) -> Callable[..., ExtractConfig]:
    def build(**changes: Any) -> ExtractConfig:
        options: dict[str, Any] = {
            "images": str(tmp_path / "images"),
            "teachers": "pooled",
            "store": tmp_path / "store",
            "size": SIZE,
            "shard_size": 4,
            "batch_size": 3,
            "workers": 0,
            "accelerator": "cpu",
            "devices": 1,
        }
        return ExtractConfig(**(options | changes))

    return build
