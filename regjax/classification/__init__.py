"""Image classifiers: stages of teachers and students, one run or many side by side, on the same loop."""

from regjax.classification.experiment import ImageExperiment, ImageStage
from regjax.classification.results import post_shift_reports
from regjax.classification.saved import load_classifier
from regjax.classification.train import train_runs

__all__ = ["ImageExperiment", "ImageStage", "load_classifier", "post_shift_reports", "train_runs"]
