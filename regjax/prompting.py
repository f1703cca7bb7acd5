"""The soft prompts of a run: which of them a stage's parameters hold, how they begin, where they are kept."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from regjax import checkpoint, paths
from regjax.data import Examples, Task
from regjax.errors import InputError
from regjax.experiment import Experiment
from regjax.models import Apply, DecoderConfig
from regjax.models.prompt import SOFT_PROMPT, SoftPrompt, create_prompt
from regjax.models.prompt_files import PromptOrigin, load_prompt, tokenizer_fingerprint
from regjax.stages import ResolvedStage

if TYPE_CHECKING:
    from regjax.prepare import PreparedStage

Parameters = Mapping[str, jax.Array]


class PromptSource(NamedTuple):
    """How a soft prompt begins."""

    config: SoftPrompt
    shape: tuple[int, int]
    """`(P, D)`."""
    value: jax.Array | None = None
    """`[P, D]` where it was read from a file."""


def sources(
    stage: ResolvedStage,
    tasks: Sequence[Task],
    start: PreparedStage | None,
    apply: Apply,
    params: Parameters,
    config: DecoderConfig | None,
    tokenizer: Any,
) -> dict[str, PromptSource]:
    """The soft prompts of a stage's parameters: those it starts with, and one for each of its tasks."""
    prompt = stage.soft_prompt
    if prompt is None:
        return {}
    if apply.embed is None:
        raise InputError(
            f"stage {stage.name!r}: a soft prompt needs a model with `embed`, see regjax.models.Apply"
        )
    found = dict(start.prompts) if start else {}
    tokens = jax.ShapeDtypeStruct((1,), jnp.int32)
    width = jax.eval_shape(apply.embed, paths.unflatten(params), tokens).shape[-1]
    for name in (task.name for task in tasks):
        if name in found:
            _check_same(stage, name, found[name])
        elif prompt.init == "file":
            frozen = params if start is None else None
            expected = origin(width, config, tokenizer, frozen, after_bos=prompt.after_bos)
            value, _ = load_prompt(prompt.path, expected)
            found[name] = PromptSource(prompt, (value.shape[0], value.shape[1]), value)
        else:
            found[name] = PromptSource(prompt, (prompt.length, width))
    return found


def _check_same(stage: ResolvedStage, name: str, found: PromptSource) -> None:
    """A prompt that was trained before keeps its length and its place."""
    wanted = stage.soft_prompt
    before = (found.shape[0], found.config.after_bos)
    length = found.shape[0] if wanted.init == "file" else wanted.length
    if before != (length, wanted.after_bos):
        raise InputError(
            f"stage {stage.name!r}: soft_prompt has length {length} and after_bos {wanted.after_bos}, "
            f"the prompt {name!r} that it starts with {before[0]} and {before[1]}; give the same"
        )


def origin(
    width: int,
    config: DecoderConfig | None,
    tokenizer: Any,
    frozen: Parameters | None = None,
    *,
    name: str = "",
    after_bos: bool | None = None,
) -> PromptOrigin:
    """What a soft prompt belongs to: a model, its parameters where they are given, and a tokenizer."""
    return PromptOrigin(
        model=name or None,
        width=width,
        layers=config.layers if config else None,
        heads=config.heads if config else None,
        vocabulary_size=config.vocabulary_size if config else None,
        checksum=None if frozen is None else int(checkpoint.checksum(dict(frozen))),
        tokenizer=tokenizer_fingerprint(tokenizer),
        after_bos=after_bos,
    )


def path_of(name: str) -> str:
    """The parameter path of the soft prompt of a task."""
    return f"{SOFT_PROMPT}/{name}"


def is_prompt(path: str) -> bool:
    """Whether a parameter path is that of a soft prompt."""
    return path.startswith(f"{SOFT_PROMPT}/")


def shapes(prompts: Mapping[str, PromptSource]) -> dict[str, jax.ShapeDtypeStruct]:
    """The soft prompts' shapes by path."""
    return {
        path_of(name): jax.ShapeDtypeStruct(source.shape, jnp.float32)
        for name, source in prompts.items()
    }


def start_parameters(
    ready: PreparedStage, start: Parameters, tokenizer: Any, seed: int
) -> dict[str, jax.Array]:
    """The parameters a stage begins with: `start`, with the soft prompts that it lacks and no others.

    A new prompt is a function of the seed, the task's name and the parameters, so that stages that
    begin alike have the same one.
    """
    model = {path: leaf for path, leaf in start.items() if not is_prompt(path)}
    found = dict(model)
    for name, source in ready.prompts.items():
        path = path_of(name)
        if path in start:
            found[path] = start[path]
        elif source.value is not None:
            found[path] = source.value
        else:
            found[path] = _new(source.config, ready.base, model, tokenizer, seed, name)
    return found


def _new(
    config: SoftPrompt, base: Apply, model: Parameters, tokenizer: Any, seed: int, name: str
) -> jax.Array:
    @jax.jit  # so that parameters may be dealt out over hosts
    def create(model):
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        return create_prompt(config, base, paths.unflatten(model), tokenizer, key)

    return create(dict(model))


def place(stage: ResolvedStage, examples: Examples, tokenizer: Any) -> int:
    """How many tokens stand before the soft prompt: 1 with `after_bos`, else 0."""
    if stage.soft_prompt is None or not stage.soft_prompt.after_bos:
        return 0
    bos = tokenizer.bos_token_id
    if bos is None or any(example.tokens[0] != bos for example in examples.examples):
        raise InputError(
            f"stage {stage.name!r}: soft_prompt.after_bos, but its texts do not begin with the "
            "tokenizer's beginning-of-sequence token; leave it off"
        )
    return 1


def base_model(
    experiment: Experiment,
    stage: ResolvedStage,
    start: PreparedStage | None,
    params: Parameters,
) -> str:
    """See `PreparedStage.base_model`; `params` are the model's own."""
    if any(paths.matches(path, stage.trainable) for path in params):
        return ""
    if start is None:
        return experiment.model
    return start.base_model or start.stage.name
