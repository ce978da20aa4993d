"""Everything that decides which parameters a model has and what they mean: plain values, from which it is built."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from jsonargparse import ArgumentError, ArgumentParser

from theia.errors import ConfigError
from theia.models.distiller import Distiller
from theia.models.positions import PositionRule
from theia.models.student import Registers, Size, Student
from theia.models.translators import TranslatorKind


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Options of a student and its translators, as :class:`Student` and :class:`Distiller` explain them.

    Attributes:
        teachers: By name, ``{"channels": int, "grid_hw": [rows, columns], "has_cls": bool}``.
        size: Of the student.
        image_size: Pixels along each side of a training image.
        registers: Tokens beside the patches.
        width: Overrides the size's.
        depth: Likewise.
        heads: Likewise.
        translator: Kind of translator.
        distill_cls: Whether CLS tokens are translated, too.
        weights: ``"scratch"``, or ``"pretrained"`` for a student that began as a DeiT and has its conventions.
        positions: How the position embedding is resized.
    """

    teachers: dict[str, dict[str, Any]]
    size: Size = "tiny"
    image_size: int = 224
    registers: Registers = 1
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    translator: TranslatorKind = "cnn"
    distill_cls: bool = False
    weights: Literal["scratch", "pretrained"] = "scratch"
    positions: PositionRule = "size"

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Architecture":
        """Picks an architecture's options out of others.

        Args:
            options: A model's, of a training or of a file. What is not there has its default.

        Raises:
            ConfigError: If there are no teachers, or a value is of another type or not one of its choices.
        """
        given = {field.name: options[field.name] for field in fields(cls) if field.name in options}
        if not isinstance(given.get("teachers"), Mapping):
            raise ConfigError("There is no record of the teachers that the model was built for.")
        # Which DeiT it was makes no difference, and a path of some machine belongs nowhere else.
        given["weights"] = "scratch" if given.get("weights", "scratch") == "scratch" else "pretrained"
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls)
        try:
            return cls(**parser.parse_object(given).as_dict())
        except ArgumentError as error:
            raise ConfigError(" ".join(str(error).split())) from error

    def as_dict(self) -> dict[str, Any]:
        """Builtins only."""
        return asdict(self)

    def build(self, weights: str | None = None) -> Distiller:
        """The model, with untrained weights.

        Args:
            weights: Which pretrained weights ``student.load_weights()`` is to load later, if it is called.

        Raises:
            ConfigError: See :class:`Student` and :class:`Distiller`.
        """
        student = Student(
            self.size,
            image_size=self.image_size,
            registers=self.registers,
            weights=weights or self.weights,
            load_weights=False,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            positions=self.positions,
        )
        return Distiller(student, self.teachers, translator=self.translator, distill_cls=self.distill_cls)
