"""The model that a run begins with: made or read where its parameters live, or only their shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from regjax import models, paths, sharding
from regjax.errors import InputError
from regjax.experiment import Experiment
from regjax.models import Apply, DecoderConfig
from regjax.models.config import Precision

Model = tuple[Apply, dict[str, jax.Array], DecoderConfig | None]
"""Functions, parameters by path, and the configuration of a model of the library."""


def initial_model(
    experiment: Experiment,
    tokenizer: Any,
    given: tuple[Apply, Any] | None,
    mesh: Mesh,
    *,
    weights: bool = True,
) -> Model:
    """The model that the caller brought, the published one of the experiment, or a new one.

    Every device makes or reads its own part of the parameters, so that no host holds all of them;
    the values of a new model do not depend on the mesh. Without `weights` the parameters are
    `jax.ShapeDtypeStruct`s that say where they would live.

    Raises:
      InputError: a model that cannot be read, or whose vocabulary is smaller than the tokenizer's.
    """
    if given is not None:
        function, tree = given
        apply = function if isinstance(function, Apply) else models.from_function(function)
        _check_vocabulary(apply, tree, tokenizer)
        params = paths.flatten(tree)
        placed = sharding.place(params, mesh, sharding.rules_for(None, mesh))
        if not weights:
            return apply, _shapes(params, placed), None
        return apply, {path: sharding.put(a, placed[path]) for path, a in params.items()}, None
    if experiment.model:
        config = models.read_config(experiment.model)
    else:
        size = _padded(len(tokenizer))
        config = dataclasses.replace(experiment.architecture, vocabulary_size=size)
    platform = mesh.devices.flat[0].platform
    resolved = models.resolve_execution(config, experiment.execution, platform)
    config = resolved.config
    if len(tokenizer) > config.vocabulary_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens, the model only {config.vocabulary_size}: "
            "give the model's own tokenizer"
        )
    rules = sharding.rules_for(config, mesh)
    apply = models.split(jax.eval_shape(lambda: models.create(config, 0)))[0]

    def new(seed: Any) -> dict[str, jax.Array]:
        return paths.flatten(models.split(models.create(config, seed))[1])

    shapes = jax.eval_shape(new, 0)
    dtype: Precision = "float32"
    if experiment.model and not _trains_any(experiment, shapes):
        dtype = resolved.frozen_dtype
        shapes = {path: jax.ShapeDtypeStruct(leaf.shape, dtype) for path, leaf in shapes.items()}
    placed = sharding.place(shapes, mesh, rules)
    if not weights:
        return apply, _shapes(shapes, placed), config
    if experiment.model:
        module = models.load(
            experiment.model,
            dtype=dtype,
            compute_dtype=config.dtype,
            attention=config.attention,
            rematerialisation=config.rematerialisation,
            scan_layers=config.scan_layers,
            mesh=mesh,
            rules=rules,
        )
        return apply, paths.flatten(models.split(module)[1]), config
    return apply, jax.jit(new, out_shardings=placed)(experiment.seed), config


def _trains_any(experiment: Experiment, params: Mapping[str, Any]) -> bool:
    """Whether a stage trains any of the model's own parameters."""
    patterns = [p for stage in experiment.stages for p in experiment.resolve(stage).trainable]
    return any(paths.matches(path, patterns) for path in params)


def _shapes(params: dict[str, Any], placed: dict[str, Any]) -> dict[str, Any]:
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed[path])
        for path, leaf in params.items()
    }


def _check_vocabulary(apply: Apply, params: Any, tokenizer: Any) -> None:
    shape = jax.ShapeDtypeStruct((1, 8), np.int32)
    logits = jax.eval_shape(lambda params, tokens: apply(params, tokens), params, shape)
    if logits.ndim != 3 or logits.shape[-1] < len(tokenizer):
        raise InputError(
            f"the model's logits have shape {logits.shape} for tokens {shape.shape}; expected "
            f"[B, L, V] with V at least {len(tokenizer)}, the tokenizer's size"
        )


def _padded(size: int, multiple: int = 64) -> int:
    return -(-size // multiple) * multiple
