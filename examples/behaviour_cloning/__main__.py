"""``python -m examples.behaviour_cloning --encoder PATH``: trains a policy, scores it, saves it."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import ArgumentParser
from tabulate import tabulate

import theia
from examples.behaviour_cloning.demonstrations import (
    Demonstrations,
    colored_square,
    read_demonstrations,
    read_recording,
)
from examples.behaviour_cloning.training import TrainingOptions, blind_error, evaluate, train
from theia.errors import ConfigError, TheiaError
from theia.policies import HeadKind
from theia.policies.policy import save_policy
from theia.policies.sight import Features, Sight, features_of_noise
from theia.probing.datasets import fingerprint, of_files
from theia.trajectories.lerobot import LeRobotFolder
from theia.utils.files import check_folder


def clone(
    encoder: str,
    demonstrations: Path | None = None,
    camera: str | None = None,
    output: Path = Path("runs/policy"),
    unfreeze: int | Literal["all"] = 0,
    features: Features = "spatial",
    head: HeadKind = "mlp",
    chunk: int | None = None,
    held_out: float = 0.2,
    seed: int = 0,
    device: str | None = None,
    training: TrainingOptions = TrainingOptions(),  # noqa: B008  (frozen)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Trains a policy on demonstrations and prints its error on episodes that it never saw.

    The same command goes on after an interruption.

    Args:
        encoder: Exported folder, training checkpoint, or id on the Hugging Face hub.
        demonstrations: A data set folder of LeRobot, or an .npz or HDF5 file with images (T, H, W, 3) uint8, actions
            (T, A), episodes (T,) and, optionally, proprioception (T, P); by default a task made up here: say where the
            red square is.
        camera: Camera of the data set; by default, the only one.
        output: Folder for the policy, which theia.load_policy reads. It must not exist.
        unfreeze: Blocks of the encoder to train, counted from the output; 0 keeps it frozen, and then each image is
            encoded once.
        features: Patch tokens through convolutions (spatial), or one vector: cls, mean or max of the tokens; vector
            takes cls, or else mean.
        head: mlp predicts the next action; chunk and diffusion predict several at once.
        chunk: Number of actions that the head predicts at once; by default, 10 for chunk and 4 for diffusion.
        held_out: Share of the episodes to score on.
        seed: Seed of the weights, the order of training, and the choice of held-out episodes.
        device: Device, such as cuda:0; by default, a GPU if there is one.
        training: How to train.

    Returns:
        Mean absolute error of each value of the actions: of the policy, and of the best constant action.

    Raises:
        ConfigError: If the output exists, or an option or the demonstrations will not do.
    """
    if output.exists():
        raise ConfigError(f"{output} exists. Move it, or give another --output.")
    check_folder(output, "--output")
    body = theia.load(encoder)
    data = _read(demonstrations, camera, body.image_size, seed)
    seen, unseen = data.split(held_out, seed)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    sight = Sight(encoder, body, features)
    if unfreeze:
        body.unfreeze(None if unfreeze == "all" else unfreeze)
    same = fingerprint(
        features_of_noise(sight, body.image_size)[1], of_files(str(demonstrations)) if demonstrations else "", camera,
        unfreeze, features, head, chunk, held_out, seed, asdict(training),
    )  # fmt: skip
    unfinished = output.with_name(f"{output.name}.unfinished-{same[:12]}")
    if unfinished.exists():
        sys.stderr.write(f"Goes on with the training that was interrupted, from {unfinished}.\n")
    policy, _ = train(sight, body.image_size, seen, training, head, chunk, seed, device, unfinished)
    save_policy(policy, output)
    unfinished.unlink(missing_ok=True)
    error, blind = evaluate(policy, unseen), blind_error(seen, unseen)
    rows = [[number, *pair] for number, pair in enumerate(zip(error.tolist(), blind.tolist(), strict=True))]
    headers = ["action", "held-out error", "error of the best constant"]
    sys.stdout.write(f"{tabulate(rows, headers, floatfmt='.4g')}\n\nThe policy is in {output}.\n")
    return error, blind


def _read(path: Path | None, camera: str | None, size: int, seed: int) -> Demonstrations:
    if path is not None and path.is_dir():
        return read_recording(LeRobotFolder(path), camera, size)
    if camera is not None:
        raise ConfigError("--camera is about data sets of LeRobot. Leave it out, or give --demonstrations FOLDER.")
    return colored_square(seed=seed) if path is None else read_demonstrations(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        Exit status: 0, 1 for an error with a message, 130 after Ctrl-C.
    """
    parser = ArgumentParser(
        prog="python -m examples.behaviour_cloning", description="Trains a policy; scores it on held-out episodes."
    )
    parser.add_function_arguments(clone, as_group=False)
    given = parser.parse_args(argv).as_dict()
    try:
        clone(**given | {"training": TrainingOptions(**given["training"])})
    except TheiaError as error:
        sys.stderr.write(f"behaviour_cloning: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("behaviour_cloning: interrupted\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
