"""ProMoT, prompt tuning first and model tuning after it, and what it is compared with.

Wang et al., 2024, *Two-stage LLM fine-tuning with less specialization and more generalization*
(arXiv 2211.00635). A soft prompt that is trained first takes up the format of the task, so that the model
that is then trained behind it need not; with the prompt taken off, the model answers other tasks in
their own formats. Every method here is a tuple of stages for `Experiment(stages=...)`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from regjax.data import Task
from regjax.experiment import MAIN
from regjax.models.prompt import SOFT_PROMPT, SoftPrompt
from regjax.objectives import Sft
from regjax.optim import Optimizer, ParameterGroup
from regjax.probes import Answers, GradientAlignment, Probe
from regjax.stages import INITIAL, Stage

PROMPT = (f"^{SOFT_PROMPT}/",)
MODEL = (f"^(?!{SOFT_PROMPT}/)",)
EVERYTHING = (".*",)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the methods have in common. The defaults are the paper's for mT5 (appendix B), where it says.

    The paper does not say how its prompt begins, nor whether its first stage smooths labels; here it
    begins with sampled vocabulary, and no labels are smoothed. That the model's rate is times the RMS of
    the parameter (`parameter_scale`) is our reading of "T5 default". The dropout of 0.1 is left out:
    the decoders here have none.
    """

    task: Task | None = None
    """What is trained; None: the experiment's own task."""

    probes: tuple[Probe, ...] = ()
    """What else is measured on every stage, above all other tasks without the prompt."""

    alignment: bool = False
    """Measure the cosine between the gradients on true and on shuffled labels, behind each stage's own
    prompt: `alignment/cosine_GROUP`."""

    prompt: SoftPrompt = SoftPrompt(length=100)  # noqa: RUF009  (frozen)
    """The soft prompt. PaLM 8b: 50 long."""

    prompt_steps: int = 5000
    """Updates of the prompt."""

    prompt_eval_every: int = 1000
    """Steps between its evaluations, by which the best prompt is chosen."""

    prompt_optimizer: Optimizer = Optimizer(
        name="adafactor",
        learning_rate=0.2,
        schedule="constant",
        warmup=0.0,
        clip_norm=0.0,
        weight_decay=1e-5,
        factored=False,
    )
    """Of the prompt. PaLM 8b: a rate of 0.3. The decay is the released code's."""

    prompt_objective: Any = Sft()  # noqa: RUF009
    """Loss of the prompt."""

    model_steps: int = 1000
    """Updates of the model."""

    model_eval_every: int = 100
    """Steps between its evaluations, by which the best model is chosen."""

    model_optimizer: Optimizer = Optimizer(
        name="adafactor",
        learning_rate=1e-3,
        schedule="constant",
        warmup=0.0,
        clip_norm=0.0,
        parameter_scale=True,
    )
    """Of the model, and of both where they are trained together."""

    model_objective: Any = Sft(label_smoothing=0.1)  # noqa: RUF009
    """Loss of the model."""

    select: str = "exact_match"
    """Figure of the trained task's validation answers that chooses the checkpoint; empty: the last."""

    max_new_tokens: int = 16
    """Length at which an answer to the trained task is cut."""

    start: str = INITIAL
    """What the first stage starts from, see `Stage.start`."""


def prompt_tuning(recipe: Recipe, *, name: str = "prompt_tuning") -> tuple[Stage, ...]:
    """The soft prompt alone is trained (Lester et al., 2021)."""
    return (
        _stage(
            recipe, name, PROMPT, recipe.start, recipe.prompt,
            objective=recipe.prompt_objective,
            optimizer=recipe.prompt_optimizer,
            steps=recipe.prompt_steps,
            eval_every=recipe.prompt_eval_every,
        ),
    )  # fmt: skip


def fine_tuning(recipe: Recipe, *, name: str = "fine_tuning") -> tuple[Stage, ...]:
    """The whole model is trained, without a prompt: standard fine-tuning."""
    return (_model_stage(recipe, name, EVERYTHING, recipe.start, prompt=None),)


def promot(recipe: Recipe, *, name: str = "promot") -> tuple[Stage, ...]:
    """The prompt first, then the model behind the prompt, which stays as it is."""
    first = prompt_tuning(recipe, name=f"{name}_prompt")
    return (*first, _model_stage(recipe, name, MODEL, first[-1].name, recipe.prompt))


def promot_with_shots(recipe: Recipe, shots: int = 1, *, name: str = "") -> tuple[Stage, ...]:
    """ProMoT with worked examples before every training input, in both stages: "ProMoT + 1-shot".

    How the paper chooses the example is not stated; here it is drawn once from the training records.
    """
    stages = promot(recipe, name=name or f"promot_{shots}_shot")
    return tuple(dataclasses.replace(stage, shots=shots) for stage in stages)


def joint_training(recipe: Recipe, *, name: str = "joint_training") -> tuple[Stage, ...]:
    """Ablation: prompt and model are trained together, at the model's rate."""
    prompt = ParameterGroup(PROMPT[0], factored=False)
    rule = recipe.model_optimizer
    rule = dataclasses.replace(rule, groups=(*rule.groups, prompt))
    together = dataclasses.replace(recipe, model_optimizer=rule)
    return (_model_stage(together, name, EVERYTHING, recipe.start, recipe.prompt),)


def fixed_prompt(recipe: Recipe, *, name: str = "fixed_prompt") -> tuple[Stage, ...]:
    """Ablation: the model is trained behind a random prompt that was never trained.

    The paper draws it from a uniform distribution: `SoftPrompt(init="uniform")`.
    """
    prompt = dataclasses.replace(recipe.prompt, init="uniform")
    return (_model_stage(recipe, name, MODEL, recipe.start, prompt),)


def multi_task_promot(
    recipe: Recipe, tasks: tuple[Task, ...], *, name: str = "multi_task_promot"
) -> tuple[Stage, ...]:
    """One prompt for each task, each trained by itself, then the model on all tasks mixed.

    Every record stands behind the prompt of its own task. The tasks are mixed as they come: a task with
    twice the records is seen twice as often. The last checkpoint is the result of the last stage.
    """
    prompts = []
    start = recipe.start
    for task in tasks:
        own = dataclasses.replace(recipe, task=task, start=start)
        stages = prompt_tuning(own, name=f"{name}_{task.name}")
        trained = (f"^{SOFT_PROMPT}/{task.name}$",)
        prompts += [dataclasses.replace(stage, trainable=trained) for stage in stages]
        start = prompts[-1].name
    mixed = Stage(
        name,
        recipe.model_objective,
        trainable=MODEL,
        start=start,
        steps=recipe.model_steps,
        optimizer=recipe.model_optimizer,
        eval_every=recipe.model_eval_every,
        tasks=tasks,
        soft_prompt=recipe.prompt,
        probes=(*(_answers(recipe, task, task.name) for task in tasks), *recipe.probes),
    )
    return (*prompts, mixed)


def _model_stage(
    recipe: Recipe, name: str, trainable: tuple[str, ...], start: str, prompt: SoftPrompt | None
) -> Stage:
    return _stage(
        recipe, name, trainable, start, prompt,
        objective=recipe.model_objective,
        optimizer=recipe.model_optimizer,
        steps=recipe.model_steps,
        eval_every=recipe.model_eval_every,
    )  # fmt: skip


def _stage(
    recipe: Recipe,
    name: str,
    trainable: tuple[str, ...],
    start: str,
    prompt: SoftPrompt | None,
    **fields: Any,
) -> Stage:
    task = recipe.task.name if recipe.task else MAIN
    asked_with = task if prompt else ""
    probes = (_answers(recipe, recipe.task, asked_with), *recipe.probes)
    if recipe.alignment:
        probes += (GradientAlignment(recipe.task, soft_prompt=asked_with),)
    return Stage(
        name,
        trainable=trainable,
        start=start,
        tasks=(recipe.task,) if recipe.task else (),
        soft_prompt=prompt,
        decisions=(),
        select=f"{task}/{recipe.select}" if recipe.select else "",
        probes=probes,
        **fields,
    )


def _answers(recipe: Recipe, task: Task | None, soft_prompt: str) -> Answers:
    return Answers(task, soft_prompt=soft_prompt, max_new_tokens=recipe.max_new_tokens)
