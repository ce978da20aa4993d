import json
from pathlib import Path

import numpy as np

from theia.utils.files import jsonable


def test_what_json_cannot_hold_becomes_what_it_can() -> None:
    value = {1: (0.5, float("nan")), "a": {"b": [float("-inf"), np.float64(2.5), True, None]}, "c": Path("x/y")}
    plain = {"1": [0.5, None], "a": {"b": [None, 2.5, True, None]}, "c": "x/y"}
    assert jsonable(value) == plain
    assert json.loads(json.dumps(jsonable(value), allow_nan=False)) == plain
