"""The options of an extraction."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from theia.errors import ConfigError
from theia.store.schema import SPLIT_RULE, TRAIN, FeatureDtype, Resize, is_split_name
from theia.types import Precision
from theia.utils.arguments import MOST_PIXELS, MOST_PROCESSES, check_number, comma_list

_MOST_VIEWS = 100


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Images, teachers, and the store for their features.

    Attributes:
        images: Where the images are: a folder, a folder of tar or parquet files, one such file, a ``.txt`` file with a
            path in each line, ``hf:OWNER/NAME`` or ``hf:OWNER/NAME:SPLIT`` for a set on the Hugging Face hub, or
            ``sample:COUNT`` for crops of the sample photographs; frames of recordings as ``lerobot:FOLDER``,
            ``lerobot:FOLDER#CAMERA`` or ``video:FOLDER``. Several places, with blanks between them, are joined; sample
            ids then begin with the last part of the place, or with NAME if it is given as ``NAME=PLACE``. Several
            splits at once as ``{train: PLACE, val: PLACE}``; of recordings, one place for both: every fifth episode or
            video is held out of train.
        teachers: Names of teachers, comma-separated or as a list; see ``theia teachers``.
        store: Folder of the feature store. An existing store is continued, or gets the new teachers and splits.
        split: Name of the split if ``images`` is a single place; train by default.
        every: Distance between the frames that are taken of recordings: 1 takes all.
        views: Number of samples of each training image: the image as it is, and random views of it, which are crops of
            30 to 100 % of its area, half of them mirrored. Other splits have the images as they are.
        labels: Keep class labels, from the first level of sub-folders, from the ``.cls`` members of tar shards, or from
            the column ``label`` of parquet files.
        size: Height and width of every stored image, in pixels; a multiple of 16, the patch size of the paper's
            students, or of 14.
        resize: Squash the whole image to a square, or cut out its centre.
        batch_size: Number of images per forward pass of a teacher.
        workers: Number of decoding processes for each extracting process.
        shard_size: Number of images per shard. Interrupted work is kept in whole shards.
        dtype: Stored type of the features. ``int8`` divides the range of each channel of an image into steps, and
            halves the size.
        keep_components: Number of principal components to keep of each token, from which the channels are restored when
            they are read. They are those of up to 2,000 of the images. By default, and for teachers with no more
            channels than that, all channels are kept.
        all_at_once: Hold all teachers in memory and read every image once; otherwise one teacher after another.
        precision: Arithmetic of the teachers: ``32-true`` is float32 throughout; ``tf32`` lets a GPU round the factors
            of matrix products and convolutions to TF32; ``bf16-mixed`` is bfloat16 autocast. ``auto`` goes on as the
            teacher's features in the store were begun; otherwise it is ``32-true`` on a CPU, and on a GPU whatever the
            teacher's ``gpu_precision`` says.
        accelerator: Device type, as Lightning Fabric takes it: ``auto``, ``cpu``, ``cuda``, ...
        devices: Number of processes on each node, or ``auto``.
        num_nodes: Number of nodes that share the work. Each of them runs this command.
        strategy: How Lightning Fabric starts the processes.
        max_skipped: Largest share of a split's images that may be unreadable. The extraction stops when there are more.
        teacher_options: Arguments of the teachers' constructors, by teacher.
    """

    images: dict[str, list[str] | str] | list[str] | str
    teachers: list[str] | str
    store: Path
    split: str | None = None
    every: int = 1
    views: int = 1
    labels: bool = False
    size: int = 224
    resize: Resize = "squash"
    batch_size: int = 32
    workers: int = 2
    shard_size: int = 1000
    dtype: FeatureDtype = "float16"
    keep_components: int | None = None
    all_at_once: bool = False
    precision: Precision | Literal["auto"] = "auto"
    accelerator: str = "auto"
    devices: int | str = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
    max_skipped: float = 0.01
    teacher_options: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_number("every", self.every, 1)
        check_number("views", self.views, 1, _MOST_VIEWS)
        check_number("size", self.size, 1, MOST_PIXELS)
        check_number("batch_size", self.batch_size, 1)
        check_number("shard_size", self.shard_size, 1)
        check_number("keep_components", self.keep_components, 1)
        check_number("num_nodes", self.num_nodes, 1, MOST_PROCESSES)
        check_number("workers", self.workers, 0, MOST_PROCESSES)
        check_number("max_skipped", self.max_skipped, 0, 1)
        if isinstance(self.devices, int):
            check_number("devices", self.devices, -1, MOST_PROCESSES)
        if self.resize not in get_args(Resize):
            raise ConfigError(f"--resize is {self.resize!r}; choose 'squash' or 'center_crop'.")
        if not self.teacher_names:
            raise ConfigError("--teachers is empty. Name at least one; `theia teachers` lists the installed ones.")
        repeated = sorted({name for name in self.teacher_names if self.teacher_names.count(name) > 1})
        if repeated:
            raise ConfigError(f"--teachers names {', '.join(repeated)} twice. Name each teacher once.")
        if not self.locations:
            raise ConfigError("--images is empty. Give a place, or one for each split: {train: PLACE, val: PLACE}.")
        if not all(self.locations.values()):
            raise ConfigError("--images has a split without a place. Give one for each: {train: PLACE, val: PLACE}.")
        if self.split is not None and isinstance(self.images, dict):
            raise ConfigError("--split is for a single place; --images names its splits itself. Leave out --split.")
        for split in self.locations:
            if not is_split_name(split):
                raise ConfigError(f"{split!r} cannot be the name of a split. Use {SPLIT_RULE}.")
        if self.views > 1 and TRAIN not in self.locations:
            raise ConfigError(
                f"--views is for the split {TRAIN!r}, and the images are of {', '.join(self.locations)}. Leave it out."
            )

    @property
    def teacher_names(self) -> list[str]:
        """Names of the teachers to extract, in order."""
        return comma_list(self.teachers)

    @property
    def locations(self) -> dict[str, list[str] | str]:
        """Place or places of the images of each split, by split."""
        return self.images if isinstance(self.images, dict) else {self.split or TRAIN: self.images}
