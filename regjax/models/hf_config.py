"""Translates `config.json` of a Hugging Face folder to a `DecoderConfig` and back, strictly.

Every key is read, listed below as harmless, or an error: a key that is passed over could change
what the model computes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from regjax.errors import InputError
from regjax.models.config import DecoderConfig, LayerKind, RopeScaling

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_LAYER_TYPES: dict[str, LayerKind] = {"full_attention": "global", "sliding_attention": "local"}

# Neither changes the logits nor the training we do.
_HARMLESS = {
    *TOKEN_IDS,
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "cache_implementation",
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
}

# Options that are not implemented, with the values that leave them off.
_OFF: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "attention_dropout": (0, None),
    "attn_logit_softcapping": (None,),
    "auto_map": (None,),
    "final_logit_softcapping": (None,),
    "is_encoder_decoder": (False, None),
    "quantization_config": (None,),
    "rope_interleaved": (False, None),
    "sliding_window": (None,),
    "tie_encoder_decoder": (False, None),
    "use_bidirectional_attention": (False, None),
    "use_mrope": (False, None),
}

_REQUIRED = object()


class _Fields:
    """The keys of one JSON object; each is taken once, and none may be left over."""

    def __init__(self, values: Mapping[str, Any], place: str):
        self.values = dict(values)
        self.place = place

    def take(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        if key not in self.values and default is _REQUIRED:
            raise InputError(f"{self.place}: {key!r} is missing; expected {kind.__name__}.")
        value = self.values.pop(key, default)
        if value is None and default is not _REQUIRED:
            return None
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise InputError(f"{self.place}: {key!r} is {value!r}; expected {kind.__name__}.")
        return value

    def finish(self) -> None:
        for key, value in self.values.items():
            if key in _HARMLESS or (key in _OFF and value in _OFF[key]):
                continue
            raise InputError(
                f"{self.place}: the option {key!r} with the value {value!r} is not implemented. "
                "Remove it if it has no influence on what the model computes."
            )


def config_from_json(values: Mapping[str, Any], place: str = "config.json") -> DecoderConfig:
    """The `DecoderConfig` of a `config.json` of transformers 5 or older.

    Keys that are absent have the defaults that transformers gives that family.

    Raises:
        InputError: names the place and the architecture, key or value that is not implemented.
    """
    fields = _Fields(values, place)
    family = fields.take("model_type", str)
    if family not in ARCHITECTURES:
        raise InputError(
            f"{place}: the architecture {family!r} (model_type) is not implemented; expected one "
            f"of {', '.join(ARCHITECTURES)}."
        )
    gemma = family in ("gemma2", "gemma3_text")
    qwen3 = family == "qwen3"
    width = fields.take("hidden_size", int)
    heads = fields.take("num_attention_heads", int)
    layers = fields.take("num_hidden_layers", int)
    max_positions = fields.take("max_position_embeddings", int)
    key_value_heads = fields.take(
        "num_key_value_heads", int, None if family == "llama" else _REQUIRED
    )
    head_dim = fields.take("head_dim", int, {"qwen3": 128}.get(family, 256 if gemma else None))
    if gemma:
        fields.values.pop("hidden_act", None)
    activation = fields.take(
        "hidden_activation" if gemma else "hidden_act",
        str,
        "gelu_pytorch_tanh" if gemma else "silu",
    )
    if activation not in _ACTIVATIONS:
        raise InputError(
            f"{place}: the activation {activation!r} is not implemented; expected one of "
            f"{', '.join(_ACTIVATIONS)}."
        )
    bias = family == "qwen2"
    if family in ("llama", "qwen3", "gemma2", "gemma3_text"):
        bias = fields.take("attention_bias", bool, False)
    pattern, window = _layer_pattern(fields, family, layers)
    theta, scaling, local_theta = _rope(fields, family, max_positions)
    scalar = fields.take("query_pre_attn_scalar", float, 256.0) if gemma else None
    attention_soft_cap = logit_soft_cap = None
    if family == "gemma2":
        attention_soft_cap = fields.take("attn_logit_softcapping", float, 50.0)
    if gemma:
        logit_soft_cap = fields.take(
            "final_logit_softcapping", float, 30.0 if family == "gemma2" else None
        )
    options: dict[str, Any] = {
        "vocabulary_size": fields.take("vocab_size", int),
        "width": width,
        "layers": layers,
        "heads": heads,
        "key_value_heads": heads if key_value_heads is None else key_value_heads,
        "head_dim": width // heads if head_dim is None else head_dim,
        "mlp_width": fields.take("intermediate_size", int),
        "max_positions": max_positions,
        "activation": _ACTIVATIONS[activation],
        "norm_epsilon": fields.take("rms_norm_eps", float, 1e-6),
        "norm_scale_plus_one": gemma,
        "post_norms": gemma,
        "query_key_norm": qwen3 or family == "gemma3_text",
        "attention_bias": bias,
        "attention_output_bias": bias and family != "qwen2",
        "mlp_bias": fields.take("mlp_bias", bool, False) if family == "llama" else False,
        "tied_embeddings": fields.take("tie_word_embeddings", bool, gemma),
        "scale_embeddings": gemma,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "local_rope_theta": local_theta,
        "attention_pattern": pattern,
        "sliding_window": window,
        "attention_soft_cap": attention_soft_cap,
        "logit_soft_cap": logit_soft_cap,
        "query_scale": None if scalar is None else scalar**-0.5,
        "initializer_scale": fields.take("initializer_range", float, 0.02),
    }
    fields.finish()
    try:
        return DecoderConfig(**options)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


def _layer_pattern(
    fields: _Fields, family: str, layers: int
) -> tuple[tuple[LayerKind, ...], int | None]:
    """Which layers are local, as the shortest pattern that repeats, and their window."""
    if family == "llama":
        return ("global",), None
    window = fields.take("sliding_window", int, None if family.startswith("qwen") else 4096)
    if family == "mistral":
        return (("global",), None) if window is None else (("local",), window)
    kinds: list[LayerKind]
    if family in ("qwen2", "qwen3"):
        if not fields.take("use_sliding_window", bool, False):
            window = None
        first_local = fields.take("max_window_layers", int, 28)
        kinds = [
            "local" if window is not None and index >= first_local else "global"
            for index in range(layers)
        ]
    else:
        # Some published Gemma 2 folders give the window twice.
        _agreed(
            fields.place, "sliding_window", window, fields.take("sliding_window_size", int, None)
        )
        period = 2
        if family == "gemma3_text":
            period = fields.take("_sliding_window_pattern", int, 6)
            period = fields.take("sliding_window_pattern", int, period)
        kinds = ["local" if (index + 1) % period else "global" for index in range(layers)]
    types = fields.take("layer_types", list, None)
    if types is not None:
        unknown = [kind for kind in types if kind not in _LAYER_TYPES]
        if unknown or len(types) != layers:
            raise InputError(
                f"{fields.place}: 'layer_types' is {types!r}; expected {layers} (one a layer) of "
                f"{', '.join(_LAYER_TYPES)}."
            )
        kinds = [_LAYER_TYPES[kind] for kind in types]
    shortest = next(
        size
        for size in range(1, layers + 1)
        if all(kind == kinds[index % size] for index, kind in enumerate(kinds))
    )
    return tuple(kinds[:shortest]), window if "local" in kinds else None


def _rope(
    fields: _Fields, family: str, max_positions: int
) -> tuple[float, RopeScaling, float | None]:
    """Theta, its scaling and the local layers' own theta, from the newer and the older keys."""
    place = fields.place
    parameters = fields.take("rope_parameters", dict, None)
    older_scaling = fields.take("rope_scaling", dict, None)
    older_theta = fields.take("rope_theta", float, None)
    local_theta = None
    if family == "gemma3_text":
        sections = _Fields(parameters or {}, f"{place}, rope_parameters")
        parameters = sections.take("full_attention", dict, None)
        local = sections.take("sliding_attention", dict, None)
        sections.finish()
        older_local = fields.take("rope_local_base_freq", float, None)
        section_theta, scaling = _rope_section(
            local or {}, f"{place}, rope_parameters, sliding_attention", max_positions
        )
        if scaling != RopeScaling():
            raise InputError(
                f"{place}: rope scaling of the sliding layers ({local!r}) is not implemented."
            )
        local_theta = _agreed(place, "the local rope_theta", section_theta, older_local) or 10_000.0
    theta, scaling = _rope_section(parameters or {}, f"{place}, rope_parameters", max_positions)
    inner_theta, older = _rope_section(older_scaling or {}, f"{place}, rope_scaling", max_positions)
    theta = _agreed(
        place, "rope_theta", _agreed(place, "rope_theta", theta, inner_theta), older_theta
    )
    scaling = _agreed(
        place, "rope_scaling", scaling if parameters else None, older if older_scaling else None
    )
    default_theta = 1_000_000.0 if family == "gemma3_text" else 10_000.0
    return theta or default_theta, scaling or RopeScaling(), local_theta


def _agreed(place: str, name: str, newer: Any, older: Any) -> Any:
    if newer is not None and older is not None and newer != older:
        raise InputError(f"{place}: {name} is given twice, as {newer} and as {older}; keep one.")
    return older if newer is None else newer


def _rope_section(
    values: Mapping[str, Any], place: str, max_positions: int
) -> tuple[float | None, RopeScaling]:
    fields = _Fields({key: value for key, value in values.items() if value is not None}, place)
    theta = fields.take("rope_theta", float, None)
    kind = fields.take("rope_type", str, fields.values.get("type", "default"))
    fields.values.pop("type", None)
    if fields.take("partial_rotary_factor", float, 1.0) != 1.0:
        raise InputError(
            f"{place}: partial_rotary_factor {values['partial_rotary_factor']} is not "
            "implemented; only 1."
        )
    if kind == "default":
        scaling = RopeScaling()
    elif kind == "linear":
        scaling = RopeScaling("linear", factor=fields.take("factor", float))
    elif kind == "llama3":
        scaling = RopeScaling(
            "llama3",
            factor=fields.take("factor", float),
            low_frequency_factor=fields.take("low_freq_factor", float),
            high_frequency_factor=fields.take("high_freq_factor", float),
            original_max_positions=fields.take(
                "original_max_position_embeddings", int, max_positions
            ),
        )
    else:
        raise InputError(
            f"{place}: the rope_type {kind!r} is not implemented; expected default, linear or "
            "llama3."
        )
    fields.finish()
    return theta, scaling


def json_from_config(config: DecoderConfig, model_type: str | None = None) -> dict[str, Any]:
    """The `config.json` of a `DecoderConfig`, readable by transformers 5 and 4.

    Without a `model_type` it is the first family, of those in `ARCHITECTURES`, that has all the
    options; that a family has them is checked by reading the result back.

    Raises:
        InputError: no family has this mix of options, or not the one that was asked for; the
            message names the options.
    """
    if model_type is not None and model_type not in ARCHITECTURES:
        raise InputError(f"model_type {model_type!r} is not one of {', '.join(ARCHITECTURES)}.")
    lacking: dict[str, list[str]] = {}
    for family in ARCHITECTURES if model_type is None else (model_type,):
        values = _as_family(config, family)
        lacking[family] = _differences(config, config_from_json(values))
        if family in ("llama", "gemma2", "gemma3_text") and config.width % config.heads:
            lacking[family].append("width (not a multiple of heads)")
        if not lacking[family]:
            return values
    closest = min(lacking, key=lambda family: len(lacking[family]))
    raise InputError(
        f"transformers has no family with this mix of options; {closest} comes closest but "
        f"does not have, as this DecoderConfig does: {', '.join(lacking[closest])}."
    )


def _as_family(config: DecoderConfig, family: str) -> dict[str, Any]:
    """What `config` is in the keys of `family`; options that it lacks are lost."""
    scaling = config.rope_scaling
    older_scaling: dict[str, Any] | None = None
    if scaling.kind != "none":
        older_scaling = {"rope_type": scaling.kind, "factor": float(scaling.factor)}
    if older_scaling is not None and scaling.kind == "llama3":
        older_scaling |= {
            "low_freq_factor": float(scaling.low_frequency_factor),
            "high_freq_factor": float(scaling.high_frequency_factor),
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    theta = float(config.rope_theta)
    rope = {"rope_type": "default"} | (older_scaling or {}) | {"rope_theta": theta}
    activations = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    gemma = family in ("gemma2", "gemma3_text")
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_positions,
        "hidden_activation" if gemma else "hidden_act": activations[config.activation],
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": config.initializer_scale,
        "attention_dropout": 0.0,
        "use_cache": True,
        "rope_theta": theta,
        "rope_scaling": older_scaling,
        "rope_parameters": rope,
    }
    if family != "qwen2" and family != "mistral":
        values["attention_bias"] = config.attention_bias
    if family == "llama":
        values["mlp_bias"] = config.mlp_bias
        return values
    local = "local" in config.layer_kinds
    values["sliding_window"] = config.sliding_window if local else None
    if family == "mistral":
        return values
    theirs = {ours: name for name, ours in _LAYER_TYPES.items()}
    values["layer_types"] = [theirs[kind] for kind in config.layer_kinds]
    if not gemma:
        values["use_sliding_window"] = local
        values["max_window_layers"] = config.layer_kinds.index("local") if local else config.layers
        return values
    values["query_pre_attn_scalar"] = round(config.score_scale**-2)
    values["attn_logit_softcapping"] = config.attention_soft_cap if family == "gemma2" else None
    values["final_logit_softcapping"] = config.logit_soft_cap
    if family == "gemma3_text":
        local_theta = config.local_rope_theta if config.local_rope_theta is not None else theta
        values["rope_local_base_freq"] = float(local_theta)
        values["rope_parameters"] = {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": float(local_theta)},
        }
    return values


def _differences(one: DecoderConfig, other: DecoderConfig) -> list[str]:
    """The fields, with their values, in which `one` computes something else than `other`."""
    first, second = _meaning(one), _meaning(other)
    return [f"{name}={getattr(one, name)!r}" for name in first if first[name] != second[name]]


def _meaning(config: DecoderConfig) -> dict[str, Any]:
    """The fields that matter for what is computed, equal wherever the computation is."""
    values = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ("dtype", "attention", "rematerialisation", "scan_layers")
    }
    values["attention_pattern"] = config.layer_kinds
    values["query_scale"] = config.score_scale
    if config.rope_scaling.kind == "none":
        values["rope_scaling"] = RopeScaling()
    if config.rope_scaling.kind == "linear":
        values["rope_scaling"] = RopeScaling("linear", factor=config.rope_scaling.factor)
    if "local" not in config.layer_kinds:
        values["sliding_window"] = values["local_rope_theta"] = None
    elif config.local_rope_theta is None and config.rope_scaling.kind == "none":
        values["local_rope_theta"] = config.rope_theta
    return values
