"""How a decoder is computed on a kind of device: what changes speed, memory and rounding, not the model."""

import dataclasses
from typing import Literal

from regjax.errors import InputError
from regjax.models.config import AttentionKernel, DecoderConfig, Precision, Rematerialisation

Platform = Literal["cpu", "gpu", "tpu"]

LOOPED_LAYERS = 8
"""Up to how many layers a CPU runs one after the other; more take too long to compile."""

_KERNELS: dict[Platform, AttentionKernel] = {"cpu": "xla", "gpu": "cudnn", "tpu": "splash"}


@dataclasses.dataclass(frozen=True)
class Execution:
    """What a config leaves open is decided by the platform: see `resolve_execution`."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products and the residual stream: bfloat16 on TPU and GPU, float32 on CPU."""
    frozen_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the parameters of a published model of which no stage trains any: that of the products. All
    others are float32."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """splash on TPU, cudnn on GPU where it can compute the model's attention, else xla."""
    rematerialisation: Literal["auto", "none", "dots", "full"] = "auto"
    """`full` on TPU and GPU, `none` on CPU."""
    layers: Literal["auto", "scan", "loop"] = "auto"
    """Compile one layer and scan over it, or all of them: a loop on CPU for few layers, else a scan."""

    def __post_init__(self) -> None:
        choices = {
            "dtype": ("auto", "float32", "bfloat16"),
            "frozen_dtype": ("auto", "float32", "bfloat16"),
            "attention": ("auto", "xla", "cudnn", "splash"),
            "rematerialisation": ("auto", "none", "dots", "full"),
            "layers": ("auto", "scan", "loop"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"Execution.{name} is {getattr(self, name)!r}; expected one of {allowed}."
                )


@dataclasses.dataclass(frozen=True)
class Resolved:
    """What an `Execution` comes to."""

    config: DecoderConfig
    """The model, and how it is computed."""
    frozen_dtype: Precision
    """Of parameters that are not trained."""


def resolve_execution(config: DecoderConfig, execution: Execution, platform: Platform) -> Resolved:
    """`config` with all that `execution` says or leaves to the platform.

    The platform is that of the devices that the model is compiled for, which need not be here
    (`device.platform`; `jax.default_backend()` for those at hand).

    Float32 products take a CPU no longer than bfloat16 ones and are exact; elsewhere bfloat16 halves
    memory and is several times as fast. Rematerialisation of whole layers keeps `[B, L, D]` a layer
    and costs a third more flops: memory is what accelerators are short of, and a step that does not
    fit costs more than one that takes a third longer. Where it fits, `dots` or `none` is faster.

    >>> resolved = resolve_execution(DecoderConfig(), Execution(attention="xla"), "tpu")
    >>> resolved.config.dtype, resolved.config.attention, resolved.config.rematerialisation
    ('bfloat16', 'xla', 'full')

    Raises:
        InputError: `execution` asks for a kernel that the platform lacks, or that cannot compute the
            model's attention.
    """
    if platform not in _KERNELS:
        raise InputError(f"platform is {platform!r}; expected one of {tuple(_KERNELS)}.")
    on_cpu = platform == "cpu"
    automatic: Precision = "float32" if on_cpu else "bfloat16"
    dtype = automatic if execution.dtype == "auto" else execution.dtype
    recomputed: Rematerialisation = "none" if on_cpu else "full"
    few = on_cpu and config.layers <= LOOPED_LAYERS
    config = dataclasses.replace(
        config,
        dtype=dtype,
        attention="xla",
        rematerialisation=(
            recomputed if execution.rematerialisation == "auto" else execution.rematerialisation
        ),
        scan_layers=not few if execution.layers == "auto" else execution.layers == "scan",
    )
    return Resolved(
        config=dataclasses.replace(config, attention=_attention(config, execution, platform)),
        frozen_dtype=dtype if execution.frozen_dtype == "auto" else execution.frozen_dtype,
    )


def _attention(config: DecoderConfig, execution: Execution, platform: Platform) -> AttentionKernel:
    """The kernel; `config` has the resolved dtype."""
    own = _KERNELS[platform]
    if execution.attention == "auto":
        return "xla" if config.kernel_obstacle(own) else own
    if execution.attention not in ("xla", own):
        raise InputError(
            f"Execution.attention is {execution.attention!r}, which a {platform} lacks; expected "
            f"{' or '.join(dict.fromkeys(['auto', 'xla', own]))}."
        )
    return execution.attention
