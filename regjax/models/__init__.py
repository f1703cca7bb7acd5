"""Models: Flax NNX modules here, `(apply, params)` everywhere else."""

from regjax.models.apply import Apply, Cache, ProjectingHead, from_function, split
from regjax.models.config import DecoderConfig, RopeScaling
from regjax.models.decoder import Decoder, create
from regjax.models.execution import Execution, Resolved, resolve_execution
from regjax.models.hf import load, read_config, resolve, save
from regjax.models.lora import Lora, create_lora, merge_lora, unmerge_lora, with_lora
from regjax.models.lora_files import LoraOrigin, load_lora, save_lora
from regjax.models.prompt import SoftPrompt, create_prompt, with_prompts, without_prompts
from regjax.models.prompt_files import PromptOrigin, load_prompt, save_prompt

__all__ = [
    "Apply",
    "Cache",
    "Decoder",
    "DecoderConfig",
    "Execution",
    "Lora",
    "LoraOrigin",
    "ProjectingHead",
    "PromptOrigin",
    "Resolved",
    "RopeScaling",
    "SoftPrompt",
    "create",
    "create_lora",
    "create_prompt",
    "from_function",
    "load",
    "load_lora",
    "load_prompt",
    "merge_lora",
    "read_config",
    "resolve",
    "resolve_execution",
    "save",
    "save_lora",
    "save_prompt",
    "split",
    "unmerge_lora",
    "with_lora",
    "with_prompts",
    "without_prompts",
]
