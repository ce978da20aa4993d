"""``theia probe``: measures what small heads read out of frozen features."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from theia.utils.arguments import check_number
from theia.utils.device import Device

if TYPE_CHECKING:
    from theia.probing.comparison import Result


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


def _say(result: "Result") -> int:
    print("\n".join([result.table, *result.notes, *map(str, result.files)]))
    return 0
