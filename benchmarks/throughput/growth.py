"""How the loader's cost grows with the work: per image with more samples, per byte with more teachers.

Samples are small here, so that the work per sample and per batch shows beside the copying of bytes.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.throughput.contenders import Contender, cost_per_epoch, theia_loader
from benchmarks.throughput.data import check_parity, check_space, random_samples, write_store
from benchmarks.throughput.measure import Cost, Measure, Result, Settings, ratios

_AIM = 1.15
_BATCH = 16


def run(settings: Settings) -> Result:
    """Runs the suite.

    Args:
        settings: How much to measure.

    Returns:
        CPU time per image of a large store in units of a small one's, and per byte of several teachers in units of
        one's.

    Raises:
        ParityError: If the loader gives other bytes than were written, or not every sample once.
        BenchmarkError: If the disk is too small.
    """
    images = _over_samples(settings)
    teachers = _over_teachers(settings)
    return Result(
        measures=_measures("CPU time per image, {} samples against {}", images)
        + _measures("CPU time per byte, {} teachers against {}", teachers),
        details={
            "batch_size": _BATCH,
            "costs_per_image": {name: [vars(cost) for cost in values] for name, values in images.items()},
            "costs_per_byte": {name: [vars(cost) for cost in values] for name, values in teachers.items()},
        },
    )


def _over_samples(settings: Settings) -> dict[str, list[Cost]]:
    counts = (16, 32) if settings.small else (1 << 10, 1 << 12, 1 << 14)
    with ExitStack() as stack:
        contenders = {}
        for count in counts:
            samples = random_samples(count, 32, {"teacher": (8, 64)}, shard=count // 16 if settings.small else 256)
            store = _folder(settings, f"samples-{count}", samples.nbytes)
            write_store(store, samples)
            epoch = theia_loader(store, _BATCH, stack)
            check_parity("The loader", epoch(), samples)
            contenders[str(count)] = Contender(epoch, 2 * counts[-1] // count)
        costs = cost_per_epoch(contenders, settings.pairs)
    return {name: [cost / int(name) for cost in values] for name, values in costs.items()}


def _over_teachers(settings: Settings) -> dict[str, list[Cost]]:
    count, grid = (16, 2) if settings.small else (256, 8)
    names = [f"teacher{number}" for number in range(1, 6)]
    samples = random_samples(count, 32, dict.fromkeys(names, (grid, 512)), shard=64)
    store = _folder(settings, "teachers", samples.nbytes)
    write_store(store, samples)
    nbytes = {}
    with ExitStack() as stack:
        contenders = {}
        for number in range(1, 1 + len(names)):
            chosen = samples.only(names[:number])
            epoch = theia_loader(store, _BATCH, stack, names[:number])
            check_parity("The loader", epoch(), chosen)
            contenders[str(number)] = Contender(epoch, 1 if settings.small else 40)
            nbytes[str(number)] = chosen.nbytes
        costs = cost_per_epoch(contenders, settings.pairs)
    return {name: [cost / nbytes[name] for cost in values] for name, values in costs.items()}


def _folder(settings: Settings, name: str, needed: int) -> Path:
    check_space(settings.folder, 2 * needed)
    return settings.folder / name


def _measures(name: str, costs: Mapping[str, Sequence[Cost]]) -> list[Measure]:
    first, *others = costs
    return [
        Measure(name.format(other, first), ratios(costs, other, first, "cpu_s"), aim=_AIM, at_most=True)
        for other in others
    ]
