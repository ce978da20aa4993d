"""HIVE-Bench's read-out: a small transformer over the patch tokens of one frame or two."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from theia.utils.progress import Progress

logger = logging.getLogger(__name__)

# Tokens of some frames, float16, shape (n, N, C), from their places.
TokensOf = Callable[[NDArray[np.int64]], NDArray[np.float16]]

_TRIED = 3  # steps by which the time is estimated


@dataclass(frozen=True)
class Rule:
    """How the read-out is built and trained.

    Attributes:
        width: Width of the transformer.
        layers: Number of its layers.
        heads: Number of attention heads.
        hidden: Width of its hidden layers.
        dropout: Probability of dropout after attention and hidden layers.
        attention_dropout: Probability of dropout on attention weights.
        positions: Whether places have learned embeddings. HIVE-Bench's rule leaves positions to the encoder.
        epochs: Number of epochs.
        least_steps: Number of steps that there are at least, however small the data.
        batch_size: Number of pairs in a batch.
        learning_rate: Largest learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        last_rate: Share of the learning rate at the end of the cosine.
        clip: Largest norm of the gradient.
    """

    width: int = 256
    layers: int = 4
    heads: int = 4
    hidden: int = 512
    dropout: float = 0.1
    attention_dropout: float = 0.1
    positions: bool = False
    epochs: int = 4
    least_steps: int = 1000
    batch_size: int = 256
    learning_rate: float = 5e-4
    weight_decay: float = 1e-4
    last_rate: float = 0.01
    clip: float = 1.0


FULL = Rule()
SMALL = Rule(width=128, layers=2, hidden=256, attention_dropout=0.0, positions=True)


class TokenTransformer(nn.Module):
    """Tokens of one frame or two to one vector.

    The tokens of each frame pass a linear layer of their own, so that the frames can be told apart; a learned query
    joins them, and its output is mapped to the prediction.

    Args:
        rule: How it is built.
        frames: Number of frames, 1 or 2.
        tokens: Number of tokens of a frame.
        channels: Number of channels of a token.
        outputs: Number of values to predict.

    Source: HIVE-Bench.
    """

    def __init__(self, rule: Rule, frames: int, tokens: int, channels: int, outputs: int) -> None:
        super().__init__()
        self.inputs = nn.ModuleList(nn.Linear(channels, rule.width) for _ in range(frames))
        self.query = nn.Parameter(torch.randn(1, 1, rule.width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, tokens, rule.width) * 0.02) if rule.positions else None
        self.layers = nn.ModuleList()
        for _ in range(rule.layers):
            layer = nn.TransformerEncoderLayer(
                rule.width, rule.heads, rule.hidden, rule.dropout, "gelu", batch_first=True, norm_first=True
            )
            layer.self_attn.dropout = rule.attention_dropout
            self.layers.append(layer)
        self.norm = nn.LayerNorm(rule.width)
        self.output = nn.Linear(rule.width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Predicts.

        Args:
            tokens: Standardised tokens, shape ``(B, frames, N, C)``.

        Returns:
            Shape ``(B, outputs)``.
        """
        parts = [layer(part) for layer, part in zip(self.inputs, tokens.unbind(1), strict=True)]
        if self.positions is not None:
            parts = [part + self.positions for part in parts]
        x = torch.cat([self.query.expand(len(tokens), -1, -1), *parts], 1)
        for layer in self.layers:
            x = layer(x)
        found: Tensor = self.output(self.norm(x[:, 0]))
        return found


def fit_and_predict(
    rule: Rule,
    tokens_of: TokensOf,
    mean: NDArray[np.float64],
    deviation: NDArray[np.float64],
    pairs: NDArray[np.int64],
    targets: NDArray[np.float64],
    tests: list[NDArray[np.int64]],
    seed: int,
    device: torch.device,
    label: str,
) -> list[NDArray[np.float64]]:
    """Trains the read-out and predicts for held-out pairs.

    Args:
        rule: How it is built and trained.
        tokens_of: Gives the tokens of frames; those of further data sets come after the training ones.
        mean: Mean of each channel, shape ``(C,)``.
        deviation: Standard deviation of each channel, shape ``(C,)``.
        pairs: Places of the frames of each training pair, shape ``(n, frames)``.
        targets: Standardised targets, shape ``(n, D)``.
        tests: Places of the frames of the pairs to predict for, one array per test set.
        seed: Seed of weights, order and dropout.
        device: Device that it runs on.
        label: What the progress bar says.

    Returns:
        Predictions for each test set, shape ``(m, D)``.
    """
    # Everything random comes from the seed, and nothing outside is disturbed.
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(seed)
        count, frames = pairs.shape
        first = tokens_of(pairs[:1, 0])
        model = TokenTransformer(rule, frames, first.shape[1], first.shape[2], targets.shape[1]).to(device)
        shift, scale = (torch.from_numpy(part).float().to(device) for part in (mean, deviation))

        def batch_of(chosen: NDArray[np.int64]) -> Tensor:
            tokens = np.stack([tokens_of(chosen[:, frame]) for frame in range(frames)], 1)
            return (torch.from_numpy(tokens).to(device).float() - shift) / scale

        per_epoch = max(1, count // rule.batch_size)
        steps = max(rule.epochs * per_epoch, rule.least_steps)
        optimizer = torch.optim.AdamW(model.parameters(), rule.learning_rate, weight_decay=rule.weight_decay)
        schedule = LambdaLR(
            optimizer,
            lambda step: rule.last_rate + (1 - rule.last_rate) * 0.5 * (1 + np.cos(np.pi * min(1.0, step / steps))),
        )
        rng = np.random.default_rng(seed)
        order = np.empty(0, np.int64)
        started = time.monotonic()
        with Progress(label, steps, unit="step") as progress:
            for step in range(steps):
                if len(order) < min(rule.batch_size, count):
                    order = rng.permutation(count)
                chosen, order = np.sort(order[: rule.batch_size]), order[rule.batch_size :]
                found = model(batch_of(pairs[chosen]))
                loss = (found - torch.from_numpy(targets[chosen]).float().to(device)).abs().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), rule.clip)
                optimizer.step()
                schedule.step()
                progress.advance(1)
                if step + 1 == _TRIED:
                    seconds = (time.monotonic() - started) / _TRIED * steps
                    logger.info("%s: %d steps, about %.0f minutes", label, steps, np.ceil(seconds / 60))
        model.eval()
        with torch.no_grad():
            return [
                np.concatenate(
                    [
                        model(batch_of(test[start : start + rule.batch_size])).double().cpu().numpy()
                        for start in range(0, len(test), rule.batch_size)
                    ]
                )
                for test in tests
            ]
