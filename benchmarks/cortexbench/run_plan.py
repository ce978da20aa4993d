"""What must stay the same while a run goes on, from one kill to the next."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.cortexbench.encoders import TaskRecording
from benchmarks.cortexbench.presets import Features, Preset
from benchmarks.cortexbench.recordings import Recordings
from benchmarks.cortexbench.run_files import RECORD, RunFiles
from benchmarks.cortexbench.scenes import Factor, check_factors
from benchmarks.cortexbench.simulation import DISTRIBUTIONS, Quality, check_installed
from benchmarks.cortexbench.simulators import Course
from benchmarks.cortexbench.tasks import TASKS, check_fit, choose_tasks
from theia.errors import ConfigError
from theia.policies import HeadKind
from theia.policies.action_heads import HEADS
from theia.policies.cloning import RECIPES
from theia.policies.demonstrated import updates_per_epoch
from theia.probing.datasets import IMAGE_SIZE
from theia.utils.arguments import comma_list
from theia.utils.files import jsonable, read_json, write_whole
from theia.utils.provenance import installed, machine, versions

# Settings to which a later run may add, by what they are of.
_GROWING = {"data": "other demonstrations of", "simulator": "another release of"}
_FIRST_SEED = 1_000_000  # of rollouts, far from those of demonstrations


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


@dataclass(frozen=True)
class RunPlan:
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
    ) -> "RunPlan":  # fmt: skip
        """Makes it of the options of the command, and checks that they fit the demonstrations.

        Args:
            data: Folder with the demonstrations.
            tasks: Names of tasks, separated by commas; by default, all that there are demonstrations of.
            preset: How much is done.
            name: Name of the preset.
            vary: What differs between rollouts, separated by commas; by default, what differs between demonstrations.
            rollouts: Number of rollouts at each evaluation, in place of the preset's.
            epochs: Number of epochs, in place of the preset's.
            features: What a policy is given of an encoder.
            learner: What is trained.

        Raises:
            TheiaError: If an option is wrong, or the demonstrations cannot be read or do not fit.
        """
        recordings = Recordings.open(data)
        collected, known = recordings.about, list(recordings.folders)
        if tasks is None:
            found = known[:1] if name == "smoke" else known
        else:
            found = choose_tasks(comma_list(tasks), known, data)
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
        return RunPlan(
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
        return Course(
            task, seeds, self.vary, self.data.about.get("spread", 1.0), self.size, self.quality, IMAGE_SIZE, steps, hold
        )

    def _distributions(self) -> list[str]:
        """What is simulated with, by all data sets of the folder, so that tasks can be added to a run."""
        simulators = {TASKS[task].simulator: None for task in self.data.folders}
        return [*(DISTRIBUTIONS[simulator] for simulator in simulators), "mujoco"]

    def recording(self, task: str) -> TaskRecording:
        """The demonstrations of a task that are used."""
        return TaskRecording(self.data.folders[task], task, self.preset.demonstrations)

    def _demonstrations(self) -> dict[str, str]:
        return {task: self.recording(task).identity(self.data.camera(task)) for task in self.tasks}

    def record(self) -> dict[str, Any]:
        """What is compared when a run goes on."""
        preset = {name: value for name, value in asdict(self.preset).items() if name != "seeds"}
        # Earlier versions had one way to train, and did not write it down.
        usual = asdict(Learner())
        learner = {name: value for name, value in asdict(self.learner).items() if value != usual[name]}
        return dict(
            jsonable(
                {
                    **learner, "data": self._demonstrations(), "preset": self.name, **preset, "vary": self.vary,
                    "features": self.features, "size": self.size, "quality": self.quality,
                    "simulator": installed(self._distributions()),
                }
            )
        )  # fmt: skip


def check_record(plan: RunPlan, files: RunFiles) -> None:
    """Writes down what a run was begun with, or compares it.

    Raises:
        ConfigError: If it differs, or the folder holds policies without it.
    """
    path, now = files.out / RECORD, plan.record()
    before = read_json(path).get("settings")
    if before is None:
        if files.policies.exists():
            raise ConfigError(f"{path} is damaged or missing. Give a new folder.")
        about = {"settings": now, "demonstrations": plan.data.about, "versions": versions(), "machine": machine()}
        write_whole(path, json.dumps(jsonable(about), indent=1))
        return
    # Tasks, and with them simulators, may be added; what is there already must be the same.
    grown = {name: {**_known(before, name), **now[name]} for name in _GROWING}
    different = [name for name in {**now, **before} if name not in _GROWING and before.get(name) != now.get(name)]
    said = [f"{name} {_setting(name, before)}, not {_setting(name, now)}" for name in different]
    for name, what in _GROWING.items():
        other = [key for key, value in _known(before, name).items() if value != grown[name][key]]
        said += [f"{what} {', '.join(other)}"] if other else []
    if said:
        raise ConfigError(f"{files.out} was begun with {'; '.join(said)}. Go on with the same, or give a new folder.")
    if grown != {name: before[name] for name in _GROWING}:
        record = read_json(path)
        record["settings"] |= grown
        write_whole(path, json.dumps(record, indent=1))


def _known(settings: dict[str, Any], name: str) -> dict[str, Any]:
    found = settings.get(name)
    return found if isinstance(found, dict) else {}


def _setting(name: str, settings: dict[str, Any]) -> Any:
    return settings.get(name, asdict(Learner()).get(name))


def choose_shifts(names: str | None, plan: RunPlan) -> tuple[Factor, ...]:
    """What looks different in a second test of finished policies.

    Args:
        names: Names of factors as a user gives them, separated by commas.
        plan: The run.

    Raises:
        ConfigError: If there is no such factor, it does not fit a task, or was varied before.
    """
    shifts = check_factors(comma_list(names), "--shift")
    check_fit(plan.tasks, shifts, "--shift")
    for factor in shifts:
        if factor in plan.vary or factor in plan.data.about["vary"]:
            raise ConfigError(
                f"--shift has {factor!r}, which the demonstrations or the other rollouts vary already. Record "
                f"demonstrations without it, or leave it out."
            )
    return shifts
