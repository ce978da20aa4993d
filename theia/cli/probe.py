"""``theia probe``: measures what small heads read out of frozen features."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from theia.errors import ConfigError
from theia.utils.arguments import check_number, comma_list, seed_numbers
from theia.utils.device import Device, choose_device
from theia.utils.files import check_folder

if TYPE_CHECKING:
    from theia.probing.comparison import Result
    from theia.probing.dynamics import DynamicsResult

_MOST = 1_000_000  # frames, of a horizon or of a batch


def classification(
    encoders: list[str],
    images: str,
    out: Path,
    val: str | None = None,
    preset: Literal["small", "full"] = "small",
    neighbours: int = 20,
    seeds: str | None = None,
    device: Device = "auto",
    folder: Path | None = None,
) -> int:
    """Classify images by their mean-pooled patch tokens: with nearest neighbours, and with a linear probe.

    The column "no encoder" always predicts the most frequent class. After an interruption, the same command continues
    after the finished encoders, which are kept in the folder "unfinished" of --out.

    Args:
        encoders: Encoders to compare.
        images: Folder whose sub-folders are the classes.
        out: Folder for the JSON file, which is named after the time and never replaces an earlier one.
        val: Folder of held-out images with the same sub-folders; by default, every fifth image of each class of
            --images is held out.
        preset: small takes logistic regression as the probe (scikit-learn, C = 1, standardised channels) and keeps one
            vector per image in memory; a minute on a CPU. full takes MAE's probe, made for ImageNet (LARS, batches of
            16384).
        neighbours: Number of neighbours that vote.
        seeds: Seeds of MAE's probe, separated by commas; 0 by default. The table shows means over them, with standard
            deviations. Nothing in the small preset's probe is random, so it takes no seeds.
        device: Device that encoders and probes run on; auto takes a GPU if there is one.
        folder: Folder for the temporary files of the full preset, theia-probing-*, which only a kill -9 leaves behind;
            the system's temporary folder by default.
    """
    check_number("neighbours", neighbours, 1)

    # torch takes seconds to import; --help does not need it.
    from theia.probing import comparison

    return _say(comparison.classification(encoders, images, val, out, preset, neighbours, seeds, device, folder))


def dense(
    encoders: list[str],
    data: str,
    out: Path,
    tasks: str | None = None,
    preset: Literal["small", "full"] = "small",
    seeds: str = "0",
    device: Device = "auto",
    folder: Path | None = None,
) -> int:
    """Predict depth, surface normals and classes of pixels with a linear head on patch tokens, and match views.

    The column "no encoder" predicts what is usual at each place of a picture, without looking at it. A picture shows
    the predictions of the first seed's heads beside the truth. Heads are linear and see the last layer alone: figures
    compare encoders with each other, not with those that probe3D publishes for its larger heads. After an interruption,
    the same command continues after the finished encoders, which are kept in the folder "unfinished" of --out.

    Args:
        encoders: Encoders to compare.
        data: Folder with train and val, each with rgb and what the tasks need (docs/probing.md shows the layout), or
            scenes for rendered rooms. A folder of that name is ./scenes.
        out: Folder for the JSON file and the picture, which are named after the time and never replace earlier ones.
        tasks: Any of depth, normals, segmentation and correspondence, separated by commas; by default, all tasks that
            there is data for.
        preset: small takes a few minutes on a CPU with scenes and keeps all pictures, maps and tokens in memory; take
            full for thousands of pictures. full keeps them in files and takes probe3D's epochs and learning rate.
        seeds: Seeds of the heads, separated by commas. The table shows means over them, with standard deviations.
        device: Device that encoders and heads run on; auto takes a GPU if there is one.
        folder: Folder for the temporary files of the full preset, theia-probing-*, which only a kill -9 leaves behind;
            the system's temporary folder by default.
    """
    # torch takes seconds to import; --help does not need it.
    from theia.probing import comparison

    return _say(comparison.dense(encoders, data, tasks, out, preset, seeds, device, folder))


def dynamics(
    encoders: list[str],
    data: str,
    out: Path,
    test: str | None = None,
    camera: str | None = None,
    horizon: int = 16,
    target: Literal["action", "displacement", "mean_action"] | None = None,
    readout: Literal["ridge", "transformer"] = "ridge",
    preset: Literal["small", "full"] = "small",
    seeds: str | None = None,
    reference: str | None = None,
    batch_size: int = 32,
    device: Device = "auto",
) -> int:
    """Predict where a robot goes, from recorded trajectories: its plan from one frame, its motion between two.

    Two questions are put to the frozen tokens of every encoder, on the same frames, pairs and split. Plan: from frame t
    alone, where will the robot be at t + h? Motion: from frames t and t + h, what happened between them? Every fifth
    episode of each task is held out. Three controls are always in the table: blind sees nothing, state sees the robot's
    state at t, and pixels sees 16x16 mean colours. An encoder's name followed by @random is the same student untrained.
    After an interruption, the same command goes on where it stopped.

    Args:
        encoders: Encoders to compare.
        data: Data set folder of LeRobot, v3.0 or v2.1, as lerobot:FOLDER or FOLDER.
        out: Folder for the JSON file and the picture, named after the time so that they never replace earlier ones,
            and for the embeddings, which later runs use again.
        test: Further data sets of the same robot, separated by commas, that are only tested on, such as with another
            camera or light; each is a column of the table.
        camera: Key of the camera, or the end of it; a data set with several needs it, here or as FOLDER#CAMERA.
        horizon: Number of frames between t and t + h.
        target: What is predicted: action is action[t + h - 1] - state[t], displacement is state[t + h] - state[t],
            mean_action is the mean of the actions between. By default action where actions are positions named like the
            state, else displacement, else mean_action.
        readout: ridge is a regression in closed form on 7x7 averaged tokens, seconds on a CPU. transformer is
            HIVE-Bench's, minutes to hours.
        preset: Size of the transformer: small has two layers of 128 on 7x7 tokens, full is HIVE-Bench's rule on all
            tokens.
        seeds: Seeds of the transformer, separated by commas; 0 by default. Nothing in ridge is random.
        reference: Encoder that the others are compared with, episode by episode; by default the first one that is no
            control, or else the first.
        batch_size: Number of frames that are given to an encoder together.
        device: Device that encoders and transformers run on; auto takes a GPU if there is one.
    """
    check_number("horizon", horizon, 1, _MOST)
    check_number("batch_size", batch_size, 1, _MOST)
    if seeds is not None and readout == "ridge":
        raise ConfigError("--seeds: nothing in --readout ridge is random. Leave it out, or take transformer.")
    check_folder(out, "--out")

    # torch takes seconds to import; --help does not need it.
    from theia.probing import dynamics as probing

    return _say(
        probing.dynamics(
            encoders, data, comma_list(test), out, camera, horizon, target, readout, preset,
            seed_numbers(0 if seeds is None else seeds),
            reference, choose_device(device), batch_size,
        )
    )  # fmt: skip


def _say(result: "Result | DynamicsResult") -> int:
    print("\n".join([result.table, *result.notes, *map(str, result.files)]))
    return 0
