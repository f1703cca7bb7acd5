"""What a finished stage keeps in files: its model, its soft prompts, and how to ask it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from regjax import checkpoint, models, paths, prompting, sharding
from regjax.data import task_template
from regjax.files import new_folder
from regjax.models.prompt import SOFT_PROMPT
from regjax.models.prompt_files import save_prompt
from regjax.prepare import Prepared, PreparedStage
from regjax.reader import save_reader

Parameters = Mapping[str, jax.Array]


def keep_parameters(run: Prepared, ready: PreparedStage, params: Parameters, folder: Path) -> None:
    """Writes a stage's parameters into its folder: `model`, and `soft_prompt/NAME` for each prompt.

    A stage that trained prompts only writes no model: its `soft_prompt/regjax.json` names the folder
    where the model is. A model that the caller brought goes into `params.safetensors`.
    """
    first = jax.process_index() == 0
    if run.config is None:
        whole: dict[str, Any] = {path: sharding.fetch(leaf) for path, leaf in params.items()}
        if first:
            checkpoint.save_params(folder, whole)
        return
    model = {path: leaf for path, leaf in params.items() if not prompting.is_prompt(path)}
    origins = {
        name: prompting.origin(
            source.shape[1],
            run.config,
            run.tokenizer,
            model,
            name=run.experiment.model or run.experiment.name,
            after_bos=source.config.after_bos,
        )
        for name, source in ready.prompts.items()
    }
    if first and origins:
        with new_folder(folder / SOFT_PROMPT) as prompts:
            for name, origin in origins.items():
                save_prompt(prompts / name, params[prompting.path_of(name)], origin)
            if ready.base_model:
                _save_reader(run, ready, prompts, ready.tasks[0].name)
    if ready.base_model:
        return
    target = folder / "model"
    with new_folder(target) if first else contextlib.nullcontext(target) as kept:
        models.save(kept, run.config, paths.unflatten(model))
        if first:
            run.tokenizer.save_pretrained(str(kept))
            beside = f"../{SOFT_PROMPT}/{ready.tasks[0].name}" if ready.prompts else ""
            _save_reader(run, ready, kept, beside)


def _save_reader(run: Prepared, ready: PreparedStage, folder: Path, soft_prompt: str) -> None:
    task, stage = ready.tasks[0], ready.stage
    base = ready.base_model
    earlier = any(base == other.stage.name for other in run.stages)
    if earlier:
        base = f"../../{base}/model"
    elif base and os.path.isdir(base):
        base = str(Path(base).resolve())
    save_reader(
        folder,
        task_template(task),
        task.grid,
        (*stage.decisions, "mean")[0],
        stage.data.max_length,
        base_model=base,
        soft_prompt=soft_prompt,
    )
