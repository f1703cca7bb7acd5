"""Models: Flax NNX modules here, `(apply, params)` everywhere else."""

from regjax.models.apply import Apply, Cache, from_function, split
from regjax.models.config import DecoderConfig, RopeScaling
from regjax.models.decoder import Decoder, create
from regjax.models.hf import load, resolve, save

__all__ = [
    "Apply",
    "Cache",
    "Decoder",
    "DecoderConfig",
    "RopeScaling",
    "create",
    "from_function",
    "load",
    "resolve",
    "save",
    "split",
]
