"""The tensors of a Hugging Face folder: their names, checking, reading in parts, and writing."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from regjax.errors import InputError
from regjax.models.apply import Params
from regjax.models.config import DecoderConfig, Precision
from regjax.sharding import fetch

_TOP = {
    "embedding/table": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
_LAYER = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/output": "self_attn.o_proj",
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
    "attention_norm": "input_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "mlp_norm": "post_attention_layernorm",
}
# Gemma calls by the same name what comes after attention rather than before the MLP.
_LAYER_WITH_POST_NORMS = _LAYER | {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_READABLE = ("F64", "F32", "F16", "BF16")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or an InputError that names the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; a model folder has one.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a JSON {type(values).__name__}; expected an object.")
    return values


def flatten(params: Params) -> dict[str, Any]:
    """`{"a/b": leaf}` of a nested dict."""
    paths, _ = jax.tree.flatten_with_path(params)
    return {"/".join(key.key for key in path): leaf for path, leaf in paths}


def nest(leaves: Mapping[str, Array]) -> Params:
    """The nested dict of `{"a/b": leaf}`."""
    params: Params = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        branch = params
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = leaf
    return params


def _tensor_names(path: str, config: DecoderConfig) -> list[str]:
    """The tensors that make up one parameter: one, or one of each layer."""
    if path in _TOP:
        return [_TOP[path]]
    module, _, kind = path.removeprefix("layers/").rpartition("/")
    name = (_LAYER_WITH_POST_NORMS if config.post_norms else _LAYER)[module]
    suffix = "bias" if kind == "bias" else "weight"
    return [f"model.layers.{index}.{name}.{suffix}" for index in range(config.layers)]


@contextlib.contextmanager
def open_tensors(folder: Path) -> Iterator[dict[str, Any]]:
    """A handle of safetensors for each tensor of the folder, by its name."""
    from safetensors import SafetensorError, safe_open

    with contextlib.ExitStack() as stack:
        tensors: dict[str, Any] = {}
        for file in _tensor_files(folder):
            try:
                handle = stack.enter_context(safe_open(file, framework="numpy"))
            except FileNotFoundError:
                raise InputError(f"{file} is missing; the index names it.") from None
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{file} is damaged or not a safetensors file ({error}); fetch it again."
                ) from None
            tensors |= dict.fromkeys(handle.keys(), handle)
        yield tensors


def _tensor_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(
            isinstance(name, str) and Path(name).name == name for name in names.values()
        ):
            raise InputError(f"{index}: 'weight_map' must map tensors to file names.")
        return [folder / name for name in sorted(set(names.values()))]
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise InputError(
            f"{folder} has its weights in {', '.join(pickles)}: pickles can run code and are never "
            "loaded. Convert them to safetensors first."
        )
    raise InputError(f"{folder} has neither model.safetensors nor {index.name}.")


def check_tensors(
    folder: Path, tensors: Mapping[str, Any], expected: Mapping[str, Any], config: DecoderConfig
) -> None:
    """Raises an InputError for a tensor that is missing, unexpected, misshapen or quantised."""
    known = set()
    for path, leaf in expected.items():
        names = _tensor_names(path, config)
        shape = leaf.shape if path in _TOP else leaf.shape[1:]
        shape = shape[::-1] if path.endswith("/kernel") else shape
        for name in names:
            if name not in tensors:
                raise InputError(f"{folder}: the tensor {name!r} {list(shape)} is missing.")
            found = tensors[name].get_slice(name)
            if tuple(found.get_shape()) != shape:
                raise InputError(
                    f"{folder}: the tensor {name!r} has shape {list(found.get_shape())}; by "
                    f"config.json it is {list(shape)}."
                )
            if found.get_dtype() not in _READABLE:
                raise InputError(
                    f"{folder}: the tensor {name!r} is {found.get_dtype()}; expected one of "
                    f"{', '.join(_READABLE)} (quantised weights are not implemented)."
                )
        known.update(names)
    for name in tensors:
        if name in known or name.endswith("rotary_emb.inv_freq"):
            continue
        if name == _TOP["head/kernel"] and config.tied_embeddings:
            table = _TOP["embedding/table"]
            if np.array_equal(tensors[name].get_tensor(name), tensors[table].get_tensor(table)):
                continue
            raise InputError(
                f"{folder}: {name!r} differs from {table!r}, but config.json ties them "
                "(tie_word_embeddings)."
            )
        raise InputError(
            f"{folder}: the tensor {name!r} has no place in this model; config.json does not "
            "describe it."
        )


def read_parameter(
    tensors: Mapping[str, Any],
    path: str,
    config: DecoderConfig,
    abstract: jax.ShapeDtypeStruct,
    sharding: NamedSharding | None,
) -> Array:
    """The parameter at `path`; with a sharding, each device's part is read for it alone."""
    names = _tensor_names(path, config)

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        values = tensors[name].get_slice(name)
        if path.endswith("/kernel"):
            return values[index[::-1]].T
        return values[index]

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        index = index or (slice(None),) * len(abstract.shape)
        if path in _TOP:
            return read(names[0], index).astype(abstract.dtype)
        rows, *rest = index
        parts = np.empty(
            [len(range(*s.indices(n))) for s, n in zip(index, abstract.shape, strict=True)],
            abstract.dtype,
        )
        for row, name in enumerate(names[rows]):
            parts[row] = read(name, tuple(rest))
        return parts

    if sharding is None:
        return jnp.asarray(part(None))
    return jax.make_array_from_callback(abstract.shape, sharding, part)


def write_tensors(
    folder: Path | None,
    leaves: Mapping[str, Array],
    config: DecoderConfig,
    dtype: Precision | None,
    max_shard_size: int,
) -> None:
    """Writes the parameters to one safetensors file, or several and an index; one in memory.

    Without a folder nothing is written: what is dealt out over processes needs all of them to be read.
    """
    from safetensors.numpy import save_file

    def tensor(path: str, layer: int) -> np.ndarray:
        leaf = leaves[path]
        values = fetch(leaf if path in _TOP else leaf[layer])
        values = values.T if path.endswith("/kernel") else values
        return np.ascontiguousarray(values, dtype=jnp.dtype(dtype or leaf.dtype))

    shards: list[dict[str, tuple[str, int]]] = [{}]
    filled = total = 0
    for path, leaf in leaves.items():
        names = _tensor_names(path, config)
        size = jnp.dtype(dtype or leaf.dtype).itemsize * leaf.size // len(names)
        for layer, name in enumerate(names):
            if shards[-1] and filled + size > max_shard_size:
                shards.append({})
                filled = 0
            shards[-1][name] = (path, layer)
            filled += size
            total += size

    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if folder is None:
            for path, layer in shard.values():
                tensor(path, layer)
            continue
        arrays = {name: tensor(path, layer) for name, (path, layer) in shard.items()}
        save_file(arrays, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if folder is not None and len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )
