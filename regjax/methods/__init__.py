"""Methods of papers, each as a list of stages."""

from regjax.methods import bipartite_ranking, distillation, noise, promot, robust_distillation

__all__ = ["bipartite_ranking", "distillation", "noise", "promot", "robust_distillation"]
