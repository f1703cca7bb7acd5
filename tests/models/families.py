"""Tiny `config.json` contents: each family, and each option that changes the result."""

from typing import Any

_COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = _COMMON | {"model_type": "llama", "rope_theta": 500.0}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MISTRAL = _COMMON | {"model_type": "mistral", "sliding_window": 5, "rope_theta": 3000.0}
QWEN2 = _COMMON | {"model_type": "qwen2", "tie_word_embeddings": True}
QWEN3 = _COMMON | {"model_type": "qwen3", "head_dim": 16, "rope_theta": 20_000.0}
_GEMMA = _COMMON | {
    "head_dim": 16,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 24,
    "sliding_window": 5,
}
GEMMA2 = _GEMMA | {
    "model_type": "gemma2",
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
GEMMA3 = _GEMMA | {
    "model_type": "gemma3_text",
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}

FAMILIES = {
    "llama": LLAMA | {"rope_scaling": LLAMA3_SCALING},
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
}
OPTIONS = {
    "llama": LLAMA,
    "llama-llama3-scaling": LLAMA | {"rope_scaling": LLAMA3_SCALING},
    "llama-linear-scaling": LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama-rope-parameters": _COMMON
    | {"model_type": "llama", "rope_parameters": LLAMA3_SCALING | {"rope_theta": 700.0}},
    "llama-tied": LLAMA | {"tie_word_embeddings": True},
    "llama-biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama-one-key-head": LLAMA | {"num_key_value_heads": 1},
    "llama-all-key-heads": LLAMA | {"num_key_value_heads": 4},
    "llama-wide-heads": LLAMA | {"head_dim": 12},
    "llama-gelu": LLAMA | {"hidden_act": "gelu"},
    "mistral": MISTRAL,
    "mistral-no-window": MISTRAL | {"sliding_window": None},
    "mistral-tied": MISTRAL | {"tie_word_embeddings": True, "head_dim": 12},
    "qwen2-tied": QWEN2,
    "qwen2-untied": QWEN2 | {"tie_word_embeddings": False},
    "qwen2-window": QWEN2
    | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": QWEN3,
    "qwen3-tied-biases": QWEN3 | {"tie_word_embeddings": True, "attention_bias": True},
    "qwen3-window": QWEN3
    | {
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gemma2": GEMMA2,
    "gemma2-no-caps": GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma2-untied-biases": GEMMA2 | {"tie_word_embeddings": False, "attention_bias": True},
    "gemma3": GEMMA3,
    "gemma3-older-keys": {
        key: value for key, value in GEMMA3.items() if key not in ("layer_types", "rope_parameters")
    }
    | {
        "rope_theta": 9000.0,
        "rope_local_base_freq": 50.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "sliding_window_pattern": 2,
    },
    "gemma3-logit-cap": GEMMA3 | {"final_logit_softcapping": 3.0, "attention_bias": True},
}
