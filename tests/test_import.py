"""`import regjax` costs little more than jax, flax and optax."""

import json
import subprocess
import sys
from pathlib import Path

HEAVY = (
    "tensorflow", "tensorflow_datasets", "transformers", "tokenizers", "torch", "matplotlib", "orbax",
    "grain", "sklearn", "scipy.stats", "safetensors", "pandas", "rich",
)  # fmt: skip


def loaded_after(code):
    script = f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    root = Path(__file__).resolve().parents[1]
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    return set(json.loads(found.stdout.splitlines()[-1]))


def test_nothing_heavy_is_imported():
    before = loaded_after("import jax, flax.nnx, optax, tyro")
    after = loaded_after("import regjax, regjax.cli")
    assert "regjax.train" in after
    assert [name for name in HEAVY if name in after - before] == []
