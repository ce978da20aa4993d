"""Tensors into a module: every tensor used, every parameter set, or an error that lists which not."""

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from theia.errors import WeightsError

_SHOWN = 8


def load_strictly(
    module: nn.Module, tensors: Mapping[str, Tensor], origin: str, names: Collection[str] | None = None
) -> None:
    """Copies tensors into a module of the same names and shapes.

    Args:
        module: Its parameters and persistent buffers are set.
        tensors: By name.
        origin: Where they come from, for messages.
        names: What must be given; all of the module's by default.

    Raises:
        WeightsError: If a tensor is missing, left over, of another shape or kind of number, not finite, or a standard
            deviation and not positive.
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
    """Compares names.

    Args:
        expected: Of the model.
        given: Of the file.
        origin: Where the file lies, for the message.

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
