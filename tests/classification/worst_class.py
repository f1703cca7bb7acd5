"""A config for the worst class, with batch normalisation and augmentation.

Its rate is small: at 0.1 rounding grows tenfold in four steps.
"""

import dataclasses

from regjax.classification import ImageStage
from regjax.data.images import Augmentation
from regjax.models.vision import CifarResNet
from regjax.objectives.classification import Robust
from tests.classification.small import OPTIMIZER, images
from tests.classification.small import experiment as small

experiment = small(
    ImageStage("only", Robust(target="labels", adjust_every=2)),
    model=CifarResNet(8),
    epochs=2,
    optimizer=dataclasses.replace(OPTIMIZER, learning_rate=0.01),
    eval_batch_size=24,
    data={
        "train": images(96, size=8),
        "test": images(60, 1, size=8),
        "held_out": 0.25,
        "augmentation": Augmentation(1, True, mixup=0.2),
    },
)
