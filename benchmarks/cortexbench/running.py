"""``run``: trains policies on encoders and lets them act, resumable after any kill at every stage."""

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
from tqdm import tqdm

from benchmarks.cortexbench.cloning import BATCH_SIZE, Demonstrations, Training, load_policy, save_policy
from benchmarks.cortexbench.demonstrations import CAMERA, SCENE_STATE
from benchmarks.cortexbench.encoders import PIXELS, Eyes, TaskRecording, open_all
from benchmarks.cortexbench.policies import Policy
from benchmarks.cortexbench.presets import PRESETS, Features, Preset, PresetName
from benchmarks.cortexbench.reporting import LOSSY, RECORD, SHIFT, report
from benchmarks.cortexbench.rollouts import Film, Pilot, Rollout, roll_out
from benchmarks.cortexbench.scenes import Factor, check_factors
from benchmarks.cortexbench.simulation import ACTIONS, Quality, find_tasks
from benchmarks.cortexbench.simulators import Command, Course, Simulators
from theia.errors import ConfigError, TrajectoryError
from theia.probing.comparison import seed_numbers
from theia.probing.datasets import IMAGE_SIZE, fingerprint, of_files
from theia.probing.frame_tokens import MOST_ROWS, FrameTokens, embed
from theia.trajectories.lerobot import ACTION, LeRobotFolder
from theia.utils.arguments import comma_list
from theia.utils.files import alone, jsonable, read_json, write_whole
from theia.utils.provenance import installed, machine, versions

_FIRST_SEED = 1_000_000  # of rollouts, far from those of demonstrations
_TRIED_STEPS = 12


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
) -> str:
    """Carries out the command; see :func:`benchmarks.cortexbench.commands.run` for the arguments.

    Raises:
        TheiaError: If an option is wrong, data cannot be read or do not fit, or a simulation fails.
    """
    plan = _Plan.make(data, tasks, PRESETS[preset], preset, vary, rollouts, epochs, features)
    chosen = tuple(seed_numbers(seeds)) if seeds else plan.preset.seeds
    shifts = _shifts(shift, plan)
    eyes = open_all(encoders, features, device)
    with alone(out):
        _check_record(plan, out)
        _Run(plan, out, chosen, shifts, videos, workers, batch_size, device).go(eyes)
        return report(out, reference)


@dataclass(frozen=True)
class _Plan:
    """What must stay the same while a run goes on."""

    data: LeRobotFolder
    tasks: tuple[str, ...]
    preset: Preset
    name: str
    vary: tuple[Factor, ...]
    size: int
    quality: Quality
    features: Features
    collected: dict[str, Any]

    @staticmethod
    def make(
        data: Path, tasks: str | None, preset: Preset, name: str, vary: str | None, rollouts: int | None,
        epochs: int | None, features: Features,
    ) -> "_Plan":  # fmt: skip
        folder = LeRobotFolder(data)
        collected = read_json(data / "meta/collection.json")
        if "size" not in collected or CAMERA not in folder.features or ACTION not in folder.features:
            raise TrajectoryError(
                f"{data} does not hold demonstrations of MetaWorld. Record some: python -m benchmarks.cortexbench "
                "collect --tasks metaworld --out FOLDER."
            )
        known = list(dict.fromkeys(task for episode in folder.episodes for task in episode.tasks))
        if tasks is None:
            found = known[:1] if name == "smoke" else known
        else:
            find_tasks(comma_list(tasks))  # its message lists all tasks that there are
            found = find_tasks(comma_list(tasks), known)
        factors = check_factors([]) if vary == "none" else check_factors(comma_list(vary))
        if vary is None:
            factors = check_factors(collected["vary"])
        changes: dict[str, Any] = {"rollouts": rollouts or preset.rollouts}
        if epochs is not None:
            changes |= {"epochs": epochs, "evaluations": (epochs // 2 - 1, epochs - 1)}
        preset = Preset(**{**asdict(preset), **changes})
        return _Plan(
            folder, tuple(found), preset, name, factors, int(collected["size"]), collected["quality"], features,
            collected,
        )  # fmt: skip

    def course(self, task: str, recording: TaskRecording) -> Course:
        """What policies for a task are tested on: no seed of a demonstration is among it."""
        fresh = (seed for seed in range(_FIRST_SEED, 2**31) if seed not in recording.seeds)
        seeds = tuple(next(fresh) for _ in range(self.preset.rollouts))
        one = self.preset
        return Course(task, seeds, self.vary, self.size, self.quality, IMAGE_SIZE, one.horizon, one.hold)

    def record(self) -> dict[str, Any]:
        """What is compared when a run goes on."""
        preset = {name: value for name, value in asdict(self.preset).items() if name != "seeds"}
        return dict(
            jsonable(
                {
                    "data": of_files(str(self.data.root)), "preset": self.name, **preset, "vary": self.vary,
                    "features": self.features, "size": self.size, "quality": self.quality,
                    "simulator": installed(("metaworld", "mujoco")),
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
        if self.plan.collected.get("pictures") == "video":
            _say(f"{LOSSY}.")
        for task in self.plan.tasks:
            if all(self._finished(one, task, seed) for one in eyes for seed in self.seeds):
                continue
            recording = TaskRecording(self.plan.data, task, self.plan.preset.demonstrations)
            course = self.plan.course(task, recording)
            with Simulators(course, self.workers) as simulators:
                if not told:
                    _say(self._forecast(eyes, recording, simulators))
                    told = True
                for one in eyes:
                    demonstrations = self._demonstrations(one, recording)
                    for seed in self.seeds:
                        self._one(one, course, seed, demonstrations, simulators)
            for factor in self.shifts:
                self._shift(eyes, course, factor)

    def _one(
        self, eyes: Eyes, course: Course, seed: int, demonstrations: Demonstrations, simulators: Simulators
    ) -> None:
        folder = self.folder(eyes, course.task, seed)
        if not (folder / "policy.pt").is_file():
            self._train(eyes, course, seed, demonstrations, simulators)
        if self.videos and not self._filmed(eyes, course.task, seed):
            policy, _ = load_policy(folder / "policy.pt")
            pilot = Pilot(eyes, policy.to(self.device), self.device)
            shown = replace(course, seeds=course.seeds[: self.videos])
            with Film(self._video(eyes, course.task, seed), round(self.plan.data.frames_per_s)) as film:
                roll_out(simulators, pilot, shown, film.watch)

    def _shift(self, eyes: Sequence[Eyes], course: Course, factor: Factor) -> None:
        """Lets finished policies act once more, from the same initial states, where one thing looks different."""
        left = [(one, seed) for one in eyes for seed in self.seeds if not self._shifted(one, course.task, seed, factor)]
        if not left:
            return
        other = replace(course, vary=check_factors([*course.vary, factor]))
        with Simulators(other, self.workers) as simulators:
            for one, seed in left:
                folder = self.folder(one, course.task, seed)
                policy, _ = load_policy(folder / "policy.pt")
                started = time.monotonic()
                found = roll_out(simulators, Pilot(one, policy.to(self.device), self.device), other)
                record = {"shift": factor, "rollout seconds": time.monotonic() - started, "rollouts": _records(found)}
                write_whole(folder / f"{SHIFT}{factor}.json", json.dumps(jsonable(record)))
                _say(
                    f"{one.label}, {course.task}, seed {seed}, another {factor}: success "
                    f"{sum(each.success for each in found)} of {len(found)}"
                )

    def _train(
        self, eyes: Eyes, course: Course, seed: int, demonstrations: Demonstrations, simulators: Simulators
    ) -> None:
        folder = self.folder(eyes, course.task, seed)
        training = Training(
            lambda: self._policy(eyes, demonstrations), demonstrations, seed, folder / "training.pt", self.device
        )
        for epoch in self.plan.preset.evaluations:
            training.advance(epoch)
            path = folder / f"rollouts-{epoch:03d}.json"
            if path.is_file():
                continue
            started = time.monotonic()
            found = roll_out(simulators, Pilot(eyes, training.policy, self.device), course)
            seconds = time.monotonic() - started
            record = {
                "encoder": eyes.label, "task": course.task, "seed": seed, "epoch": epoch,
                "last": epoch == self.plan.preset.evaluations[-1], "losses": training.losses,
                "training seconds": training.seconds, "rollout seconds": seconds,
                "steps": sum(one.steps for one in found),
                "rollouts": _records(found),
            }  # fmt: skip
            write_whole(path, json.dumps(jsonable(record)))
            _say(
                f"{eyes.label}, {course.task}, seed {seed}, epoch {epoch}: loss {training.losses[-1]:.4f}, success "
                f"{sum(one.success for one in found)} of {len(found)} ({seconds:.0f} s)"
            )
        about = {"encoder": eyes.name, "features": self.plan.features, "task": course.task, "seed": seed}
        save_policy(training.policy, folder / "policy.pt", about)
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

    def _demonstrations(self, eyes: Eyes, recording: TaskRecording) -> Demonstrations:
        if not recording.originals:
            raise TrajectoryError(f"{recording.folder.root} holds no demonstration of one of the tasks. Collect some.")
        observations = recording.folder.column(SCENE_STATE)[recording.rows]
        actions = recording.folder.column(ACTION)[recording.rows]
        tokens: FrameTokens | None = None
        if eyes.tokens_of is not None:
            numbers = [one.index for one in recording.originals]
            place = fingerprint(eyes.look, self._pooled(eyes), of_files(str(recording.folder.root)), numbers)
            tokens = embed(
                eyes.tokens_of, eyes.label, recording, CAMERA, frozenset(range(len(recording.episodes))),
                self.out / "embeddings" / place, self.device, self.batch_size, self._pooled(eyes),
            )  # fmt: skip
        lengths = [one.length for one in recording.episodes]
        return Demonstrations.of(tokens, eyes.known(observations), actions, lengths)

    def _pooled(self, eyes: Eyes) -> bool:
        return self.plan.preset.components is not None and eyes.name != PIXELS  # which is small already

    def _policy(self, eyes: Eyes, demonstrations: Demonstrations) -> Policy:
        grid = demonstrations.tokens.grid if demonstrations.tokens is not None else (1, 1)
        return Policy(eyes.channels, grid, demonstrations.known.shape[1], len(ACTIONS), self.plan.preset.components)

    def _forecast(self, eyes: Sequence[Eyes], recording: TaskRecording, simulators: Simulators) -> str:
        """Measures one step of everything, and says how long the rest will take at most."""
        preset, tasks = self.plan.preset, len(self.plan.tasks)
        looking, blind = (_seconds_per_step(simulators, look) for look in (True, False))
        lines, total = [], 0.0
        for one in eyes:
            left = sum(not self._finished(one, task, seed) for task in self.plan.tasks for seed in self.seeds)
            encoding, deciding, fitting = self._seconds(one, recording)
            simulating = (looking if one.tokens_of is not None else blind) / min(self.workers, preset.rollouts)
            steps = preset.rollouts * preset.horizon * (len(preset.evaluations) + len(self.shifts))
            updates = preset.epochs * -(-recording.frame_count // BATCH_SIZE)
            acting = steps * (simulating + encoding + deciding)
            seconds = left * (updates * fitting + acting)
            seconds += tasks * recording.frame_count * encoding if left else 0
            total += seconds
            lines.append(
                f"  {one.label}: {left} policies, {updates} updates of {1000 * fitting:.0f} ms and at most {steps:,} "
                f"steps of {1000 * (simulating + encoding + deciding):.0f} ms each: {seconds / 60:.0f} min"
            )
        return f"At most about {total / 60:.0f} min, as measured now on this machine:\n" + "\n".join(lines)

    def _seconds(self, eyes: Eyes, recording: TaskRecording) -> tuple[float, float, float]:
        """Time of one frame through the encoder, of one decision, and of one update."""
        encoding, tokens = 0.0, None
        if eyes.tokens_of is not None:
            rows, columns = eyes.grid
            if self._pooled(eyes):
                rows, columns = min(rows, MOST_ROWS), min(columns, MOST_ROWS)
            pictures = torch.zeros((self.workers, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, device=self.device)
            encoding = _time(lambda: eyes.tokens_of(pictures)) / self.workers
            made_up = np.random.default_rng(0).normal(size=(BATCH_SIZE, rows * columns, eyes.channels))
            identity = np.eye(eyes.channels)
            mean, deviation = np.zeros(eyes.channels), np.ones(eyes.channels)
            tokens = FrameTokens(made_up.astype(np.float16), (rows, columns), mean, deviation, identity)
        known = eyes.known(np.zeros((BATCH_SIZE, recording.folder.features[SCENE_STATE].shape[0])))
        made_up_data = Demonstrations.of(tokens, known, np.zeros((BATCH_SIZE, len(ACTIONS)), np.float32), [BATCH_SIZE])
        training = Training(lambda: self._policy(eyes, made_up_data), made_up_data, 0, self.out / "none", self.device)
        fitting = _time(lambda: training.step(np.arange(BATCH_SIZE)))
        policy = training.policy.eval()
        with torch.inference_mode():
            frames, seen = made_up_data.batch(policy, np.arange(self.workers), self.device)
            deciding = _time(lambda: policy(frames, seen)) / self.workers
        return encoding, deciding, fitting


def _shifts(names: str | None, plan: _Plan) -> tuple[Factor, ...]:
    shifts = check_factors(comma_list(names), "--shift")
    for factor in shifts:
        if factor in plan.vary or factor in plan.collected["vary"]:
            raise ConfigError(
                f"--shift has {factor!r}, which the demonstrations or the other rollouts vary already. Record "
                f"demonstrations without it, or leave it out."
            )
    return shifts


def _records(rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
    return [
        {
            "seed": one.seed, "success": one.success, "first_success": one.first_success, "steps": one.steps,
            "beginning": one.beginning,
        }
        for one in rollouts
    ]  # fmt: skip


def _seconds_per_step(simulators: Simulators, look: bool) -> float:
    slot = simulators.groups[0][0]
    action = np.zeros(len(ACTIONS), np.float32)
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
        about = {"settings": now, "demonstrations": plan.collected, "versions": versions(), "machine": machine()}
        write_whole(path, json.dumps(jsonable(about), indent=1))
        return
    different = [name for name in now if before.get(name) != now[name]]
    if different:
        said = "; ".join(
            "other demonstrations" if name == "data" else f"{name} {before.get(name)}, not {now[name]}"
            for name in different
        )
        raise ConfigError(f"{out} was begun with {said}. Go on with the same, or give a new folder.")


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)  # whatever bar there is stays whole


def _file_name(label: str) -> str:
    """A label as the name of a folder; two labels never share one."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", label)
    return plain if plain == label else f"{plain}-{fingerprint(label)[:6]}"
