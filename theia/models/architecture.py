"""The options that decide which parameters a model has and what they mean, as plain values to build it from."""

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
        teachers: Feature shapes by teacher name, ``{"channels": int, "grid_hw": [rows, columns], "has_cls": bool}``.
        translator: Kind of the translators: "cnn" as in the paper; "linear", its ablation; "mlp", two layers per token;
            "ladder", the sum of an MLP for each block of the student; "transformer", one more block.
        distill_cls: Also distil the CLS token of the teachers that have one.
    """

    teachers: dict[str, dict[str, Any]]
    translator: TranslatorKind = "cnn"
    distill_cls: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Architecture":
        """Picks the options of an architecture from a larger set of options.

        Args:
            options: Options of a training or of a model file, which an earlier version may have written. An option
                that is missing takes its default.

        Raises:
            ConfigError: If there are no teachers, or a value has the wrong type or is not one of the choices.
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
        """The options as builtin types only."""
        return asdict(self)

    def build(self, weights: str | None = None) -> Distiller:
        """The model, with untrained weights.

        Args:
            weights: Pretrained weights that a later call of ``student.load_weights()`` loads.

        Raises:
            ConfigError: See :class:`Student` and :class:`Distiller`.
        """
        student = Student(replace(self, weights=weights or self.weights), load_weights=False)
        return Distiller(student, self.teachers, translator=self.translator, distill_cls=self.distill_cls)

    def _portable(self) -> "Architecture":
        # The initial weights make no difference to the architecture, and a path means nothing on another machine.
        return self if self.weights == "scratch" else replace(self, weights="pretrained")
