"""The distiller: a student, and for each teacher a translator and the normalisation of its features."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from theia.errors import ConfigError, ShapeError
from theia.models.backbone import StudentTokens
from theia.models.scaler import FeatureScaler, Matrix, Normalizer, Statistic
from theia.models.student import Student
from theia.models.translators import Translator, TranslatorKind, on_grid


@dataclass(frozen=True)
class SomePatches:
    """The patches of each image that a student is given in training.

    Attributes:
        kept: Their numbers, row by row, int64, shape ``(B, K)``.
        mask: Token that the translators are given in place of each of the others, shape ``(C,)``.
    """

    kept: Tensor
    mask: Tensor

    def filled(self, tokens: StudentTokens) -> StudentTokens:
        """The tokens with all patches, of which ``(B, K, C)`` are given."""
        given = tokens.patches
        batch, _, width = given.shape
        every = self.mask.to(given.dtype).expand(batch, tokens.grid[0] * tokens.grid[1], width)
        patches = every.scatter(1, self.kept[..., None].expand(-1, -1, width), given)
        return StudentTokens(tokens.cls, tokens.registers, patches, tokens.grid)


class Distiller(nn.Module):
    """A student and, by teacher name, translators into each teacher's normalised features.

    Args:
        student: The student.
        teachers: Feature shapes by teacher name, ``{"channels": int, "grid_hw": [rows, columns], "has_cls": bool}``.
        translator: Kind of the translators, as for :class:`~theia.models.translators.Translator`.
        distill_cls: Whether the student's CLS token is distilled from the CLS token of each teacher that has one,
            through one linear layer per teacher. Theia found it slightly harmful (77.3 against 78.9).

    Raises:
        ConfigError: If there are no teachers, the record of a teacher is incomplete, ``distill_cls`` is on but the
            student or every teacher lacks a CLS token, or a ladder is asked for and the student has no transformer
            blocks, a lift or a wide last block.
    """

    def __init__(
        self,
        student: Student,
        teachers: Mapping[str, Mapping[str, Any]],
        *,
        translator: TranslatorKind = "cnn",
        distill_cls: bool = False,
    ) -> None:
        super().__init__()
        specs = {name: _parse(name, record) for name, record in teachers.items()}
        if not specs:
            raise ConfigError("No teachers to distil from. Name at least one that is in the feature store.")
        cls_channels = {name: channels for name, (channels, _, has_cls) in specs.items() if distill_cls and has_cls}
        if distill_cls and not student.has_cls:
            raise ConfigError(
                "distill_cls needs a student with a CLS token: registers must be 1, 4 or 8, or the backbone one of "
                "timm that has it."
            )
        if distill_cls and not cls_channels:
            raise ConfigError(
                f"distill_cls is on, but none of these teachers gives a CLS token: {', '.join(specs)}. "
                "Add one that does, or turn it off."
            )
        self._of_all_blocks = translator == "ladder"
        if self._of_all_blocks and not student.backbone.is_transformer:
            raise ConfigError(
                "The translator 'ladder' takes the tokens of every transformer block, and this backbone has no such "
                "blocks. Choose a theia_* backbone, a vision transformer of timm, or another translator."
            )
        if self._of_all_blocks and student.lift is not None:
            raise ConfigError(
                "The translator 'ladder' takes the tokens of the blocks, which are not lifted. Leave out model.lift, "
                "or choose another translator."
            )
        if self._of_all_blocks and student.backbone.has_wide_last:
            raise ConfigError(
                "The translator 'ladder' takes the tokens of all blocks at one width, and the last one has another. "
                "Leave out model.wide_last, or choose another translator."
            )
        depth = len(student.backbone.blocks())
        self.student = student
        self.translators = nn.ModuleDict(
            {
                name: Translator(student.width, student.grid_hw, channels, grid_hw, translator, depth)
                for name, (channels, grid_hw, _) in specs.items()
            }
        )
        self.cls_translators = nn.ModuleDict(
            {name: nn.Linear(student.width, channels) for name, channels in cls_channels.items()}
        )
        self.scalers = nn.ModuleDict(
            {name: FeatureScaler(f"Teacher {name!r}", channels) for name, (channels, _, _) in specs.items()}
        )
        self.cls_scalers = nn.ModuleDict(
            {name: FeatureScaler(f"CLS of teacher {name!r}", channels) for name, channels in cls_channels.items()}
        )

    @property
    def teachers(self) -> list[str]:
        """Names of the teachers, in the order given."""
        return list(self.translators)

    @property
    def cls_teachers(self) -> list[str]:
        """Names of the teachers whose CLS token is distilled; usually none."""
        return list(self.cls_translators)

    def forward(
        self, images: Tensor, some: SomePatches | None = None, teachers: Collection[str] | None = None
    ) -> tuple[StudentTokens, dict[str, Tensor], dict[str, Tensor]]:
        """Gives the student's tokens and their translations.

        Args:
            images: RGB images, uint8, shape ``(B, 3, H, W)``. Of another size than the student's training size, the
                tokens are brought to the grid of that size before they are translated.
            some: Patches of images of the training size that the student is given; all by default.
            teachers: Names of the teachers to translate for; all by default.

        Returns:
            The student's tokens; predicted targets ``(B, N, C)`` by teacher, which are normalised patch tokens unless
            the model has a normaliser; predicted normalised CLS tokens ``(B, C)`` for each teacher in
            :attr:`cls_teachers`.

        Raises:
            ShapeError: If the images have the wrong shape or type, or a size that the student does not take.
        """
        if some is None:
            tokens, read = self.encode(images, self.student)
        else:
            tokens = some.filled(self.student.forward_kept(images, some.kept))
            read = tokens.patches
        grid_hw = self.student.grid_hw
        on_own_grid = on_grid(read, tokens.grid, grid_hw)
        wanted = self.translators if teachers is None else teachers
        patches = {name: head(on_own_grid, grid_hw) for name, head in self.translators.items() if name in wanted}
        cls = {name: head(tokens.cls) for name, head in self.cls_translators.items() if name in wanted}
        return tokens, patches, cls

    def use_normalizer(self, normalizer: Normalizer, exponent: float) -> "Distiller":
        """Chooses a normaliser for the targets of all patch tokens; see :meth:`FeatureScaler.use`."""
        for scaler in self.scalers.values():
            cast(FeatureScaler, scaler).use(normalizer, exponent)
        return self

    def encode(self, images: Tensor, encode: Callable[[Tensor], StudentTokens]) -> tuple[StudentTokens, Tensor]:
        """Gives the student's tokens, and what the translators take.

        Args:
            images: RGB images of the student's training size, shape ``(B, 3, H, W)``.
            encode: The student, or its compiled form.

        Returns:
            The tokens; their patch tokens ``(B, N, C)``, or for ladders those of every block side by side
            ``(B, N, blocks * C)``, each after the final norm.
        """
        if not self._of_all_blocks:
            tokens = encode(images)
            return tokens, tokens.patches
        blocks = range(len(self.student.backbone.blocks()))
        every = self.student.forward_intermediates(images, blocks, norm=True)
        return every[-1], torch.cat([tokens.patches for tokens in every], -1)

    def set_statistics(
        self,
        name: str,
        mean: Statistic,
        std: Statistic,
        cls_mean: Statistic | None = None,
        cls_std: Statistic | None = None,
        covariance: Matrix | None = None,
    ) -> None:
        """Sets the statistics that a teacher's features are normalised with.

        Args:
            name: Name of the teacher.
            mean: Mean of each channel over training images and tokens, shape ``(C,)``.
            std: Standard deviation (not variance) of each channel, shape ``(C,)``.
            cls_mean: Mean of each channel of the CLS token, shape ``(C,)``; needed only if the CLS token is distilled.
            cls_std: Standard deviation of each channel of the CLS token, shape ``(C,)``; needed as ``cls_mean`` is.
            covariance: Population covariance of the channels, shape ``(C, C)``, if the normaliser needs it.

        Raises:
            ConfigError: If the teacher is unknown, statistics of a distilled CLS token are missing, or a
                value is unusable.
            ShapeError: If the statistics do not have one value per channel.
        """
        self._scaler(self.scalers, name).set(mean, std, covariance)
        if name in self.cls_scalers:
            if cls_mean is None or cls_std is None:
                raise ConfigError(
                    f"The CLS token of teacher {name!r} is distilled, but there are no statistics of it. "
                    "Extract its features again, or turn distill_cls off."
                )
            self._scaler(self.cls_scalers, name).set(cls_mean, cls_std)

    def normalize(self, name: str, patches: Tensor, scale: Tensor | None = None) -> Tensor:
        """Normalises stored features per channel.

        Args:
            name: Name of the teacher.
            patches: Patch tokens as stored, shape ``(B, N, C)``, floating point or int8.
            scale: Step and middle of each channel of int8 tokens, shape ``(B, 2, C)``; ``None`` for other types.

        Returns:
            Normalised features, float32, shape ``(B, N, C)``.

        Raises:
            ConfigError: If the teacher is unknown or its statistics are not set.
            ShapeError: If int8 features come without a scale, or features of another type with one.
        """
        scaler = self._scaler(self.scalers, name)
        if (patches.dtype == torch.int8) != (scale is not None):
            raise ShapeError(
                f"Features of teacher {name!r} are {patches.dtype} and come "
                f"{'without' if scale is None else 'with'} scales: int8 needs a step and a middle per channel, other "
                "types none."
            )
        if scale is None:
            return scaler.normalize(patches)
        if scale.shape != (len(patches), 2, patches.shape[-1]):
            raise ShapeError(
                f"Features of teacher {name!r} have shape {tuple(patches.shape)}, their scales "
                f"{tuple(scale.shape)}: there must be a step and a middle for each channel of each image."
            )
        step, middle = scale.float().unsqueeze(2).unbind(1)
        return scaler.normalize(patches.float() * step + middle)

    def target(self, name: str, patches: Tensor, scale: Tensor | None = None) -> Tensor:
        """Turns stored features into targets of the training; arguments and errors are those of :meth:`normalize`."""
        return self.as_target(name, self.normalize(name, patches, scale))

    def as_target(self, name: str, normalized: Tensor) -> Tensor:
        """Turns features ``(B, N, C)`` that are normalised per channel into targets of the training, float32."""
        return self._scaler(self.scalers, name).target(normalized)

    def per_channel(self, predictions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turns predicted targets ``(B, N, C)`` by teacher into features that are normalised per channel."""
        return {name: self._scaler(self.scalers, name).per_channel(value) for name, value in predictions.items()}

    def fold(self) -> "Distiller":
        """Has the translators predict features that are normalised per channel, whatever they were trained for."""
        for name, head in self.translators.items():
            self._scaler(self.scalers, name).fold_into(cast(Translator, head).last)
        return self

    def normalize_cls(self, name: str, cls: Tensor) -> Tensor:
        """Turns stored CLS tokens ``(B, C)`` into training targets, float32.

        Raises:
            ConfigError: If the teacher's CLS token is not distilled or its statistics are not set.
        """
        return self._scaler(self.cls_scalers, name).normalize(cls)

    def denormalize_cls(self, name: str, cls: Tensor) -> Tensor:
        """Turns predicted CLS tokens ``(B, C)`` into tokens on the teacher's own scale, float32.

        Raises:
            ConfigError: As :meth:`normalize_cls` does.
        """
        return self._scaler(self.cls_scalers, name).denormalize(cls)

    def mean_cls(self, name: str) -> Tensor:
        """Mean of a teacher's CLS token over the training images, on its own scale, float32, shape ``(C,)``."""
        return self._scaler(self.cls_scalers, name).mean

    def denormalize(self, name: str, patches: Tensor) -> Tensor:
        """Turns predictions ``(B, N, C)`` into features on the teacher's own scale, float32.

        Raises:
            ConfigError: If the teacher is unknown or its statistics are not set.
        """
        return self._scaler(self.scalers, name).denormalize(patches)

    def _scaler(self, scalers: nn.ModuleDict, name: str) -> FeatureScaler:
        if name not in scalers:
            raise ConfigError(f"This model does not distil {name!r}. It has: {', '.join(scalers) or 'none'}.")
        return cast(FeatureScaler, scalers[name])


def _parse(name: str, record: Mapping[str, Any]) -> tuple[int, tuple[int, int], bool]:
    try:
        channels, (rows, columns), has_cls = record["channels"], record["grid_hw"], record["has_cls"]
        fits = min(channels, rows, columns) > 0
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise ConfigError(
            f"The record of teacher {name!r} is {record!r}; it needs has_cls and, in positive numbers, "
            "channels and grid_hw: [rows, columns]."
        )
    return int(channels), (int(rows), int(columns)), bool(has_cls)
