"""A long tail on Fashion-MNIST: a teacher, and students that do or do not look after its rare classes.

The images of the ten classes are thinned exponentially, the last class to a hundredth of the first. The
margins of AdaAlpha and AdaMargin are the teacher's on held-out images, a tenth of each class from before
the thinning.

    regjax sweep configs/long_tail_fashion.py --seeds 5 --workdir runs/long_tail_fashion

Four minutes on two cores. Worst class: cross-entropy .285, KD .269, AdaAlpha .287, AdaMargin .428, logit
adjustment .378; balanced accuracy .795, .800, .794, .803, .827. PAPERS.md has the rest.
"""

from regjax import ImageExperiment
from regjax.data.images import ImageData, LongTail
from regjax.methods import distillation
from regjax.models.vision import SmallCnn
from regjax.optim import Optimizer

experiment = ImageExperiment(
    name="Fashion-MNIST with a long tail",
    stages=distillation.students(teacher_model=SmallCnn((16, 32), (64,))),
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
