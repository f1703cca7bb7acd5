"""Checkpoints: the training state and the position in the data, whole or absent, on orbax."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from regjax import paths
from regjax.errors import InputError

if TYPE_CHECKING:
    from orbax.checkpoint import CheckpointManager

PARAMETERS = "params.safetensors"


def open_manager(
    folder: Path, *, select: str = "", largest: bool = False, keep: int = 2
) -> CheckpointManager:
    """A manager that keeps the `keep` newest checkpoints, and the best by the metric `select`.

    The best is the lowest, or the highest where `largest`; what is NaN or was not evaluated is never
    best. Saving is asynchronous: the arrays are copied off the devices and written in the background.
    """
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers as policies

    def loss(metrics: Mapping[str, float]) -> float:
        value = metrics.get(select, math.nan)
        if math.isnan(value):
            return math.inf
        return -value if largest else value

    kept: list[Any] = [policies.LatestN(keep)]
    if select:
        kept.append(
            policies.BestN(
                get_metric_fn=loss,
                reverse=True,
                n=1,
                keep_checkpoints_without_metrics=False,
            )
        )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept),
        save_decision_policy=policies.AnySavePolicy([policies.FixedIntervalPolicy(1)]),
        best_fn=loss if select else None,
        best_mode="min",
        enable_async_checkpointing=True,
    )
    return ocp.CheckpointManager(folder.resolve(), options=options)


def save(
    manager: CheckpointManager,
    step: int,
    state: Any,
    data: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Saves `state` (a tree of arrays) and `data` (JSON) as the checkpoint of `step`."""
    import orbax.checkpoint as ocp

    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(dict(data))
        ),
        metrics=dict(metrics or {}),
        force=True,
    )


def restore(
    manager: CheckpointManager, target: Any, step: int | None = None
) -> tuple[Any, dict[str, Any]]:
    """`(state, data)` of `step` (the newest where None), laid out as `target`.

    `target` is a tree of arrays or `jax.ShapeDtypeStruct`s with shardings. The arrays that come back
    can be donated.

    Raises:
      InputError: if the checkpoint's tree is not the target's, or its files are damaged.
    """
    import orbax.checkpoint as ocp

    step = manager.latest_step() if step is None else step
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), target
    )
    try:
        _check_tree(Path(str(manager.directory)) / str(step) / "state", abstract)
        restored = manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
            ),
        )
    except Exception as error:  # orbax and tensorstore raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(
            f"the checkpoint of step {step} in {manager.directory} cannot be read: it belongs to "
            f"another model, optimizer or set of trained parameters, or it is damaged ({reason}). "
            "Go back to the config that wrote it, give another --workdir, or delete the folder "
            f"{step} to go on from the checkpoint before it."
        ) from error
    # Restored arrays may not be donatable; the copy that a compiled identity makes always is.
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)
    return copy(restored["state"]), restored["data"]


def _check_tree(folder: Path, target: Any) -> None:
    """Raises `ValueError` where the arrays that were saved are not the target's, before any is read.

    A read that fails half-way would leave the reads of the other arrays behind.
    """
    import orbax.checkpoint as ocp

    saved = _arrays(ocp.StandardCheckpointHandler().metadata(folder).tree)
    asked = _arrays(target)
    for name in sorted(saved.keys() | asked.keys()):
        before, now = saved.get(name, "not there"), asked.get(name, "not there")
        if before != now:
            raise ValueError(f"{name} is {before} in the checkpoint, {now} in the run")


def _arrays(tree: Any) -> dict[str, str]:
    """Type and shape of every array by its path, in which an attribute is a key like any other."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype} {list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@jax.jit
def checksum(params: Mapping[str, jax.Array]) -> jax.Array:
    """A uint32 of every bit of `{path: array}`, the same however the arrays are laid out on devices."""
    total = jnp.zeros((), jnp.uint32)
    for index, path in enumerate(sorted(params)):
        array = params[path]
        words = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
        words = words.astype(jnp.uint32) * (_indices(array.shape) * 2 + 1)
        total = total * 31 + words.sum(dtype=jnp.uint32) + index
    return total


def _indices(shape: tuple[int, ...]) -> jax.Array:
    """Row-major indices modulo 2**32; of the array's shape, so that one dealt out stays so."""
    found, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        step = jnp.uint32(stride % 2**32)
        found += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * step
        stride *= shape[axis]
    return found


def save_params(folder: Path, params: Mapping[str, jax.Array]) -> None:
    """Writes `{path: array}` as `params.safetensors`, whole or not at all."""
    from safetensors.flax import save_file

    temporary = folder / f"{PARAMETERS}.tmp"
    save_file(dict(params), str(temporary))
    temporary.replace(folder / PARAMETERS)


def load_params(workdir: str | Path, stage: str) -> dict[str, Any]:
    """The parameters that a finished stage of `train(..., model=(apply, params))` ended with.

    They are the nested dict that `train` was given, frozen ones included, of the selected step. A
    stage whose model came from the experiment has a model folder instead: `models.load`.

    Raises:
      InputError: if the stage has not finished, or has a model folder.
    """
    from safetensors.flax import load_file

    folder = Path(workdir) / stage
    if (folder / PARAMETERS).is_file():
        return paths.unflatten(load_file(str(folder / PARAMETERS)))
    if (folder / "model").is_dir():
        raise InputError(
            f"{folder} has a model folder: regjax.models.load({str(folder / 'model')!r})"
        )
    raise InputError(f"{folder} holds no {PARAMETERS}: no stage that has finished")
