"""Stages: what is trained, from where, with which objective and for how long; and one stage's update."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
import tyro
from jax.sharding import Mesh, NamedSharding

from regjax import paths
from regjax.data import Data, Task
from regjax.errors import InputError
from regjax.evaluation import READ_OUTS
from regjax.models import Apply
from regjax.models.lora import LORA, Lora
from regjax.models.prompt import SOFT_PROMPT, SoftPrompt
from regjax.optim import Optimizer
from regjax.sharding import follow, known_inside, replicated
from regjax.token_grid import TokenGrid

DEVICES = "devices"
"""Axis of `jax.pmap`."""

PREVIOUS, INITIAL = "previous", "initial"
EVERYTHING = (".*",)
DECISIONS = ("mean", "median", "mode")


# Any, and made by a function: tyro would look for records in memory among the types of a union.
NotOnCommandLine: TypeAlias = Annotated[
    Any, tyro.conf.Fixed, tyro.conf.Suppress, tyro.conf.arg(constructor=str)
]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a method. Fields that are None take the experiment's."""

    name: str
    """Name of the stage and of its folder in the workdir."""

    objective: Any
    """What is minimised, see `regjax.objectives`."""

    trainable: tuple[str, ...] = EVERYTHING
    """Regular expressions of the parameter paths that are trained; all others stay bit-identical. With
    `lora` the default is the adapters, and the soft prompts if there are any."""

    start: str = PREVIOUS
    """Parameters it starts from: `previous` stage, `initial` model, or the name of an earlier stage."""

    steps: int | None = None
    """Number of updates."""

    optimizer: Optimizer | None = None
    """Update rule."""

    eval_every: int | None = None
    """Steps between evaluations on the validation data; 0: only at its end."""

    data: NotOnCommandLine = None
    """Training, validation and test `Data`; set in the config, not on the command line."""

    decisions: tuple[str, ...] = DECISIONS
    """Read-outs reported for the trained model: `mean`, `normalized_mean`, `median`, `mode`; the first is
    the one `predict` uses. None of them, or no grid: no scores are evaluated."""

    select: str = ""
    """Validation figure whose best checkpoint is the result, e.g. `mean/rmse` or, of a probe,
    `main/accuracy`; empty: the last checkpoint."""

    tasks: NotOnCommandLine = ()
    """`Task`s it is trained on, mixed; none: the experiment's own, whose name is `main`."""

    shots: int | None = None
    """Worked examples before every record; None: as its tasks say."""

    soft_prompt: NotOnCommandLine = None
    """`SoftPrompt` before every record, one for each task, at the parameter path `soft_prompt/TASK`; made
    where the parameters that the stage starts from have none. None: those that they have are taken off."""

    probes: NotOnCommandLine = ()
    """What else is measured on held-out data, see `regjax.probes`."""

    lora: Lora | None = None
    """Low-rank adapters beside the kernels that it names, at the parameter paths `lora/...`; made where the
    parameters that the stage starts from have none. Those of another `Lora` than the stage's, or of one
    where it has None, are merged into the kernels first: what was learnt stays."""


@dataclasses.dataclass(frozen=True)
class ResolvedStage(Stage):
    """A stage whose steps, optimizer, evaluations and data are decided."""

    steps: int = 0
    eval_every: int = 0
    optimizer: Optimizer = Optimizer()
    data: Any = Data()
    """Of several tasks the shape of the rows: the first one's, of the longest `max_length`."""


def trainable_of(stage: Stage) -> tuple[str, ...]:
    """`stage.trainable`, or what that is by default with adapters.

    >>> trainable_of(Stage("adapters", None, lora=Lora()))
    ('^lora/',)
    """
    if stage.lora is None or stage.trainable != EVERYTHING:
        return stage.trainable
    return (f"^{LORA}/", f"^{SOFT_PROMPT}/") if stage.soft_prompt else (f"^{LORA}/",)


class TrainState(NamedTuple):
    """All that a checkpoint holds: trained parameters by path, optimizer state, number of steps done."""

    params: dict[str, jax.Array]
    optimizer: Any
    step: jax.Array


def check_stages(stages: Sequence[Stage]) -> None:
    """Raises `InputError` for an empty list, names that clash or cannot be folders, unknown starts."""
    if not stages:
        raise InputError("the experiment has no stages")
    seen: list[str] = []
    for stage in stages:
        if not stage.name or stage.name in (PREVIOUS, INITIAL) or not is_folder_name(stage.name):
            raise InputError(
                f"stage name {stage.name!r}: use letters, digits, '-' and '_' only, and neither "
                f"{PREVIOUS!r} nor {INITIAL!r}"
            )
        if stage.name in seen:
            raise InputError(f"two stages are named {stage.name!r}")
        if stage.start not in (PREVIOUS, INITIAL, *seen):
            known = ", ".join((PREVIOUS, INITIAL, *seen))
            raise InputError(f"stage {stage.name!r} starts from {stage.start!r}; known: {known}")
        for field in ("trainable", "decisions", "tasks", "probes"):
            if isinstance(getattr(stage, field), str):
                raise InputError(
                    f"stage {stage.name!r}: {field} is the string {getattr(stage, field)!r}; "
                    "expected a tuple"
                )
        if not stage.trainable:
            raise InputError(f"stage {stage.name!r}: trainable is empty; name what is trained")
        if not callable(stage.objective):
            raise InputError(f"stage {stage.name!r}: its objective is not callable")
        _check_tasks(stage)
        unknown = [name for name in stage.decisions if name not in READ_OUTS]
        if unknown:
            raise InputError(
                f"stage {stage.name!r}: unknown read-out {unknown[0]!r}; known: "
                f"{', '.join(READ_OUTS)}"
            )
        seen.append(stage.name)


def _check_tasks(stage: Stage) -> None:
    place = f"stage {stage.name!r}"
    if not all(isinstance(task, Task) for task in stage.tasks):
        raise InputError(
            f"{place}: tasks are {stage.tasks!r}; expected a tuple of regjax.data.Task"
        )
    names = [task.name for task in stage.tasks]
    if len(set(names)) < len(names):
        raise InputError(f"{place}: two of its tasks have one name: {', '.join(names)}")
    if stage.tasks and stage.data is not None:
        raise InputError(f"{place}: has tasks and data; the data stand in the tasks")
    if not isinstance(stage.soft_prompt, SoftPrompt | None):
        raise InputError(f"{place}: soft_prompt is {stage.soft_prompt!r}; expected a SoftPrompt")
    if not isinstance(stage.lora, Lora | None):
        raise InputError(f"{place}: lora is {stage.lora!r}; expected a Lora")
    probes = [probe.name for probe in stage.probes]
    if len(set(probes)) < len(probes):
        raise InputError(f"{place}: two of its probes have one name: {', '.join(probes)}")


def is_folder_name(name: str) -> bool:
    return all(character.isalnum() or character in "-_" for character in name)


def init_state(
    params: Mapping[str, jax.Array], optimizer: optax.GradientTransformation, sharding: Sharding
) -> TrainState:
    """The state before the first step; the parameters are copied, so donating it leaves `params` alone.

    The optimizer's moments are float32 whatever the type of the parameters.
    """
    return jax.jit(_initial(optimizer), out_shardings=sharding)(dict(params))


def abstract_state(
    params: Mapping[str, Any], optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The shapes of `init_state`'s result and where they live; computes nothing.

    `params` are arrays or `jax.ShapeDtypeStruct`s with a sharding each on `mesh`. What the optimizer
    keeps of a parameter lives where the parameter does, see `regjax.sharding.follow`.
    """
    shapes = jax.eval_shape(_initial(optimizer), dict(params))

    def placed(keys: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        path = next(
            (key.key for key in reversed(keys) if getattr(key, "key", None) in params), None
        )
        where = (
            replicated(mesh) if path is None else follow(leaf, params[path], params[path].sharding)
        )
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map_with_path(placed, shapes)


def sharding_of(state: TrainState) -> TrainState:
    """The `NamedSharding` of every array of a state, or of an abstract one."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def _initial(optimizer: optax.GradientTransformation) -> Callable[[Any], TrainState]:
    def init(params):
        # `astype` makes weak types strong: what the step returns is strong, and would be compiled anew.
        params = jax.tree.map(lambda leaf: jnp.copy(leaf).astype(leaf.dtype), params)
        return TrainState(params, optimizer.init(_float32(params)), jnp.zeros((), jnp.int32))

    return init


def _float32(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


Sharding: TypeAlias = NamedSharding | TrainState
"""Of a state: one for all of it, or one for each array."""

Parallelism: TypeAlias = Literal["jit", "pmap"]

Update = Callable[[TrainState, Mapping[str, jax.Array], Mapping[str, jax.Array]], Any]


def make_update(
    model: Apply,
    objective: Callable,
    optimizer: optax.GradientTransformation,
    codec: TokenGrid | None,
    *,
    seed: int,
    sharding: Sharding,
    parallelism: Parallelism = "jit",
) -> Update:
    """The compiled step `(state, frozen, batch) -> (state, metrics)`.

    The leaves of `batch` are `[A, B / A, ...]`: A micro-batches, whose sums, weights and gradients are
    added in float32 and divided by the summed weight once, so that A does not change the update. What is
    random in a step is a function of `(seed, step)`. Where the loss, its weight or a gradient is not
    finite nothing but the step counter changes and `metrics["bad"]` is 1: the optimizer's schedule
    counts the steps that were applied. A batch whose weights are all 0 has a gradient of 0.

    `metrics` are `[2]`, sum and weight, of every entry of the objective, of `gradient_norm` (before
    clipping) and of `bad`. `state` is donated, `frozen` is not.

    The state stays where `sharding` says: one for all of it, or one for each array (`sharding_of`). The
    objective sees arrays of the whole batch, and finds their mesh by `regjax.sharding.current_mesh()`.

    With `parallelism="pmap"` the state is replicated and `jax.pmap` runs the same update on every
    device, whose objective sees the device's rows alone; sums, weights and gradients are added over the
    devices before anything is divided, so that both give the same numbers.
    """
    mesh = jax.tree.leaves(sharding)[0].mesh

    def loss_sum(params, frozen, batch, key):
        sums = objective(model, paths.unflatten({**frozen, **params}), batch, key, codec)
        return sums["loss"][0], sums

    def gradients(params, frozen, batch, key):
        (_, sums), grads = jax.value_and_grad(loss_sum, has_aux=True)(params, frozen, batch, key)
        return _float32(grads), sums

    def accumulate(params, frozen, batch, key):
        count = jax.tree.leaves(batch)[0].shape[0]
        first = jax.tree.map(lambda x: x[0], batch)
        if count == 1:
            return gradients(params, frozen, first, jax.random.fold_in(key, 0))

        def add(total, micro):
            index, batch = micro
            new = gradients(params, frozen, batch, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, new), None

        shapes = jax.eval_shape(gradients, params, frozen, first, key)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, (jnp.arange(count), batch))
        return total

    def update(state: TrainState, frozen, batch, axis: str | None = None):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if axis is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        grads, sums = accumulate(state.params, frozen, batch, key)
        if axis is not None:
            grads, sums = jax.lax.psum((grads, sums), axis)
        params, optimizer_state, metrics = apply_gradients(
            optimizer, state.params, state.optimizer, grads, sums
        )
        return TrainState(params, optimizer_state, state.step + 1), metrics

    if parallelism == "pmap":
        return _replicated(update, mesh)

    def on_mesh(state: TrainState, frozen, batch):
        with known_inside(mesh):
            return update(state, frozen, batch)

    everywhere = replicated(mesh)
    return jax.jit(on_mesh, donate_argnums=0, out_shardings=(sharding, everywhere))


def apply_gradients(
    optimizer: optax.GradientTransformation,
    params: dict[str, jax.Array],
    optimizer_state: Any,
    grads: Mapping[str, jax.Array],
    sums: Mapping[str, tuple[jax.Array, jax.Array]],
    *,
    branch: bool = False,
) -> tuple[dict[str, jax.Array], Any, dict[str, jax.Array]]:
    """`(params, optimizer_state, metrics)` after an update by gradients of a summed loss, float32.

    The gradients are divided by the loss's weight. Where the loss, its weight or a gradient is not finite
    nothing changes and `metrics["bad"]` is 1. `metrics` are `[2]`, sum and weight, of every entry of
    `sums`, of `gradient_norm` (before clipping) and of `bad`. With `branch` a step that is not finite is
    another branch of the program rather than a selection from two results: fewer passes over the
    parameters, and sums that are rounded otherwise.
    """
    total, weight = sums["loss"]
    scale = jnp.where(weight > 0, 1 / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny), 0)
    grads = jax.tree.map(lambda g: g * scale, grads)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(total) & jnp.isfinite(weight) & jnp.isfinite(norm)
    old = params, optimizer_state

    def updated():
        updates, new_state = optimizer.update(grads, optimizer_state, _float32(params))
        return optax.apply_updates(params, updates), new_state

    if branch:
        params, optimizer_state = jax.lax.cond(finite, updated, lambda: old)
    else:
        params, optimizer_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), updated(), old
        )
    metrics = {
        **sums,
        "gradient_norm": (norm, jnp.float32(1)),
        "bad": (1 - finite.astype(jnp.float32), jnp.float32(1)),
    }
    return params, optimizer_state, {name: jnp.stack(pair) for name, pair in metrics.items()}


def _replicated(update: Callable, mesh: Mesh) -> Update:
    """`update` under `jax.pmap`, its batch `[A, B / A, ...]` split among the devices."""
    count = mesh.devices.size
    on_devices = jax.pmap(
        functools.partial(update, axis=DEVICES),
        axis_name=DEVICES,
        in_axes=(None, None, 1),
        out_axes=None,
        donate_argnums=0,
        devices=list(mesh.devices.flat),
    )

    @jax.jit
    def split(batch):
        return {
            name: array.reshape(array.shape[0], count, -1, *array.shape[2:])
            for name, array in batch.items()
        }

    def on_batch(state: TrainState, frozen, batch):
        return on_devices(state, frozen, split(dict(batch)))

    return on_batch
