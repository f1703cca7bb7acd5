"""The same models in transformers on torch, as the reference for parity."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np


def random_model(values: dict[str, Any], seed: int = 0) -> Any:
    """A transformers model of a `config.json`, with weights far from where training starts."""
    import torch
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.AutoConfig.for_model(**values)
        config._attn_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * (0.3 if parameter.ndim > 1 else 0.5))
    return model.eval()


def write_folder(model: Any, values: dict[str, Any], folder: Path) -> None:
    """`save_pretrained`, but with `config.json` as it was given, in the keys of its time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(values))


def read_folder(folder: Path) -> Any:
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype="auto", local_files_only=True
        ).eval()


def logits(
    model: Any,
    tokens: np.ndarray | None = None,
    *,
    embeddings: np.ndarray | None = None,
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """Logits `[B, L, V]`; with a `mask [B, L]` (1 real, 0 padding), positions count real tokens."""
    import torch

    inputs: dict[str, Any] = {"use_cache": False}
    if tokens is not None:
        inputs["input_ids"] = torch.tensor(np.asarray(tokens, np.int64))
    if embeddings is not None:
        inputs["inputs_embeds"] = torch.tensor(embeddings)
    if mask is not None:
        positions = np.maximum(np.cumsum(mask, axis=-1) - 1, 0)
        inputs["attention_mask"] = torch.tensor(np.asarray(mask, np.int64))
        inputs["position_ids"] = torch.tensor(np.asarray(positions, np.int64))
    with torch.no_grad():
        return model(**inputs).logits.float().numpy()
