"""Distillation for the worst class on Fashion-MNIST with a long tail: teachers by students.

Three objectives of the teacher by three of the student and a trade-off between them, beside group DRO and
logit adjustment. The multipliers of the classes follow held-out risks once an epoch.

    regjax sweep configs/robust_fashion.py --seeds 5 --workdir runs/robust_fashion
    python benchmarks/trade_off.py runs/robust_fashion --stages standard_standard balanced_balanced

About 25 minutes of one processor's time. Worst class and balanced accuracy: standard student of a standard
teacher .265 and .796, robust one .629 and .805, robust one of a balanced teacher .640 and .808, robust one
of a robust teacher .634 and .791; group DRO .518 and .796. PAPERS.md has the rest.
"""

from regjax import ImageExperiment
from regjax.data.images import ImageData, LongTail
from regjax.methods.robust_distillation import teacher_by_student
from regjax.models.vision import SmallCnn
from regjax.objectives.classification import Robust
from regjax.optim import Optimizer

experiment = ImageExperiment(
    name="Fashion-MNIST, worst class",
    stages=teacher_by_student(
        Robust(step_size=0.3, adjust_every=34, floor=0.001),
        tradeoffs=(0.5,),
        teacher_model=SmallCnn((16, 32), (64,)),
    ),
    data=ImageData(
        train="idx:../shared/data/fashion_mnist:train",
        test="idx:../shared/data/fashion_mnist:test",
        limit=20_000,
        held_out=0.1,
        tail=LongTail("exponential", 100),
    ),
    model=SmallCnn((8, 16), (32,)),
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
