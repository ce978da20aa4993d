"""Translates what earlier versions wrote into today's names, so that the rest of the code knows only those."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

# The student called its transformer ``vit`` before there was a choice of backbones.
VIT, BACKBONE = "vit.", "backbone.model."
# The same renaming as a pattern, which AutoModel needs.
KEY_MAPPING = {r"student\.vit\.": f"student.{BACKBONE}"}

_STEPS = "running.steps"  # of model.balance ada
_LOSSES = ("mse", "cosine_smooth_l1")
_REPLACED = ("--model.size", "--model.cosine_weight", "--model.per_token", "--model.loss")


def tensors(given: Mapping[str, T]) -> dict[str, T]:
    """Renames parameters, or other values kept under the names of parameters.

    Args:
        given: Values by parameter name, from a checkpoint or an exported folder, with any prefix.
    """
    return {name.replace(f"student.{VIT}", f"student.{BACKBONE}"): value for name, value in given.items()}


def options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Renames the options of a model, from ``theia fit`` or from an architecture alone.

    ``size`` is now ``backbone``; ``loss``, ``cosine_weight`` and ``per_token`` are now the weights in ``loss``.

    Args:
        given: Options by name; options with today's names stay as they are.
    """
    now = dict(given)
    size = now.pop("size", None)
    if size is not None:
        now.setdefault("backbone", f"theia_{size}")
    weight, per_token = now.pop("cosine_weight", None), now.pop("per_token", None)
    loss = now.get("loss")
    if loss == "mse":
        now["loss"] = {"mse": 1.0}
    elif loss == "cosine_smooth_l1" or (loss is None and (weight is not None or per_token is not None)):
        share = 0.9 if weight is None else weight
        terms = {"cosine_per_token" if per_token else "cosine": share, "smooth_l1": round(1 - share, 12)}
        now["loss"] = {name: float(value) for name, value in terms.items() if value}
    return now


def checkpoint(given: dict[str, Any]) -> dict[str, Any]:
    """Renames the entries of a ``theia fit`` checkpoint: parameters, options and the state of callbacks.

    Args:
        given: Content of the checkpoint as it was read; it is changed in place.
    """
    given["state_dict"] = tensors(given["state_dict"])
    if (steps := given["state_dict"].get(_STEPS)) is not None and steps.ndim == 0:  # of all teachers alike
        given["state_dict"][_STEPS] = steps.expand_as(given["state_dict"]["running.mean"]).clone()
    given["hyper_parameters"] = options(given["hyper_parameters"])
    for state in given.get("callbacks", {}).values():
        if isinstance(state, dict) and isinstance(state.get("options"), dict):
            state["options"] = dotted(state["options"])
    return given


def dotted(given: Mapping[str, Any]) -> dict[str, Any]:
    """Renames the options of a run, where those of the model begin with ``model.``.

    Args:
        given: Options by name, those of the trainer and the data included.
    """
    of_model = {name.removeprefix("model."): value for name, value in given.items() if name.startswith("model.")}
    others = {name: value for name, value in given.items() if not name.startswith("model.")}
    return {**others, **{f"model.{name}": value for name, value in options(of_model).items()}}


def config(given: Any) -> Any:
    """Renames the model options in a config of ``theia fit``.

    Args:
        given: Config as read from YAML; a value that is not a config stays as it is.
    """
    if isinstance(given, dict) and isinstance(given.get("model"), dict):
        return {**given, "model": options(given["model"])}
    return given


def arguments(words: Sequence[str]) -> list[str]:
    """Renames options of an earlier version on a command line of ``theia fit``.

    Args:
        words: Arguments as they were typed.
    """
    typed: dict[str, Any] = {}
    others: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name in _REPLACED and not equals:
            value = next(rest, "")
        if name in _REPLACED and (name != "--model.loss" or value in _LOSSES):
            typed[name.removeprefix("--model.")] = value
        else:
            others += [name, value] if name in _REPLACED and not equals else [word]
    if "cosine_weight" in typed:
        typed["cosine_weight"] = float(typed["cosine_weight"])
    if "per_token" in typed:
        typed["per_token"] = typed["per_token"].lower() in ("true", "yes", "on", "1")
    return [*others, *(f"--model.{name}={_word(value)}" for name, value in options(typed).items())]


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
