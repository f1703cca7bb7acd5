"""Writes `golden/<family>/`: a tiny model and the logits that transformers on torch gives for it.

    python -m tests.models.write_golden

Golden numbers: transformers 5.23.0, torch 2.13.0, CPU, float32 computation on weights rounded to
bfloat16. Write them again when `families.FAMILIES` changes, or when transformers changes what it
computes and the parity tests agree with the new numbers.
"""

import copy
from pathlib import Path

import numpy as np

from tests.models import torch_models
from tests.models.families import FAMILIES

FOLDER = Path(__file__).parent / "golden"


def main() -> None:
    import torch

    tokens = np.random.default_rng(7).integers(1, 61, (2, 16))
    mask = np.ones_like(tokens)
    mask[0, :5] = 0
    for name, values in FAMILIES.items():
        model = torch_models.random_model(values, seed=11)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        folder = FOLDER / name
        torch_models.write_folder(copy.deepcopy(model).to(torch.bfloat16), values, folder)
        (folder / "generation_config.json").unlink()
        logits = torch_models.logits(model, tokens, mask=mask)
        np.savez_compressed(folder / "logits.npz", tokens=tokens, mask=mask, logits=logits)


if __name__ == "__main__":
    main()
