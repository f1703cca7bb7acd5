"""A long tail on CIFAR-10: the stages of `long_tail_fashion.py`, with crops and flips.

The images (JPEG, official order) are read from `../shared/data`; elsewhere give `--data.train tar:FILE` and
`--data.test tar:FILE`.

    regjax sweep configs/long_tail_cifar.py --seeds 4 --workdir runs/long_tail_cifar

Twelve minutes on two cores. Worst class: cross-entropy .036, KD .027, AdaAlpha .053, AdaMargin .298, logit
adjustment .418; balanced accuracy .468, .464, .476, .546, .559. PAPERS.md has the rest.
"""

from regjax import ImageExperiment
from regjax.data.images import Augmentation, ImageData, LongTail
from regjax.methods import distillation
from regjax.models.vision import SmallCnn
from regjax.optim import Optimizer

experiment = ImageExperiment(
    name="CIFAR-10 with a long tail",
    stages=distillation.students(teacher_model=SmallCnn((24, 48), (128,))),
    data=ImageData(
        train="tar:../shared/data/cifar10_jpg/train.tar.xz",
        test="tar:../shared/data/cifar10_jpg/test.tar.xz",
        limit=30_000,
        held_out=0.1,
        tail=LongTail("exponential", 100),
        augmentation=Augmentation(crop_padding=2, flip=True),
    ),
    model=SmallCnn((16, 32), (64,)),
    batch_size=128,
    epochs=30,
    checkpoint_every=30,
    worst_k=3,
    optimizer=Optimizer(
        name="sgd",
        learning_rate=0.05,
        b1=0.9,
        nesterov=True,
        weight_decay=1e-4,
        warmup=0.05,
        clip_norm=5.0,
    ),
)
