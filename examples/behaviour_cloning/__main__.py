"""``python -m examples.behaviour_cloning --encoder PATH``: trains a policy, scores it, saves it."""

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import ArgumentParser
from tabulate import tabulate

import theia
from examples.behaviour_cloning.demonstrations import colored_square, read_demonstrations
from examples.behaviour_cloning.policy import Features, Policy, PolicyOptions
from examples.behaviour_cloning.training import TrainingOptions, blind_error, evaluate, train
from theia.errors import ConfigError, TheiaError
from theia.utils.files import write_whole


def clone(
    encoder: str,
    demonstrations: Path | None = None,
    output: Path = Path("policy.pt"),
    unfreeze: int | Literal["all"] = 0,
    features: Features = "spatial",
    conv_norm: bool = True,
    input_norm: bool = True,
    held_out: float = 0.2,
    seed: int = 0,
    device: str | None = None,
    training: TrainingOptions = TrainingOptions(),  # noqa: B008  (frozen)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Trains a policy on demonstrations and prints its error on episodes that it never saw.

    Args:
        encoder: Exported folder, training checkpoint, or id on the Hugging Face hub.
        demonstrations: An .npz or HDF5 file with images (T, H, W, 3) uint8, actions (T, A), episodes (T,) and,
            optionally, proprioception (T, P); by default a task made up here: say where the red square is.
        output: File for the policy. It must not exist.
        unfreeze: Blocks of the encoder to train, counted from the output; 0 keeps it frozen, and then each image is
            encoded once.
        features: Patch tokens through convolutions, or a pooling of the encoder.
        conv_norm: Layer norms in the convolutions, as in the authors' code.
        input_norm: A batch norm in front of the MLP, likewise.
        held_out: Share of the episodes to score on.
        seed: Of weights, of the order of training, and of the episodes held out.
        device: Such as cuda:0; a GPU if there is one, by default.
        training: How to train.

    Returns:
        Mean absolute error of each value of the actions: of the policy, and of the best constant action.

    Raises:
        ConfigError: If the output exists, or an option or the demonstrations will not do.
    """
    if output.exists():
        raise ConfigError(f"{output} exists. Move it, or give another --output.")
    data = colored_square(seed=seed) if demonstrations is None else read_demonstrations(demonstrations)
    seen, unseen = data.split(held_out, seed)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    body = theia.load(encoder).freeze()
    if unfreeze:
        body.unfreeze(None if unfreeze == "all" else unfreeze)
    torch.manual_seed(seed)
    options = PolicyOptions(
        actions=data.actions.shape[1],
        proprioception=0 if data.proprioception is None else data.proprioception.shape[1],
        features=features,
        conv_norm=conv_norm,
        input_norm=input_norm,
    )
    policy = Policy(body, options).to(device)
    train(policy, seen, training, seed)
    save(policy, output)
    error, blind = evaluate(policy, unseen), blind_error(seen, unseen)
    rows = [[number, *pair] for number, pair in enumerate(zip(error.tolist(), blind.tolist(), strict=True))]
    headers = ["action", "held-out error", "error of the best constant"]
    sys.stdout.write(f"{tabulate(rows, headers, floatfmt='.4g')}\n\nThe policy is in {output}.\n")
    return error, blind


def save(policy: Policy, path: Path) -> None:
    """Writes a policy under its name when it is whole, never a part of it.

    Args:
        policy: The policy.
        path: The file; its folder is made.

    Raises:
        FileError: If it cannot be written, for instance on a full disk.
    """
    buffer = io.BytesIO()  # torch's own writer does not say that a disk is full
    torch.save(policy.checkpoint(), buffer)
    write_whole(path, buffer.getvalue())


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
