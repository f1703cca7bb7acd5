"""On which TPU slices do large models train? Compiled for each slice, without a TPU and without a weight.

    JAX_PLATFORMS=cpu python benchmarks/tpu_plans.py --output plans.jsonl

writes a line for each model and slice as it is done (those that are there are left out when it is called
again) and prints all as the table of docs/tpu.md. Needs `pip install 'regjax[tpu]'` on any x86 Linux machine;
a slice takes the compiler one to several minutes.

The step is RAFT's on a grid of five single tokens: L = 2048, one row a chip, parameters dealt out over all
chips (`--mesh.data 1 --mesh.fsdp -1`), layers computed again in the backward pass, splash attention,
bfloat16 products. Full fine-tuning: float32 parameters and AdamW's two moments. LoRA: rank 16 on every linear
layer, dealt out as its kernels are, the frozen model in bfloat16.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

import jax

from regjax import chips, models, paths, plan, programs, sharding, topology
from regjax.compiled import compile_program
from regjax.log import print_table
from regjax.models import DecoderConfig, Execution, Lora, RopeScaling, with_lora
from regjax.models.lora import adapter_shapes
from regjax.objectives import Raft
from regjax.optim import Optimizer
from regjax.token_grid import TokenGrid

LENGTH = 2048
RANK = 16

# https://huggingface.co/meta-llama/Llama-3.1-8B/blob/main/config.json
LLAMA_8B = DecoderConfig(
    vocabulary_size=128256, width=4096, layers=32, heads=32, key_value_heads=8, head_dim=128,
    mlp_width=14336, max_positions=131072, norm_epsilon=1e-5, rope_theta=500_000.0,
    rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
)  # fmt: skip

# https://huggingface.co/Qwen/Qwen3-32B/blob/main/config.json
QWEN_32B = DecoderConfig(
    vocabulary_size=151936, width=5120, layers=64, heads=64, key_value_heads=8, head_dim=128,
    mlp_width=25600, max_positions=40960, norm_epsilon=1e-6, rope_theta=1_000_000.0,
    query_key_norm=True,
)  # fmt: skip

CASES: dict[str, tuple[DecoderConfig, Lora | None]] = {
    "Llama-3.1-8B, LoRA": (LLAMA_8B, Lora(rank=RANK)),
    "Llama-3.1-8B, full": (LLAMA_8B, None),
    "Qwen3-32B, LoRA": (QWEN_32B, Lora(rank=RANK)),
}
SLICES = (
    "v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16",
    "v5p:2x2x1", "v5p:2x2x2", "v5p:4x4x4",
    "v6e:2x2", "v6e:4x4", "v6e:8x8", "v6e:16x16",
)  # fmt: skip

LIMITS = {"compute": "products", "memory": "memory", "exchange": "exchanges"}


def program_of(config: DecoderConfig, lora: Lora | None, devices: list[Any]) -> programs.Program:
    """The training step of a model on a slice."""
    mesh = sharding.make_mesh(sharding.MeshShape(data=1, fsdp=-1), devices)
    resolved = models.resolve_execution(config, Execution(), "tpu")
    config = resolved.config
    apply = models.split(jax.eval_shape(lambda: models.create(config, 0)))[0]
    shapes = jax.eval_shape(lambda: paths.flatten(models.split(models.create(config, 0))[1]))
    trainable: tuple[str, ...] = (".*",)
    if lora is not None:
        shapes = {
            path: jax.ShapeDtypeStruct(leaf.shape, resolved.frozen_dtype)
            for path, leaf in shapes.items()
        }
        shapes |= adapter_shapes(lora, paths.unflatten(shapes))
        apply, trainable = with_lora(apply, lora), ("^lora/",)
    places = sharding.place(shapes, mesh, sharding.rules_for(config, mesh))
    params = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[path])
        for path, leaf in shapes.items()
    }
    return programs.training_step(
        "raft",
        apply,
        params,
        trainable,
        Raft(),
        TokenGrid.from_ids([10, 11, 12, 13, 14], [1.0, 2.0, 3.0, 4.0, 5.0]),
        Optimizer(),
        programs.rows_of(mesh.size, LENGTH, labels=4),
        mesh,
        config=config,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, one a plan")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--slices", nargs="*", default=list(SLICES))
    arguments = parser.parse_args()
    for case in arguments.cases:
        for name in arguments.slices:
            if (case, name) in {(one["case"], one["slice"]) for one in read(arguments.output)}:
                continue
            devices = topology.tpu_devices(name)
            chip = chips.find(devices[0].device_kind)
            start = time.perf_counter()
            program = program_of(*CASES[case], devices)
            result = compile_program(program.lower, program.parts, chip)
            found = {
                "case": case,
                "slice": name,
                "chips": len(devices),
                "compiled_in": time.perf_counter() - start,
                "date": time.strftime("%Y-%m-%d"),
                "jax": jax.__version__,
                "libtpu": importlib.metadata.version("libtpu"),
                **plan.Planned(program, result, chip).to_json(),
            }
            with arguments.output.open("a") as file:
                file.write(json.dumps(found) + "\n")
    print_table("", [row(one) for one in read(arguments.output)])


def read(path: Path) -> list[dict[str, Any]]:
    """What is there already, in the order of `CASES` and `SLICES`."""
    if not path.is_file():
        return []
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(found, key=lambda one: (one["case"], SLICES.index(one["slice"])))


def row(one: dict[str, Any]) -> dict[str, Any]:
    """A line of the table."""
    arguments = sum(one["arguments"].values())
    cells = {
        "step": one["case"],
        "slice": one["slice"],
        "arguments": f"{arguments / chips.GIB:.1f}",
        "in all, GiB a chip": f"{one['needed_bytes'] / chips.GIB:.1f}",
        "of": f"{one['memory_bytes'] / chips.GIB:.0f}",
        "fits": "yes" if one["fits"] else "no",
        "ms at least": "",
        "limited by": "",
        "MFU at most": "",
    }
    if "seconds" in one:
        seconds = one["seconds"]
        cells["ms at least"] = f"{one['seconds_at_least'] * 1e3:.0f}"
        cells["limited by"] = LIMITS[max(seconds, key=seconds.get)]
        cells["MFU at most"] = f"{one['utilisation_at_most']:.0%}"
    return cells


if __name__ == "__main__":
    main()
