"""The models that a stage leaves behind, of all its runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from regjax.errors import InputError
from regjax.files import write_json

PARAMETERS, ABOUT = "params.safetensors", "model.json"
PARAMS, STATISTICS = "params/", "statistics/"

Arrays = dict[str, np.ndarray]


def save_classifiers(
    folder: Path, params: Mapping[str, Any], statistics: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    """Writes the arrays `[R, ...]` of all runs, and what they belong to as JSON."""
    from safetensors.numpy import save_file

    arrays = {f"{PARAMS}{path}": np.asarray(leaf) for path, leaf in params.items()}
    arrays |= {f"{STATISTICS}{path}": np.asarray(leaf) for path, leaf in statistics.items()}
    temporary = folder / f"{PARAMETERS}.tmp"
    save_file(arrays, temporary)
    temporary.replace(folder / PARAMETERS)
    write_json(folder / ABOUT, about)


def load_classifier(
    workdir: str | Path, stage: str, run: int = 0
) -> tuple[Arrays, Arrays, dict[str, Any]]:
    """`(params, statistics, about)` of one run of a stage that a workdir has finished.

    `regjax.models.vision.build(config, image_shape, num_classes).apply(params, statistics, images,
    training=False)` gives its outputs; `about` holds the configuration's fields, the shape, the classes and
    the mean and standard deviation that images are standardised by.

    Raises:
      InputError: if there is none.
    """
    from safetensors.numpy import load_file

    folder = Path(workdir) / stage
    if not (folder / PARAMETERS).is_file() or not (folder / ABOUT).is_file():
        raise InputError(f"{folder} holds no finished stage of an image experiment")
    arrays = load_file(folder / PARAMETERS)
    count = len(next(iter(arrays.values())))
    if not 0 <= run < count:
        raise InputError(f"run {run} of {folder}: there are {count}, counted from 0")
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    parts = [
        {
            path.removeprefix(prefix): leaf[run]
            for path, leaf in arrays.items()
            if path.startswith(prefix)
        }
        for prefix in (PARAMS, STATISTICS)
    ]
    return parts[0], parts[1], about
