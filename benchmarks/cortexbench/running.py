"""``run``: trains policies on encoders and lets them act, resumable after any kill at every stage."""

import copy
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.cortexbench.encoders import STATE, Eyes, TaskRecording, open_all
from benchmarks.cortexbench.forecast import Left, forecast
from benchmarks.cortexbench.learning import check_trainable, demonstrations_of, make_head, tuning_of
from benchmarks.cortexbench.presets import PRESETS, Features, PresetName
from benchmarks.cortexbench.reporting import LOSSY, report
from benchmarks.cortexbench.rollouts import Film, Pilot, Rollout, roll_out
from benchmarks.cortexbench.run_files import POLICY, RunFiles
from benchmarks.cortexbench.run_plan import Learner, RunPlan, check_record, choose_shifts
from benchmarks.cortexbench.scenes import Factor, check_factors
from benchmarks.cortexbench.simulators import Course, Simulators
from benchmarks.cortexbench.tasks import TASKS
from theia.errors import ConfigError
from theia.policies.cloning import Training, load_head, save_head
from theia.policies.demonstrated import Demonstrations
from theia.policies.policy import same_features
from theia.probing.datasets import IMAGE_SIZE
from theia.utils.arguments import seed_numbers
from theia.utils.files import alone, jsonable, read_json, write_whole


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
    plan = RunPlan.make(data, tasks, PRESETS[preset], preset, vary, rollouts, epochs, features, learner)
    chosen = tuple(seed_numbers(seeds)) if seeds else plan.preset.seeds
    shifts = choose_shifts(shift, plan)
    if STATE in encoders:
        for task in plan.tasks:
            plan.data.check_state(task)
    eyes = open_all(encoders, features, device)
    if learner.encoder_learning_rate is not None:
        check_trainable(eyes)
    files = RunFiles(out)
    chosen_reference = choose_reference(reference, eyes, files)
    with alone(out):
        check_record(plan, files)
        _Run(plan, files, chosen, shifts, videos, workers, batch_size, device).go(eyes)
        return report(out, chosen_reference)


def choose_reference(wanted: str | None, eyes: Sequence[Eyes], files: RunFiles) -> str | None:
    """Finds the label of the encoder that others are compared with, before anything is trained.

    Args:
        wanted: Name or label of an encoder, or the label of one that was tested in this folder before; ``None`` leaves
            the choice to the report.
        eyes: Encoders and controls of this run.
        files: The files of the run.

    Raises:
        ConfigError: If it is none of them.
    """
    labels = {one.name: one.label for one in eyes}
    label = None if wanted is None else labels.get(wanted, wanted)
    if label is None or label in labels.values() or files.encoder(label).is_file():
        return label
    raise ConfigError(f"--reference is {wanted!r}, which is none of the encoders: {', '.join(labels)}.")


@dataclass(frozen=True)
class _Run:
    plan: RunPlan
    files: RunFiles
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
            recording = self.plan.recording(task)
            course = self.plan.course(task, recording)
            if warning := too_short(task, recording, self.plan.preset.steps(TASKS[task])):
                _say(warning)
            here = [replace(one, proprioception=TASKS[task].proprioception) for one in eyes]
            with Simulators(course, self.workers) as simulators:
                if not told:
                    _say(
                        forecast(
                            self.plan, self._left(here), here, task, recording, simulators, self.workers, self.device
                        )
                    )  # fmt: skip
                    told = True
                for one in here:
                    demonstrations = demonstrations_of(
                        self.plan, one, task, recording, self.files.embeddings, self.device, self.batch_size
                    )
                    for seed in self.seeds:
                        self._one(one, course, seed, demonstrations, simulators)
            for factor in self.shifts:
                self._shift(here, course, factor)

    def _one(
        self, eyes: Eyes, course: Course, seed: int, demonstrations: Demonstrations, simulators: Simulators
    ) -> None:
        folder = self.files.policy(eyes.label, course.task, seed)
        if not (folder / POLICY).is_file():
            self._train(eyes, course, seed, demonstrations, simulators)
        if self.videos and not self._filmed(eyes, course.task, seed):
            self._film(eyes, course, seed, simulators)

    def _film(
        self, eyes: Eyes, course: Course, seed: int, simulators: Simulators, factor: Factor | None = None
    ) -> None:
        pilot = self._pilot(eyes, self.files.policy(eyes.label, course.task, seed))
        shown = replace(course, seeds=course.seeds[: self.videos])
        path_of = partial(self.files.video, eyes.label, course.task, seed, factor)
        with Film(path_of, TASKS[course.task].frames_per_s) as film:
            roll_out(simulators, pilot, shown, film.watch)

    def _pilot(self, eyes: Eyes, folder: Path) -> Pilot:
        """A finished policy."""
        head, kept = load_head(folder / POLICY)
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
                if self.videos and not self._filmed(one, course.task, seed, factor):
                    self._film(one, other, seed, simulators, factor)
                path = self.files.shift(one.label, course.task, seed, factor)
                if path.is_file():
                    continue
                pilot = self._pilot(one, self.files.policy(one.label, course.task, seed))
                started = time.monotonic()
                found = roll_out(simulators, pilot, other)
                records = _records(found, course.task)
                record = {"shift": factor, "rollout seconds": time.monotonic() - started, "rollouts": records}
                write_whole(path, json.dumps(jsonable(record)))
                _say(f"{one.label}, {course.task}, seed {seed}, another {factor}: {_outcome(records, course.task)}")

    def _train(
        self, eyes: Eyes, course: Course, seed: int, demonstrations: Demonstrations, simulators: Simulators
    ) -> None:
        folder = self.files.policy(eyes.label, course.task, seed)
        epochs, evaluations = self.plan.schedule(len(demonstrations))
        tuning = tuning_of(self.plan, eyes)
        if tuning is not None:
            eyes = replace(eyes, tokens_of=tuning.sight)
        training = Training(
            lambda: make_head(self.plan, eyes, demonstrations), demonstrations, seed, folder / "training.pt",
            self.device, epochs, tuning=tuning,
        )  # fmt: skip
        pilot = Pilot(eyes, training.head, self.device, self.plan.learner.execute)
        if training.losses:
            _say(f"{eyes.label}, {course.task}, seed {seed}: goes on after epoch {len(training.losses) - 1}")
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
        save_head(training.head, folder / POLICY, about)
        (folder / "training.pt").unlink(missing_ok=True)

    def _left(self, eyes: Sequence[Eyes]) -> dict[str, Left]:
        """What is not done, by the label of the encoder."""
        every = [(task, seed) for task in self.plan.tasks for seed in self.seeds]
        return {
            one.label: Left(
                sum(not self._trained(one, task, seed) for task, seed in every),
                sum(not self._shifted(one, task, seed, f) for task, seed in every for f in self.shifts),
            )
            for one in eyes
        }

    def _finished(self, eyes: Eyes, task: str, seed: int) -> bool:
        shown = self._filmed(eyes, task, seed)
        return (
            self._trained(eyes, task, seed)
            and shown
            and all(self._shifted(eyes, task, seed, factor) for factor in self.shifts)
        )

    def _trained(self, eyes: Eyes, task: str, seed: int) -> bool:
        return (self.files.policy(eyes.label, task, seed) / POLICY).is_file()

    def _shifted(self, eyes: Eyes, task: str, seed: int, factor: Factor) -> bool:
        done = self.files.shift(eyes.label, task, seed, factor).is_file()
        return done and self._filmed(eyes, task, seed, factor)

    def _filmed(self, eyes: Eyes, task: str, seed: int, factor: Factor | None = None) -> bool:
        numbers = range(min(self.videos, self.plan.preset.rollouts))
        return all(self.files.video(eyes.label, task, seed, factor, number).is_file() for number in numbers)

    def _check_weights(self, eyes: Eyes) -> None:
        path = self.files.encoder(eyes.label)
        before = read_json(path)
        now = {"name": eyes.name, "label": eyes.label, "features of noise": eyes.of_noise}
        if not before:
            write_whole(path, json.dumps(now))
            return
        if before.get("name") != eyes.name:
            raise ConfigError(
                f"{self.files.out} has policies on {before.get('name')} under this name. Give a new folder."
            )
        if not same_features(before["features of noise"], eyes.of_noise):
            raise ConfigError(
                f"{self.files.out} has policies on {eyes.name}, whose weights have changed since. Give a new folder."
            )


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


def too_short(task: str, recording: TaskRecording, steps: int) -> str | None:
    """Warns if rollouts end before most of the demonstrations have succeeded.

    Args:
        task: Full name of the task.
        recording: Its demonstrations.
        steps: Number of steps of a rollout.

    Returns:
        The warning, or ``None``.
    """
    needed = [one.record["success_step"] for one in recording.originals if one.record.get("success_step")]
    late = sum(step > steps for step in needed)
    if not needed or 2 * late < len(needed):
        return None
    return (
        f"Rollouts of {task} end after {steps} steps, and {late} of {len(needed)} demonstrations succeed only later: "
        "expect no success with this preset, from any policy."
    )


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)  # whatever bar there is stays whole
