import tarfile
from pathlib import Path

import pytest

LEROBOT = Path(__file__).parent / "lerobot.tar.xz"


@pytest.fixture(scope="session")
def written_by_lerobot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small data sets that LeRobot 0.4.4 (v3.0) and 0.3.3 (v2.1) wrote: see ``record.py``."""
    folder = tmp_path_factory.mktemp("lerobot")
    with tarfile.open(LEROBOT) as tar:
        tar.extractall(folder, filter="data")
    return folder
