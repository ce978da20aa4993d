"""How a teacher computes: on which device, in which arithmetic, and what is said if it does not fit."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from theia.errors import ConfigError
from theia.teacher import Teacher, check_features
from theia.types import Precision, TeacherFeatures
from theia.utils.progress import readable_bytes


def choose(wanted: Precision | Literal["auto"], begun: str | None, on_gpu: bool, gpu_precision: Precision) -> Precision:
    """Precision of one teacher.

    Args:
        wanted: What the user asks for.
        begun: Precision of this teacher's features that are in the store already; ``None`` if there are none.
        on_gpu: Whether the teacher runs on a CUDA device.
        gpu_precision: The teacher's own choice for a GPU.
    """
    if wanted != "auto":
        return wanted
    if begun in get_args(Precision):
        return cast(Precision, begun)
    return gpu_precision if on_gpu else "32-true"


@contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """Sets the precision of float32 products for everything that runs in the block, and puts it back."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    # Both are about GPUs only. By default, convolutions would be in TF32 and matrix products would not.
    matmul.allow_tf32 = cudnn.allow_tf32 = precision != "32-true"
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def compute(teacher: Teacher, images: Tensor, precision: Precision) -> TeacherFeatures:
    """Runs a teacher and checks what it gives.

    Args:
        teacher: The teacher, on the device of the images.
        images: RGB, uint8, shape ``(B, 3, H, W)``.
        precision: Arithmetic of the teacher.

    Raises:
        ConfigError: If the memory of the device is too small.
        FeatureError: If the features do not fit the teacher's spec.
    """
    with fitting(teacher, len(images), images.device), arithmetic(precision, images.device):
        features: TeacherFeatures = teacher(images)
    check_features(teacher.spec, features, len(images))
    return features


def weight_bytes(teacher: Teacher) -> int:
    """Memory of a teacher's weights."""
    return sum(value.numel() * value.element_size() for value in teacher.state_dict().values())


def placed(teacher: Teacher, device: torch.device) -> Teacher:
    """Moves a teacher to a device.

    Raises:
        ConfigError: If its weights do not fit there.
    """
    with fitting(teacher, 0, device):
        return teacher.to(device)


@contextmanager
def fitting(teacher: Teacher, images: int, device: torch.device) -> Iterator[None]:
    """Says what a teacher needs and what there is, if the memory of a device is too small inside the block.

    Args:
        teacher: The teacher.
        images: Number of images in the batch; 0 if its weights are moved.
        device: The device.

    Raises:
        ConfigError: If it is too small.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        needs = f"its weights take {readable_bytes(weight_bytes(teacher))}"
        if images:
            needs += f", and it was given {images} images at a time"
        free, total = torch.cuda.mem_get_info(device)
        raise ConfigError(
            f"Teacher {teacher.spec.name!r} does not fit into the memory of {device}: {needs}; {readable_bytes(free)} "
            f"of {readable_bytes(total)} are free. Give it fewer images at a time (theia extract --batch_size, "
            "theia fit --data.teacher_batch_size), fewer teachers, or a larger device. What was finished is kept."
        ) from error
