"""Reads and writes Hugging Face folders: `config.json` and safetensors, nothing else.

No pickle is opened and nothing from a folder is executed. torch is not needed.
"""

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from regjax.errors import InputError
from regjax.models.apply import Params
from regjax.models.config import AttentionKernel, DecoderConfig, Precision, Rematerialisation
from regjax.models.decoder import Decoder, create
from regjax.models.hf_config import TOKEN_IDS, config_from_json, json_from_config
from regjax.models.hf_tensors import (
    check_tensors,
    flatten,
    nest,
    open_tensors,
    read_json,
    read_parameter,
    write_tensors,
)
from regjax.sharding import Rules, place

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def resolve(path_or_hub_id: str | Path) -> Path:
    """The local folder of a model: the path itself, or a download of that hub id.

    Of a hub repository only JSON, safetensors and tokenizer files are fetched.

    Raises:
        InputError: there is no such folder, and it cannot be fetched either.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    name = str(path_or_hub_id)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or path.exists():
        raise InputError(f"{name!r} is no folder with a model, nor a hub id such as 'owner/model'.")
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model"],
                ignore_patterns=["*/*"],
            )
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{name!r} is no local folder, and cannot be fetched from the hub: {reason} "
            "Give a folder with config.json and safetensors, or check the name and the network."
        ) from error


def read_config(path: str | Path) -> DecoderConfig:
    """The model in a Hugging Face folder (or hub id), from its `config.json`: no tensor is read.

    Raises:
        InputError: as `load`, of the architecture and its options.
    """
    place = resolve(path) / "config.json"
    return config_from_json(read_json(place), str(place))


def load(
    path: str | Path,
    *,
    dtype: Precision = "float32",
    compute_dtype: Precision | None = None,
    attention: AttentionKernel = "xla",
    rematerialisation: Rematerialisation = "none",
    scan_layers: bool = True,
    mesh: Mesh | None = None,
    rules: Rules = (),
) -> Decoder:
    """The decoder of a Hugging Face folder (or hub id), read straight into its sharding.

    Args:
        path: a folder with `config.json` and `model.safetensors`, or several safetensors files and
            `model.safetensors.index.json`; see `resolve`.
        dtype: of the parameters.
        compute_dtype: `DecoderConfig.dtype`; by default that of the parameters.
        attention: as in `DecoderConfig`.
        rematerialisation: as in `DecoderConfig`.
        scan_layers: as in `DecoderConfig`.
        mesh: where the parameters go; each device's part alone is read for it. Without one, the
            default device.
        rules: `(pattern, PartitionSpec)`: the first whose pattern is found (`re.search`) in the
            parameter's path, such as `layers/attention/query/kernel`, places it, see
            `regjax.sharding.place`, and `rules_for` there for those of this family. Kernels are
            `[inputs, outputs]`, in layers `[N, inputs, outputs]`.

    Raises:
        InputError: an architecture, option, tensor or file that is unknown, missing, of the wrong
            shape, damaged or pickled; the message names it.
    """
    folder = resolve(path)
    config = dataclasses.replace(
        read_config(folder),
        dtype=compute_dtype or dtype,
        attention=attention,
        rematerialisation=rematerialisation,
        scan_layers=scan_layers,
    )
    structure, expected = _abstract(config)
    placed = {} if mesh is None else place(expected, mesh, rules)
    with open_tensors(folder) as tensors:
        check_tensors(folder, tensors, expected, config)
        leaves = {
            name: read_parameter(
                tensors,
                name,
                config,
                jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)),
                placed.get(name),
            )
            for name, leaf in expected.items()
        }
    return nnx.merge(structure, nest(leaves))


def save(
    path: str | Path,
    config: DecoderConfig,
    params: Params,
    *,
    dtype: Precision | None = None,
    model_type: str | None = None,
    source: str | Path | None = None,
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Writes a folder that transformers and `load` read, whole or not at all.

    Over several processes all call this, for parameters may be dealt out over them; the first writes,
    and holds one file's tensors at a time.

    Args:
        path: the folder to make; it must not exist, or be empty.
        config: of the model.
        params: as `split` gives them.
        dtype: of the tensors written; by default that of `params`.
        model_type: the family to write it as; by default the first that has the options.
        source: a folder, usually the one that was loaded, whose tokenizer files, generation config
            and ids of special tokens are copied.
        max_shard_size: bytes of a safetensors file, above which there are several.

    Raises:
        InputError: no family has this mix of options, or `path` holds something already.
        ValueError: `params` are not those of `config`; names the paths or shapes.
    """
    target, first = Path(path), jax.process_index() == 0
    if first and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists and is not an empty folder; give another name.")
    values = json_from_config(config, model_type)
    values |= dict.fromkeys(TOKEN_IDS)
    if source is not None:
        original = read_json(Path(source) / "config.json")
        values |= {name: original[name] for name in TOKEN_IDS if name in original}
    leaves = flatten(params)
    _check_params(leaves, config)
    values["torch_dtype"] = str(jnp.dtype(dtype or leaves["embedding/table"].dtype))
    if not first:
        write_tensors(None, leaves, config, dtype, max_shard_size)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix="-tmp", dir=target.parent))
    try:
        work.chmod(0o755)
        write_tensors(work, leaves, config, dtype, max_shard_size)
        (work / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        if source is not None:
            _copy_tokenizer(Path(source), work)
        os.rename(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, target / name)


def _abstract(config: DecoderConfig) -> tuple[nnx.GraphDef[Decoder], dict[str, Any]]:
    structure, state = nnx.split(nnx.eval_shape(lambda: create(config, 0)))
    return structure, flatten(nnx.to_pure_dict(state))


def _check_params(leaves: Mapping[str, Any], config: DecoderConfig) -> None:
    expected = {path: leaf.shape for path, leaf in _abstract(config)[1].items()}
    found = {path: leaf.shape for path, leaf in leaves.items()}
    wrong = sorted(path for path in found | expected if found.get(path) != expected.get(path))
    if wrong:
        raise ValueError(
            "params are not those of config: "
            + ", ".join(f"{path} {found.get(path)}, not {expected.get(path)}" for path in wrong)
        )
