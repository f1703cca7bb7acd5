"""A config of little to compile, for jobs that are started many times."""

import dataclasses

from tests.small_experiment import experiment as small

experiment = dataclasses.replace(
    small,
    stages=small.stages[1:],
    data=dataclasses.replace(small.data, test=""),
    reference_field="",
)
