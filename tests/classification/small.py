"""Small image experiments for tests."""

import numpy as np

from regjax.classification import ImageExperiment, ImageStage
from regjax.data.images import ImageData, ImageSet
from regjax.models.vision import Mlp
from regjax.objectives.classification import CrossEntropy
from regjax.optim import Optimizer

CLASSES = 3


def images(count, seed=0, size=6):
    """`count` grey images whose class is the row that is bright, under noise."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    pixels = random.integers(0, 120, (count, size, size, 1))
    pixels[np.arange(count), labels] += 100
    return ImageSet(
        pixels.astype(np.uint8), labels.astype(np.int32), ("a", "b", "c"),
        [f"image {number}" for number in range(count)],
    )  # fmt: skip


OPTIMIZER = Optimizer(
    name="sgd",
    learning_rate=0.1,
    b1=0.9,
    nesterov=True,
    weight_decay=1e-4,
    warmup=0.0,
    clip_norm=0.0,
)


def experiment(*stages, **changes):
    data = ImageData(**{"train": images(96), "test": images(60, 1), **changes.pop("data", {})})
    fields = {"model": Mlp((16,)), "batch_size": 32, "epochs": 4, "optimizer": OPTIMIZER}
    stages = stages or (ImageStage("only", CrossEntropy()),)
    return ImageExperiment(stages, data, **{**fields, **changes})
