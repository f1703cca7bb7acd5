"""Checkpoints: the training state and the position in the data, whole or absent, on orbax.

What orbax writes has no checksum of its own for the values of arrays, so each checkpoint holds one of
every bit of its state, and a digest of what else it holds.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from regjax import paths
from regjax.errors import InputError
from regjax.files import write_text

if TYPE_CHECKING:
    from orbax.checkpoint import CheckpointManager

PARAMETERS = "params.safetensors"
STATE, DATA, METRICS = "state", "data", "metrics"
DAMAGED = ".damaged"


@contextlib.contextmanager
def open_manager(
    folder: Path,
    *,
    select: str = "",
    largest: bool = False,
    keep_latest: int = 2,
    keep_best: int = 1,
    keep_every: int = 0,
) -> Iterator[CheckpointManager]:
    """A manager that keeps the `keep_latest` newest checkpoints, and the `keep_best` by `select`.

    The best are the lowest by that metric, or the highest where `largest`; what is NaN or was not
    evaluated is never best. Checkpoints of steps that `keep_every` divides are kept for good; 0: none.
    Saving is asynchronous: the arrays are copied off the devices and written in the background, and
    leaving the block waits for that.

    Raises:
      OSError: on leaving, if what was saved last could not be written.
    """
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers as policies

    def loss(metrics: Mapping[str, float]) -> float:
        value = metrics.get(select, math.nan)
        if math.isnan(value):
            return math.inf
        return -value if largest else value

    kept: list[Any] = [policies.LatestN(keep_latest)]
    if select:
        kept.append(
            policies.BestN(
                get_metric_fn=loss,
                reverse=True,
                n=keep_best,
                keep_checkpoints_without_metrics=False,
            )
        )
    if keep_every:
        kept.append(policies.EveryNSteps(keep_every))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept),
        save_decision_policy=policies.AnySavePolicy([policies.FixedIntervalPolicy(1)]),
        best_fn=loss if select else None,
        best_mode="min",
        enable_async_checkpointing=True,
    )
    folder = folder.resolve()
    with _errors_told_once():
        if select and jax.process_index() == 0:
            _mend_metrics(folder)
        _wait_for_all("regjax_metrics")
        manager = ocp.CheckpointManager(folder, options=options)
        try:
            yield manager
            wait(manager)
        finally:
            # An error of its own has been raised by now, or another one is more important.
            with contextlib.suppress(Exception):
                manager.close()


@contextlib.contextmanager
def _errors_told_once() -> Iterator[None]:
    """Keeps orbax from printing tracebacks of what it raises as well."""

    def elsewhere(record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    logger = logging.getLogger("absl")
    logger.addFilter(elsewhere)
    try:
        yield
    finally:
        logger.removeFilter(elsewhere)


def save(
    manager: CheckpointManager,
    step: int,
    state: Any,
    data: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Saves `state` (a tree of arrays) and `data` (JSON) as the checkpoint of `step`.

    Raises:
      OSError: if this checkpoint, or the one before it, cannot be written.
    """
    import orbax.checkpoint as ocp

    wait(manager)
    values = {
        "data": dict(data),
        "metrics": dict(metrics or {}),
        "checksum": int(checksum(state)),
    }
    with _writing(manager, step):
        manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave({**values, "digest": _digest(values)}),
            ),
            metrics=dict(metrics or {}),
            force=True,
        )


def wait(manager: CheckpointManager) -> None:
    """Returns when what was saved last is written.

    Raises:
      OSError: if it could not be.
    """
    with _writing(manager, manager.latest_step()):
        manager.wait_until_finished()


@contextlib.contextmanager
def _writing(manager: CheckpointManager, step: int | None) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # tensorstore's errors are ValueErrors
        code = getattr(error, "errno", None)
        told = re.search(r"os_error_code='(\d+)'", str(error))
        code = int(told[1]) if told else code
        if code is None:
            raise
        room = code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise OSError(
            code,
            f"the checkpoint of step {step} could not be written: {os.strerror(code)}. The "
            f"checkpoints before it are intact: {'make room' if room else 'see to it'}, then give the "
            "same command again",
            str(manager.directory),
        ) from error


def restore(
    manager: CheckpointManager, target: Any, step: int | None = None
) -> tuple[Any, dict[str, Any]]:
    """`(state, data)` of `step`, or of the newest checkpoint that is whole, laid out as `target`.

    `target` is a tree of arrays or `jax.ShapeDtypeStruct`s with shardings. The arrays that come back
    can be donated. Newer checkpoints that are damaged are named on stderr and moved out of the way, to
    `STEP.damaged`, once an older one has been restored.

    Raises:
      InputError: if no checkpoint is whole, or the tree is not the target's.
    """
    steps = sorted(manager.all_steps(), reverse=True) if step is None else [step]
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), target
    )
    folder = Path(str(manager.directory))
    damaged: dict[int, str] = {}
    for candidate in steps:
        found = _read(folder / str(candidate), abstract)
        if isinstance(found, str):
            damaged[candidate] = found
            continue
        if damaged:
            _move_aside(folder, damaged, candidate)
            manager.reload()
        return found
    reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
    raise InputError(
        f"no checkpoint in {folder} can be read: they belong to another model, optimizer or set of "
        f"trained parameters, or they are damaged ({reasons}). Go back to the config that wrote them, "
        f"give another --workdir, or delete {folder} to train the stage anew."
        if step is None
        else f"the checkpoint of step {step} in {folder} cannot be read ({reasons}). Delete "
        f"{folder / str(step)} and give the same command again: what is left decides then."
    )


def _read(folder: Path, abstract: Any) -> tuple[Any, dict[str, Any]] | str:
    """`(state, data)`, or what is wrong with the checkpoint."""
    import orbax.checkpoint as ocp

    reason = ""
    try:
        values = _read_values(folder)
        _check_tree(folder / STATE, abstract)
        # The handler and not the manager, which would wait for processes that failed.
        state = ocp.StandardCheckpointHandler().restore(
            folder / STATE, args=ocp.args.StandardRestore(abstract)
        )
    except Exception as error:  # orbax and tensorstore raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    if _any_process(bool(reason)):
        return reason or "another process cannot read it"
    # Restored arrays may not be donatable; the copy that a compiled identity makes always is.
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)
    state = copy(state)
    if int(checksum(state)) != values["checksum"]:
        return "its arrays are not those that were saved: their checksum is another"
    return state, values["data"]


def _read_values(folder: Path) -> dict[str, Any]:
    values = json.loads((folder / DATA / "metadata").read_text(encoding="utf-8"))
    if not isinstance(values, dict) or values.pop("digest", None) != _digest(values):
        raise ValueError(f"{folder / DATA} is not what was saved: its digest is another")
    return values


def _digest(values: Mapping[str, Any]) -> int:
    """Of the values as they are read back."""
    written = json.loads(json.dumps(values))
    return zlib.crc32(json.dumps(written, sort_keys=True).encode())


def _mend_metrics(folder: Path) -> None:
    """Writes metrics that were damaged anew, from the other place where they stand.

    Orbax cannot open a folder of which it cannot read them.
    """
    for step in folder.glob("[0-9]*") if folder.is_dir() else ():
        place = step / METRICS / METRICS
        if not step.name.isdigit():
            continue
        try:
            expected = _read_values(step)["metrics"]
        except (OSError, ValueError):
            # The checkpoint is damaged, which `restore` reports; it cannot be the best one.
            place.unlink(missing_ok=True)
            continue
        text = json.dumps(expected)
        try:
            if json.dumps(json.loads(place.read_text(encoding="utf-8"))) == text:
                continue
        except (OSError, ValueError):
            place.parent.mkdir(exist_ok=True)
        write_text(place, text)


def _move_aside(folder: Path, damaged: Mapping[int, str], used: int) -> None:
    if jax.process_index() == 0:
        for step, reason in damaged.items():
            aside = folder / f"{step}{DAMAGED}"
            shutil.rmtree(aside, ignore_errors=True)
            (folder / str(step)).rename(aside)
            print(
                f"regjax: the checkpoint of step {step} in {folder} is damaged ({reason}); going on "
                f"from step {used}. It was moved to {aside}, which can be deleted.",
                file=sys.stderr,
            )
    _wait_for_all("regjax_damaged")


def _wait_for_all(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _any_process(value: bool) -> bool:
    if jax.process_count() == 1:
        return value
    return bool(np.any(multihost_utils.process_allgather(np.array(value))))


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
    return {name: f"{leaf.dtype} {list(leaf.shape)}" for name, leaf in _named(tree)}


def _named(tree: Any) -> list[tuple[str, Any]]:
    named = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    return sorted(named, key=lambda pair: pair[0])


@jax.jit
def checksum(tree: Any) -> jax.Array:
    """A uint32 of every bit of a tree of arrays, the same however they are laid out on devices.

    Words and their places are mixed as in MurmurHash3's last step, so that a changed bit always changes
    it and other damage almost always; sums are modulo 2^32, which no order of adding changes.
    """
    total = jnp.zeros((), jnp.uint32)
    for index, (_, array) in enumerate(_named(tree)):
        total = total * 31 + _mixed(array).sum(dtype=jnp.uint32) + index
    return total


def _mixed(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    unsigned = jnp.dtype(f"uint{min(8 * array.dtype.itemsize, 32)}")
    words = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(words.shape):  # no reshape: that would move shards between devices
        place = place * size + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    mixed = words ^ (place * jnp.uint32(0x9E3779B1))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return mixed ^ (mixed >> 16)


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
