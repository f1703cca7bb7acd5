"""ProMoT's claim where the answer is known: `configs/promot_toy.py` to its end."""

import dataclasses
from pathlib import Path

import pytest

import regjax
from regjax.experiment import load_config

CONFIG = Path(__file__).parents[1] / "configs" / "promot_toy.py"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_model_behind_a_trained_prompt_keeps_other_formats(seed, tmp_path):
    experiment = dataclasses.replace(load_config(CONFIG), seed=seed)
    table = regjax.train(experiment, tmp_path, quiet=True)["text_table"]
    rows = {row["stage"]: row for row in table}
    tuned, promot, joint = (rows[name] for name in ("fine_tuning", "promot", "joint_training"))
    # The other task, asked without a prompt: answered in its own format before, and after ProMoT alone.
    assert rows["pretraining"]["larger/format_ratio"] < 0.02
    assert tuned["larger/format_ratio"] > 0.9
    assert joint["larger/format_ratio"] > 0.4
    assert promot["larger/format_ratio"] < 0.2
    # Prompt tuning leaves the model alone: exactly what it was.
    for figure in ("larger/format_ratio", "larger/exact_match"):
        assert rows["promot_prompt"][figure] == rows["pretraining"][figure]
    # The trained task is learnt as well, and better than by the prompt alone.
    assert abs(promot["main/accuracy"] - tuned["main/accuracy"]) <= 0.03
    assert promot["main/accuracy"] > rows["promot_prompt"]["main/accuracy"]
