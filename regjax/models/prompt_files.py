"""Soft prompts as folders in PEFT's layout, with a note of what each prompt belongs to.

PEFT writes `adapter_config.json` and one tensor, `prompt_embeddings` `[P, D]`, in
`adapter_model.safetensors`. It warns of keys that its config does not know and does not look at the
header of the tensor file: what PEFT has no place for is in that header.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from regjax.errors import InputError
from regjax.files import new_folder, write_json
from regjax.models.hf_tensors import read_json
from regjax.models.prompt import special_ids

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"

_TENSOR = "prompt_embeddings"
_HEADER = "regjax"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclasses.dataclass(frozen=True)
class PromptOrigin:
    """What a soft prompt belongs to. None: not known, and not compared."""

    model: str | None = None
    """Name of the model, told in messages and never compared."""

    width: int | None = None
    """D, the size of an embedding."""

    layers: int | None = None
    """Number of transformer layers."""

    heads: int | None = None
    """Number of query heads."""

    vocabulary_size: int | None = None
    """V, the number of token ids."""

    checksum: int | None = None
    """Of the parameters that were frozen while the prompt was trained."""

    tokenizer: str | None = None
    """What `tokenizer_fingerprint` says."""

    after_bos: bool | None = None
    """Whether the prompt stands after a row's first token; PEFT puts it before."""


_PEFT_NAMES = {
    "model": "base_model_name_or_path",
    "width": "token_dim",
    "layers": "num_layers",
    "heads": "num_attention_heads",
}


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of what ids mean: the vocabulary, which ids are special, which begin and end a sequence."""
    facts = [
        sorted(tokenizer.get_vocab().items()),
        sorted(special_ids(tokenizer)),
        [tokenizer.bos_token_id, tokenizer.eos_token_id],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def save_prompt(
    folder: str | Path,
    prompt: Array | np.ndarray,
    origin: PromptOrigin = PromptOrigin(),
) -> None:
    """Writes a soft prompt, whole or not at all; `load_prompt` and PEFT's `PeftModel` read it.

    With PEFT the prompt stands before the begin-of-sequence token, so that one trained after it
    (`origin.after_bos`) means something else there.

    Args:
        folder: to make; an earlier prompt there is replaced.
        prompt: `[P, D]`, float32.
        origin: what it belongs to.

    Raises:
        InputError: the folder holds something other than a prompt.
        ValueError: a prompt of another shape, type or width, or with an entry that is not finite.
    """
    from safetensors.numpy import save_file

    target, values = Path(folder), np.asarray(prompt)
    if values.ndim != 2 or not values.size or values.dtype != np.float32:
        raise ValueError(f"the prompt is {values.dtype} {values.shape}; expected float32 [P, D]")
    if origin.width not in (None, values.shape[1]):
        raise ValueError(f"the prompt has width {values.shape[1]}, its origin {origin.width}")
    if not np.isfinite(values).all():
        raise ValueError("the prompt has entries that are not finite")
    if target.exists():
        others = {"."} if target.is_file() else {file.name for file in target.iterdir()}
        if others - {CONFIG, TENSORS}:
            raise InputError(f"{target} holds something other than a prompt; give another name.")
    origin = dataclasses.replace(origin, width=values.shape[1])
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "num_virtual_tokens": len(values),
        "num_transformer_submodules": 1,
        # Others make PEFT look for a tokenizer or draw a prompt, only to overwrite it.
        "prompt_tuning_init": "RANDOM",
        **{theirs: getattr(origin, ours) for ours, theirs in _PEFT_NAMES.items()},
    }
    with new_folder(target) as work:
        write_json(work / CONFIG, dict(sorted(config.items())))
        # One entry: safetensors writes several in an order of chance.
        header = {_HEADER: json.dumps(dataclasses.asdict(origin))}
        save_file({_TENSOR: np.ascontiguousarray(values)}, work / TENSORS, metadata=header)


def load_prompt(
    folder: str | Path,
    expected: PromptOrigin = PromptOrigin(),
) -> tuple[Array, PromptOrigin]:
    """`(prompt [P, D] float32, origin)` of a folder that `save_prompt` or PEFT wrote.

    Of a prompt that PEFT wrote the name, width, layers and heads of the model are known, and that it
    stands before the begin-of-sequence token.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        expected: what the prompt has to belong to.

    Raises:
        InputError: a folder or file that is missing, damaged or pickled; an adapter that is no soft
            prompt of a decoder; a tensor of the wrong name, type or shape or with entries that are not
            finite; an origin other than `expected`. The message names it.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} has no {CONFIG}; expected a soft prompt's folder.")
    config = read_json(folder / CONFIG)
    length, width = _check_config(folder / CONFIG, config)
    values, header = _read_tensor(folder)
    if values.shape != (length, width):
        raise InputError(
            f"{folder / TENSORS}: {_TENSOR!r} has shape {list(values.shape)}; by {CONFIG} it is "
            f"[{length}, {width}]."
        )
    if not np.isfinite(values).all():
        raise InputError(f"{folder / TENSORS}: {_TENSOR!r} has entries that are not finite.")
    origin = _origin(folder, config, header)
    for field in dataclasses.fields(PromptOrigin):
        found, wanted = getattr(origin, field.name), getattr(expected, field.name)
        if field.name != "model" and None not in (found, wanted) and found != wanted:
            raise InputError(
                f"{folder}: the prompt was made for {origin.model or 'a model'} with "
                f"{field.name} {found}; here {field.name} is {wanted}. Use the model and tokenizer "
                "it was trained with, or train another."
            )
    return jnp.asarray(values), origin


def _check_config(path: Path, config: Mapping[str, Any]) -> tuple[int, int]:
    """`(P, D)` of PEFT's config, which must be that of a decoder's soft prompt."""
    kind = config.get("peft_type")
    if kind != "PROMPT_TUNING":
        raise InputError(f"{path}: peft_type is {kind!r}; expected 'PROMPT_TUNING'.")
    # PEFT leaves it out for models that it has no task for.
    task = config.get("task_type")
    if task not in ("CAUSAL_LM", None):
        raise InputError(f"{path}: task_type is {task!r}; expected 'CAUSAL_LM', a decoder's.")
    # With 2 PEFT cuts the second half off for an encoder, and fails on a decoder.
    submodules = config.get("num_transformer_submodules")
    if submodules not in (1, None):
        raise InputError(
            f"{path}: num_transformer_submodules is {submodules!r}; expected 1: 2 is the prompt of "
            "an encoder-decoder."
        )
    for name in ("num_virtual_tokens", "token_dim"):
        value = config.get(name)
        if type(value) is not int or value < 1:
            raise InputError(f"{path}: {name} is {value!r}; expected a positive whole number.")
    return config["num_virtual_tokens"], config["token_dim"]


def _read_tensor(folder: Path) -> tuple[np.ndarray, dict[str, str]]:
    """The one tensor of the folder and the header of its file."""
    from safetensors import SafetensorError, safe_open

    path = folder / TENSORS
    if not path.is_file():
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
        if pickles:
            raise InputError(
                f"{folder} has its prompt in {', '.join(pickles)}: pickles can run code and are "
                "never loaded. Convert it to safetensors first."
            )
        raise InputError(f"{folder} has no {TENSORS}.")
    try:
        with safe_open(path, framework="numpy") as file:
            names = sorted(file.keys())
            if names != [_TENSOR]:
                raise InputError(
                    f"{path} holds {', '.join(map(repr, names)) or 'nothing'}; a soft prompt is "
                    f"{_TENSOR!r} alone."
                )
            dtype = file.get_slice(_TENSOR).get_dtype()
            if dtype != "F32":
                raise InputError(f"{path}: {_TENSOR!r} is {dtype}; expected F32.")
            return file.get_tensor(_TENSOR), file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is damaged or not a safetensors file ({error}); fetch it again."
        ) from None


def _origin(folder: Path, config: Mapping[str, Any], header: Mapping[str, str]) -> PromptOrigin:
    """What the header says, or else as much as PEFT's config does."""
    if _HEADER not in header:
        known = {ours: config.get(theirs) for ours, theirs in _PEFT_NAMES.items()}
        return PromptOrigin(**known, after_bos=False)
    try:
        origin = PromptOrigin(**json.loads(header[_HEADER]))
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{folder / TENSORS}: {_HEADER!r} in its header is not readable: {error}"
        ) from None
    if origin.width != config["token_dim"]:
        raise InputError(
            f"{folder}: the prompt has width {origin.width} by the header of {TENSORS} and "
            f"{config['token_dim']} by {CONFIG}; the two files are not of one prompt."
        )
    return origin
