"""Batches on a CUDA device; needs one: pytest -m gpu."""

from pathlib import Path

import numpy as np
import pytest
import torch

from theia.data.loader import FeatureLoader
from theia.data.sampler import EvaluationSampler
from theia.store.reader import FeatureStore

pytestmark = pytest.mark.gpu

# Cycles of a kernel that does nothing: about half a second, far longer than any copy here.
_LONG = 1_000_000_000


def loader(store: Path, device: torch.device | None) -> FeatureLoader:
    split = FeatureStore(store).open_split("train")
    return FeatureLoader(split, EvaluationSampler(np.arange(len(split)), 12), workers=1, device=device)


def test_batches_have_the_bytes_of_the_cpus_even_for_work_that_lags_behind(store: Path) -> None:
    late: list[dict[str, torch.Tensor]] = []
    for batch in loader(store, torch.device("cuda", 0)):
        # The host goes on at once; the device reads the batch when later ones were long since asked for.
        torch.cuda._sleep(_LONG // 20)
        late.append({name: tensor.clone() for name, tensor in {**batch.patches, "image": batch.images}.items()})

    for copied, batch in zip(late, loader(store, None), strict=True):
        for name, tensor in {**batch.patches, "image": batch.images}.items():
            assert copied[name].device.type == "cuda"
            assert torch.equal(copied[name].cpu(), tensor)


def test_the_next_batch_is_copied_while_the_device_computes(store: Path) -> None:
    one = loader(store, torch.device("cuda", 0))
    batches = iter(one)
    next(batches)
    slot = one._ring.slots[1]  # of the second batch
    torch.cuda._sleep(_LONG)
    computed = torch.cuda.Event()
    computed.record()

    assert slot.copied is not None
    slot.copied.synchronize()

    assert not computed.query()
    one.close()


def test_memory_is_page_locked_until_the_loader_is_closed(store: Path) -> None:
    one = loader(store, torch.device("cuda", 0))
    next(iter(one))
    arrays = [torch.from_numpy(array) for slot in one._ring.slots for array in slot.arrays.values()]
    assert all(array.is_pinned() for array in arrays)

    one.close()

    assert not any(array.is_pinned() for array in arrays)
