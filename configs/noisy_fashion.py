"""Noisy labels on Fashion-MNIST: smoothing, corrections, robust losses, and students of such teachers.

Six objectives on 5,400 images whose labels are wrong with probability 0.2 or 0.4, and students of three of
the models. The images are read from `../shared/data`; elsewhere give `--data.train idx:FOLDER:train` and
`--data.test idx:FOLDER:test`.

    regjax sweep configs/noisy_fashion.py --seeds 5 --grid data.noise.rate .2 .4 --workdir runs/noisy_fashion

18 minutes of one processor's time. Test accuracy at 20 % and 40 % noise: cross-entropy .741, .597; smoothing
.768, .626; forward correction .826, .783; students of these three .784, .681; .824, .741; .838, .801.
PAPERS.md has the rest.
"""

from regjax import ImageExperiment
from regjax.data.images import ImageData, LabelNoise
from regjax.methods import noise
from regjax.models.vision import SmallCnn
from regjax.optim import Optimizer

experiment = ImageExperiment(
    name="Fashion-MNIST with noisy labels",
    stages=(*noise.corrections(), *noise.students_of()),
    data=ImageData(
        train="idx:../shared/data/fashion_mnist:train",
        test="idx:../shared/data/fashion_mnist:test",
        limit=6000,
        held_out=0.1,
        noise=LabelNoise("symmetric", 0.2),
    ),
    model=SmallCnn((8, 16), (64,)),
    batch_size=128,
    epochs=25,
    checkpoint_every=25,
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
