"""Loads tensors into a module: all are used and every parameter is set, or an error lists the exceptions."""

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from theia.errors import WeightsError

_SHOWN = 8


def load_strictly(
    module: nn.Module, tensors: Mapping[str, Tensor], origin: str, names: Collection[str] | None = None
) -> None:
    """Copies tensors into a module whose tensors have the same names and shapes.

    Args:
        module: Module whose parameters and persistent buffers are set.
        tensors: Tensors to copy, by name.
        origin: Name of the source of the tensors, for messages.
        names: Names that must be given; by default all names of the module.

    Raises:
        WeightsError: If a tensor is missing or left over, has another shape or kind of number, or is not finite, or if
            a standard deviation is not positive.
    """
    own = module.state_dict()
    refuse_unless_equal(own.keys() if names is None else names, tensors.keys(), origin)
    _refuse_if(
        origin,
        [
            f"{name} has shape {tuple(tensor.shape)}, not {tuple(own[name].shape)}"
            for name, tensor in tensors.items()
            if tensor.shape != own[name].shape
        ]
        or [
            f"{name} is {tensor.dtype}"
            for name, tensor in tensors.items()
            if tensor.is_floating_point() != own[name].is_floating_point()
        ]
        or [f"{name} is not finite" for name, tensor in tensors.items() if not tensor.isfinite().all()]
        or [
            f"{name} is not positive"
            for name, tensor in tensors.items()
            if name.endswith((".std", "_std")) and not (tensor > 0).all()
        ],
    )
    module.load_state_dict(dict(tensors), strict=False)


def refuse_unless_equal(expected: Collection[str], given: Collection[str], origin: str) -> None:
    """Refuses a file whose tensors have other names than those of the model.

    Args:
        expected: Names of the model's tensors.
        given: Names of the file's tensors.
        origin: Path or id of the file, for the message.

    Raises:
        WeightsError: If a name is missing or left over.
    """
    _refuse_if(
        origin,
        [f"{name} is missing" for name in sorted(set(expected) - set(given))]
        + [f"{name} is left over" for name in sorted(set(given) - set(expected))],
    )


def _refuse_if(origin: str, problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise WeightsError(
            f"The weights of {origin} do not fit its config: {'; '.join(problems[:_SHOWN])}{more}. "
            "Fetch or export the model again, so that both files are of one model."
        )
