"""Everything that decides which parameters a model has and what they mean: plain values, from which it is built."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from theia.errors import ConfigError
from theia.models import older
from theia.models.backbone import StudentOptions
from theia.models.distiller import Distiller
from theia.models.student import Student
from theia.models.translators import TranslatorKind


@dataclass(frozen=True, kw_only=True)
class Architecture(StudentOptions):
    """Options of a student and of its translators.

    Attributes:
        teachers: By name, ``{"channels": int, "grid_hw": [rows, columns], "has_cls": bool}``.
        translator: "cnn" as in the paper, or "linear", its ablation.
        distill_cls: Also distil the CLS token of the teachers that have one.
    """

    teachers: dict[str, dict[str, Any]]
    translator: TranslatorKind = "cnn"
    distill_cls: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Architecture":
        """Picks an architecture's options out of others.

        Args:
            options: A model's, of a training or of a file, whose version may be an earlier one. What is not there has
                its default.

        Raises:
            ConfigError: If there are no teachers, or a value is of another type or not one of its choices.
        """
        options = older.options(options)
        given = {field.name: options[field.name] for field in fields(cls) if field.name in options}
        if not isinstance(given.get("teachers"), Mapping):
            raise ConfigError("There is no record of the teachers that the model was built for.")
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls)
        try:
            return cls(**parser.parse_object(given).as_dict())._portable()
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
        student = Student(replace(self, weights=weights or self.weights), load_weights=False)
        return Distiller(student, self.teachers, translator=self.translator, distill_cls=self.distill_cls)

    def _portable(self) -> "Architecture":
        # Which weights it began with makes no difference, and a path of some machine belongs nowhere else.
        return self if self.weights == "scratch" else replace(self, weights="pretrained")
