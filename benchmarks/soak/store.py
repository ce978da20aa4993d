"""A feature store of random features with rows as large as those of CLIP, DINOv2 and ViT."""

from pathlib import Path

import numpy as np

from theia.store.schema import ImageSet, hash_ids
from theia.store.writer import SplitWriter
from theia.types import TeacherSpec

CHANNELS = {"clip": 1024, "dinov2": 1024, "vit": 1280}
_SHARD = 32


def write_store(root: Path, train: int = 256, val: int = 64, grid: int = 16, image_size: int = 224) -> None:
    """Writes both splits.

    Args:
        root: Folder of the store.
        train: Number of training images, 1.85 MB each at the default sizes.
        val: Number of held-out images.
        grid: Rows and columns of patch tokens.
        image_size: Height and width of an image, in pixels.
    """
    for split, count in {"train": train, "val": val}.items():
        _write_split(root, split, count, grid, image_size)


def _write_split(root: Path, split: str, count: int, grid: int, size: int) -> None:
    random = np.random.default_rng(len(split))
    ids = [f"{split}/{number:05d}" for number in range(count)]
    specs = [
        TeacherSpec(name=name, channels=channels, grid_hw=(grid, grid), licence="none", weights="none")
        for name, channels in CHANNELS.items()
    ]
    images = ImageSet(
        source={"kind": "random"},
        size=size,
        resize="squash",
        listed=count,
        ids_sha256=hash_ids(ids),
        shard_size=_SHARD,
        classes=None,
    )
    writer = SplitWriter(root, split)
    writer.begin(images, specs, "float16", {"device": "cpu"})
    for index, start in enumerate(range(0, count, _SHARD)):
        chosen = ids[start : start + _SHARD]
        writer.write_images(index, chosen, random.integers(0, 256, (len(chosen), 3, size, size), np.uint8), None, [])
        for spec in specs:
            with writer.open_shard(spec.name, index) as shard:
                shard.append(random.standard_normal((len(chosen), grid * grid, spec.channels), np.float32), None)
    writer.finish()
