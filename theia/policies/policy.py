"""``theia.load_policy``: a policy that a robot can run, from one folder."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from theia.encoder.encoder import Encoder, Images, to_channels_first
from theia.encoder.from_name import theia_parts
from theia.encoder.load import CONFIG, WEIGHTS, load, read_config
from theia.errors import ConfigError, ExportError, ObservationError, ShapeError, WeightsError
from theia.export.export import part_beside, record_of
from theia.export.formats import Exported, write_safetensors
from theia.extraction.images import to_square
from theia.models.weights import load_strictly
from theia.policies.acting import Actor, Memory
from theia.policies.action_heads import HEADS, Head
from theia.policies.sight import Sight, features_of_noise, open_sight
from theia.utils.files import at_home, check_folder, publish, sync, writing
from theia.version import __version__

MODEL_TYPE = "theia-policy"
ENCODER = "encoder"  # folder with the exported encoder


@dataclass(frozen=True)
class About:
    """What a robot has to know of a policy.

    Attributes:
        image_size: Height and width of the picture that the encoder is given, in pixels; others are resized to it.
        frames_per_s: Rate at which the policy has to be called: that of its demonstrations. ``None`` if unknown.
        state_names: Names of the values of the state, as far as they are known.
        action_names: Names of the values of an action, as far as they are known.
        record: Record of the training.
    """

    image_size: int
    frames_per_s: float | None = None
    state_names: tuple[str, ...] = ()
    action_names: tuple[str, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)


class Policy:
    """A trained policy: what its robot sees and reports goes in, an action comes out.

    Encoder, head, scales and the last three frames are all in it. Begin each episode with :meth:`reset`, and call
    :meth:`act` at the rate of the demonstrations.

    Args:
        head: The head.
        sight: Its encoder; ``None`` for a policy that sees no picture.
        about: What else is known of it.
        device: Device of both.
        execute: Number of the predicted actions that are carried out before the next decision; by default, all.

    Attributes:
        head: The head.
        sight: Its encoder.
        about: What else is known of it.

    Raises:
        ConfigError: If the head predicts fewer actions than are to be carried out.
    """

    def __init__(
        self,
        head: Head,
        sight: Sight | None,
        about: About,
        device: str | torch.device = "cpu",
        execute: int | None = None,
    ) -> None:
        self._device = torch.device(device)
        self.head, self.about = head.to(self._device).eval(), about
        self.sight = None if sight is None else sight.to(self._device)
        self._actor = Actor(self.head, self.sight, self._device, execute)
        self._memories: list[Memory] = []
        self._seed = 0

    @property
    def state_size(self) -> int:
        """Number of values of the state; 0 for a policy that is given none."""
        return int(self.head.options["known"])

    @property
    def action_size(self) -> int:
        """Number of values of an action."""
        return int(self.head.options["actions"])

    @property
    def execute(self) -> int:
        """Number of the predicted actions that are carried out before the next decision."""
        return self._actor.execute

    def reset(self, seed: int = 0) -> None:
        """Begins a new episode: forgets the frames, and what is left of the predicted actions.

        Args:
            seed: Seed of the noise that a policy samples from, if it does. Episodes with the same seed and
                observations have the same actions.
        """
        self._memories, self._seed = [], seed

    def act(self, image: Images | Image.Image | None = None, state: ArrayLike | Tensor | None = None) -> NDArray[Any]:
        """The next action, in the units of the demonstrations.

        Args:
            image: What the robot sees now: RGB of any size, uint8 from 0 to 255 or floating point from 0 to 1, shape
                ``(H, W, 3)`` or ``(3, H, W)``, or a PIL image. It is squashed to the encoder's square. For ``B`` robots
                of one kind, a batch of images; their number stays the same until the next reset.
            state: Values of the state, shape ``(K,)``, or ``(B, K)``. What they mean is up to the demonstrations.

        Returns:
            The action, float32, shape ``(A,)``, or ``(B, A)``.

        Raises:
            ShapeError: If image or state have the wrong shape or size, or the number of robots changes.
            ImageError: If the type or range of the image is wrong.
            ObservationError: If image or state are missing, are not asked for, or the state is not finite.
        """
        images, one_image = self._images(image)
        states, one_state = self._states(state)
        if images is not None and states is not None and (one_image != one_state or len(images) != len(states)):
            raise ShapeError(
                f"{len(images)} images and {len(states)} states. Give one of each, or a batch of as many of each."
            )
        count = len(images) if images is not None else len(states) if states is not None else 1
        if not self._memories:
            self._memories = [Memory(self._seed) for _ in range(count)]
        if len(self._memories) != count:
            raise ShapeError(
                f"{count} robots, but this episode began with {len(self._memories)}. Call reset() before another one."
            )
        known = torch.zeros(count, 0) if states is None else states
        actions = self._actor.act(self._memories, images, known).numpy()
        return actions[0] if one_image and one_state else actions

    def _images(self, image: Images | Image.Image | None) -> tuple[Tensor | None, bool]:
        """Pictures of the encoder's size, ``(B, 3, S, S)``, and whether it may be one robot's."""
        if self.sight is None:
            if image is not None:
                raise ObservationError("This policy sees no image. Leave it out.")
            return None, True
        if image is None:
            raise ObservationError("This policy sees, and was given no image. Give one: act(image, state).")
        given: Images = np.asarray(image.convert("RGB")) if isinstance(image, Image.Image) else image
        one = isinstance(given, Tensor | np.ndarray) and given.ndim == 3
        batch = to_channels_first(given[None] if one else given, torch.device("cpu"))
        if batch.numel() == 0:
            raise ShapeError(f"An image of shape {tuple(batch.shape)} has no pixels. Look at what the camera gives.")
        if batch.dtype != torch.uint8:
            batch = (batch * 255).round().to(torch.uint8)
        size = self.about.image_size
        # As the frames of the demonstrations were.
        squares = [to_square(Image.fromarray(rgb), size, "squash") for rgb in batch.permute(0, 2, 3, 1).numpy()]
        return torch.from_numpy(np.stack(squares)), one

    def _states(self, state: ArrayLike | Tensor | None) -> tuple[Tensor | None, bool]:
        names = f" ({', '.join(self.about.state_names)})" if self.about.state_names else ""
        wanted = f"This policy is given a state of {self.state_size} values{names}"
        if state is None:
            if self.state_size:
                raise ObservationError(f"{wanted}, and there is none. Give it: act(image, state).")
            return None, True
        if not self.state_size:
            raise ObservationError("This policy is given no state. Leave it out.")
        try:
            values = torch.as_tensor(state, dtype=torch.float32, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise ObservationError(f"{wanted}; what it was given holds no numbers: {error}.") from error
        if values.ndim not in (1, 2) or values.shape[-1] != self.state_size or not len(values):
            raise ShapeError(f"{wanted}, and got shape {tuple(values.shape)}. Give them as one row for each robot.")
        if not bool(values.isfinite().all()):
            bad = int((~values.isfinite().reshape(-1, self.state_size).all(0)).nonzero()[0])
            called = f" ({self.about.state_names[bad]})" if self.about.state_names else ""
            raise ObservationError(f"Value {bad}{called} of the state is not a finite number. Look at the sensor.")
        return values.reshape(-1, self.state_size), values.ndim == 1


def save_policy(policy: Policy, folder: str | os.PathLike[str]) -> None:
    """Writes a policy into one folder, which is there whole or not at all.

    A Theia model lies in it as ``theia export`` writes it. Another encoder is kept by its name, and has to be there
    where the policy is loaded.

    Args:
        policy: The policy.
        folder: Folder to create.

    Raises:
        ExportError: If the folder holds something, or cannot be written, for instance on a full disk.
    """
    head, sight, about = policy.head, policy.sight, policy.about
    config: dict[str, Any] = {
        "model_type": MODEL_TYPE,
        "theia_version": __version__,
        "head": head.kind,
        "options": head.options,
        "execute": policy.execute,
        "encoder": None if sight is None else _describe(sight, about.image_size),
        "image_size": about.image_size,
        "frames_per_s": about.frames_per_s,
        "state_names": about.state_names,
        "action_names": about.action_names,
        "record": about.record,
    }
    tensors = {name: tensor.cpu().contiguous() for name, tensor in head.state_dict().items()}
    out = Path(at_home(os.fspath(folder))).resolve()
    check_folder(out, "--out")
    if out.exists() and any(out.iterdir()):
        raise ExportError(f"{out} holds something already. Choose another folder with --out.")
    with writing(out, ExportError), _placed(out) as part:
        (part / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (part / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
        if sight is not None and sight.encoder is not None:
            (part / ENCODER).mkdir()
            _write_encoder(sight.encoder, sight.name, part / ENCODER)


def load_policy(
    folder: str | os.PathLike[str], *, device: str | torch.device = "cpu", execute: int | None = None
) -> Policy:
    """Loads a policy that a robot can run.

    Args:
        folder: Folder that :func:`save_policy` wrote.
        device: Device of the policy.
        execute: Number of the predicted actions that are carried out before the next decision; by default, as it was
            saved: all of them.

    Returns:
        The policy, at the beginning of an episode.

    Raises:
        WeightsError: If the folder is missing, incomplete, damaged or of another kind, or the weights of an encoder
            that is kept by its name have changed.
        ConfigError: If the policy predicts fewer actions, or there is no such device.
    """
    path = Path(at_home(os.fspath(folder)))
    if not path.is_dir():
        raise WeightsError(f"There is no folder {path}. Give one that holds a policy.")
    if not (path / CONFIG).is_file():
        raise WeightsError(
            f"There is no {CONFIG} in {path}, so it holds no policy to run. 'python -m benchmarks.cortexbench export "
            "--policy FOLDER' makes one of a benchmark's policy, and 'python -m examples.behaviour_cloning' trains one."
        )
    config = read_config(path)
    if config.get("model_type") != MODEL_TYPE:
        raise WeightsError(
            f"{path} holds no policy (model_type {config.get('model_type')!r}). For an encoder, take theia.load."
        )
    try:
        head = HEADS[config["head"]](**config["options"])
        about = About(
            int(config["image_size"]), config["frames_per_s"], tuple(config["state_names"]),
            tuple(config["action_names"]), dict(config["record"]),
        )  # fmt: skip
        described, saved = config["encoder"], int(config["execute"])
        kept = None if described is None else (str(described["name"]), described["features"], described["of_noise"])
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise WeightsError(
            f"The {CONFIG} of {path} is incomplete or of another version ({type(error).__name__}: {error}). It was "
            f"written by theia {config.get('theia_version')}; save the policy again."
        ) from error
    try:
        tensors = load_file(path / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path / WEIGHTS} cannot be read ({error}). Save or copy the policy again.") from error
    load_strictly(head, tensors, str(path))
    sight: Sight | None = None
    if kept is not None:
        name, features, of_noise = kept
        if of_noise is None:
            sight = Sight(name, load(path / ENCODER), features, described.get("size"))
        else:
            sight = open_sight(name, features)
            _, now = features_of_noise(sight, about.image_size)
            if not same_features(of_noise, now):
                raise WeightsError(
                    f"The policy {path} was trained on {name}, whose weights have changed since. Put them back, or "
                    "train it again."
                )
    try:
        return Policy(head, sight, about, device, saved if execute is None else execute)
    except (RuntimeError, AssertionError) as error:  # torch's own for a device that is not there
        raise ConfigError(f"The policy cannot be put on device {device!r}: {error}. Give 'cpu'.") from error


@contextmanager
def _placed(out: Path) -> Iterator[Path]:
    """A folder that gets its name when it is whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with part_beside(out) as part:
        yield part
        for path in [*part.rglob("*"), part]:
            sync(path)
        publish(part, out)


def same_features(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two encoders give the same for a picture of noise, but for rounding, which differs between processors."""
    return len(one) == len(other) and np.allclose(one, other, 0.01, 0.01 * np.abs(one).max())


def _describe(sight: Sight, image_size: int) -> dict[str, Any]:
    of_noise = None if sight.encoder is not None else features_of_noise(sight, image_size)[1]
    return {"name": sight.name, "features": sight.features, "of_noise": of_noise, "size": sight.size}


def _write_encoder(encoder: Encoder, name: str, folder: Path) -> None:
    """Writes an encoder with the record of its own training, if it is there under its name."""
    model, untrained, _ = theia_parts(name)
    record = {} if ":" in name or untrained else record_of(model, encoder)
    copy = Encoder(encoder.architecture, encoder.pool)
    copy.distiller.load_state_dict(encoder.distiller.state_dict())
    write_safetensors(Exported(copy.cpu().float(), copy.architecture, record), folder)
