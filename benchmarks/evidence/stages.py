"""The stages of the evidence: command lines of ``theia``, any of which a user could type."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from theia.errors import ConfigError

PresetName = Literal["small", "full"]
STORE, TEACHERS, INGREDIENTS, BOUNDS = "store", "teachers", "ingredients", "bounds"
STAGES = (STORE, TEACHERS, INGREDIENTS, BOUNDS)

_CONFIGS = Path(__file__).parents[2] / "configs"
_ROWS = _CONFIGS / "ablations" / "ingredients.yaml"


@dataclass(frozen=True)
class Preset:
    """How much is done.

    Attributes:
        config: Name of the config of ``theia fit`` that all students start from.
        photographs: Training images beside the frames of the recordings.
        held_out_photographs: Held-out images beside theirs.
        frames: About how many frames of the recordings are taken, of both splits together.
    """

    config: str
    photographs: str
    held_out_photographs: str
    frames: int


PRESETS = {
    "small": Preset("quickstart", "sample:640", "sample:64", 800),
    "full": Preset("cdiv_tiny", "sample:20000", "sample:1000", 100_000),
}


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Attributes:
        data: Data set folder of LeRobot, with the camera after ``#`` if it has several.
        frames: Number of frames that it holds.
        teachers: Names of the teachers.
        seeds: Seeds of the trainings.
        preset: How much is done.
        out: Folder for everything.
        jobs: Number of trainings at a time.
        scorers: Scorers of the students beside the probe on the recordings.
        options: Further options of ``theia fit``, for all trainings.
    """

    data: str
    frames: int
    teachers: Sequence[str]
    seeds: Sequence[int]
    preset: PresetName
    out: Path
    jobs: int
    scorers: Sequence[str]
    options: Sequence[str]

    def commands(self, stage: str) -> list[list[str]]:
        """Arguments of ``theia`` for the commands of a stage, in order."""
        return {
            STORE: self._store, TEACHERS: self._teachers, INGREDIENTS: self._ingredients, BOUNDS: self._bounds,
        }[stage]()  # fmt: skip

    def _store(self) -> list[list[str]]:
        preset = PRESETS[self.preset]
        robot = f"robot=lerobot:{self.data}"
        images = {
            "train": [f"photographs={preset.photographs}", robot],
            "val": [f"photographs={preset.held_out_photographs}", robot],
        }
        every = max(1, round(self.frames / preset.frames))
        store = str(self.out / STORE)
        return [
            ["extract", "--images", json.dumps(images), "--every", str(every), "--teachers", ",".join(self.teachers),
             "--store", store],
            ["store", "statistics", store],
        ]  # fmt: skip

    def _sweep(self, stage: str, *options: str) -> list[str]:
        return [
            "ablate", *options, "--base", str(_CONFIGS / f"{PRESETS[self.preset].config}.yaml"),
            "--out", str(self.out / stage), "--seeds", ",".join(map(str, self.seeds)), "--jobs", str(self.jobs),
            "--scorers", ",".join([*self.scorers, f"dynamics@{self.data}"]), "--data.store", str(self.out / STORE),
            *self.options,
        ]  # fmt: skip

    def _teachers(self) -> list[list[str]]:
        sets = ["singles", "all_pairs", "all"] if len(self.teachers) > 2 else ["singles", "all"]
        sort = ["--sort_by", "dynamics/plan_error", "--reference", "all"]
        return [self._sweep(TEACHERS, "--teachers", json.dumps(sets), *sort)]

    def _ingredients(self) -> list[list[str]]:
        return [self._sweep(INGREDIENTS, "--config", str(_ROWS), "--data.teachers", json.dumps(list(self.teachers)))]

    def _bounds(self) -> list[list[str]]:
        trained = [
            str(self.out / TEACHERS / "all" / f"seed_{seed}" / "checkpoints" / "last.ckpt") for seed in self.seeds
        ]
        encoders = [f"{trained[0]}@random", *(f"teacher:{name}" for name in self.teachers)]
        if len(self.teachers) > 1:
            encoders.append(f"concat:{','.join(self.teachers)}")
        return [["probe", "dynamics", "--encoders", *encoders, "--data", self.data, "--out", str(self.out / BOUNDS)]]


def chosen(stages: Sequence[str]) -> list[str]:
    """Stages by name, in the order in which they build on each other.

    Raises:
        ConfigError: If there is no stage of a name.
    """
    for name in stages:
        if name not in STAGES:
            raise ConfigError(f"There is no stage {name!r}. Choose from: {', '.join(STAGES)}.")
    return [name for name in STAGES if name in stages]


def theia(arguments: Sequence[str]) -> list[str]:
    """The command line of ``theia`` with this Python."""
    return [sys.executable, "-m", "theia", *arguments]
