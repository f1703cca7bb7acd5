"""The compiled part: chunks of training steps of several runs, and the logits of a split.

Arrays that differ between runs have an axis of R runs in front. Images, batches and augmentation are
shared, so that they are held and made once. At least as many runs as devices are dealt out over them, and
nothing is exchanged; of fewer, every device computes its rows of each batch.
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

from regjax import compilation
from regjax.data.images import Augmentation, augment, mixup, standardise
from regjax.models.vision import Classifier, Outputs
from regjax.sharding import AXES, by_row, known_inside, replicated
from regjax.stages import apply_gradients

RunsBy = Literal["vmap", "map"]
BLOCK = 32
"""Steps whose batches are made before the runs take turns: as few as keep them in the cache, as many as a
run needs to be worth its turn."""

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


def over_runs(function: Callable, by: RunsBy) -> Callable:
    """`function` of one run, over the first axis of its first argument; the others are shared."""

    def several(runs: Any, *shared: Any) -> Any:
        # A batched convolution of one is slower than a plain one.
        if _length(runs) == 1:
            only = function(jax.tree.map(lambda leaf: leaf[0], runs), *shared)
            return jax.tree.map(lambda leaf: leaf[None], only)
        if by == "map":
            return jax.lax.map(lambda run: function(run, *shared), runs)
        return jax.vmap(function, in_axes=(0, *[None] * len(shared)))(runs, *shared)

    return several


def in_turns(function: Callable) -> Callable:
    """As `over_runs(function, "map")` for `function((state, own), *shared) -> (state, rest)`, but that the
    states are changed where they lie and not copied."""

    def several(runs: tuple[Any, Any], *shared: Any) -> Any:
        def turn(states, given):
            number, own = given
            state = jax.tree.map(lambda leaf: leaf[number], states)
            state, rest = function((state, own), *shared)
            return jax.tree.map(lambda every, new: every.at[number].set(new), states, state), rest

        states, own = runs
        return jax.lax.scan(turn, states, (jnp.arange(_length(states)), own))

    return several


def _length(runs: Any) -> int:
    return len(jax.tree.leaves(runs)[0])


def are_dealt_out(count: int, mesh: Mesh) -> bool:
    """Whether each of `count` runs is one device's."""
    return 1 < mesh.size <= count


def dealt_out(function: Callable, count: int, mesh: Mesh) -> Callable:
    """`function(runs, *shared)` with the runs dealt out over the devices, if there are enough of them.

    Arguments and results are whole on every device. Where the runs do not divide among the devices, the
    last one is computed as often as there are places left.
    """
    if not are_dealt_out(count, mesh):
        return function
    places = np.minimum(np.arange(-(-count // mesh.size) * mesh.size), count - 1)
    here = jax.shard_map(
        lambda runs, shared: function(runs, *shared),
        mesh=mesh, in_specs=(P(AXES), P()), out_specs=P(AXES), check_vma=False,
    )  # fmt: skip

    def dealt(runs: Any, *shared: Any) -> Any:
        if len(places) > count:
            runs = jax.tree.map(lambda leaf: leaf[places], runs)
        return jax.tree.map(lambda leaf: leaf[:count], here(runs, shared))

    return dealt


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
            optimizer, state.params, state.optimizer, grads, sums, branch=True
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

    def make_batch(index, step, shared: Shared):
        key = jax.random.fold_in(jax.random.key(order_seed), step)
        images = augment(key, shared.images[index], augmentation, shared.mean, shared.std)
        mixing = jax.random.fold_in(key, 1)
        if augmentation.mixup:
            images, _ = mixup(mixing, images, jnp.zeros((len(index), 1)), augmentation.mixup)
        return images, index, mixing

    def block_of_one(run: tuple[RunState, Own], batches, step, steps, shared: Shared):
        """`(state, metrics {name: [K, 2]})` after the first `steps` of K batches."""
        _, own = run

        def at(number):
            return jax.tree.map(lambda leaf: leaf[number], batches)

        def one(number, carry):
            state, found = carry
            state, metrics = one_step((state, own), *at(number))
            found = jax.tree.map(lambda every, new: every.at[number].set(new), found, metrics)
            if adjusts:
                state = jax.lax.cond(
                    (step + number + 1) % objective.adjust_every == 0,
                    lambda state: adjust(
                        (state, own), shared.held_out_images, shared.mean, shared.std
                    ),
                    lambda state: state,
                    state,
                )
            return state, found

        _, metrics = jax.eval_shape(one_step, run, *at(0))
        size = len(batches[0])
        found = jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape), leaf.dtype), metrics)
        return jax.lax.fori_loop(0, steps, one, (run[0], found))

    rows = by_row(mesh, axis=1)

    def steps_of(runs: tuple[RunState, Own], step, shared: Shared, indices):
        """`(states, metrics {name: [R, S, 2]})`."""
        states, own = runs
        several = in_turns(block_of_one) if by == "map" else over_runs(block_of_one, by)
        total, batch_size = indices.shape
        # Elsewhere a step of all runs is one set of kernels, however the loops are nested.
        size = min(BLOCK, total) if by == "map" else 1
        blocks = -(-total // size)
        indices = jnp.pad(indices, ((0, blocks * size - total), (0, 0)))

        def block(states, given):
            index, number = given
            if not are_dealt_out(count, mesh):
                index = jax.lax.with_sharding_constraint(index, rows)
            first = step + number * size
            batches = jax.lax.map(
                lambda one: make_batch(one[0], one[1], shared), (index, first + jnp.arange(size))
            )
            left = size if total % size == 0 else jnp.minimum(size, total - number * size)
            return several((states, own), batches, first, left, shared)

        given = indices.reshape(blocks, size, batch_size), jnp.arange(blocks)
        states, metrics = jax.lax.scan(block, states, given)  # [blocks, R, size, 2]
        metrics = jax.tree.map(
            lambda leaf: leaf.swapaxes(0, 1).reshape(leaf.shape[1], -1, *leaf.shape[3:])[:, :total],
            metrics,
        )
        return states, metrics

    def chunk(state: ClassifierState, own: Own, shared: Shared, indices):
        with known_inside(mesh):
            several = dealt_out(steps_of, count, mesh)
            runs, metrics = several((state.runs, own), state.step, shared, indices)
        metrics = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), metrics)
        return ClassifierState(runs, state.step + len(indices)), metrics

    return jax.jit(
        chunk, donate_argnums=0, out_shardings=replicated(mesh),
        compiler_options=compilation.options(mesh),
    )  # fmt: skip


@functools.lru_cache(maxsize=16)
def make_logits(
    model: Classifier, *, count: int, by: RunsBy, mesh: Mesh, eval_batch_size: int
) -> Callable[..., jax.Array]:
    """The compiled `(params, statistics, images, mean, std) -> logits [R, N, K]` of the runs."""

    def one(run, images, mean, std):
        params, statistics = run
        return _outputs(model, params, statistics, images, mean, std, eval_batch_size).logits

    @functools.partial(
        jax.jit, out_shardings=replicated(mesh), compiler_options=compilation.options(mesh)
    )
    def logits(params, statistics, images, mean, std):
        with known_inside(mesh):
            several = dealt_out(over_runs(one, by), count, mesh)
            return several((params, statistics), images, mean, std)

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
