"""Divergence of the rows of two projections, the student's and the teacher's, tile by tile."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from regjax.losses.divergence import Divergence, divergence
from regjax.losses.linear_chunks import Columns, Projection, Rows, fold, with_gradient
from regjax.losses.linear_rows import Part, total, total_log


def projected_divergence(
    projections: tuple[Projection, ...],
    rows: Rows,
    part: Part,
    *,
    kind: Divergence,
    beta: float,
) -> jax.Array:
    """Float32 `[N]`: `divergence` of the student, the first projection, and the teacher.

    First the normalizers of both, then the terms: each is made of log-probabilities and is
    non-negative, so nothing cancels. With D the divergence as a function of the student's
    log-probabilities, e = dD / dlog p, the gradient of a logit of temperature one is
    e_v - p_v sum_w e_w. There is none to the teacher.
    """
    terms = functools.partial(_terms, kind=kind, beta=beta)
    count = projections[0].hidden.shape[0]
    # Finite, so that exp(top - top) is defined before the first chunk.
    top, zero = jnp.full(count, jnp.finfo(jnp.float32).min), jnp.zeros(count, jnp.float32)
    state = fold(_normalize, [(top, zero)] * 2, projections, (), part.kept, part.tiling)
    log_totals = [total_log(top + jnp.log(scaled), part) for top, scaled in state]

    def visit(state: Rows, tiles: list[jax.Array], log_totals: Rows, columns: Columns) -> Rows:
        losses, slopes = terms(tiles, log_totals, columns)
        return state[0] + losses, state[1] + jnp.sum(slopes, axis=1)

    def gradient(
        cotangents: jax.Array, tiles: list[jax.Array], rows: Rows, columns: Columns
    ) -> jax.Array:
        log_totals, slope_totals = rows
        _, slopes = terms(tiles, log_totals, columns)
        student = jnp.exp(tiles[0] - log_totals[0][:, None])
        slopes = slopes - jnp.where(columns.fresh, student * slope_totals[:, None], 0.0)
        return cotangents[:, None] * slopes

    losses, slope_totals = fold(
        visit, (zero, zero), projections, log_totals, part.kept, part.tiling
    )
    losses = with_gradient(
        gradient,
        part.tiling,
        losses,
        projections,
        (log_totals, total(slope_totals, part)),
        part.kept,
    )
    return total(losses, part)


def _normalize(state: Rows, tiles: list[jax.Array], rows: Rows, columns: Columns) -> Rows:
    new = []
    for (top, scaled), tile in zip(state, tiles, strict=True):
        tile = jnp.where(columns.fresh, tile, -jnp.inf)
        higher = jnp.maximum(top, jnp.max(tile, axis=1))
        scaled = scaled * jnp.exp(top - higher) + jnp.sum(jnp.exp(tile - higher[:, None]), axis=1)
        new.append((higher, scaled))
    return new


def _terms(
    tiles: list[jax.Array],
    log_totals: list[jax.Array],
    columns: Columns,
    *,
    kind: Divergence,
    beta: float,
) -> tuple[jax.Array, jax.Array]:
    """The chunk's share of the divergence `[block]`, and its slopes `[block, chunk]` by log p."""
    student, teacher = (
        jnp.where(columns.fresh, tile - log_total[:, None], -jnp.inf)
        for tile, log_total in zip(tiles, log_totals, strict=True)
    )
    losses, pull_back = jax.vjp(lambda log_p: divergence(log_p, teacher, kind, beta), student)
    [slopes] = pull_back(jnp.ones_like(losses))
    return losses, jnp.where(columns.fresh, slopes, 0.0)
