"""The components in which a teacher's features are stored, from its features of some of the images."""

import numpy as np
import torch

from theia.errors import ImageError
from theia.extraction.computing import compute
from theia.extraction.images import UnreadableImageError, to_square
from theia.extraction.sources import ImageSource
from theia.store.components import Basis
from theia.store.schema import Resize
from theia.store.second_moments import Sums
from theia.teacher import Teacher
from theia.types import Precision
from theia.utils.progress import Progress

MOST_IMAGES = 2000


@torch.inference_mode()
def find_basis(
    teacher: Teacher, source: ImageSource, size: int, resize: Resize, components: int, batch_size: int,
    precision: Precision, device: torch.device,
) -> Basis:  # fmt: skip
    """Runs a teacher over images that are spread evenly over a source.

    Args:
        teacher: The teacher, on the device.
        source: The images.
        size: Height and width that they are brought to, in pixels.
        resize: How.
        components: Number of components to keep.
        batch_size: Number of images that the teacher is given together.
        precision: Precision that the teacher computes in.
        device: Device of the teacher.

    Raises:
        ImageError: If none of the images can be read.
        FeatureError: If the features differ from the teacher's spec.
    """
    places = np.unique(np.linspace(0, len(source.ids) - 1, min(MOST_IMAGES, len(source.ids))).astype(int)).tolist()
    sums: Sums | None = None
    images = 0
    with Progress(f"{teacher.spec.name}: components", len(places)) as progress:
        for start in range(0, len(places), batch_size):
            some = places[start : start + batch_size]
            pixels = []
            for place in some:
                try:
                    pixels.append(to_square(source.read(place), size, resize))
                except UnreadableImageError:
                    continue  # the extraction lists it
            progress.advance(len(some))
            if not pixels:
                continue
            batch = torch.from_numpy(np.stack(pixels)).to(device)
            features = compute(teacher, batch, precision)
            tokens = features.patches.float().flatten(0, 1)
            if sums is None:
                sums = Sums.around(tokens.mean(0))
            sums.add(tokens)
            images += len(batch)
    if sums is None:
        raise ImageError(f"None of the {len(places)} images that the components would come from can be read.")
    return Basis.of(sums.mean(), sums.covariance(), components, images)
