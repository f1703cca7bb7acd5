"""What commands that read a config share."""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

from regjax import distributed
from regjax.data import Data

WORKDIR = (
    "Folder for checkpoints, log, predictions, results and plots; a run that is there goes on."
)


def default_of(config: str) -> Any:
    """The config's experiment, as `--help` may show it."""
    from regjax.experiment import load_config

    default = load_config(config)
    if isinstance(default.data, Data):
        return dataclasses.replace(default, data=short_to_show(default.data))
    return default


class _InMemory(list):
    """Records given in the config, which --help would print in full otherwise."""

    def __str__(self) -> str:
        return f"{len(self)} records in memory"


def short_to_show(data: Data) -> Data:
    """The data with records in memory as they may be printed."""
    sources = {name: getattr(data, name) for name in ("train", "validation", "test")}
    shown: dict[str, Any] = {
        name: _InMemory(source)
        for name, source in sources.items()
        if not isinstance(source, str | os.PathLike)
    }
    return dataclasses.replace(data, **shown)


def use_cores(experiments: Sequence[Any]) -> None:
    """A device for each core of a processor, where that is faster: for experiments on images."""
    from regjax.classification import ImageExperiment
    from regjax.cores import one_device_a_core

    # In a job of several processes the batch is dealt out over those already.
    if isinstance(experiments[0], ImageExperiment) and not distributed.is_part():
        one_device_a_core(math.gcd(*(each.batch_size for each in experiments)))
