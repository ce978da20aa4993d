"""What the commands of all benchmarks check first: measuring takes minutes, and what cannot be written is lost."""

from pathlib import Path

from theia.errors import ConfigError
from theia.utils.files import check_folder


def check_folders(results: Path, folder: Path | None = None) -> None:
    """Sees that files can be written where they are to be.

    Args:
        results: For the JSON; made when it is written.
        folder: For data that are deleted afterwards; the system's temporary folder if there is none.

    Raises:
        ConfigError: If there is no such folder, or it cannot be written.
    """
    check_folder(results, "--results")
    if folder is None:
        return
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}. Make it, or give another one with --folder.")
    check_folder(folder, "--folder")
