"""The encoder: a trained student as its user sees it."""

import operator
from collections.abc import Callable, Iterable
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from theia.errors import ConfigError, ImageError, ShapeError, UnknownTeacherError
from theia.models.architecture import Architecture
from theia.models.backbone import StudentTokens

Pool = Literal["none", "mean", "max", "cls"]
Images = Tensor | NDArray[Any]


class Encoder(nn.Module):
    """A trained student with its translators.

    Images are RGB, ``(B, H, W, 3)`` or ``(B, 3, H, W)``, as tensor or numpy array, uint8 from 0 to 255 or floating
    point from 0 to 1. Both sides must be multiples of the backbone's stride, 16 pixels for the paper's. Sizes other
    than the training size work too, except in :meth:`translate` and with a few timm backbones. The encoder normalises
    the pixels itself.

    Every plain call checks the range of floating-point images; uint8 images need no check. On a GPU the check makes the
    host wait for the GPU, so a control loop should pass uint8 images or compile the encoder. There is no check where
    values cannot be read: in code that is compiled, exported, traced or captured in a CUDA graph, under ``torch.func``
    (``vmap``, ``grad``, ...), under modes that intercept every operation, and for fake and meta tensors.

    The student's parameters are trainable from the start, the translators' only after
    ``encoder.distiller.translators.requires_grad_()``: a call does not use them, and distributed training would wait
    for their gradients.

    Args:
        architecture: Architecture to build, with untrained weights; :func:`theia.load` gives a trained encoder.
        pool: Pooling that a call uses by default.

    Attributes:
        distiller: Student, translators and the statistics of the teachers' features.
    """

    def __init__(self, architecture: Architecture, pool: Pool = "none") -> None:
        super().__init__()
        self.architecture = architecture
        self.distiller = architecture.build()
        self.freeze_translators()
        self.pool = check_pool(pool)
        self._compile: dict[str, Any] | None = None
        self._compiled: Callable[[Tensor], StudentTokens] | None = None
        self.eval()

    @property
    def width(self) -> int:
        """Channels ``C`` of a token."""
        return self.distiller.student.width

    @property
    def depth(self) -> int:
        """Number of transformer blocks, or of stages for another kind of backbone."""
        return len(self.distiller.student.backbone.blocks())

    @property
    def image_size(self) -> int:
        """Height and width of a training image, in pixels."""
        return self.distiller.student.backbone.image_hw[0]

    @property
    def teachers(self) -> list[str]:
        """Names of the teachers whose features the model predicts."""
        return self.distiller.teachers

    def forward(self, images: Images, pool: Pool | None = None) -> Tensor:
        """Features of a batch of images.

        Args:
            images: Images, as the class describes them.
            pool: Pooling: ``"mean"`` or ``"max"`` over the patch tokens, the ``"cls"`` token, or ``"none"`` for all
                patch tokens. By default the model's own.

        Returns:
            Features, shape ``(B, C)``, or ``(B, N, C)`` without pooling.

        Raises:
            ShapeError: If the images have the wrong shape or size.
            ImageError: If their type or range is wrong.
            ConfigError: If there is no such pooling, or no CLS token.
        """
        return self.pooled(self.forward_features(images), self.pool if pool is None else pool)

    def pooled(self, tokens: StudentTokens, pool: Pool) -> Tensor:
        """Pools tokens as :meth:`forward` does.

        Raises:
            ConfigError: If there is no such pooling, or no CLS token.
        """
        check_pool(pool)
        if pool == "cls":
            if tokens.cls is None:
                raise ConfigError("This model has no CLS token. Choose pool='mean', 'max' or 'none'.")
            return tokens.cls
        if pool == "mean":
            return tokens.patches.mean(1)
        if pool == "max":
            return tokens.patches.amax(1)
        return tokens.patches

    def forward_features(self, images: Images) -> StudentTokens:
        """All tokens, after the final layer norm and the lift, if the student has one.

        Args:
            images: Images, as the class describes them.

        Raises:
            ShapeError: If the images have the wrong shape or size.
            ImageError: If their type or range is wrong.
        """
        return self._encode(self._prepared(images))

    def forward_intermediates(
        self, images: Images, indices: int | Iterable[int] | None = None, norm: bool = False
    ) -> list[StudentTokens]:
        """Tokens after some of the blocks, before the lift if the student has one.

        Args:
            images: Images, as the class describes them.
            indices: Block numbers, counted from 0, or a single one; negative numbers count from the end. All blocks by
                default.
            norm: Whether to apply the final layer norm to each result.

        Returns:
            One result for each index, in the order of the indices.

        Raises:
            ShapeError: If the images have the wrong shape or size.
            ImageError: If their type or range is wrong.
            ConfigError: If there is no such block, or the norm is asked for of blocks before a wide last one.
        """
        wanted = range(self.depth) if indices is None else one_or_several(indices)
        return self.distiller.student.forward_intermediates(self._prepared(images), wanted, norm)

    def translate(
        self, images: Images, teachers: str | Iterable[str] | None = None, denormalize: bool = False
    ) -> dict[str, Tensor]:
        """Predicts the teachers' features.

        Args:
            images: Images of the training size, as the class describes them.
            teachers: Names of the teachers, or a single name; all by default.
            denormalize: Whether to give the features on the teacher's own scale instead of normalised per channel.

        Returns:
            Features by teacher name, shape ``(B, N, C)`` with the teacher's tokens and channels, row by row.

        Raises:
            UnknownTeacherError: If the model has no translator for a teacher.
            ShapeError: If the images have the wrong shape or size.
            ImageError: If their type or range is wrong.
            ConfigError: If ``denormalize`` needs statistics that the model lacks, as all published models do.
        """
        names = self.teachers if teachers is None else one_or_several(teachers)
        unknown = [name for name in names if name not in self.teachers]
        if unknown:
            raise UnknownTeacherError(
                f"This model has no translator for {unknown[0]!r}. It has: {', '.join(self.teachers)}."
            )
        if denormalize:
            for name in names:
                self.distiller.denormalize(name, torch.zeros(1, 1, 1, device=self._device))
        tokens, read = self.distiller.encode(self._prepared(images), self._encode)
        translations = {name: self.distiller.translators[name](read, tokens.grid) for name in names}
        if denormalize:
            return {name: self.distiller.denormalize(name, value) for name, value in translations.items()}
        return translations

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """The size nearest to a given one that the encoder takes, in pixels.

        Args:
            height: Height of an image, in pixels.
            width: Width of the image, in pixels.
        """
        return self.distiller.student.backbone.nearest_size(height, width)

    def compile(self, **options: Any) -> None:
        """Compiles the student at its first use, and again for each new batch shape.

        Args:
            options: Options of ``torch.compile``.
        """
        self._compile, self._compiled = {"dynamic": False, **options}, None

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and pickles, without compiled code, which belongs to the parameters of the original."""
        return {**self.__dict__, "_compiled": None}

    def freeze(self) -> "Encoder":
        """Freezes every parameter, those of the translators included; returns the encoder."""
        self.requires_grad_(False)
        return self

    def freeze_translators(self) -> "Encoder":
        """Freezes the translators alone, as they are from the start; returns the encoder."""
        self.distiller.translators.requires_grad_(False)
        self.distiller.cls_translators.requires_grad_(False)
        return self

    def unfreeze(self, last_n_blocks: int | None = None) -> "Encoder":
        """Makes the student trainable; returns the encoder.

        It is trainable from the start: call :meth:`freeze` first to train only a part of it. The translators stay as
        they are: ``encoder.distiller.translators.requires_grad_()`` unfreezes them.

        Args:
            last_n_blocks: Number of blocks (or stages) before the output to unfreeze, together with the final norm and
                the lift. By default everything, patch embedding, positions and tokens included. What was trainable
                stays so.

        Raises:
            ConfigError: If the encoder has fewer blocks.
        """
        student = self.distiller.student
        if last_n_blocks is None:
            student.unfreeze()
            return self
        try:
            count = operator.index(last_n_blocks)
        except TypeError:
            count = -1
        if not 0 <= count <= self.depth:
            raise ConfigError(f"last_n_blocks is {last_n_blocks!r}; this encoder has {self.depth} blocks.")
        student.unfreeze(count)
        return self

    def _encode(self, prepared: Tensor) -> StudentTokens:
        encode = self.distiller.student.encode
        if self._compile is not None and self._compiled is None:
            self._compiled = torch.compile(encode, **self._compile)
        return (self._compiled or encode)(prepared)

    def _prepared(self, images: Images) -> Tensor:
        return to_channels_first(images, self._device)

    @property
    def _device(self) -> torch.device:
        return self.distiller.student.pixel_mean.device


def check_pool(pool: str) -> Pool:
    """Returns the pooling, once it is known to be valid.

    Raises:
        ConfigError: If there is no such pooling.
    """
    if pool not in get_args(Pool):
        raise ConfigError(f"There is no pooling {pool!r}. Choose one of: {', '.join(get_args(Pool))}.")
    return cast(Pool, pool)


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WANTED = "An encoder takes uint8 from 0 to 255 or floating point from 0 to 1"


def to_channels_first(images: Tensor | NDArray[Any], device: torch.device) -> Tensor:
    """Brings a batch of images into the student's layout without changing its values.

    Args:
        images: RGB images, shape ``(B, H, W, 3)`` or ``(B, 3, H, W)``; uint8 from 0 to 255, or floating point from 0
            to 1.
        device: Device of the student.

    Returns:
        The same values, shape ``(B, 3, H, W)``, on the device.

    Raises:
        ShapeError: If they are not a batch of RGB images.
        ImageError: If their type is wrong, or the range of floating-point images, which is checked only where
            :func:`_has_values`; on a GPU, the check makes the host wait.
    """
    batch = _from_numpy(images) if isinstance(images, np.ndarray) else images
    if not isinstance(batch, Tensor):
        raise ShapeError(
            f"Images of type {type(images).__name__}; an encoder takes a batch in a torch tensor or a numpy array. "
            "Make one from a list of pictures: numpy.stack([numpy.asarray(picture) for picture in pictures])."
        )
    shape = tuple(batch.shape)
    # Decided one by one: a compiled graph for any size cannot compare two comparisons.
    of_colours = [axis for axis in (1, 3) if batch.ndim == 4 and shape[axis] == 3]
    if len(of_colours) != 1:
        raise ShapeError(
            f"Images of shape {shape}; an encoder takes a batch of RGB images, (B, H, W, 3) or (B, 3, H, W)."
            + _hint(shape)
        )
    if batch.dtype not in (torch.uint8, *FLOATS):
        raise ImageError(f"Images of type {batch.dtype}. {_WANTED}, of 16, 32 or 64 bits.")
    batch = batch.to(device)
    if batch.dtype != torch.uint8 and _has_values(batch) and batch.numel():
        _check_range(batch)
    return batch if of_colours == [1] else batch.permute(0, 3, 1, 2)


def one_or_several(values: Any) -> list[Any]:
    """A list of the given values: one for a single name or number; any other iterable is read once."""
    # Arrays and tensors without dimensions count as iterable, too.
    if isinstance(values, str | bytes) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        return [values]
    return list(values)


def _has_values(batch: Tensor) -> bool:
    """Whether this is a plain call, in which the values of a tensor can be read.

    They cannot in code that is compiled, exported, traced or captured, under ``torch.func``, and for fake and meta
    tensors: there Python cannot branch on a value, or the branch would be fixed for all later images.
    """
    return not (
        torch.compiler.is_compiling()
        or batch.is_meta
        or (batch.is_cuda and torch.cuda.is_current_stream_capturing())
        # torch has no public API to ask for these: torch.jit.trace, transforms such as vmap, modes such as make_fx.
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or type(batch).__torch_dispatch__ is not Tensor.__torch_dispatch__  # fake and wrapped ones
    )


def _from_numpy(images: NDArray[Any]) -> Tensor:
    if images.dtype.kind not in "uf" or images.dtype.itemsize > 8:
        raise ImageError(f"Images of type {images.dtype}. {_WANTED}, of 16, 32 or 64 bits.")
    native = images.astype(images.dtype.newbyteorder("="), copy=False)
    # torch takes no negative strides, which come from turning BGR to RGB, and warns of read-only memory.
    usable = native.flags.writeable and min(native.strides, default=0) >= 0
    return torch.from_numpy(native if usable else native.copy())


def _check_range(batch: Tensor) -> None:
    least, greatest = torch.stack(
        torch.aminmax(batch.detach())
    ).tolist()  # both at once: the host waits for a GPU only once
    # A cubic resize overshoots by a few hundredths unless somebody clamps it; the caller should learn of that, too.
    if not (least >= 0 and greatest <= 1):
        if least < 0:
            guess = "they look normalised already; the encoder does that itself"
        elif greatest <= 255:
            guess = "they look like 0 to 255; divide by 255 or give uint8"
        else:
            guess = "they are not images"
        if least != least or greatest != greatest:
            guess = "some values are not numbers"
        raise ImageError(f"Floating-point images from {least:g} to {greatest:g}: {guess}. {_WANTED}.")


def _hint(shape: tuple[int, ...]) -> str:
    if len(shape) == 3 and 3 in (shape[0], shape[2]):
        return " For one image, add a dimension: images[None]."
    if len(shape) == 4 and 4 in (shape[1], shape[3]):
        return " Drop the fourth channel."
    if len(shape) == 4 and 1 in (shape[1], shape[3]):
        return " Repeat the grey channel three times."
    return ""
