from pathlib import Path

from theia.data.ring import HELD, Ring
from theia.store.reader import FeatureStore


def test_a_slot_is_filled_again_only_when_its_copy_has_ended(store: Path) -> None:
    ring = Ring(FeatureStore(store).open_split("train"), batch_size=2, ahead=0)
    waited: list[int] = []
    for number, slot in enumerate(ring.slots):
        slot.copied = Copied(waited, number)

    assert [ring.claim() for _ in range(HELD)] == waited == list(range(HELD))
    assert [slot.copied for slot in ring.slots] == [None] * HELD


class Copied:
    def __init__(self, waited: list[int], number: int) -> None:
        self.waited = waited
        self.number = number

    def synchronize(self) -> None:
        self.waited.append(self.number)
