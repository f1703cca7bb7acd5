"""The adapters of a run: which of them a stage's parameters hold, how they begin, what becomes of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from regjax import checkpoint, paths
from regjax.errors import InputError
from regjax.models import Apply, DecoderConfig
from regjax.models.lora import LORA, Lora, adapter_shapes, create_lora, merge_lora, with_lora
from regjax.models.lora_files import LoraOrigin, load_lora
from regjax.prompting import is_prompt
from regjax.stages import ResolvedStage

if TYPE_CHECKING:
    from regjax.prepare import PreparedStage

Parameters = Mapping[str, jax.Array]


class Adapters(NamedTuple):
    """Those that a stage's parameters hold."""

    lora: Lora | None
    """What they are made by; None: there are none."""
    before: Lora | None
    """Of the parameters that the stage starts from."""
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    """By path."""
    values: Parameters | None = None
    """By path, where they were read from a file."""


def adapters_of(
    stage: ResolvedStage,
    start: PreparedStage | None,
    params: Mapping[str, Any],
    config: DecoderConfig | None,
) -> Adapters:
    """The adapters of a stage; `params` are the model's own, arrays or shapes.

    Raises:
      InputError: for patterns that match no kernel, and adapters in a file that are not the stage's.
    """
    lora, before = stage.lora, start.adapters.lora if start else None
    if lora is None:
        return Adapters(None, before, {})
    if any(is_adapter(path) for path in params):
        raise InputError(
            f"stage {stage.name!r}: the model's own parameters have the name {LORA!r}, under which "
            "adapters go; give them another"
        )
    try:
        shapes = adapter_shapes(lora, paths.unflatten(params))
    except InputError as error:
        raise InputError(f"stage {stage.name!r}: {error}") from error
    tables = [path for path in shapes if path.startswith(f"{LORA}/embedding/")]
    if config is not None and tables:
        raise InputError(
            f"stage {stage.name!r}: Lora.patterns matches the embedding table, which is no linear layer"
        )
    values = None
    if lora.path and lora != before:
        values = _read(stage.name, lora, params if start is None else None, shapes, params, config)
    return Adapters(lora, before, shapes, values)


def _read(
    stage: str,
    lora: Lora,
    frozen: Parameters | None,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    params: Mapping[str, Any],
    config: DecoderConfig | None,
) -> Parameters:
    """The adapters of `lora.path`, by path; `frozen` are the parameters they go beside, if known yet."""
    if config is None:
        raise InputError(
            f"stage {stage!r}: Lora.path is {lora.path!r}, but adapters of a model that the caller "
            "brought are not read from a file"
        )
    expected = LoraOrigin(checksum=None if frozen is None else int(checkpoint.checksum(frozen)))
    nested, written, _ = load_lora(lora.path, config, paths.unflatten(params), expected)
    for field in ("rank", "alpha", "rank_stabilised"):
        asked, found = getattr(lora, field), getattr(written, field)
        if asked != found:
            raise InputError(
                f"stage {stage!r}: Lora.{field} is {asked}, in {lora.path} it is {found}; give the same"
            )
    values = paths.flatten({LORA: nested})
    odd = min(values.keys() ^ shapes.keys(), default="")
    if odd:
        raise InputError(
            f"stage {stage!r}: {odd} is {'asked for' if odd in shapes else 'not asked for'} by "
            f"Lora.patterns and {'there' if odd in values else 'not there'} in {lora.path}; give the "
            f"patterns that match its kernels, {written.patterns}"
        )
    return values


def is_adapter(path: str) -> bool:
    """Whether a parameter path is that of an adapter."""
    return path.startswith(f"{LORA}/")


def adapted(apply: Apply, adapters: Adapters) -> Apply:
    """The model with a stage's adapters, if it has any."""
    return apply if adapters.lora is None else with_lora(apply, adapters.lora)


def start_parameters(ready: PreparedStage, start: Parameters, seed: int) -> Parameters:
    """The parameters a stage begins with: `start`, with adapters as the stage says and no others.

    Adapters of the same `Lora` stay, others are merged into the kernels. New ones are a function of the
    seed and their paths.
    """
    lora, before, _, values = ready.adapters
    if lora == before:
        return start
    if before is not None:
        start = merged(start, before)
    if lora is None:
        return start
    if values is not None:
        return {**start, **values}
    model = {path: leaf for path, leaf in start.items() if not is_prompt(path)}
    new = create_lora(lora, paths.unflatten(model), jax.random.key(seed))
    return {**start, **paths.flatten({LORA: new})}


def merged(params: Parameters, lora: Lora) -> dict[str, jax.Array]:
    """`merge_lora` of parameters by path, compiled: the same bits wherever it is called."""
    touched = {path for path in params if is_adapter(path)}
    places = {path.removeprefix(f"{LORA}/").rpartition("/")[0] for path in touched}
    touched |= {path for path in params if path.removesuffix("/kernel") in places}
    return {
        **{path: leaf for path, leaf in params.items() if path not in touched},
        **_merge({path: params[path] for path in touched}, lora),
    }


@functools.partial(jax.jit, static_argnames="lora")
def _merge(params: Parameters, lora: Lora) -> dict[str, jax.Array]:
    return paths.flatten(merge_lora(paths.unflatten(params), lora))
