"""Image experiments over two processes, whose devices share the rows of a batch."""

import json

import jax
import numpy as np
import pytest

import regjax
from regjax.classification import load_classifier
from tests.classification.worst_class import experiment
from tests.processes import run_in_processes

RUN = """
import sys
import regjax
from tests.classification.worst_class import experiment
regjax.train(experiment, sys.argv[1], quiet=True)
"""


@pytest.mark.skipif(jax.device_count() != 1, reason="compares with a single device")
def test_two_processes_give_the_run_of_one(tmp_path):
    regjax.train(experiment, tmp_path / "1", quiet=True)
    run_in_processes(RUN, tmp_path / "2", count=2)
    for found, expected in zip(
        *(load_classifier(tmp_path / n, "only")[:2] for n in "21"), strict=True
    ):
        for path, leaf in expected.items():
            np.testing.assert_allclose(found[path], leaf, rtol=1e-4, atol=1e-4, err_msg=path)
    one, two = (json.loads((tmp_path / n / "results.json").read_text()) for n in "12")
    assert one["table"][0]["accuracy"] == two["table"][0]["accuracy"]
