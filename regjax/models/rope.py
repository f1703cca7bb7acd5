"""Rotary positions: frequencies, their scaling, and the rotation. All in float32."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from regjax.models.config import RopeScaling


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Angular frequencies `[head_dim / 2]`, in radians per position: `theta ** (-2 i / head_dim)`.

    `linear` divides them by `factor` (Chen et al., 2023, Extending Context Window of Large Language
    Models via Positional Interpolation). `llama3` divides those whose wavelength exceeds
    `original / low`, keeps those below `original / high`, and between the two mixes both, by
    `(original / wavelength - low) / (high - low)` (Llama 3.1).

    >>> rope_frequencies(4, 100.0, RopeScaling("linear", factor=2.0))
    array([0.5 , 0.05], dtype=float32)
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = 1.0 / np.float32(theta) ** exponents
    if scaling.kind == "linear":
        return (frequencies / np.float32(scaling.factor)).astype(np.float32)
    if scaling.kind == "llama3":
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        turns = scaling.original_max_positions * frequencies / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = kept * frequencies + (1 - kept) * frequencies / scaling.factor
    return frequencies.astype(np.float32)


def rope_angles(positions: Array, frequencies: np.ndarray) -> tuple[Array, Array]:
    """Cosines and sines `[B, L, 1, head_dim / 2]` of `positions [B, L]` times `frequencies`."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(heads: Array, cosines: Array, sines: Array) -> Array:
    """Rotates `heads [B, L, H, head_dim]`, entry i with entry `i + head_dim / 2`, as one pair.

    Su et al., 2021, RoFormer, eq. 34, in the halves-not-neighbours order of published checkpoints.
    """
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cosines - second * sines, second * cosines + first * sines)
    return jnp.concatenate(rotated, axis=-1).astype(heads.dtype)
