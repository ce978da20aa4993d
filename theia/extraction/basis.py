"""The components in which features are stored: as they were begun, or from features of some of the images."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from theia.errors import ImageError, StoreError
from theia.extraction.computing import compute, placed
from theia.extraction.config import ExtractConfig
from theia.extraction.images import UnreadableImageError, to_square
from theia.extraction.sources import ImageSource
from theia.extraction.stages import build_teacher
from theia.store.components import Basis, load_basis
from theia.store.schema import TRAIN
from theia.store.second_moments import Sums
from theia.store.writer import SplitWriter
from theia.teacher import Teacher
from theia.types import Precision, TeacherSpec
from theia.utils.progress import Progress

logger = logging.getLogger(__name__)

_MOST_IMAGES = 2000


def choose_bases(
    device: torch.device,
    config: ExtractConfig,
    writers: Mapping[str, SplitWriter],
    sources: Mapping[str, ImageSource],
    specs: Sequence[TeacherSpec],
    built: Mapping[str, Teacher],
    precisions: Mapping[str, Mapping[str, Precision]],
) -> dict[str, Basis]:
    """Bases of the teachers that have more channels than are kept, as they were begun or from the training images.

    Args:
        device: Device of the teachers.
        config: Options of the extraction.
        writers: Writers of the splits, by split.
        sources: Images of the splits, by split.
        specs: Specs of the teachers.
        built: Those teachers that are in memory already, by name.
        precisions: Precision of each teacher, by split and teacher.

    Raises:
        StoreError: If the store has another number of components of a teacher.
        ImageError: If none of the images can be read.
        FeatureError: If the features differ from the teacher's spec.
    """
    found: dict[str, Basis] = {}
    split = TRAIN if TRAIN in sources else next(iter(sources))
    for spec in specs:
        keep = config.keep_components
        wanted = None if keep is None or keep >= spec.channels else keep
        begun = next((record for writer in writers.values() if (record := writer.begun(spec.name))), None)
        if begun is not None and wanted != (there := begun.basis and begun.basis.components):
            raise StoreError(
                f"{config.store} has {there or 'all'} components of {spec.name!r}, and --keep_components is {keep}. "
                "Give the same number, or another --store."
            )
        if wanted is None:
            continue
        if begun is not None and begun.basis is not None:
            found[spec.name] = load_basis(config.store, spec.name, begun.basis)
        else:
            teacher = built.get(spec.name) or build_teacher(spec.name, config.teacher_options.get(spec.name))
            precision = precisions[split][spec.name]
            found[spec.name] = find_basis(placed(teacher, device), sources[split], config, wanted, precision, device)
        basis = found[spec.name]
        logger.info(
            "%s: %d of %d components hold %.2f %% of the variance over %d images.",
            spec.name, wanted, spec.channels, 100 * basis.kept, basis.images,
        )  # fmt: skip
    return found


@torch.inference_mode()
def find_basis(
    teacher: Teacher, source: ImageSource, config: ExtractConfig, components: int, precision: Precision,
    device: torch.device,
) -> Basis:  # fmt: skip
    """Runs a teacher over up to 2,000 images that are spread evenly over a source.

    Args:
        teacher: The teacher, on the device.
        source: The images.
        config: Options of the extraction, which say what the images are brought to.
        components: Number of components to keep.
        precision: Precision that the teacher computes in.
        device: Device of the teacher.

    Raises:
        ImageError: If none of the images can be read.
        FeatureError: If the features differ from the teacher's spec.
    """
    places = np.unique(np.linspace(0, len(source.ids) - 1, _MOST_IMAGES).astype(int)).tolist()
    sums: Sums | None = None
    images = 0
    with Progress(f"{teacher.spec.name}: components", len(places)) as progress:
        for start in range(0, len(places), config.batch_size):
            some = places[start : start + config.batch_size]
            pixels = []
            for place in some:
                try:
                    pixels.append(to_square(source.read(place), config.size, config.resize))
                except UnreadableImageError:
                    continue  # the extraction lists it
            progress.advance(len(some))
            if not pixels:
                continue
            features = compute(teacher, torch.from_numpy(np.stack(pixels)).to(device), precision)
            tokens = features.patches.float().flatten(0, 1)
            if sums is None:
                sums = Sums.around(tokens.mean(0))
            sums.add(tokens)
            images += len(pixels)
    if sums is None:
        raise ImageError(f"None of the {len(places)} images that the components would come from can be read.")
    return Basis.of(sums.mean(), sums.covariance(), components, images)
