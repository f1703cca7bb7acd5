"""The compiled part: chunks of training steps of several runs, and the logits of a split.

Arrays that differ between runs have an axis of R runs in front. Images, batches and augmentation are
shared, so that they are held and made once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from regjax.data.images import Augmentation, augment, mixup, standardise
from regjax.models.vision import Classifier, Outputs
from regjax.sharding import known_inside, replicated
from regjax.stages import apply_gradients

RunsBy = Literal["vmap", "map"]

Array: TypeAlias = jax.Array | np.ndarray


class RunState(NamedTuple):
    """What training changes; each array has an axis of runs in front."""

    params: dict[str, jax.Array]
    statistics: dict[str, jax.Array]
    """Running means and variances of batch normalisation."""
    optimizer: Any
    extras: Any
    """The objective's own, such as multipliers of classes; () where it has none."""
    average: Any
    """`(number of adjustments, mean params, mean statistics)`, or () where no mean is asked for."""


class ClassifierState(NamedTuple):
    """All that a checkpoint holds."""

    runs: RunState
    step: jax.Array


class Own(NamedTuple):
    """What the steps of a run read and do not change; each array has an axis of runs in front."""

    objective: Any
    """The numbers in which the objectives of runs differ."""
    given: Any
    """What the objective made of the facts."""
    labels: Array
    """int32 `[R, N]`."""
    teacher_logits: Array | None
    """`[R, T, N, K]` of cached teachers."""
    teachers: Sequence[tuple[Any, Any]]
    """`(params, statistics)` of teachers that are applied at every step."""
    held_out: Mapping[str, Array] | None
    """`labels [R, M]` and, where there are teachers, `teacher_logits [R, T, M, K]`."""


class Shared(NamedTuple):
    """What the steps of all runs read."""

    images: Array
    """uint8 `[N, H, W, C]`."""
    mean: Array
    std: Array
    """`[C]` of the training images, as shares of 255."""
    held_out_images: Array | None
    """uint8 `[M, H, W, C]`."""


def over_runs(function: Callable, by: RunsBy, count: int) -> Callable:
    """`function` of one run, over the first axis of its first argument; the others are shared."""

    def several(runs: Any, *shared: Any) -> Any:
        if count == 1:  # a batched convolution of one is slower than a plain one
            only = function(jax.tree.map(lambda leaf: leaf[0], runs), *shared)
            return jax.tree.map(lambda leaf: leaf[None], only)
        if by == "map":
            return jax.lax.map(lambda run: function(run, *shared), runs)
        return jax.vmap(function, in_axes=(0, *[None] * len(shared)))(runs, *shared)

    return several


def init_state(
    model: Classifier,
    optimizer: optax.GradientTransformation,
    objective: Any,
    runs: Mapping[str, Any],
    *,
    average: bool,
    mesh: Mesh,
) -> ClassifierState:
    """The state before the first step of runs `{"seed" [R], "objective", "given", "start"}`.

    `start` is `(params, statistics)` to go on from, or None for new ones of the seeds.
    """

    def one(run: Mapping[str, Any]) -> RunState:
        if run["start"] is None:
            params, statistics = model.init(jax.random.key(run["seed"]))
        else:
            params, statistics = run["start"]
        has_state = hasattr(objective, "initial")
        extras = run["objective"].initial(run["given"]) if has_state else ()
        mean = (jnp.zeros((), jnp.int32), params, statistics) if average else ()
        return RunState(params, statistics, optimizer.init(params), extras, mean)

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def init(runs):
        # Copies: what is donated must not be what it starts from, nor one array twice.
        state = ClassifierState(jax.lax.map(one, runs), jnp.zeros((), jnp.int32))
        return jax.tree.map(jnp.copy, state)

    return init(dict(runs))


def make_chunk(
    model: Classifier,
    teachers: Sequence[Classifier],
    optimizer: optax.GradientTransformation,
    objective: Any,
    augmentation: Augmentation,
    *,
    num_classes: int,
    attributes: np.ndarray | None = None,
    count: int,
    by: RunsBy,
    order_seed: int,
    average: bool,
    mesh: Mesh,
    eval_batch_size: int,
) -> Callable[..., tuple[ClassifierState, dict[str, jax.Array]]]:
    """The compiled `(state, own, shared, indices [S, B]) -> (state, metrics {name: [S, R, 2]})`: S steps.

    Row s of `indices` are the training images of a step. Augmentation is a function of
    `(order_seed, step)` alone. Where a run's loss or gradient is not finite nothing of it changes, see
    `regjax.stages.apply_gradients`. With `attributes [C, K]` the labels are those of an image's class. An
    objective with `adjust` is given the model's outputs on the held-out images every `adjust_every` steps.
    `state` is donated.
    """
    has_state = hasattr(objective, "initial")
    adjusts = has_state and objective.adjust_every > 0
    rows = jax.sharding.NamedSharding(mesh, P(("data", "fsdp")))

    def one_step(run: tuple[RunState, Own], images, index, mixing):
        state, own = run
        labels = own.labels[index]
        batch = {"labels": labels, "index": index}
        if attributes is None:
            targets = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
            if augmentation.mixup:
                _, targets = mixup(mixing, images, targets, augmentation.mixup)
            batch["targets"] = targets
        else:
            batch["labels"] = jnp.asarray(attributes)[labels]
        if teachers:
            found = [
                teacher.apply(*weights, images, training=False)[0].logits
                for teacher, weights in zip(teachers, own.teachers, strict=True)
            ]
            batch["teacher_logits"] = jax.lax.stop_gradient(jnp.stack(found))
        elif own.teacher_logits is not None:
            batch["teacher_logits"] = own.teacher_logits[:, index]

        def loss_sum(params):
            outputs, statistics = model.apply(params, state.statistics, images, training=True)
            extras = (state.extras,) if has_state else ()
            sums = own.objective(outputs, batch, own.given, *extras)
            return sums["loss"][0], (sums, statistics)

        grads, (sums, statistics) = jax.grad(loss_sum, has_aux=True)(state.params)
        params, optimizer_state, metrics = apply_gradients(
            optimizer, state.params, state.optimizer, grads, sums
        )
        bad = metrics["bad"][0] > 0
        statistics = jax.tree.map(
            lambda new, old: jnp.where(bad, old, new), statistics, state.statistics
        )
        state = state._replace(params=params, statistics=statistics, optimizer=optimizer_state)
        return state, metrics

    def adjust(run: tuple[RunState, Own], images, mean, std):
        state, own = run
        outputs = _outputs(
            model, state.params, state.statistics, images, mean, std, eval_batch_size
        )
        extras = own.objective.adjust(state.extras, outputs, own.held_out, own.given)
        if not average:
            return state._replace(extras=extras)
        count, *means = state.average
        now = [state.params, state.statistics]
        means = jax.tree.map(lambda mean, now: mean + (now - mean) / (count + 1), means, now)
        return state._replace(extras=extras, average=(count + 1, *means))

    run_steps, run_adjust = over_runs(one_step, by, count), over_runs(adjust, by, count)

    def chunk(state: ClassifierState, own: Own, shared: Shared, indices):
        def step(state: ClassifierState, index):
            key = jax.random.fold_in(jax.random.key(order_seed), state.step)
            index = jax.lax.with_sharding_constraint(index, rows)
            images = augment(key, shared.images[index], augmentation, shared.mean, shared.std)
            mixing = jax.random.fold_in(key, 1)
            if augmentation.mixup:
                images, _ = mixup(mixing, images, jnp.zeros((len(index), 1)), augmentation.mixup)
            runs, metrics = run_steps((state.runs, own), images, index, mixing)
            state = ClassifierState(runs, state.step + 1)
            if adjusts:
                runs = jax.lax.cond(
                    state.step % objective.adjust_every == 0,
                    lambda runs: run_adjust(
                        (runs, own), shared.held_out_images, shared.mean, shared.std
                    ),
                    lambda runs: runs,
                    state.runs,
                )
                state = state._replace(runs=runs)
            return state, metrics

        with known_inside(mesh):
            return jax.lax.scan(step, state, indices)

    return jax.jit(chunk, donate_argnums=0, out_shardings=replicated(mesh))


@functools.lru_cache(maxsize=16)
def make_logits(
    model: Classifier, *, count: int, by: RunsBy, mesh: Mesh, eval_batch_size: int
) -> Callable[..., jax.Array]:
    """The compiled `(params, statistics, images, mean, std) -> logits [R, N, K]` of the runs."""

    def one(run, images, mean, std):
        params, statistics = run
        return _outputs(model, params, statistics, images, mean, std, eval_batch_size).logits

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def logits(params, statistics, images, mean, std):
        with known_inside(mesh):
            return over_runs(one, by, count)((params, statistics), images, mean, std)

    return logits


def _outputs(model: Classifier, params, statistics, images, mean, std, size: int) -> Outputs:
    """The model's outputs `[N, ...]`, `size` images at once."""
    total = len(images)
    size = min(size, total)
    blocks = -(-total // size)
    # The last rows are repeated to fill the last block, and cut off.
    index = np.minimum(np.arange(blocks * size), total - 1).reshape(blocks, size)

    def block(index):
        batch = standardise(images[index], mean, std)
        return model.apply(params, statistics, batch, training=False)[0]

    found = jax.lax.map(block, jnp.asarray(index))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:total], found)
