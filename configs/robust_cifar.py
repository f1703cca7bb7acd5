"""Distillation for the worst class on CIFAR-10 with a long tail: the stages of `robust_fashion.py`.

The images (JPEG, official order) are read from `../shared/data`; elsewhere give `--data.train tar:FILE` and
`--data.test tar:FILE`.

    regjax sweep configs/robust_cifar.py --seeds 4 --workdir runs/robust_cifar
    python benchmarks/trade_off.py runs/robust_cifar --stages standard_standard balanced_balanced

26 minutes on two cores. Worst class and balanced accuracy: standard student of a standard teacher .034 and
.466, robust one .471 and .566, group DRO .280 and .423, post-shift of the standard student .493 and .564.
PAPERS.md has the rest.
"""

from regjax import ImageExperiment
from regjax.data.images import Augmentation, ImageData, LongTail
from regjax.methods.robust_distillation import teacher_by_student
from regjax.models.vision import SmallCnn
from regjax.objectives.classification import Robust
from regjax.optim import Optimizer

experiment = ImageExperiment(
    name="CIFAR-10, worst class",
    stages=teacher_by_student(
        Robust(step_size=0.3, adjust_every=50, floor=0.001),
        tradeoffs=(0.5,),
        teacher_model=SmallCnn((24, 48), (128,)),
    ),
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
