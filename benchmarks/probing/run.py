"""A run over several encoders, as both commands share it."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.command import check_folders
from benchmarks.probing.features import Device, choose_device
from benchmarks.probing.fingerprint import fingerprint
from benchmarks.probing.presets import PRESETS, Effort, Preset
from benchmarks.probing.probes import Probed
from benchmarks.probing.report import results as records
from benchmarks.probing.report import table
from benchmarks.probing.storage import Storage, temporary
from benchmarks.probing.unfinished import Unfinished
from benchmarks.throughput.machine import machine, versions
from benchmarks.throughput.report import write
from theia.analysis.labels import short_labels
from theia.encoder.named import NamedEncoder
from theia.errors import ConfigError
from theia.lists import comma_list

NOTHING = "no encoder"  # the column of what can be told without one


@dataclass(frozen=True)
class Run:
    """Where and how much a command works.

    Attributes:
        kind: Name of the command.
        device: Where to work.
        seeds: Of what is fitted.
        effort: How much work there is.
        folder: For files that are mapped into memory; the system's temporary folder by default.
        results: For the JSON, and what is kept of an unfinished run.
    """

    kind: str
    device: str
    seeds: list[int]
    effort: Effort
    folder: Path | None
    results: Path

    def probe_all(
        self,
        encoders: Sequence[NamedEncoder],
        looks: Mapping[str, str],
        data: str,
        nothing: Probed,
        probe: Callable[[NamedEncoder, Storage], Probed],
        settings: dict[str, Any],
        notes: list[str],
    ) -> tuple[Path, dict[str, Probed]]:
        """Probes what an interrupted run has not, prints the table and writes the JSON.

        Args:
            encoders: Which.
            looks: Fingerprint of each, by name.
            data: That of the data.
            nothing: What needs no encoder.
            probe: Does one of them.
            settings: For the record.
            notes: What a reader of the table must know.

        Returns:
            The JSON, and what was found by the encoders' labels, with what needs no encoder first.
        """
        # Where a model lies is nobody else's business.
        labels = short_labels([encoder.name for encoder in encoders])
        identities = {name: fingerprint(settings, versions(), data, look) for name, look in looks.items()}
        found = {NOTHING: nothing}
        unfinished = Unfinished(self.results / "unfinished")
        for number, encoder in enumerate(encoders, 1):
            known = unfinished.load(identities[encoder.name])
            turn = f"encoder {number} of {len(encoders)}: {encoder.name}"
            if known is None:
                print(turn, file=sys.stderr)
                with temporary(self.effort.on_disk, self.folder) as storage:
                    known = probe(encoder, storage)
                unfinished.keep(identities[encoder.name], known)
            else:
                print(f"{turn} was finished by an interrupted run", file=sys.stderr)
            found[labels[encoder.name]] = known
        figures = {name: probed.figures for name, probed in found.items()}
        print("\n".join([table(figures), *notes]))
        record = {"versions": versions(), "machine": machine(), "settings": settings, "notes": notes}
        path = write(self.results, f"probing-{self.kind}", records(figures), record)
        unfinished.forget(identities.values())
        print(path)
        return path, found


def open_run(kind: str, device: Device, seeds: str, folder: Path | None, preset: Preset, results: Path) -> Run:
    """Checks the options that both commands have.

    Args:
        kind: Name of the command.
        device: As the option says.
        seeds: Whole numbers, separated by commas.
        folder: As the option says.
        preset: How much work there is.
        results: As the option says.

    Raises:
        ConfigError: If there is no such device or folder, nothing can be written there, or seeds are no whole numbers.
    """
    numbers = comma_list(seeds)
    if not numbers or not all(number.isdecimal() and int(number) < 2**32 for number in numbers):
        raise ConfigError(
            f"--seeds is {seeds!r}; give whole numbers from 0 and below 2**32, separated by commas, such as 0,1,2."
        )
    check_folders(results, folder)
    return Run(kind, choose_device(device), [int(number) for number in numbers], PRESETS[preset], folder, results)
