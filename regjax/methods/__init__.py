"""Methods of papers, each as a list of stages."""

from regjax.methods import promot

__all__ = ["promot"]
