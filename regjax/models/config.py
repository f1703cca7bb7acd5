"""What a decoder is made of, in one frozen dataclass that a command line can fill."""

import dataclasses
from typing import Literal

from regjax.errors import InputError

LayerKind = Literal["global", "local"]
Precision = Literal["float32", "bfloat16"]
Rematerialisation = Literal["none", "dots", "full"]
AttentionKernel = Literal["xla", "cudnn", "splash"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched for inputs longer than the first training ones."""

    kind: Literal["none", "linear", "llama3"] = "none"
    """`linear` divides every frequency by `factor`; `llama3` divides the low ones only."""
    factor: float = 8.0
    """The stretch, at least 1."""
    low_frequency_factor: float = 1.0
    """llama3: wavelengths above `original_max_positions / low_frequency_factor` are divided."""
    high_frequency_factor: float = 4.0
    """llama3: wavelengths below `original_max_positions / high_frequency_factor` are kept."""
    original_max_positions: int = 8192
    """llama3: the length the model was first trained for, in tokens."""

    def __post_init__(self) -> None:
        if self.kind not in ("none", "linear", "llama3"):
            raise InputError(
                f"RopeScaling.kind is {self.kind!r}; expected 'none', 'linear' or 'llama3'."
            )
        if self.factor < 1:
            raise InputError(f"RopeScaling.factor is {self.factor}; expected at least 1.")
        if not 0 < self.low_frequency_factor < self.high_frequency_factor:
            raise InputError(
                f"RopeScaling.low_frequency_factor is {self.low_frequency_factor}; expected a "
                f"positive number below high_frequency_factor ({self.high_frequency_factor})."
            )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer. The defaults are a small Llama-like one to train from scratch.

    >>> DecoderConfig(layers=5, attention_pattern=("local", "global"), sliding_window=8).layer_kinds
    ('local', 'global', 'local', 'global', 'local')

    Raises:
        InputError: for a combination that no model can have; the message names the field.
    """

    vocabulary_size: int = 512
    """V, the number of token ids."""
    width: int = 128
    """D, the size of the residual stream."""
    layers: int = 4
    """Number of transformer layers."""
    heads: int = 4
    """Number of query heads."""
    key_value_heads: int = 4
    """Number of key and value heads; each serves `heads / key_value_heads` query heads."""
    head_dim: int = 32
    """Size of one head; even. `heads * head_dim` need not be `width`."""
    mlp_width: int = 384
    """Size of the gated hidden layer of each MLP."""
    max_positions: int = 2048
    """The longest input the model is meant for, in tokens. Written to disk, not enforced."""

    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    """Of the MLP's gate. `gelu` is the exact one (erf), `gelu_tanh` its approximation."""
    norm_epsilon: float = 1e-6
    """Added to the mean square in every RMS norm."""
    norm_scale_plus_one: bool = False
    """Norms multiply by `1 + scale` rather than `scale` (Gemma)."""
    post_norms: bool = False
    """Also norm what attention and MLP return, before the residual sum (Gemma 2 and 3)."""
    query_key_norm: bool = False
    """RMS norm of each query and key head before the rotation (Qwen 3, Gemma 3)."""
    attention_bias: bool = False
    """Biases on the query, key and value projections."""
    attention_output_bias: bool = False
    """Bias on the projection that ends attention."""
    mlp_bias: bool = False
    """Biases on the three projections of the MLP."""
    tied_embeddings: bool = False
    """The head is the embedding table, transposed."""
    scale_embeddings: bool = False
    """Token embeddings are multiplied by `sqrt(width)`, rounded to `dtype` (Gemma)."""

    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    rope_scaling: RopeScaling = RopeScaling()
    """Stretch of the rotary frequencies that belong to `rope_theta`."""
    local_rope_theta: float | None = None
    """Base for the local layers, unscaled (Gemma 3). None: they rotate as the global ones do."""
    attention_pattern: tuple[LayerKind, ...] = ("global",)
    """The kinds of the layers in order, repeated as often as needed."""
    sliding_window: int | None = None
    """How many tokens a local layer's query sees, its own included."""
    attention_soft_cap: float | None = None
    """Attention scores s become `cap * tanh(s / cap)` (Gemma 2)."""
    logit_soft_cap: float | None = None
    """Logits likewise (Gemma 2)."""
    query_scale: float | None = None
    """What attention scores are multiplied by. None: `head_dim ** -0.5`."""

    initializer_scale: float = 0.02
    """Standard deviation of the new kernels and embeddings, drawn within two deviations."""
    dtype: Precision = "float32"
    """Of matrix products and the residual stream. Norms, rotations, softmax and logits are float32.
    Products of float32 follow `jax_default_matmul_precision`, which accelerators read as less."""
    attention: AttentionKernel = "xla"
    """What computes attention over whole rows: the compiler, from its formula, everywhere; cuDNN's
    kernel on GPUs (see `kernel_obstacle`); JAX's splash kernel on TPUs. A cache is always read by `xla`."""
    rematerialisation: Rematerialisation = "none"
    """What the backward pass computes again: nothing; all but the layers' projections and what the
    splash kernel returned; all but the layers' inputs."""
    scan_layers: bool = True
    """Compile one layer and scan over it, rather than all of them. Parameters are the same."""

    def __post_init__(self) -> None:
        for name in ("vocabulary_size", "width", "layers", "heads", "key_value_heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise InputError(f"DecoderConfig.{name} is {getattr(self, name)}; at least 1.")
        if self.heads % self.key_value_heads:
            raise InputError(
                f"DecoderConfig.heads is {self.heads}, not a multiple of key_value_heads "
                f"({self.key_value_heads})."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise InputError(
                f"DecoderConfig.head_dim is {self.head_dim}; expected a positive even number."
            )
        if not self.attention_pattern or set(self.attention_pattern) - {"global", "local"}:
            raise InputError(
                f"DecoderConfig.attention_pattern is {self.attention_pattern!r}; expected one or "
                "more of 'global' and 'local'."
            )
        if "local" in self.layer_kinds and (self.sliding_window is None or self.sliding_window < 1):
            raise InputError(
                f"DecoderConfig.sliding_window is {self.sliding_window}, but attention_pattern has "
                "local layers: give the number of tokens they see, at least 1."
            )
        for name in (
            "attention_soft_cap",
            "logit_soft_cap",
            "query_scale",
            "rope_theta",
            "local_rope_theta",
            "norm_epsilon",
            "initializer_scale",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"DecoderConfig.{name} is {value}; expected a positive number.")
        choices = {
            "activation": ("silu", "gelu", "gelu_tanh"),
            "dtype": ("float32", "bfloat16"),
            "attention": ("xla", "cudnn", "splash"),
            "rematerialisation": ("none", "dots", "full"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"DecoderConfig.{name} is {getattr(self, name)!r}; expected one of {allowed}."
                )
        obstacle = self.kernel_obstacle(self.attention)
        if obstacle:
            raise InputError(
                f"DecoderConfig.attention is {self.attention!r}, which takes no {obstacle}; "
                "expected 'xla'."
            )

    def kernel_obstacle(self, kernel: AttentionKernel) -> str:
        """What of this model `kernel` cannot compute; empty if it can.

        >>> DecoderConfig(attention_soft_cap=50.0, dtype="bfloat16").kernel_obstacle("cudnn")
        'attention_soft_cap (50.0)'
        """
        if kernel != "cudnn":
            return ""
        if self.dtype != "bfloat16":
            return f"dtype {self.dtype!r}"
        if self.attention_soft_cap is not None:
            return f"attention_soft_cap ({self.attention_soft_cap})"
        if self.head_dim % 8 or self.head_dim > 128:
            return f"head_dim ({self.head_dim}) that is above 128 or no multiple of 8"
        return ""

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer: `attention_pattern` repeated and cut to `layers`."""
        pattern = self.attention_pattern
        return tuple(pattern[index % len(pattern)] for index in range(self.layers))

    @property
    def score_scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale
