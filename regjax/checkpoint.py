"""Checkpoints: the training state and the position in the data, whole or absent, on orbax."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from regjax.errors import InputError

if TYPE_CHECKING:
    from orbax.checkpoint import CheckpointManager


def open_manager(folder: Path, *, select: str = "", keep: int = 2) -> CheckpointManager:
    """A manager that keeps the `keep` newest checkpoints, and the one whose metric `select` is lowest.

    Saving is asynchronous: the arrays are copied off the devices and written in the background.
    """
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers as policies

    kept: list[Any] = [policies.LatestN(keep)]
    if select:
        kept.append(
            policies.BestN(
                get_metric_fn=lambda metrics: metrics[select],
                reverse=True,
                n=1,
                keep_checkpoints_without_metrics=False,
            )
        )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept),
        save_decision_policy=policies.AnySavePolicy([policies.FixedIntervalPolicy(1)]),
        best_fn=(lambda metrics: metrics[select]) if select else None,
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
        metrics=dict(metrics) if metrics else None,
        force=True,
    )


def restore(
    manager: CheckpointManager, target: Any, step: int | None = None
) -> tuple[Any, dict[str, Any]]:
    """`(state, data)` of `step` (the newest where None), laid out as `target`.

    `target` is a tree of arrays or `jax.ShapeDtypeStruct`s with shardings. The arrays that come back
    can be donated.

    Raises:
      InputError: if the checkpoint's tree is not the target's.
    """
    import orbax.checkpoint as ocp

    step = manager.latest_step() if step is None else step
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), target
    )
    try:
        restored = manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
            ),
        )
    except (ValueError, KeyError) as error:
        raise InputError(
            f"the checkpoint of step {step} in {manager.directory} is not one of this run (another "
            f"model, optimizer or set of trained parameters?): {str(error).splitlines()[0]}. "
            "Train into another --workdir, or go back to the config that wrote it."
        ) from error
    # Restored arrays may not be donatable; the copy that a compiled identity makes always is.
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)
    return copy(restored["state"]), restored["data"]
