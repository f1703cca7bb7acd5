"""Noisy labels on CIFAR-10: symmetric ones by rate, or those that people gave (CIFAR-N, "worse").

The stages of `noisy_fashion.py` on 9,000 images with crops and flips. The images (JPEG, official order) are
read from `../shared/data`; elsewhere give `--data.train tar:FILE` and `--data.test tar:FILE`.

    regjax sweep configs/noisy_cifar.py --seeds 3 --grid data.noise.rate .2 .4 --workdir runs/noisy_cifar
    regjax sweep configs/noisy_cifar.py --seeds 4 --data.noise.kind human --data.noise.rate 0 \
        --data.noise.file ../shared/data/cifar_n/CIFAR-10_human.npz --data.noise.column worse_label \
        --workdir runs/worse_cifar

30 minutes on two cores. Cross-entropy, smoothing, forward correction: .619, .615, .630 at 20 % noise, .560,
.557, .574 at 40 %, .562, .569, .587 with people's labels. PAPERS.md has the rest.
"""

from regjax import ImageExperiment
from regjax.data.images import Augmentation, ImageData, LabelNoise
from regjax.methods import noise
from regjax.models.vision import SmallCnn
from regjax.optim import Optimizer

experiment = ImageExperiment(
    name="CIFAR-10 with noisy labels",
    stages=(*noise.corrections(), *noise.students_of()),
    data=ImageData(
        train="tar:../shared/data/cifar10_jpg/train.tar.xz",
        test="tar:../shared/data/cifar10_jpg/test.tar.xz",
        limit=10_000,
        held_out=0.1,
        noise=LabelNoise("symmetric", 0.2),
        augmentation=Augmentation(crop_padding=2, flip=True),
    ),
    model=SmallCnn((16, 32), (64,)),
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
