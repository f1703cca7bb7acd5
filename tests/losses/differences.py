"""Gradients of float64 formulas."""

import numpy as np


def central_differences(function, point, step=1e-5):
    """The gradient of a scalar function of an array, at the point."""
    gradient = np.zeros(point.shape)
    for index in np.ndindex(point.shape):
        change = np.zeros(point.shape)
        change[index] = step
        gradient[index] = (function(point + change) - function(point - change)) / (2 * step)
    return gradient
