"""regjax: training and reading out models whose labels are numbers, in JAX."""

from regjax import (
    alignment,
    class_metrics,
    classification,
    data,
    decisions,
    distributed,
    generate,
    losses,
    methods,
    metrics,
    models,
    objectives,
    optim,
    probes,
    scoring,
    text_metrics,
)
from regjax.classification import ImageExperiment, ImageStage
from regjax.errors import InputError
from regjax.experiment import Experiment
from regjax.reader import Reader, export, load_model
from regjax.scores import ScoreGrid
from regjax.stages import Stage
from regjax.token_grid import TokenGrid

# Last, since a function takes the place of its module's name here.
from regjax.evaluate import evaluate  # isort: skip
from regjax.predict import predict  # isort: skip
from regjax.sweep import sweep  # isort: skip
from regjax.train import train  # isort: skip

__all__ = [
    "Experiment",
    "ImageExperiment",
    "ImageStage",
    "InputError",
    "Reader",
    "ScoreGrid",
    "Stage",
    "TokenGrid",
    "alignment",
    "class_metrics",
    "classification",
    "data",
    "decisions",
    "distributed",
    "evaluate",
    "export",
    "generate",
    "load_model",
    "losses",
    "methods",
    "metrics",
    "models",
    "objectives",
    "optim",
    "predict",
    "probes",
    "scoring",
    "sweep",
    "text_metrics",
    "train",
]
