"""Adapters of a decoder as folders in PEFT's layout.

PEFT writes `adapter_config.json` and, in `adapter_model.safetensors`, two matrices for each layer's
linear module, `...q_proj.lora_A.weight` `[r, in]` and `...lora_B.weight` `[out, r]`. What it has no place for
is in the header of that file.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from regjax import paths
from regjax.errors import InputError
from regjax.files import new_folder, write_json
from regjax.models.apply import Params
from regjax.models.config import DecoderConfig
from regjax.models.hf_tensors import read_json, tensor_names
from regjax.models.lora import Lora, adapter_shapes

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"

_HEADER = "regjax"
_READABLE = ("F64", "F32", "F16", "BF16")
# Options of PEFT by which its adapters would be other functions than ours.
_OTHER_FUNCTIONS = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)


@dataclasses.dataclass(frozen=True)
class LoraOrigin:
    """What adapters belong to. None: not known, and not compared."""

    model: str | None = None
    """Name of the model, told in messages and never compared."""

    checksum: int | None = None
    """Of the float32 parameters that the adapters were trained beside, `regjax.checkpoint.checksum`."""


def save_lora(
    folder: str | Path,
    adapters: Params,
    lora: Lora,
    config: DecoderConfig,
    origin: LoraOrigin = LoraOrigin(),
) -> None:
    """Writes a decoder's adapters, whole or not at all; `load_lora` and PEFT's `PeftModel` read them.

    Args:
        folder: to make; earlier adapters there are replaced.
        adapters: `params["lora"]`.
        lora: what they were made by.
        config: of the decoder.
        origin: what they belong to.

    Raises:
        InputError: the folder holds something other than adapters.
    """
    target = Path(folder)
    if target.exists():
        others = {"."} if target.is_file() else {file.name for file in target.iterdir()}
        if others - {CONFIG, TENSORS}:
            raise InputError(f"{target} holds something other than adapters; give another name.")
    with new_folder(target) as work:
        write_lora(work, adapters, lora, config, origin)


def write_lora(
    folder: Path, adapters: Params, lora: Lora, config: DecoderConfig, origin: LoraOrigin
) -> None:
    """Writes the two files into a folder that is there."""
    from safetensors.numpy import save_file

    tensors, modules = {}, set()
    for path, leaf in paths.flatten(adapters).items():
        place, _, factor = path.rpartition("/")
        names = tensor_names(f"{place}/kernel", config)
        values = np.asarray(leaf, np.float32)
        for name, matrix in zip(names, values if len(values.shape) == 3 else [values], strict=True):
            tensors[_peft_name(name, factor)] = np.ascontiguousarray(matrix.T)
        modules.add(names[0].split(".")[-2])
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": origin.model,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": lora.rank_stabilised,
        "target_modules": sorted(modules),
    }
    write_json(folder / CONFIG, dict(sorted(settings.items())))
    header = json.dumps({**dataclasses.asdict(origin), "patterns": lora.patterns})
    save_file(tensors, folder / TENSORS, metadata={_HEADER: header})


def load_lora(
    folder: str | Path,
    config: DecoderConfig,
    params: Mapping[str, Any],
    expected: LoraOrigin = LoraOrigin(),
) -> tuple[Params, Lora, LoraOrigin]:
    """`(params["lora"], lora, origin)` of a folder that `save_lora` or PEFT wrote; all float32.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        config: of the decoder that they are for.
        params: its parameters, arrays or shapes.
        expected: what they have to belong to.

    Raises:
        InputError: a folder or file that is missing or damaged; adapters that are no LoRA, of another
            kind than ours, or of a model with other modules, layers or sizes; entries that are not
            finite; an origin other than `expected`. The message names it.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} has no {CONFIG}; expected a folder of adapters.")
    lora = _lora(folder / CONFIG, read_json(folder / CONFIG))
    tensors, header = _read_tensors(folder)
    kernels = {
        path: leaf.shape
        for path, leaf in paths.flatten(params).items()
        if path.rpartition("/")[2] == "kernel"
    }
    found: dict[str, Any] = {}
    patterns = []
    for path, shape in kernels.items():
        names = tensor_names(path, config)
        if not any(_peft_name(name, factor) in tensors for name in names for factor in "ab"):
            continue
        patterns.append(f"^{re.escape(path)}$")
        for factor, wanted in (("a", (lora.rank, shape[-2])), ("b", (shape[-1], lora.rank))):
            matrices = [
                _checked(folder / TENSORS, tensors, _peft_name(name, factor), wanted).T
                for name in names
            ]
            stacked = np.stack(matrices) if len(shape) == 3 else matrices[0]
            found[f"{path.removesuffix('/kernel')}/{factor}"] = jnp.asarray(stacked, jnp.float32)
    if tensors:
        raise InputError(
            f"{folder / TENSORS}: {min(tensors)!r} is no adapter of a kernel of this model; the file is "
            "for another one, or holds more than adapters."
        )
    origin, written = _origin(folder / TENSORS, header)
    lora = dataclasses.replace(lora, patterns=tuple(written or patterns))
    expected_shapes = {path.partition("/")[2] for path in adapter_shapes(lora, params)}
    if expected_shapes != found.keys():
        odd = min(expected_shapes ^ found.keys())
        raise InputError(
            f"{folder / TENSORS}: of {odd} it has one thing and by the patterns {lora.patterns} in its "
            "header another; the file is not whole, or was changed."
        )
    if None not in (origin.checksum, expected.checksum) and origin.checksum != expected.checksum:
        raise InputError(
            f"{folder}: the adapters were trained beside other parameters, those of "
            f"{origin.model or 'another model'} (checksum {origin.checksum}; here it is "
            f"{expected.checksum}). Use the model they were trained with, or train others."
        )
    return paths.unflatten(found), lora, origin


def _peft_name(tensor: str, factor: str) -> str:
    """PEFT's name of A or B of a module, by the name of the module's weight."""
    return f"base_model.model.{tensor.removesuffix('.weight')}.lora_{factor.upper()}.weight"


def _lora(path: Path, config: Mapping[str, Any]) -> Lora:
    """What PEFT's config says, but for the patterns."""
    kind, task = config.get("peft_type"), config.get("task_type")
    if kind != "LORA":
        raise InputError(f"{path}: peft_type is {kind!r}; expected 'LORA'.")
    if task not in ("CAUSAL_LM", None):
        raise InputError(f"{path}: task_type is {task!r}; expected 'CAUSAL_LM', a decoder's.")
    for name in _OTHER_FUNCTIONS:
        if config.get(name):
            raise InputError(f"{path}: {name} is {config[name]!r}, which is not implemented.")
    if config.get("bias", "none") != "none":
        raise InputError(f"{path}: bias is {config['bias']!r}; only 'none' is implemented.")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1:
        raise InputError(f"{path}: r is {rank!r}; expected a positive whole number.")
    if not isinstance(alpha, int | float) or not alpha > 0:
        raise InputError(f"{path}: lora_alpha is {alpha!r}; expected a positive number.")
    return Lora(rank, float(alpha), rank_stabilised=bool(config.get("use_rslora")))


def _read_tensors(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    path = folder / TENSORS
    if not path.is_file():
        raise InputError(f"{folder} has no {TENSORS}; pickled adapters are never loaded.")
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118
                dtype = file.get_slice(name).get_dtype()
                if dtype not in _READABLE:
                    raise InputError(
                        f"{path}: {name!r} is {dtype}; expected one of {', '.join(_READABLE)}."
                    )
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is damaged or not a safetensors file ({error}); fetch it again."
        ) from None


def _checked(
    path: Path, tensors: dict[str, np.ndarray], name: str, wanted: tuple[int, int]
) -> np.ndarray:
    """The tensor of that name, taken out of `tensors`."""
    matrix = tensors.pop(name, None)
    if matrix is None:
        raise InputError(
            f"{path}: {name!r} is missing; the adapters of a module are in all layers here."
        )
    if matrix.shape != wanted:
        raise InputError(
            f"{path}: {name!r} has shape {list(matrix.shape)}; for this model and the rank in "
            f"{CONFIG} it is {list(wanted)}."
        )
    if not np.isfinite(matrix.astype(np.float32)).all():
        raise InputError(f"{path}: {name!r} has entries that are not finite.")
    return matrix


def _origin(path: Path, header: Mapping[str, str]) -> tuple[LoraOrigin, list[str]]:
    """What the header says of a model, and the patterns; nothing where PEFT wrote the file."""
    if _HEADER not in header:
        return LoraOrigin(), []
    try:
        values = json.loads(header[_HEADER])
        patterns = [str(pattern) for pattern in values.pop("patterns")]
        return LoraOrigin(**values), patterns
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: {_HEADER!r} in its header is not readable: {error}") from None
