"""What is asked of a recorded trajectory: from one frame or two, where does the robot go within a horizon?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from theia.errors import ConfigError, TrajectoryError
from theia.probing.datasets import fingerprint, of_files
from theia.trajectories.lerobot import ACTION, STATE, LeRobotFolder
from theia.utils.pictures import short_labels

Target = Literal["action", "displacement", "mean_action"]
Question = Literal["plan", "motion"]

QUESTIONS: tuple[Question, ...] = ("plan", "motion")
_ENOUGH_EPISODES = 5  # below, intervals say nothing
_PREFIX, _PICTURES = "lerobot:", "observation.images."
_MEANING: dict[Target, str] = {
    "action": "action[t + {h} - 1] - state[t]",
    "displacement": "state[t + {h}] - state[t]",
    "mean_action": "the mean of action[t] to action[t + {h} - 1]",
}


@dataclass(frozen=True)
class Pairs:
    """Pairs of frames ``t`` and ``t + h`` of the same episode, and what is to be predicted of each.

    Attributes:
        first: Place of frame ``t`` among the frames of all episodes, shape ``(n,)``.
        second: Place of frame ``t + h``, shape ``(n,)``.
        episode: Number of the episode, shape ``(n,)``.
        target: Values to predict, float64, shape ``(n, D)``.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    episode: NDArray[np.int64]
    target: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.first)

    def of(self, episodes: Sequence[int] | frozenset[int]) -> "Pairs":
        """The pairs of some episodes."""
        mask = np.isin(self.episode, list(episodes))
        return Pairs(self.first[mask], self.second[mask], self.episode[mask], self.target[mask])


@dataclass(frozen=True)
class Recording:
    """One data set, as the probe sees it.

    Attributes:
        name: Short name, for the table.
        folder: The data set.
        camera: Key of the camera.
        pairs: All pairs of frames.
        tested: Numbers of the episodes that are tested on.
        fitted: Numbers of the episodes that are fitted on; none for data that are only tested on.
        identity: Fingerprint of the files and the camera.
    """

    name: str
    folder: LeRobotFolder
    camera: str
    pairs: Pairs
    tested: frozenset[int]
    fitted: frozenset[int]
    identity: str


def open_recordings(
    train: str, tests: Sequence[str], camera: str | None, horizon: int, target: Target | None
) -> tuple[list[Recording], Target, list[str]]:
    """Opens the data set to fit on and those that are only tested on.

    Args:
        train: Place of the data set to fit on; every fifth episode of each task is held out and tested on.
        tests: Places of further data sets of the same robot. The one to fit on may be among them with another camera:
            then its held-out episodes are tested on.
        camera: Key of the camera, for all of them; by default, what follows ``#`` in each place, or the only one.
        horizon: Number of frames between the two of a pair.
        target: What is predicted; chosen by :func:`choose_target` by default.

    Returns:
        The data sets, the one to fit on first; the target; and what a reader of the figures must know.

    Raises:
        ConfigError: If there are too few or too short episodes, the data sets are not of one robot, one is given
            twice with the same camera, or a camera is named twice.
        TrajectoryError: If one cannot be read.
    """
    folder = LeRobotFolder(_path(train))
    kind, reason = choose_target(folder, target)
    notes = [f"Target: {describe_target(kind, horizon)} ({reason}). Errors are in its standard deviations."]
    out = folder.held_out_episodes()
    if not out:
        raise ConfigError(
            f"{folder.root} has one episode. One to fit on and one to test on are needed: the frames of an episode are "
            "never divided between the two. Record more."
        )
    places = [train, *tests]
    if camera is not None and (named := [place for place in places if _camera(place) is not None]):
        raise ConfigError(
            f"--camera {camera} is for all data sets, and {named[0]} names a camera too. Leave out one of the two."
        )
    paths = [_path(place).resolve() for place in places]
    folders = [folder, *(folder if _path(test).resolve() == paths[0] else LeRobotFolder(_path(test)) for test in tests)]
    cameras = [
        here.camera(camera if camera is not None else _camera(place))
        for place, here in zip(places, folders, strict=True)
    ]
    recordings: list[Recording] = []
    for here, seen, name in zip(folders, cameras, _names(paths, cameras), strict=True):
        pairs = make_pairs(here, kind, horizon)
        if recordings and pairs.target.shape[1] != recordings[0].pairs.target.shape[1]:
            raise ConfigError(
                f"{here.root} has targets of {pairs.target.shape[1]} values and {folder.root} of "
                f"{recordings[0].pairs.target.shape[1]}: they are not of one robot. Give another --test."
            )
        everything = frozenset(range(len(here.episodes)))
        tested = out if here is folder else everything  # through another camera, episodes stay fitted on or held out
        fitted = frozenset() if recordings else everything - out
        identity = fingerprint(of_files(str(here.root)), seen)
        recordings.append(Recording(name, here, seen, pairs, tested, fitted, identity))
        if not tested_episodes(recordings[-1]) or (here is folder and not len(pairs.of(recordings[0].fitted))):
            raise ConfigError(
                f"Too few episodes of {here.root} have more than {horizon} frames: some to fit on and one to test on "
                "are needed. Give a smaller --horizon."
            )
    _compare_states(recordings, notes)
    few = [(one.name, len(tested_episodes(one))) for one in recordings if len(tested_episodes(one)) < _ENOUGH_EPISODES]
    notes += [
        f"Only {count} episode{'s' * (count > 1)} of {name} {'are' if count > 1 else 'is'} tested on: over so few, "
        "intervals say nothing, and no p can be small. Record more."
        for name, count in few
    ]
    return recordings, kind, notes


def _compare_states(recordings: Sequence[Recording], notes: list[str]) -> None:
    """Refuses states of different sizes, which the control ``state`` cannot be fitted to, and notes missing ones."""
    sizes = {one.name: int(np.prod(one.folder.features[STATE].shape)) for one in recordings if _has_state(one)}
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{size} values in {name}" for name, size in sizes.items())
        raise ConfigError(f"{STATE} has {said}: they are not of one robot. Give another --test.")
    without = [one.name for one in recordings if not _has_state(one)]
    if without and (sizes or len(recordings) == 1):
        notes.append(f"The control 'state' knows nothing where no {STATE} was recorded: {', '.join(without)}.")


def _has_state(recording: Recording) -> bool:
    return STATE in recording.folder.features


def choose_target(folder: LeRobotFolder, wanted: Target | None) -> tuple[Target, str]:
    """Chooses what is predicted, and says why.

    Actions that are positions, named like the state, give HIVE-Bench's target; otherwise the displacement of the state
    serves, and without a state the mean action.

    Args:
        folder: The data set.
        wanted: What the user asks for, if anything.

    Returns:
        The target, and a sentence about it.

    Raises:
        ConfigError: If the data set lacks what the target needs.
    """
    has_state, has_action = STATE in folder.features, ACTION in folder.features
    if wanted is not None:
        lacking = [key for key in _needs(wanted) if key not in folder.features]
        if lacking:
            raise ConfigError(
                f"--target {wanted} needs {' and '.join(_needs(wanted))}, and {folder.root} has no {lacking[0]}. "
                "Choose another target."
            )
        if wanted == "action" and folder.features[STATE].shape != folder.features[ACTION].shape:
            raise ConfigError(
                f"--target action needs actions of the state's shape, but {folder.root} has "
                f"{folder.features[ACTION].shape} and {folder.features[STATE].shape}. Choose another target."
            )
        return wanted, "as --target says"
    if has_state and has_action and _are_positions(folder):
        return "action", "actions are positions, named like the state and near to it"
    if has_state:
        return "displacement", "actions are not positions named like the state" if has_action else "there is no action"
    if has_action:
        return "mean_action", "there is no state"
    raise ConfigError(f"{folder.root} has neither {STATE} nor {ACTION}, so there is nothing to predict.")


def describe_target(target: Target, horizon: int) -> str:
    """The target as a formula."""
    return _MEANING[target].format(h=horizon)


def make_pairs(folder: LeRobotFolder, target: Target, horizon: int) -> Pairs:
    """All pairs of frames that lie ``horizon`` apart within an episode.

    Args:
        folder: The data set.
        target: What is predicted.
        horizon: Number of frames between the two.

    Raises:
        ConfigError: If no episode is longer than the horizon.
        TrajectoryError: If states or actions cannot be read.
    """
    state = folder.column(STATE).astype(np.float64) if STATE in _needs(target) else None
    action = folder.column(ACTION).astype(np.float64) if ACTION in _needs(target) else None
    starts = [np.arange(e.start, e.start + e.length - horizon) for e in folder.episodes]
    first = np.concatenate(starts) if starts else np.empty(0, np.int64)
    if not len(first):
        longest = max(episode.length for episode in folder.episodes)
        raise ConfigError(f"No episode of {folder.root} has more than {longest} frames. Give a --horizon below that.")
    episode = np.concatenate([np.full(len(part), e.index) for part, e in zip(starts, folder.episodes, strict=True)])
    if target == "action" and action is not None and state is not None:
        values = action[first + horizon - 1] - state[first]
    elif target == "displacement" and state is not None:
        values = state[first + horizon] - state[first]
    else:
        assert action is not None
        sums = np.concatenate([np.zeros((1, action.shape[1])), np.cumsum(action, 0)])
        values = (sums[first + horizon] - sums[first]) / horizon
    return Pairs(first, first + horizon, episode, values)


def moving(pairs: Pairs) -> NDArray[np.bool_]:
    """Which values of the target vary at all, shape ``(D,)``.

    Raises:
        TrajectoryError: If none does.
    """
    deviation = pairs.target.std(0)
    varies: NDArray[np.bool_] = deviation > 1e-6 * max(1.0, float(np.abs(pairs.target).max()))
    if not varies.any():
        raise TrajectoryError("The robot never moves in the training episodes: there is nothing to predict.")
    return varies


def tested_episodes(recording: Recording) -> list[int]:
    """Tested episodes that are long enough to hold a pair, in order."""
    there = set(recording.pairs.episode.tolist())
    return [episode for episode in sorted(recording.tested) if episode in there]


def episode_weights(recording: Recording) -> NDArray[np.float64]:
    """Number of pairs in each tested episode."""
    return np.array([(recording.pairs.episode == episode).sum() for episode in tested_episodes(recording)], np.float64)


def standardised_state(recording: Recording, main: Recording) -> NDArray[np.float64]:
    """State of every frame, standardised by the fitted episodes; constant where none is recorded."""
    if not _has_state(main):
        return np.zeros((recording.folder.frame_count, 1))
    if not _has_state(recording):
        return np.zeros((recording.folder.frame_count, int(np.prod(main.folder.features[STATE].shape))))
    state = main.folder.column(STATE).astype(np.float64)
    fitted = np.repeat([e.index in main.fitted for e in main.folder.episodes], [e.length for e in main.folder.episodes])
    mean, deviation = state[fitted].mean(0), state[fitted].std(0)
    here = state if recording is main else recording.folder.column(STATE).astype(np.float64)
    return np.asarray((here - mean) / np.where(deviation > 0, deviation, 1))


def _names(paths: Sequence[Path], cameras: Sequence[str]) -> list[str]:
    """Short names of data sets, no two alike."""
    both = [*zip(paths, cameras, strict=True)]
    twice = [path for place, (path, seen) in enumerate(both) if (path, seen) in both[:place]]
    if twice:
        raise ConfigError(
            f"--test names {twice[0]} with a camera that it is fitted on or tested on already. Its held-out episodes "
            "are in the table anyway: leave it out, or choose another camera with FOLDER#CAMERA."
        )
    names = [path.name for path in paths]
    if len({*zip(names, paths, strict=True)}) > len(set(names)):
        labels = short_labels([*dict.fromkeys(map(str, paths))])
        names = [labels[str(path)] for path in paths]
    return [
        f"{name}#{seen.removeprefix(_PICTURES)}" if paths.count(path) > 1 else name
        for name, (path, seen) in zip(names, both, strict=True)
    ]


def _path(place: str) -> Path:
    return Path(place.removeprefix(_PREFIX).partition("#")[0]).expanduser()


def _camera(place: str) -> str | None:
    return place.partition("#")[2] or None


def _needs(target: Target) -> tuple[str, ...]:
    return {"action": (STATE, ACTION), "displacement": (STATE,), "mean_action": (ACTION,)}[target]


def _are_positions(folder: LeRobotFolder) -> bool:
    """Whether actions are named like the state, and the next state is near to them: nearer than the mean state is."""
    state_about, action_about = folder.features[STATE], folder.features[ACTION]
    if state_about.shape != action_about.shape or state_about.names is None or state_about.names != action_about.names:
        return False
    state, action = folder.column(STATE), folder.column(ACTION)
    last = np.array([episode.start + episode.length - 1 for episode in folder.episodes])
    inside = np.setdiff1d(np.arange(len(state)), last)
    if not len(inside):
        return False
    distance = np.abs(action[inside] - state[inside + 1]).mean(0)
    spread = np.abs(state[inside] - state[inside].mean(0)).mean(0)
    return bool(np.median(distance - spread) < 0)
