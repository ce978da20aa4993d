"""``run``: trains policies on encoders and lets them act, resumable after any kill at every stage."""

import copy
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.cortexbench.encoders import STATE, Eyes, TaskRecording, open_all
from benchmarks.cortexbench.presets import PRESETS, Features, Preset, PresetName
from benchmarks.cortexbench.recordings import Recordings
from benchmarks.cortexbench.reporting import LOSSY, RECORD, SHIFT, report
from benchmarks.cortexbench.rollouts import Film, Pilot, Rollout, roll_out
from benchmarks.cortexbench.scenes import Factor, check_factors
from benchmarks.cortexbench.simulation import DISTRIBUTIONS, Quality, check_installed
from benchmarks.cortexbench.simulators import Command, Course, Simulators
from benchmarks.cortexbench.tasks import TASKS, check_fit, find_tasks
from theia.errors import ConfigError, TrajectoryError
from theia.extraction.images import to_square
from theia.policies import HeadKind
from theia.policies.cloning import (
    RECIPES,
    Demonstrations,
    FineTuning,
    PicturesOf,
    Training,
    load_head,
    save_head,
    updates_per_epoch,
)
from theia.policies.heads import HEADS, HISTORY, Head
from theia.policies.sight import PIXELS, Sight
from theia.probing.comparison import seed_numbers
from theia.probing.datasets import IMAGE_SIZE, fingerprint, of_files
from theia.probing.frame_tokens import MOST_ROWS, FrameTokens, embed
from theia.trajectories.lerobot import ACTION
from theia.utils.arguments import comma_list
from theia.utils.files import alone, jsonable, read_json, write_whole
from theia.utils.provenance import installed, machine, versions

_FIRST_SEED = 1_000_000  # of rollouts, far from those of demonstrations
_TRIED_STEPS = 12
_TRIED_OF_BATCH = 4  # steps of the demonstrations, where the encoder is trained too


@dataclass(frozen=True)
class Learner:
    """What is trained, and how it acts.

    Attributes:
        head: Kind of the head.
        chunk: Number of actions that it predicts at once; ``None`` for what is usual.
        execute: Number of those that are carried out before the next decision; ``None`` for all.
        encoder_learning_rate: Learning rate of the encoder; ``None`` for a frozen one.
    """

    head: HeadKind = "mlp"
    chunk: int | None = None
    execute: int | None = None
    encoder_learning_rate: float | None = None

    @property
    def predicted(self) -> int:
        """Number of actions that the head predicts at once."""
        return self.chunk or HEADS[self.head].usual_chunk

    def check(self) -> None:
        """Checks that the options fit together.

        Raises:
            ConfigError: If they do not.
        """
        predicted = self.predicted
        if self.head == "mlp" and predicted != 1:
            raise ConfigError(f"--chunk is {self.chunk}, but --head mlp predicts one action. Take --head chunk.")
        if self.execute is not None and self.execute > predicted:
            raise ConfigError(f"--execute is {self.execute}, but the head predicts {predicted}. Give less, or --chunk.")


def run(
    encoders: Sequence[str],
    data: Path,
    out: Path,
    tasks: str | None,
    preset: PresetName,
    vary: str | None,
    rollouts: int | None,
    seeds: str | None,
    epochs: int | None,
    features: Features,
    shift: str | None,
    videos: int,
    reference: str | None,
    workers: int,
    batch_size: int,
    device: torch.device,
    learner: Learner,
) -> str:
    """Carries out the command; see :func:`benchmarks.cortexbench.commands.run` for the arguments.

    Raises:
        TheiaError: If an option is wrong, data cannot be read or do not fit, or a simulation fails.
    """
    learner.check()
    plan = _Plan.make(data, tasks, PRESETS[preset], preset, vary, rollouts, epochs, features, learner)
    chosen = tuple(seed_numbers(seeds)) if seeds else plan.preset.seeds
    shifts = _shifts(shift, plan)
    if STATE in encoders:
        for task in plan.tasks:
            plan.data.check_state(task)
    eyes = open_all(encoders, features, device)
    if learner.encoder_learning_rate is not None:
        _check_trainable(eyes)
    with alone(out):
        _check_record(plan, out)
        _Run(plan, out, chosen, shifts, videos, workers, batch_size, device).go(eyes)
        return report(out, reference)


@dataclass(frozen=True)
class _Plan:
    """What must stay the same while a run goes on."""

    data: Recordings
    tasks: tuple[str, ...]
    preset: Preset
    name: str
    vary: tuple[Factor, ...]
    size: int
    quality: Quality
    features: Features
    learner: Learner
    epochs_given: bool

    @staticmethod
    def make(
        data: Path, tasks: str | None, preset: Preset, name: str, vary: str | None, rollouts: int | None,
        epochs: int | None, features: Features, learner: Learner,
    ) -> "_Plan":  # fmt: skip
        recordings = Recordings.open(data)
        collected, known = recordings.about, list(recordings.folders)
        if tasks is None:
            found = known[:1] if name == "smoke" else known
        else:
            find_tasks(comma_list(tasks))  # its message lists all tasks that there are
            found = find_tasks(comma_list(tasks), known)
        missing = [task for task in found if task not in known]
        if missing:
            raise TrajectoryError(
                f"{data} holds no demonstration of {missing[0]}. Collect some, or name tasks that it has: "
                f"{', '.join(known)}."
            )
        check_installed(TASKS[task].simulator for task in found)
        factors = check_factors([]) if vary == "none" else check_factors(comma_list(vary))
        if vary is None:
            factors = check_factors(collected["vary"])
        check_fit(found, factors)
        changes: dict[str, Any] = {"rollouts": rollouts or preset.rollouts}
        if epochs is not None:
            changes |= {"epochs": epochs, "evaluations": (epochs // 2 - 1, epochs - 1)}
        preset = Preset(**{**asdict(preset), **changes})
        size, quality = int(collected["size"]), collected["quality"]
        return _Plan(
            recordings, tuple(found), preset, name, factors, size, quality, features, learner, epochs is not None
        )

    def schedule(self, frames: int) -> tuple[int, tuple[int, ...]]:
        """Number of epochs, and those after which the policy acts, for demonstrations of so many frames."""
        preset, recipe = self.preset, RECIPES[self.learner.head]
        if recipe.updates is None or self.epochs_given or self.name == "smoke":
            return preset.epochs, preset.evaluations
        epochs = max(2, -(-recipe.updates // updates_per_epoch(frames, recipe.batch_size)))
        scaled = (max(0, (one + 1) * epochs // preset.epochs - 1) for one in preset.evaluations)
        return epochs, tuple(dict.fromkeys(scaled))

    def course(self, task: str, recording: TaskRecording) -> Course:
        """What policies for a task are tested on: no seed of a demonstration is among it."""
        fresh = (seed for seed in range(_FIRST_SEED, 2**31) if seed not in recording.seeds)
        seeds = tuple(next(fresh) for _ in range(self.preset.rollouts))
        steps, hold = self.preset.steps(TASKS[task]), self.preset.holds(TASKS[task])
        return Course(task, seeds, self.vary, self.size, self.quality, IMAGE_SIZE, steps, hold)

    def _distributions(self) -> list[str]:
        """What is simulated with, by all data sets of the folder, so that tasks can be added to a run."""
        simulators = {TASKS[task].simulator: None for task in self.data.folders}
        return [*(DISTRIBUTIONS[simulator] for simulator in simulators), "mujoco"]

    def record(self) -> dict[str, Any]:
        """What is compared when a run goes on."""
        preset = {name: value for name, value in asdict(self.preset).items() if name != "seeds"}
        # Earlier versions had one way to train, and did not write it down.
        usual = asdict(Learner())
        learner = {name: value for name, value in asdict(self.learner).items() if value != usual[name]}
        return dict(
            jsonable(
                {
                    **learner, "data": of_files(str(self.data.root)), "preset": self.name, **preset, "vary": self.vary,
                    "features": self.features, "size": self.size, "quality": self.quality,
                    "simulator": installed(self._distributions()),
                }
            )
        )  # fmt: skip


@dataclass(frozen=True)
class _Run:
    plan: _Plan
    out: Path
    seeds: tuple[int, ...]
    shifts: tuple[Factor, ...]
    videos: int
    workers: int
    batch_size: int
    device: torch.device

    def go(self, eyes: Sequence[Eyes]) -> None:
        """Does what is left to do, one task after another, so that simulators are started once for each."""
        for one in eyes:
            self._check_weights(one)
        told = False
        if self.plan.data.about.get("pictures") == "video":
            _say(f"{LOSSY}.")
        for task in self.plan.tasks:
            if all(self._finished(one, task, seed) for one in eyes for seed in self.seeds):
                continue
            recording = TaskRecording(self.plan.data.folders[task], task, self.plan.preset.demonstrations)
            course = self.plan.course(task, recording)
            here = [replace(one, proprioception=TASKS[task].proprioception) for one in eyes]
            with Simulators(course, self.workers) as simulators:
                if not told:
                    _say(self._forecast(here, task, recording, simulators))
                    told = True
                for one in here:
                    demonstrations = self._demonstrations(one, task, recording)
                    for seed in self.seeds:
                        self._one(one, course, seed, demonstrations, simulators)
            for factor in self.shifts:
                self._shift(here, course, factor)

    def _one(
        self, eyes: Eyes, course: Course, seed: int, demonstrations: Demonstrations, simulators: Simulators
    ) -> None:
        folder = self.folder(eyes, course.task, seed)
        if not (folder / "policy.pt").is_file():
            self._train(eyes, course, seed, demonstrations, simulators)
        if self.videos and not self._filmed(eyes, course.task, seed):
            pilot = self._pilot(eyes, folder)
            shown = replace(course, seeds=course.seeds[: self.videos])
            with Film(self._video(eyes, course.task, seed), TASKS[course.task].frames_per_s) as film:
                roll_out(simulators, pilot, shown, film.watch)

    def _pilot(self, eyes: Eyes, folder: Path) -> Pilot:
        """A finished policy."""
        head, kept = load_head(folder / "policy.pt")
        if eyes.sight is not None and "weights" in kept:
            tuned = copy.deepcopy(eyes.sight)
            tuned.load_state_dict(kept["weights"])
            eyes = replace(eyes, tokens_of=tuned)
        return Pilot(eyes, head.to(self.device), self.device, self.plan.learner.execute)

    def _shift(self, eyes: Sequence[Eyes], course: Course, factor: Factor) -> None:
        """Lets finished policies act once more, from the same initial states, where one thing looks different."""
        left = [(one, seed) for one in eyes for seed in self.seeds if not self._shifted(one, course.task, seed, factor)]
        if not left:
            return
        other = replace(course, vary=check_factors([*course.vary, factor]))
        with Simulators(other, self.workers) as simulators:
            for one, seed in left:
                folder = self.folder(one, course.task, seed)
                pilot = self._pilot(one, folder)
                started = time.monotonic()
                found = roll_out(simulators, pilot, other)
                records = _records(found, course.task)
                record = {"shift": factor, "rollout seconds": time.monotonic() - started, "rollouts": records}
                write_whole(folder / f"{SHIFT}{factor}.json", json.dumps(jsonable(record)))
                _say(f"{one.label}, {course.task}, seed {seed}, another {factor}: {_outcome(records, course.task)}")

    def _train(
        self, eyes: Eyes, course: Course, seed: int, demonstrations: Demonstrations, simulators: Simulators
    ) -> None:
        folder = self.folder(eyes, course.task, seed)
        epochs, evaluations = self.plan.schedule(len(demonstrations))
        tuning = self._tuning(eyes)
        if tuning is not None:
            eyes = replace(eyes, tokens_of=tuning.sight)
        training = Training(
            lambda: self._head(eyes, demonstrations), demonstrations, seed, folder / "training.pt", self.device, epochs,
            tuning=tuning,
        )  # fmt: skip
        pilot = Pilot(eyes, training.head, self.device, self.plan.learner.execute)
        for epoch in evaluations:
            training.advance(epoch)
            path = folder / f"rollouts-{epoch:03d}.json"
            if path.is_file():
                continue
            started = time.monotonic()
            training.head.eval()
            found = roll_out(simulators, pilot, course)
            seconds = time.monotonic() - started
            record: dict[str, Any] = {
                "encoder": eyes.label, "task": course.task, "seed": seed, "epoch": epoch,
                "last": epoch == evaluations[-1], "losses": training.losses,
                "training seconds": training.seconds, "rollout seconds": seconds,
                "steps": sum(one.steps for one in found),
                "rollouts": _records(found, course.task),
            }  # fmt: skip
            write_whole(path, json.dumps(jsonable(record)))
            _say(
                f"{eyes.label}, {course.task}, seed {seed}, epoch {epoch}: loss {training.losses[-1]:.4f}, "
                f"{_outcome(record['rollouts'], course.task)} ({seconds:.0f} s)"
            )
        task = TASKS[course.task]
        about = {
            "encoder": eyes.name, "features": self.plan.features, "task": course.task, "seed": seed,
            "image_size": IMAGE_SIZE, "execute": self.plan.learner.execute, "frames_per_s": float(task.frames_per_s),
            "state_names": () if eyes.name == STATE else task.states, "action_names": task.actions,
        }  # fmt: skip
        if tuning is not None:
            about["weights"] = tuning.sight.state_dict()
        save_head(training.head, folder / "policy.pt", about)
        (folder / "training.pt").unlink(missing_ok=True)

    def folder(self, eyes: Eyes, task: str, seed: int) -> Path:
        """Where the files of one policy lie."""
        return self.out / "policies" / _file_name(eyes.label) / task / f"seed-{seed}"

    def _finished(self, eyes: Eyes, task: str, seed: int) -> bool:
        done = (self.folder(eyes, task, seed) / "policy.pt").is_file()
        shown = not self.videos or self._filmed(eyes, task, seed)
        return done and shown and all(self._shifted(eyes, task, seed, factor) for factor in self.shifts)

    def _shifted(self, eyes: Eyes, task: str, seed: int, factor: Factor) -> bool:
        return (self.folder(eyes, task, seed) / f"{SHIFT}{factor}.json").is_file()

    def _filmed(self, eyes: Eyes, task: str, seed: int) -> bool:
        path_of = self._video(eyes, task, seed)
        return all(path_of(number).is_file() for number in range(min(self.videos, self.plan.preset.rollouts)))

    def _video(self, eyes: Eyes, task: str, seed: int) -> Callable[[int], Path]:
        return lambda number: (
            self.out / "videos" / f"{_file_name(eyes.label)}-{task}-seed-{seed}-rollout-{number:02d}.mp4"
        )

    def _check_weights(self, eyes: Eyes) -> None:
        path = self.out / "policies" / _file_name(eyes.label) / "encoder.json"
        before = read_json(path)
        now = {"name": eyes.name, "label": eyes.label, "features of noise": eyes.of_noise}
        if not before:
            write_whole(path, json.dumps(now))
            return
        if before.get("name") != eyes.name:
            raise ConfigError(f"{self.out} has policies on {before.get('name')} under this name. Give a new folder.")
        then = before["features of noise"]
        # Processors and numbers of threads round differently.
        if len(then) != len(eyes.of_noise) or not np.allclose(then, eyes.of_noise, 0.01, 0.01 * np.abs(then).max()):
            raise ConfigError(
                f"{self.out} has policies on {eyes.name}, whose weights have changed since. Give a new folder."
            )

    def _demonstrations(self, eyes: Eyes, task: str, recording: TaskRecording) -> Demonstrations:
        observations = self.plan.data.observations(task, recording.rows)
        actions = recording.folder.column(ACTION)[recording.rows]
        tokens, pictures = None, None
        if self._tunes(eyes):
            pictures = _pictures_of(recording)
        # An encoder that is trained too is embedded for the principal components alone.
        if eyes.tokens_of is not None and (pictures is None or self.plan.preset.components is not None):
            numbers = [one.index for one in recording.originals]
            place = fingerprint(eyes.look, self._pooled(eyes), of_files(str(recording.folder.root)), numbers)
            tokens = embed(
                eyes.tokens_of, eyes.label, recording, self.plan.data.camera(task),
                frozenset(range(len(recording.episodes))), self.out / "embeddings" / place, self.device,
                self.batch_size, self._pooled(eyes),
            )  # fmt: skip
        lengths = [one.length for one in recording.episodes]
        return Demonstrations.of(tokens, eyes.known(observations), actions, lengths, pictures)

    def _pooled(self, eyes: Eyes) -> bool:
        return self.plan.preset.components is not None and eyes.name != PIXELS  # which is small already

    def _head(self, eyes: Eyes, demonstrations: Demonstrations) -> Head:
        grid = demonstrations.tokens.grid if demonstrations.tokens is not None else eyes.grid
        known, actions = demonstrations.known.shape[1], demonstrations.actions.shape[1]
        learner = self.plan.learner
        return HEADS[learner.head](eyes.channels, grid, known, actions, self.plan.preset.components, learner.chunk)

    def _tunes(self, eyes: Eyes) -> bool:
        return self.plan.learner.encoder_learning_rate is not None and eyes.sight is not None and eyes.name != PIXELS

    def _tuning(self, eyes: Eyes) -> FineTuning | None:
        """A copy of the encoder to train, for one policy."""
        if not self._tunes(eyes):
            return None
        sight: Sight = copy.deepcopy(eyes.tokens_of)  # type: ignore[assignment]
        if sight.encoder is not None:
            sight.encoder.unfreeze()
        return FineTuning(sight, self.plan.learner.encoder_learning_rate or 0.0)

    def _forecast(self, eyes: Sequence[Eyes], task: str, recording: TaskRecording, simulators: Simulators) -> str:
        """Measures one step of everything, and says how long the rest will take at most."""
        preset, tasks, actions = self.plan.preset, len(self.plan.tasks), self.plan.data.actions(task)
        looking, blind = (_seconds_per_step(simulators, actions, look) for look in (True, False))
        lines, total = [], 0.0
        for one in eyes:
            left = sum(not self._finished(one, task, seed) for task in self.plan.tasks for seed in self.seeds)
            encoding, deciding, fitting = self._seconds(one, task, recording)
            simulating = (looking if one.tokens_of is not None else blind) / min(self.workers, preset.rollouts)
            epochs, evaluations = self.plan.schedule(recording.frame_count)
            steps = preset.rollouts * preset.steps(TASKS[task]) * (len(evaluations) + len(self.shifts))
            updates = epochs * updates_per_epoch(recording.frame_count, RECIPES[self.plan.learner.head].batch_size)
            execute = self.plan.learner.execute or self.plan.learner.predicted
            # Of the frames between two decisions, no more than three are encoded.
            a_step = simulating + encoding * min(HISTORY, execute) / execute + deciding
            acting = steps * a_step
            seconds = left * (updates * fitting + acting)
            seconds += tasks * recording.frame_count * encoding if left else 0
            total += seconds
            lines.append(
                f"  {one.label}: {left} policies, {updates} updates of {1000 * fitting:.0f} ms and at most {steps:,} "
                f"steps of {1000 * a_step:.0f} ms each: {seconds / 60:.0f} min"
            )
        return f"At most about {total / 60:.0f} min, as measured now on this machine:\n" + "\n".join(lines)

    def _seconds(self, eyes: Eyes, task: str, recording: TaskRecording) -> tuple[float, float, float]:
        """Time of one frame through the encoder, of one decision, and of one update."""
        encoding, tokens = 0.0, None
        count = RECIPES[self.plan.learner.head].batch_size
        if eyes.tokens_of is not None:
            rows, columns = eyes.grid
            if self._pooled(eyes):
                rows, columns = min(rows, MOST_ROWS), min(columns, MOST_ROWS)
            blank = torch.zeros((self.workers, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, device=self.device)
            encoding = _time(lambda: eyes.tokens_of(blank)) / self.workers
            made_up = np.random.default_rng(0).normal(size=(count, rows * columns, eyes.channels))
            identity = np.eye(eyes.channels)
            mean, deviation = np.zeros(eyes.channels), np.ones(eyes.channels)
            tokens = FrameTokens(made_up.astype(np.float16), (rows, columns), mean, deviation, identity)
        known = eyes.known(np.zeros((count, TASKS[task].observations)))
        actions, tuning = np.zeros((count, self.plan.data.actions(task)), np.float32), self._tuning(eyes)
        pictures: PicturesOf | None = None
        if tuning is not None:
            pictures = lambda rows: _pictures_of(recording)(np.minimum(rows, recording.frame_count - 1))  # noqa: E731
        # Apart, a step has three pictures of its own, as it nearly has in a batch of steps in any order.
        made_up_data = Demonstrations.of(tokens, known, actions, [count], pictures)
        training = Training(lambda: self._head(eyes, made_up_data), made_up_data, 0, None, self.device, tuning=tuning)
        tried = np.arange(count) if tuning is None else np.arange(2, count, count // _TRIED_OF_BATCH)
        fitting = _time(lambda: training.step(tried)) * count / len(tried)
        head = training.head.eval()
        with torch.inference_mode():
            frames, seen = made_up_data.batch(head, np.arange(min(self.workers, count)), self.device)
            deciding = _time(lambda: head(frames, seen)) / min(self.workers, count)
        return encoding, deciding / (self.plan.learner.execute or head.chunk), fitting


def _pictures_of(recording: TaskRecording) -> PicturesOf:
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


def _check_trainable(eyes: Sequence[Eyes]) -> None:
    frozen = [one.name for one in eyes if one.sight is not None and one.name != PIXELS and one.sight.encoder is None]
    if frozen:
        raise ConfigError(f"--finetune trains Theia models, and {frozen[0]} is none. Leave it out, or --finetune.")


def _shifts(names: str | None, plan: _Plan) -> tuple[Factor, ...]:
    shifts = check_factors(comma_list(names), "--shift")
    check_fit(plan.tasks, shifts, "--shift")
    for factor in shifts:
        if factor in plan.vary or factor in plan.data.about["vary"]:
            raise ConfigError(
                f"--shift has {factor!r}, which the demonstrations or the other rollouts vary already. Record "
                f"demonstrations without it, or leave it out."
            )
    return shifts


def _records(rollouts: Sequence[Rollout], task: str) -> list[dict[str, Any]]:
    records = []
    for one in rollouts:
        success = TASKS[task].success(one.success, one.fulfilled)
        record = {
            "seed": one.seed, "success": success, "first_success": one.first_success, "steps": one.steps,
            "fulfilled": one.fulfilled, "rewards": one.rewards,
            "value": TASKS[task].value(success, one.rewards, one.steps), "beginning": one.beginning,
        }  # fmt: skip
        records.append(record)
    return records


def _outcome(records: Sequence[dict[str, Any]], task: str) -> str:
    values = [one["value"] for one in records]
    if TASKS[task].measure == "return":
        return f"score {100 * np.mean(values):.1f}"
    return f"success {sum(values):.0f} of {len(values)}"


def _seconds_per_step(simulators: Simulators, actions: int, look: bool) -> float:
    slot = simulators.groups[0][0]
    action = np.zeros(actions, np.float32)
    for command in (Command(slot, look, seed=0), Command(slot, look, action=action)):
        simulators.send(command)
        simulators.receive(slot)
    started = time.perf_counter()
    for _ in range(_TRIED_STEPS):
        simulators.send(Command(slot, look, action=action))
        simulators.receive(slot)
    return (time.perf_counter() - started) / _TRIED_STEPS


def _time(work: Any) -> float:
    work()
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _check_record(plan: _Plan, out: Path) -> None:
    """Writes down what a run was begun with, or compares it."""
    path, now = out / RECORD, plan.record()
    before = read_json(path).get("settings")
    if before is None:
        if (out / "policies").exists():
            raise ConfigError(f"{path} is damaged or missing. Give a new folder.")
        about = {"settings": now, "demonstrations": plan.data.about, "versions": versions(), "machine": machine()}
        write_whole(path, json.dumps(jsonable(about), indent=1))
        return
    different = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    if different:
        said = "; ".join(
            "other demonstrations" if name == "data" else f"{name} {_setting(name, before)}, not {_setting(name, now)}"
            for name in different
        )
        raise ConfigError(f"{out} was begun with {said}. Go on with the same, or give a new folder.")


def _setting(name: str, settings: dict[str, Any]) -> Any:
    return settings.get(name, asdict(Learner()).get(name))


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)  # whatever bar there is stays whole


def _file_name(label: str) -> str:
    """A label as the name of a folder; two labels never share one."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", label)
    return plain if plain == label else f"{plain}-{fingerprint(label)[:6]}"
