"""regjax: training and reading out models whose labels are numbers, in JAX."""
