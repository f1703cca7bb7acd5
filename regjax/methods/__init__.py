"""Methods of papers, each as a list of stages."""

from regjax.methods import bipartite_ranking, promot

__all__ = ["bipartite_ranking", "promot"]
