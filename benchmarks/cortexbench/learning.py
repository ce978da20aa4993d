"""What a policy is made of: demonstrations with tokens or pictures, a head, and the encoder if it is trained too."""

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.cortexbench.encoders import Eyes, TaskRecording
from benchmarks.cortexbench.run_plan import RunPlan
from theia.errors import ConfigError
from theia.extraction.images import to_square
from theia.policies.action_heads import HEADS, Head
from theia.policies.cloning import FineTuning
from theia.policies.demonstrated import Demonstrations, PicturesOf
from theia.policies.sight import PIXELS
from theia.probing.datasets import IMAGE_SIZE, fingerprint
from theia.probing.frame_tokens import embed
from theia.trajectories.lerobot import ACTION


def demonstrations_of(
    plan: RunPlan, eyes: Eyes, task: str, recording: TaskRecording, embeddings: Path, device: torch.device,
    batch_size: int,
) -> Demonstrations:  # fmt: skip
    """What the policies for a task are fitted to.

    Args:
        plan: The run.
        eyes: What the policies are given.
        task: Full name of the task.
        recording: Its demonstrations.
        embeddings: Folder of tokens that were computed once.
        device: Device of the encoder.
        batch_size: Number of frames that are given to it together.
    """
    observations = plan.data.observations(task, recording.rows)
    actions = recording.folder.column(ACTION)[recording.rows]
    tokens, pictures = None, None
    if _is_trained(plan, eyes):
        pictures = pictures_of(recording)
    # An encoder that is trained too is embedded for the principal components alone.
    if eyes.tokens_of is not None and (pictures is None or plan.preset.components is not None):
        place = fingerprint(eyes.look, plan.preset.most_rows, recording.identity(plan.data.camera(task)))
        tokens = embed(
            eyes.tokens_of, eyes.label, recording, plan.data.camera(task),
            frozenset(range(len(recording.episodes))), embeddings / place, device, batch_size,
            plan.preset.most_rows,
        )  # fmt: skip
    lengths = [one.length for one in recording.episodes]
    return Demonstrations.of(tokens, eyes.known(observations), actions, lengths, pictures)


def make_head(plan: RunPlan, eyes: Eyes, demonstrations: Demonstrations) -> Head:
    """A new head for demonstrations."""
    grid = demonstrations.tokens.grid if demonstrations.tokens is not None else eyes.grid
    known, actions = demonstrations.known.shape[1], demonstrations.actions.shape[1]
    learner = plan.learner
    return HEADS[learner.head](eyes.channels, grid, known, actions, plan.preset.components, learner.chunk)


def _is_trained(plan: RunPlan, eyes: Eyes) -> bool:
    return plan.learner.encoder_learning_rate is not None and eyes.sight is not None and eyes.name != PIXELS


def tuning_of(plan: RunPlan, eyes: Eyes) -> FineTuning | None:
    """A copy of the encoder to train with one policy; ``None`` for one that stays frozen."""
    if eyes.sight is None or not _is_trained(plan, eyes):
        return None
    sight = copy.deepcopy(eyes.sight)
    if sight.encoder is not None:
        sight.encoder.unfreeze()
    return FineTuning(sight, plan.learner.encoder_learning_rate or 0.0)


def pictures_of(recording: TaskRecording) -> PicturesOf:
    """Decodes frames as the encoder is given them, by their rows in ascending order."""
    starts = np.array([one.start for one in recording.episodes])

    def pictures(rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        found = []
        for place in np.unique(np.searchsorted(starts, rows, "right") - 1):
            episode = recording.episodes[place]
            own = rows[(rows >= episode.start) & (rows < episode.start + episode.length)]
            frames = recording.frames(episode, recording.folder.camera(), (own - episode.start).tolist())
            found += [to_square(frame, IMAGE_SIZE, "squash") for frame in frames]
        return np.stack(found)

    return pictures


def check_trainable(eyes: Sequence[Eyes]) -> None:
    """Refuses encoders that cannot be trained with a policy.

    Raises:
        ConfigError: If there is one.
    """
    frozen = [one.name for one in eyes if one.sight is not None and one.name != PIXELS and one.sight.encoder is None]
    if frozen:
        raise ConfigError(f"--finetune trains Theia models, and {frozen[0]} is none. Leave it out, or --finetune.")
