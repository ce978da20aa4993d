"""``theia probe dynamics``: what frozen tokens know of a robot's plans and motions, from recorded trajectories."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from theia.encoder.from_name import open_encoder
from theia.errors import ConfigError
from theia.plugins import checked_by
from theia.probing import dynamics_report
from theia.probing.datasets import IMAGE_SIZE, fingerprint
from theia.probing.frame_tokens import FrameTokens, TokensOf, embed, pixel_means
from theia.probing.motion import (
    QUESTIONS,
    Pairs,
    Question,
    Recording,
    Target,
    describe_target,
    episode_weights,
    moving,
    open_recordings,
    standardised_state,
    tested_episodes,
)
from theia.probing.ridge import fit, predict
from theia.probing.token_transformer import FULL, SMALL, Rule, fit_and_predict
from theia.trajectories.lerobot import held_out
from theia.utils.files import alone, jsonable, write_whole
from theia.utils.pictures import short_labels
from theia.utils.provenance import machine, versions

logger = logging.getLogger(__name__)

Readout = Literal["ridge", "transformer"]
Preset = Literal["small", "full"]

BLIND, STATE_ONLY, PIXELS = "blind", "state", "pixels"
CONTROLS = {
    BLIND: "control: no picture",
    STATE_ONLY: "control: the robot's state at t, no picture",
    PIXELS: "control: 16x16 mean colours",
}
_HORIZON = 16
_MOST_ROWS = 7  # rows and columns of tokens that a read-out is given


@dataclass
class Outcome:
    """Errors of one encoder.

    Attributes:
        errors: By question and data set, the mean L1 error of each tested episode in deviations of the target, shape
            ``(seeds, episodes)``.
        details: What else is known, such as the penalty.
    """

    errors: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DynamicsResult:
    """What the command says in the end."""

    table: str
    notes: list[str]
    files: list[Path]


def dynamics(
    encoders: Sequence[str],
    train: str,
    tests: Sequence[str],
    out: Path,
    camera: str | None,
    horizon: int,
    target: Target | None,
    readout: Readout,
    preset: Preset,
    seeds: Sequence[int],
    reference: str | None,
    device: torch.device,
    batch_size: int,
) -> DynamicsResult:
    """Probes encoders on recorded trajectories; see :func:`theia.cli.probe.dynamics` for the arguments.

    Raises:
        TheiaError: If data cannot be read or do not fit together, or an encoder cannot be probed.
    """
    names = [*(control for control in CONTROLS if control not in encoders), *encoders]
    labels = short_labels(names)
    chosen = _reference(reference, names, encoders)
    recordings, kind, notes = open_recordings(train, tests, camera, horizon, target)
    fitted = recordings[0].pairs.of(recordings[0].fitted)
    varies = moving(fitted)
    deviation = fitted.target.std(0)[varies]
    rule = {"full": FULL, "small": SMALL}[preset]
    settings = {
        "data": [recording.name for recording in recordings], "camera": recordings[0].camera, "horizon": horizon,
        "target": kind, "readout": readout, "preset": preset if readout == "transformer" else None,
        "seeds": list(seeds) if readout == "transformer" else [], "fitted episodes": len(recordings[0].fitted),
        "tested episodes": {recording.name: len(recording.tested) for recording in recordings},
        "fitted pairs": len(fitted), "outputs": int(varies.sum()), "image size": IMAGE_SIZE,
    }  # fmt: skip
    logger.info(
        "%d frames, %d pairs to fit on in %d episodes; %s",
        sum(recording.folder.frame_count for recording in recordings), len(fitted), len(recordings[0].fitted),
        ", ".join(f"{len(r.tested)} episodes of {r.name} to test on" for r in recordings),
    )  # fmt: skip
    problem = _Problem(recordings, varies, deviation, readout, rule, seeds, device, batch_size, out)
    opened = {name: _tokens_of(name, device) for name in names if name not in (BLIND, STATE_ONLY)}
    data = [recording.identity for recording in recordings]
    found: dict[str, Outcome] = {}
    finished: list[Path] = []
    with alone(out):
        for number, name in enumerate(names, 1):
            identity = fingerprint(settings, versions(), data, name, opened[name][1] if name in opened else "")
            kept = out / "unfinished" / f"{identity}.json"
            finished.append(kept)
            if kept.is_file():
                logger.info("Encoder %d of %d: %s was finished by an interrupted run", number, len(names), name)
                found[labels[name]] = Outcome(**json.loads(kept.read_text()))
                continue
            logger.info("Encoder %d of %d: %s", number, len(names), name)
            outcome = problem.solve(name, *opened.get(name, (None, "")))
            write_whole(kept, json.dumps(asdict(outcome)))
            found[labels[name]] = outcome
        result = _report(out, found, labels[chosen], recordings, settings, notes, kind, horizon)
        for file in finished:
            file.unlink()
        if not any((out / "unfinished").iterdir()):
            (out / "unfinished").rmdir()
        return result


def _open_argument(argument: str | None) -> list[Recording]:
    if argument is None:
        raise ConfigError("The scorer dynamics needs recorded trajectories: --scorers dynamics@FOLDER.")
    return open_recordings(argument, [], None, _HORIZON, None)[0]


@checked_by(lambda argument: _open_argument(argument)[0].identity)
def dynamics_scorer(trained: Any) -> dict[str, float]:
    """What the patch tokens know of a robot's plans and motions: ridge regression on recorded trajectories.

    Protocol: that of ``theia probe dynamics`` with its defaults. Data: the data set folder of LeRobot that follows the
    scorer's name, as in ``--scorers dynamics@/data/my_robot`` or ``dynamics@/data/my_robot#CAMERA``.

    Args:
        trained: The student, a :class:`theia.scoring.contract.Trained`.

    Returns:
        ``plan_error`` and ``motion_error``: mean L1 errors on held-out episodes, in deviations of the target.

    Raises:
        ConfigError: If no data set was given.
        TrajectoryError: If it cannot be read.
    """
    recordings = _open_argument(trained.argument)
    varies = moving(recordings[0].pairs.of(recordings[0].fitted))
    deviation = recordings[0].pairs.of(recordings[0].fitted).target.std(0)[varies]
    with TemporaryDirectory(prefix="theia-dynamics-") as folder:
        problem = _Problem(recordings, varies, deviation, "ridge", SMALL, [], trained.device, 32, Path(folder))
        outcome = problem.solve("student", trained.encoder.forward_features, "")
    weights = episode_weights(recordings[0])
    return {
        f"{question}_error": float(np.average(outcome.errors[question][recordings[0].name][0], weights=weights))
        for question in QUESTIONS
    }


@dataclass(frozen=True)
class _Problem:
    """All that stays the same from one encoder to the next."""

    recordings: Sequence[Recording]
    varies: NDArray[np.bool_]
    deviation: NDArray[np.float64]
    readout: Readout
    rule: Rule
    seeds: Sequence[int]
    device: torch.device
    batch_size: int
    out: Path

    def targets(self, pairs: Pairs) -> NDArray[np.float64]:
        """Targets in deviations, shape ``(n, D)``."""
        return pairs.target[:, self.varies] / self.deviation

    def solve(self, name: str, tokens_of: TokensOf | None, look: str) -> Outcome:
        """Fits the read-outs of one encoder and measures their errors."""
        if name == BLIND:
            return self._by_ridge(
                {q: [lambda places: np.zeros((len(places), 1))] * len(self.recordings) for q in QUESTIONS}
            )
        if name == STATE_ONLY:
            states = [standardised_state(recording, self.recordings[0]) for recording in self.recordings]
            of_pairs = [_first_of(state, r.pairs) for state, r in zip(states, self.recordings, strict=True)]
            return self._by_ridge({question: of_pairs for question in QUESTIONS})
        assert tokens_of is not None
        # 16x16 means are small enough for a ridge, but five times the tokens that the small transformer takes.
        averaged = name != PIXELS if self.readout == "ridge" else self.rule is SMALL
        most_rows = _MOST_ROWS if averaged else None
        every = [
            embed(
                tokens_of, name, recording.folder, recording.camera, recording.fitted,
                self.out / "embeddings" / fingerprint(look, recording.identity, sorted(recording.fitted), most_rows),
                self.device, self.batch_size, most_rows,
            )
            for recording in self.recordings
        ]  # fmt: skip
        if self.readout == "transformer":
            return self._by_transformer(name, every)
        components = np.eye(every[0].tokens.shape[2], dtype=np.float32) if name == PIXELS else every[0].components()
        projected = [
            FrameTokens(part.tokens, part.grid, every[0].mean, every[0].deviation, every[0].correlation)
            for part in every
        ]

        def features(part: FrameTokens, pairs: Pairs, question: Question) -> Callable[..., NDArray[np.floating]]:
            def of(places: NDArray[np.int64]) -> NDArray[np.floating]:
                first = part.projected(pairs.first[places], components)
                if question == "plan":
                    return first
                return np.concatenate([first, part.projected(pairs.second[places], components)], 1)

            return of

        return self._by_ridge(
            {
                question: [features(p, r.pairs, question) for p, r in zip(projected, self.recordings, strict=True)]
                for question in QUESTIONS
            }
        )

    def _by_ridge(self, features: Mapping[str, Sequence[Callable[..., NDArray[np.floating]]]]) -> Outcome:
        outcome = Outcome()
        main = self.recordings[0]
        order = sorted(main.fitted)
        inner = held_out([main.folder.tasks[episode] for episode in order])
        checking = [order[place] for place in sorted(inner)]
        for question, of_recordings in features.items():
            samples = np.flatnonzero(np.isin(main.pairs.episode, order))
            targets = self.targets(main.pairs)
            checked = np.isin(main.pairs.episode[samples], checking)
            line, penalty = fit(of_recordings[0], samples, targets[samples], checked)
            outcome.details[f"{question} penalty"] = penalty
            for recording, features_of in zip(self.recordings, of_recordings, strict=True):
                tested = np.flatnonzero(np.isin(recording.pairs.episode, list(recording.tested)))
                error = np.abs(predict(line, features_of, tested) - self.targets(recording.pairs)[tested]).mean(1)
                outcome.errors.setdefault(question, {})[recording.name] = [_by_episode(error, recording, tested)]
        return outcome

    def _by_transformer(self, name: str, every: Sequence[FrameTokens]) -> Outcome:
        outcome, starts = Outcome(), np.cumsum([0, *(len(part.tokens) for part in every)])

        def tokens_of(places: NDArray[np.int64]) -> NDArray[np.float16]:
            number = int(np.searchsorted(starts, places[0], "right")) - 1  # all of one data set
            found: NDArray[np.float16] = every[number].tokens[places - starts[number]]
            return found

        for question in QUESTIONS:
            frames = 1 if question == "plan" else 2
            sets = []
            for number, recording in enumerate(self.recordings):
                pairs = recording.pairs.of(recording.tested)
                sets.append(np.stack([pairs.first, pairs.second][:frames], 1) + starts[number])
            fitted = self.recordings[0].pairs.of(self.recordings[0].fitted)
            for seed in self.seeds:
                predictions = fit_and_predict(
                    self.rule, tokens_of, every[0].mean, every[0].deviation,
                    np.stack([fitted.first, fitted.second][:frames], 1), self.targets(fitted), sets, seed, self.device,
                    f"{name}: {question}, seed {seed}",
                )  # fmt: skip
                for recording, predicted in zip(self.recordings, predictions, strict=True):
                    tested = np.flatnonzero(np.isin(recording.pairs.episode, list(recording.tested)))
                    error = np.abs(predicted - self.targets(recording.pairs)[tested]).mean(1)
                    by_recording = outcome.errors.setdefault(question, {})
                    by_recording.setdefault(recording.name, []).append(_by_episode(error, recording, tested))
        return outcome


def _by_episode(error: NDArray[np.float64], recording: Recording, tested: NDArray[np.int64]) -> list[float]:
    episodes = recording.pairs.episode[tested]
    return [float(error[episodes == episode].mean()) for episode in tested_episodes(recording)]


def _reference(wanted: str | None, names: Sequence[str], encoders: Sequence[str]) -> str:
    twice = [name for place, name in enumerate(names) if name in names[:place]]
    if twice:
        raise ConfigError(f"--encoders names {twice[0]} twice. Name each once.")
    if wanted is None:
        real = [name for name in encoders if name not in CONTROLS]
        return real[0] if real else names[0]
    if wanted not in names:
        raise ConfigError(f"--reference is {wanted!r}, which is none of the encoders: {', '.join(names)}.")
    return wanted


def _tokens_of(name: str, device: torch.device) -> tuple[TokensOf, str]:
    """An encoder, tried on one image, and a fingerprint of what it gave."""
    tokens_of: TokensOf = pixel_means if name == PIXELS else open_encoder(name, device, CONTROLS)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (1, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, generator=generator)
    tokens = tokens_of(noise.to(device))
    if tokens.patches.shape[1] < 2:
        raise ConfigError(f"{name} gives no spatial features, but one vector per image. Take another encoder.")
    return tokens_of, fingerprint(name, list(tokens.grid), tokens.patches.cpu().numpy())


def _first_of(state: NDArray[np.float64], pairs: Pairs) -> Callable[..., NDArray[np.floating]]:
    return lambda places: state[pairs.first[places]]


def _report(
    out: Path,
    found: Mapping[str, Outcome],
    reference: str,
    recordings: Sequence[Recording],
    settings: Mapping[str, Any],
    notes: list[str],
    target: Target,
    horizon: int,
) -> DynamicsResult:
    weights = {recording.name: episode_weights(recording) for recording in recordings}
    tasks = {r.name: [r.folder.tasks[episode] for episode in tested_episodes(r)] for r in recordings}
    summary = dynamics_report.summarise({name: o.errors for name, o in found.items()}, weights, tasks, reference)
    path = out / f"probing-dynamics-{datetime.now():%Y%m%d-%H%M%S}.json"
    while path.exists():
        path = path.with_stem(f"{path.stem}-again")
    record = {
        "versions": versions(), "machine": machine(), "settings": settings, "notes": notes, "reference": reference,
        "summary": summary.as_json(), "tested episodes": {r.name: tested_episodes(r) for r in recordings},
        "errors": {name: outcome.errors for name, outcome in found.items()},
        "details": {name: outcome.details for name, outcome in found.items()},
    }  # fmt: skip
    write_whole(path, json.dumps(jsonable(record), indent=1) + "\n")
    label = f"{describe_target(target, horizon)}, L1 in deviations"
    dynamics_report.draw(path.with_suffix(".png"), summary, label)
    size = sum(file.stat().st_size for file in (out / "embeddings").rglob("*.npy"))
    notes.append(
        f"The embeddings in {out / 'embeddings'} ({size / 1e6:.0f} MB) are used again by the next run; you may "
        "delete them."
    )
    return DynamicsResult(summary.table(), notes, [path, path.with_suffix(".png")])
