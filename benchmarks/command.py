"""Checks that every benchmark makes first: measuring takes minutes, and results that cannot be written are lost."""

from pathlib import Path

from theia.errors import ConfigError
from theia.utils.files import check_folder


def check_folders(results: Path, folder: Path | None = None) -> None:
    """Checks that files can be written into the folders.

    Args:
        results: Folder for the JSON, which is made when the JSON is written.
        folder: Folder for temporary data; ``None`` for the system's temporary folder.

    Raises:
        ConfigError: If there is no such folder, or it cannot be written.
    """
    check_folder(results, "--results")
    if folder is None:
        return
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}. Make it, or give another one with --folder.")
    check_folder(folder, "--folder")
