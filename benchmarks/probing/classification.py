"""``python -m benchmarks.probing classification``."""

from pathlib import Path

from benchmarks.probing.features import Device, check_encoders, open_all
from benchmarks.probing.fingerprint import of_files
from benchmarks.probing.labelled import open_labelled
from benchmarks.probing.presets import Preset
from benchmarks.probing.probes import Probed, probe_classes, probe_nothing
from benchmarks.probing.run import open_run
from benchmarks.probing.storage import Storage
from theia.encoder.named import NamedEncoder
from theia.utils.numbers import check_number


def classification(
    encoders: list[str],
    images: str,
    val: str | None = None,
    preset: Preset = "small",
    neighbours: int = 20,
    seeds: str = "0",
    device: Device = "auto",
    folder: Path | None = None,
    results: Path = Path("benchmarks/results"),
) -> Path:
    """Tells classes of images by mean-pooled patch tokens: nearest neighbours, and a linear probe.

    The column "no encoder" always tells the most frequent class. The same command again after an interruption skips
    encoders that are finished; they are kept in the folder "unfinished" of --results.

    Args:
        encoders: Names with blanks between them. All are in memory together.
        images: Folder whose sub-folders are the classes.
        val: The same, held-out images; every fifth image of each class of --images by default.
        preset: small: the probe is logistic regression (scikit-learn, C = 1, standardised channels), one vector of each
            image is in memory, a minute on a CPU; full: MAE's probe, for ImageNet: LARS, batches of 16384.
        neighbours: Images that vote.
        seeds: Of MAE's probe, separated by commas; the table shows means, and of several their standard deviation.
            Logistic regression leaves nothing to chance, and needs none.
        device: Where to work; auto takes a GPU if there is one.
        folder: Where the full preset puts its files, which are deleted in the end (not after kill -9: theia-probing-*);
            the system's temporary folder by default.
        results: Folder for the JSON.

    Returns:
        The JSON.

    Raises:
        TheiaError: If options do not fit the data, an image cannot be read, or an encoder cannot be probed.
    """
    check_number("neighbours", neighbours, 1)
    run = open_run("classification", device, seeds, folder, preset, results)
    opened = open_all(encoders, run.device, spatial=False)
    training, testing = open_labelled(images, val, neighbours)
    looks = check_encoders(opened, training.some(4), spatial=False)
    schedule = run.effort.probe
    settings = {
        "preset": preset, "data": " and ".join(Path(root).resolve().name for root in (images, val) if root),
        "neighbours": neighbours, "seeds": run.seeds if schedule else [], "training images": len(training),
        "held-out images": len(testing), "classes": len(training.classes), "device": run.device,
    }  # fmt: skip
    notes = []
    if schedule is None and len(run.seeds) > 1:
        notes.append("The small preset's probe leaves nothing to chance: it gives one figure, whatever the seeds.")
    if schedule is not None and len(training) < schedule.batch_size:
        notes.append(
            f"The full preset is meant for more than its batch of {schedule.batch_size}; with {len(training)} "
            "training images the linear probe ends before it has learned much. Take the small one."
        )

    def probe(encoder: NamedEncoder, storage: Storage) -> Probed:
        return probe_classes(encoder, training, testing, neighbours, schedule, run.seeds, run.device, storage)

    nothing = probe_nothing(training, testing)
    return run.probe_all(opened, looks, of_files(images, val), nothing, probe, settings, notes)[0]
