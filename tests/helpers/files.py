"""Files that tests read."""

import json
import pathlib

import numpy as np
import pytest

TESTS = pathlib.Path(__file__).parents[1]
ROOT = TESTS.parent
#: Numbers of the authors' implementation.
GOLDEN = TESTS / "golden"
#: Files of version 0.1.0.
SAVED = TESTS / "saved"


def golden_operators():
    """The cases of golden/operators.npz, as pytest params of (case, arrays)."""
    with np.load(GOLDEN / "operators.npz", allow_pickle=False) as file:
        arrays = dict(file)
    params = []
    for case in json.loads(str(arrays["index"])):
        prefix = case["name"] + "/"
        own = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        params.append(pytest.param(case, own, id=case["name"]))
    return params
