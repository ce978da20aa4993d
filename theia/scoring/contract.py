"""The contract of a scorer, for authors of plug-ins.

A scorer is a function that takes a trained student and returns numbers::

    def brightness(trained: Trained) -> dict[str, float]:
        '''How well the brightness of an image can be read out of its pooled tokens.'''
        for batch in trained.train():
            pooled = trained.encoder(batch.images, pool="mean")
        ...
        return {"correlation": 0.93}

One line registers it, under its name::

    [project.entry-points."theia.scorers"]
    brightness = "my_package:brightness"

Then ``theia test --scorers brightness`` writes ``brightness/correlation`` into its report. The first line of the
docstring is what the log says of it.

An argument that may be wrong, such as a folder, can be checked before a training or a sweep starts::

    @theia.plugins.checked_by(check_my_folder)  # takes the argument, or None; raises a TheiaError
    def brightness(trained: Trained) -> dict[str, float]: ...
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from theia.errors import ConfigError, UnknownScorerError
from theia.plugins import NAME, NAME_RULE, Plugins, check_argument
from theia.types import FeatureBatch, FeatureStatistics
from theia.utils.arguments import comma_list

if TYPE_CHECKING:  # `theia ablate --help` names the scorers without torch
    import torch

    from theia.encoder.encoder import Encoder


class Part(Protocol):
    """One part of the data: training images or held-out images."""

    def __call__(self, features: bool = True) -> Iterable[FeatureBatch]:
        """Gives all batches, from the first.

        Args:
            features: Whether to read the teachers' features too; reading is many times faster without them.
        """


@dataclass(frozen=True)
class Trained:
    """A trained student, and the images and features to score it with.

    Each call of ``train`` and ``held_out`` starts over and gives each image once, in the order of the store, with the
    features of every teacher in :attr:`shapes`, on :attr:`device`. A batch is a view of memory that is reused: it is
    valid until the next one is taken, so clone what you keep. Two iterations over the same part at once are refused.

    A scorer runs in a single process and must not use collectives: the others of a distributed test have ended.

    Attributes:
        checkpoint: Checkpoint file of the student.
        encoder: The student, in evaluation mode and frozen, on :attr:`device`; a fresh one for every scorer.
        shapes: Shapes of the features of every teacher in the store, by teacher name: ``{"channels": int, "grid_hw":
            [rows, columns], "has_cls": bool}``. The student was distilled from those in ``encoder.teachers`` only.
        statistics: Statistics that each teacher's features are normalised with, by teacher name.
        train: Images to fit on, at most as many as ``--scorer_images``: a fixed part of the training split.
        held_out: Images to score on, which were neither trained on nor are in ``train``.
        device: Device to compute on.
        seed: Seed of everything random; torch, numpy and Python are seeded with it before each scorer.
        argument: What follows the scorer's name, as in ``--scorers NAME@ARGUMENT``; ``None`` if nothing does.
        images: Largest number of images in ``train``: ``--scorer_images``.
    """

    checkpoint: Path
    encoder: "Encoder"
    shapes: Mapping[str, Mapping[str, Any]]
    statistics: Mapping[str, FeatureStatistics]
    train: Part
    held_out: Part
    device: "torch.device"
    seed: int
    argument: str | None = None
    images: int = 10_000


# Keys are a metric, or metric/teacher. All values are finite.
Scorer = Callable[[Trained], Mapping[str, float]]


GROUP = "theia.scorers"
_SCORERS = Plugins(GROUP, "scorer", UnknownScorerError)


def scorer_names() -> list[str]:
    """Names of all registered scorers, sorted. Imports none of them."""
    return _SCORERS.names()


def find_scorer(name: str) -> "Scorer":
    """Finds one scorer, and checks its argument.

    Args:
        name: Name of the scorer's entry point; ``@`` and an argument for it may follow.

    Raises:
        UnknownScorerError: If nothing registers the name. The message lists what is installed and the nearest name.
        PluginError: If the plugin cannot be imported, is not a function, or shares its name with another.
        ConfigError: If nothing follows the ``@``.
        TheiaError: If the scorer's own check refuses the argument.
    """
    name, at, argument = name.partition("@")
    if at and not argument.strip():
        raise ConfigError(f"--scorers: {name} has nothing after @. Is a shell variable unset? Give its data, or no @.")
    scorer = cast("Scorer", _SCORERS.load(name, lambda found: _problem(found, name)))
    check_argument(scorer, argument or None)
    return scorer


def find_scorers(names: str | list[str]) -> dict[str, "Scorer"]:
    """Finds scorers by their names, each with its argument, if any: ``NAME@ARGUMENT``.

    Raises:
        ConfigError: If one is named twice.
        TheiaError: See :func:`find_scorer`.
    """
    chosen = comma_list(names)
    plain = [name.partition("@")[0] for name in chosen]
    twice = [name for place, name in enumerate(plain) if name in plain[:place]]
    if twice:
        raise ConfigError(f"--scorers names {twice[0]} twice. Name each once.")
    return {name: find_scorer(name) for name in chosen}


def data_of(scorers: "Mapping[str, Scorer]") -> dict[str, str]:
    """Fingerprints of the data behind the names of scorers, of those that have data of their own and tell.

    Args:
        scorers: What :func:`find_scorers` gives.
    """
    found = {name: check_argument(scorer, name.partition("@")[2] or None) for name, scorer in scorers.items()}
    return {name: fingerprint for name, fingerprint in found.items() if fingerprint is not None}


def _problem(scorer: Any, name: str) -> str | None:
    if not callable(scorer):
        return "is not a function"
    if not NAME.fullmatch(name):
        return f"needs another name: {NAME_RULE}"
    return None
