import json
from pathlib import Path

import numpy as np
import pytest

from theia.errors import ConfigError
from theia.utils.files import alone, jsonable


def test_what_json_cannot_hold_becomes_what_it_can() -> None:
    value = {1: (0.5, float("nan")), "a": {"b": [float("-inf"), np.float64(2.5), True, None]}, "c": Path("x/y")}
    plain = {"1": [0.5, None], "a": {"b": [None, 2.5, True, None]}, "c": "x/y"}
    assert jsonable(value) == plain
    assert json.loads(json.dumps(jsonable(value), allow_nan=False)) == plain


def test_a_folder_belongs_to_one_process_at_a_time(tmp_path: Path) -> None:
    with alone(tmp_path / "out"), pytest.raises(ConfigError, match="Another process"), alone(tmp_path / "out"):
        pass
    with alone(tmp_path / "out"):
        pass
