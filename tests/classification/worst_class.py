"""A config for the worst class, with batch normalisation and augmentation."""

from regjax.classification import ImageStage
from regjax.data.images import Augmentation
from regjax.models.vision import CifarResNet
from regjax.objectives.classification import Robust
from tests.classification.small import experiment as small
from tests.classification.small import images

experiment = small(
    ImageStage("only", Robust(target="labels", adjust_every=2)),
    model=CifarResNet(8),
    epochs=2,
    eval_batch_size=24,
    data={
        "train": images(96, size=8),
        "test": images(60, 1, size=8),
        "held_out": 0.25,
        "augmentation": Augmentation(1, True, mixup=0.2),
    },
)
