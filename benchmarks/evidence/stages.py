"""The stages of the evidence: command lines, any of which a user could type."""

import json
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from benchmarks.evidence import faults
from theia.ablation.grid import flat
from theia.errors import ConfigError

PresetName = Literal["small", "full"]
STAGES = STORE, TEACHERS, INGREDIENTS, VIEWS, SIZES, BEYOND, FAULTS, BOUNDS, PROXY, TASKS = (
    "store", "teachers", "ingredients", "views", "sizes", "beyond", "faults", "bounds", "proxy", "tasks",
)  # fmt: skip
WITHOUT_RECORDINGS = (FAULTS,)
NEEDS = {
    TEACHERS: (STORE,), INGREDIENTS: (STORE,), VIEWS: (STORE,), SIZES: (INGREDIENTS, VIEWS), BEYOND: (STORE,),
    BOUNDS: (TEACHERS,), PROXY: (STORE,), TASKS: (TEACHERS,),
}  # fmt: skip
BY_DEFAULT = STAGES[:-1]  # tasks takes hours, and needs the simulator

SETTINGS = "settings.json"  # of a folder of evidence
THEIA, CORTEXBENCH, EVIDENCE = "theia", "benchmarks.cortexbench", "benchmarks.evidence"
_CONFIGS = Path(__file__).parents[2] / "configs"
_SMALL = Path(__file__).with_name("small.yaml")
_ROWS = _CONFIGS / "ablations" / "ingredients.yaml"
_VIEWS = 5  # samples of an image
_BOTH = "Muon and linear"  # the row of the ingredients that configs/beyond_* has
_OTHER_SIZES = (112, 448)  # pixels, beside the 224 that all students are scored at


@dataclass(frozen=True)
class Preset:
    """How much is done.

    Attributes:
        config: Config of ``theia fit`` that all students start from.
        photographs: Training images beside the frames of the recordings.
        held_out_photographs: Held-out images beside theirs.
        frames: About how many frames of the recordings are taken, of both splits together.
        large: Options of the large student that stands between the teachers and a student.
        longer: How many times the steps of a student it takes to cost as much as the large student and its own student.
        policies: Preset of the robot benchmark.
    """

    config: Path
    photographs: str
    held_out_photographs: str
    frames: int
    large: Mapping[str, Any]
    longer: int
    policies: str


PRESETS = {
    "small": Preset(
        _SMALL, "sample:640", "sample:64", 800, {"model.width": 192, "model.depth": 6, "model.heads": 6}, 3, "small",
    ),
    "full": Preset(
        _CONFIGS / "cdiv_tiny.yaml", "sample:20000", "sample:1000", 100_000, {"model.backbone": "theia_base"}, 8,
        "full",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Attributes:
        data: Data set folder of LeRobot, with the camera after ``#`` if it has several; empty if no stage needs it.
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
        """Module and arguments of the commands of a stage, in order."""
        return {
            STORE: self._store, TEACHERS: self._teachers, INGREDIENTS: self._ingredients, VIEWS: self._views,
            SIZES: self._sizes, BEYOND: self._beyond, FAULTS: self._faults, BOUNDS: self._bounds,
            PROXY: self._proxy, TASKS: self._tasks,
        }[stage]()  # fmt: skip

    def _extract(self, store: Path, *teachers: str) -> list[str]:
        preset = PRESETS[self.preset]
        robot = f"robot=lerobot:{self.data}"
        images = {
            "train": [f"photographs={preset.photographs}", robot],
            "val": [f"photographs={preset.held_out_photographs}", robot],
        }
        every = max(1, round(self.frames / preset.frames))
        return [
            THEIA, "extract", "--images", json.dumps(images), "--every", str(every), "--teachers", *teachers,
            "--store", str(store),
        ]  # fmt: skip

    def _store(self) -> list[list[str]]:
        store = self.out / STORE
        return [self._extract(store, ",".join(self.teachers)), [THEIA, "store", "statistics", str(store)]]

    def _sweep(
        self,
        stage: str,
        *options: str,
        store: str = STORE,
        fit: Sequence[str] = (),
        one_seed: bool = False,
        scorers: Sequence[str] | None = None,
    ) -> list[str]:
        chosen = self.scorers if scorers is None else scorers
        return [
            THEIA, "ablate", *options, "--base", str(PRESETS[self.preset].config), "--out", str(self.out / stage),
            "--seeds", ",".join(map(str, self.seeds[:1] if one_seed else self.seeds)), "--jobs", str(self.jobs),
            "--scorers", ",".join([*chosen, f"dynamics@{self.data}"]), "--data.store", str(self.out / store),
            *self.options, *fit,
        ]  # fmt: skip

    def _teachers(self) -> list[list[str]]:
        sets = ["singles", "all_pairs", "all"] if len(self.teachers) > 2 else ["singles", "all"]
        sort = ["--sort_by", "dynamics/plan_error", "--reference", "all"]
        return [self._sweep(TEACHERS, "--teachers", json.dumps(sets), *sort)]

    def _ingredients(self) -> list[list[str]]:
        """With two teachers: a run costs less, and the others are read out of students that never saw them."""
        two = json.dumps(list(self.teachers[:2]))
        return [self._sweep(INGREDIENTS, "--config", str(_ROWS), "--data.teachers", two)]

    def _views(self) -> list[list[str]]:
        """Two teachers' features of random views of each image, and students of them after as many steps.

        They are read out by the store without views, which has all teachers.
        """
        two, store = list(self.teachers[:2]), f"{VIEWS}/store"
        rows = {"views": {"data.teachers": two}, f"{_BOTH}, views": {"data.teachers": two, **beyond()}}
        readout = f"readout@{self.out / STORE}"
        scorers = [readout if name == "readout" else name for name in self.scorers]
        limit = self._given("trainer.limit_train_batches") or "1.0"
        part = ["--trainer.limit_train_batches", limit if limit.isdecimal() else str(float(limit) / _VIEWS)]
        return [
            [*self._extract(self.out / store, ",".join(two)), "--views", str(_VIEWS)],
            self._sweep(VIEWS, "--rows", json.dumps(rows), store=store, fit=part, scorers=scorers),
        ]

    def _sizes(self) -> list[list[str]]:
        """Students with and without several sizes or views in training, and an untrained one, at other sizes."""
        rows = [f"{recipe}{more}" for recipe in ("", f"{_BOTH}, ") for more in ("resolutions", "views")]
        folders = {row: VIEWS if row.endswith("views") else INGREDIENTS for row in ["paper", _BOTH, *rows]}
        students = [self._student(row, folder, seed) for row, folder in folders.items() for seed in self.seeds]
        students.append(f"{self._student('paper', INGREDIENTS)}@random")
        encoders = [f"{student}@{size}" for student in students for size in _OTHER_SIZES]
        return [[THEIA, "probe", "dynamics", "--encoders", *encoders, *self._probed(SIZES)]]

    def _probed(self, stage: str) -> list[str]:
        return ["--data", self.data, "--out", str(self.out / stage)]

    def _beyond(self) -> list[list[str]]:
        """Each teacher alone and all of them, with the ingredients of configs/beyond_*."""
        sets = {**{name: [name] for name in self.teachers}, "all": list(self.teachers)}
        rows = {name: {"data.teachers": members, **beyond()} for name, members in sets.items()}
        return [self._sweep(BEYOND, "--rows", json.dumps(rows), "--reference", "all")]

    def _faults(self) -> list[list[str]]:
        store, sweep = str(self.out / f"{FAULTS}-{STORE}"), str(self.out / FAULTS)
        images = json.dumps({"train": ["sample:320"], "val": ["sample:96"]})
        return [
            [THEIA, "extract", "--images", images, "--size", str(faults.SIZE), "--teachers", faults.SOURCE,
             "--store", store],
            [EVIDENCE, "plant", "--store", store],
            [THEIA, "store", "statistics", store],
            [THEIA, "ablate", "--rows", json.dumps(faults.rows()), "--base", str(_SMALL),
             "--out", sweep, "--seeds", ",".join(map(str, self.seeds)), "--jobs", str(self.jobs), "--scorers", "",
             "--data.store", store, "--data.batch_size", "16", "--trainer.max_epochs", "8",
             "--trainer.check_val_every_n_epoch", "8", *self.options],
            [EVIDENCE, "measure", "--sweep", sweep, "--store", store],
        ]  # fmt: skip

    def _student(self, row: str, stage: str = TEACHERS, seed: int | None = None) -> str:
        folder = self.out / stage / row / f"seed_{self.seeds[0] if seed is None else seed}"
        return str(folder / "checkpoints" / "last.ckpt")

    def _untrained_and_teachers(self) -> list[str]:
        return [f"{self._student('all')}@random", *(f"teacher:{name}" for name in self.teachers)]

    def _bounds(self) -> list[list[str]]:
        encoders = [*self._untrained_and_teachers(), f"concat:{','.join(self.teachers)}"]
        return [[THEIA, "probe", "dynamics", "--encoders", *encoders, *self._probed(BOUNDS)]]

    def _proxy(self) -> list[list[str]]:
        """A large student learns from all teachers, and students from it, in a copy of the store with it.

        All have the ingredients of configs/beyond_*: behind a CNN, tokens hold less, whoever the teacher is.
        """
        preset, large, store = PRESETS[self.preset], f"{PROXY}/large", f"{PROXY}/store"
        every = {"data.teachers": list(self.teachers), **beyond()}
        rows = {
            "direct": every,
            "direct and longer": {**every, "trainer.max_epochs": preset.longer * self._epochs()},
            "proxy": {**every, "data.teachers": ["theia"]},
        }
        size = [f"--{option}={value}" for option, value in preset.large.items()]  # the last of an option counts
        return [
            self._sweep(large, "--rows", json.dumps({"large": every}), fit=size, one_seed=True),
            [THEIA, "store", "push", str(self.out / STORE), str(self.out / store)],
            [*self._extract(self.out / store, "theia"), "--theia.weights", self._student("large", large)],
            self._sweep(f"{PROXY}/students", "--rows", json.dumps(rows), "--reference", "direct", store=store),
        ]

    def _given(self, option: str) -> str | None:
        """What further options say of one."""
        parser = ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument(f"--{option}", dest="value")
        value: str | None = parser.parse_known_args(self.options)[0].value
        return value

    def _epochs(self) -> int:
        return int(
            self._given("trainer.max_epochs")
            or yaml.safe_load(PRESETS[self.preset].config.read_text())["trainer"]["max_epochs"]
        )

    def _tasks(self) -> list[list[str]]:
        students = [self._student(row) for row in (*self.teachers, "all")]
        out = self.out / TASKS
        return [
            [CORTEXBENCH, "run", "--encoders", *self._untrained_and_teachers(), *students, "--data", self.data,
             "--preset", PRESETS[self.preset].policies, "--out", str(out)],
            [THEIA, "ablate", "report", str(self.out / TEACHERS), "--scores", str(out / f"scores-{TEACHERS}.csv")],
        ]  # fmt: skip


def beyond() -> dict[str, Any]:
    """Options of ``theia fit`` that ``configs/beyond_tiny.yaml`` sets and ``configs/cdiv_tiny.yaml`` does not."""
    ours, paper = (flat(yaml.safe_load((_CONFIGS / f"{name}_tiny.yaml").read_text())) for name in ("beyond", "cdiv"))
    return {name: value for name, value in ours.items() if name not in paper}


def chosen(stages: Sequence[str]) -> list[str]:
    """Stages by name, in the order in which they build on each other.

    Raises:
        ConfigError: If there is no stage of a name.
    """
    for name in stages:
        if name not in STAGES:
            raise ConfigError(f"There is no stage {name!r}. Choose from: {', '.join(STAGES)}.")
    return [name for name in STAGES if name in stages]


def command(parts: Sequence[str]) -> list[str]:
    """The command line of a module and its arguments, with this Python."""
    return [sys.executable, "-m", *parts]


def shown(parts: Sequence[str]) -> str:
    """The same as a user would type it."""
    return shlex.join(parts if parts[0] == THEIA else ["python", "-m", *parts])
