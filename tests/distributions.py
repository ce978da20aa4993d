"""Distributions of plug-ins, laid out as pip would leave them."""

from pathlib import Path


def install(folder: Path, distribution: str, group: str, name: str, source: str, attribute: str) -> None:
    """Lays out version 1.2 of a distribution with one entry point.

    Args:
        folder: On ``sys.path``; named after the test, as its module is: Python keeps imported modules.
        distribution: Its name.
        group: Of the entry point.
        name: Likewise.
        source: Of its only module.
        attribute: Of that module: what the entry point names.
    """
    module = f"plugin_{folder.name}_{distribution}".replace("-", "_")
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{distribution.replace('-', '_')}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:{attribute}\n")
