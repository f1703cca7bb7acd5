"""A trained model as a reader of scores: saved beside its weights, loaded by path, fed with records."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from regjax import adapting, checkpoint, models, paths, prompting, sharding
from regjax.data import (
    BadRecord,
    Data,
    Record,
    Template,
    encode_records,
    load_tokenizer,
    ordered_batches,  # fmt: skip
)
from regjax.data.bad_records import check_bad_records
from regjax.data.rows import round_up
from regjax.errors import InputError
from regjax.evaluation import READ_OUTS, Score, evaluate_batches, make_score
from regjax.files import write_json
from regjax.models import Apply, DecoderConfig, Execution, resolve_execution
from regjax.models.config import Precision
from regjax.models.lora import LORA
from regjax.models.lora_files import LoraOrigin, load_lora
from regjax.models.prompt import SOFT_PROMPT, with_prompts
from regjax.models.prompt_files import load_prompt
from regjax.scores import ScoreGrid
from regjax.sharding import MeshShape
from regjax.token_grid import TokenGrid

READER_FILE = "regjax.json"


PROMPT = "main"
"""What a soft prompt is called in the parameters of a model that was loaded."""


class Loaded(NamedTuple):
    """A model that was loaded to be asked."""

    model: Apply
    params: Any
    tokenizer: Any


class Scored(NamedTuple):
    """What a reader says of one record."""

    score: float
    probabilities: np.ndarray
    """`[K]` probability of every grid value, not renormalised."""
    mass: float
    """Their sum."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """Model, tokenizer, template, grid and read-out: what turns a record into a score."""

    model: Apply
    params: Any
    tokenizer: Any
    template: Template
    grid: ScoreGrid
    codec: TokenGrid
    read_out: str
    max_length: int
    score: Score
    row_parts: int = 1
    """Parts that `score` deals the rows of a batch out in, which have to divide."""

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        read_out: str = "",
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> Reader:
        """The reader of a workdir (its last stage), of a stage's `model` folder, or of an exported one.

        Rows are dealt out over all devices of this process; parameters are whole on each of them, or,
        where they would take more than half of its memory, dealt out as well.

        Raises:
          InputError: if there is none, or it is not whole.
        """
        folder = find_model(Path(folder))
        saved = _read_reader_file(folder / READER_FILE)
        if saved["grid"] is None:
            raise InputError(
                f"{folder} answers in text, it has no grid of scores: regjax.load_model and "
                "regjax.generate.texts ask it"
            )
        template = Template(**saved["template"])
        grid = ScoreGrid(tuple(saved["grid"]["values"]), tuple(saved["grid"]["texts"]))
        read_out = read_out or saved["read_out"]
        if read_out not in READ_OUTS:
            known = ", ".join(READ_OUTS)
            raise InputError(f"unknown read-out {read_out!r}; known: {known}")
        mesh = _mesh_for(models.read_config(_weights(folder, saved)), dtype)
        model, params, tokenizer = load_model(folder, dtype=dtype, mesh=mesh)
        codec = template.codec(grid, tokenizer)
        score = make_score(model, codec, mesh)
        return cls(
            model, params, tokenizer, template, grid, codec, read_out, saved["max_length"], score,
            sharding.row_parts(mesh),
        )  # fmt: skip

    @property
    def buckets(self) -> tuple[int, ...]:
        """Row lengths below `max_length`: powers of two, so that few shapes are compiled."""
        return tuple(2**n for n in range(5, 31) if 2**n < self.max_length)

    def rows(self, batch_size: int) -> int:
        """`batch_size`, rounded up to what divides among the devices."""
        return round_up(batch_size, self.row_parts)

    def __call__(self, records: Sequence[Mapping[str, Any]], batch_size: int = 64) -> list[Scored]:
        """Scores of records that hold the template's fields, in their order.

        Raises:
          InputError: for the records that cannot be used.
        """
        checked = [Record(f"records[{i}]", record) for i, record in enumerate(records)]
        scored, bad = self.score_records(checked, batch_size)
        check_bad_records("records", bad, len(checked), "stop")
        return [scored[index] for index in range(len(checked))]

    def score_records(
        self, records: Sequence[Record], batch_size: int = 64
    ) -> tuple[dict[int, Scored], list[BadRecord]]:
        """Scores by index, and the records that cannot be used."""
        data = Data(max_length=self.max_length, buckets=self.buckets, on_bad_record="skip")
        examples = encode_records(
            records, data, self.template, self.tokenizer, self.grid, self.codec, labelled=False
        )
        if not examples.examples:
            return {}, examples.bad
        found = evaluate_batches(
            self.score, self.params, ordered_batches(examples, self.rows(batch_size), data),
            self.codec.values, (),
        )  # fmt: skip
        predicted = np.asarray(READ_OUTS[self.read_out](found.probabilities, found.values))
        scored = {
            int(index): Scored(float(score), probabilities, float(probabilities.sum()))
            for index, score, probabilities in zip(
                found.record_ids, predicted, found.probabilities, strict=True
            )
        }
        return scored, examples.bad


def load_model(
    folder: str | Path,
    *,
    soft_prompt: bool = True,
    dtype: Literal["float32", "bfloat16"] = "float32",
    mesh: Mesh | None = None,
) -> Loaded:
    """The model of a workdir (its last stage), of a stage's folder, or of an exported one.

    Adapters are merged into the kernels.

    Args:
      folder: as in `Reader.load`.
      soft_prompt: with the soft prompt it was trained with, if it was; False: take it off, for tasks
        of another format than the one it was trained on.
      dtype: of the parameters; a soft prompt is float32.
      mesh: where the parameters go, by the rules of `regjax.sharding`; by default the default device.

    Raises:
      InputError: if there is none, or it is not whole, or the soft prompt or the adapters are another
        model's.
    """
    folder = find_model(Path(folder))
    saved = _read_reader_file(folder / READER_FILE)
    weights = _weights(folder, saved)
    model, params, config = _load_weights(folder, saved, dtype, mesh)
    tokenizer = load_tokenizer(str(weights))
    if soft_prompt and saved.get("soft_prompt"):
        expected = prompting.origin(config.width, config, tokenizer)
        prompt, origin = load_prompt(folder / saved["soft_prompt"], expected)
        model = with_prompts(model, [PROMPT], after=int(bool(origin.after_bos)))
        params = {**params, SOFT_PROMPT: {PROMPT: prompt}}
    if mesh is not None:
        flat = paths.flatten(params)
        places = sharding.place(flat, mesh, sharding.rules_for(config, mesh))
        params = paths.unflatten({p: sharding.put(leaf, places[p]) for p, leaf in flat.items()})
    return Loaded(model, params, tokenizer)


def _mesh_for(config: DecoderConfig, dtype: Precision) -> Mesh:
    """The devices of this process, with the parameters whole on each where there is room."""
    shapes = jax.eval_shape(lambda: models.split(models.create(config, 0))[1])
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes)) * jnp.dtype(dtype).itemsize
    room = _device_memory()
    shape = MeshShape() if room is None or 2 * size <= room else MeshShape(data=1, fsdp=-1)
    return sharding.make_mesh(shape, jax.local_devices())


def _device_memory() -> int | None:
    """Bytes of one device; None: not known, as of a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def _weights(folder: Path, saved: Mapping[str, Any]) -> str | Path:
    """Where the model's own folder is: here, beside, or what the experiment named."""
    base = saved.get("base_model", "")
    if not base:
        return folder
    return folder / base if (folder / base).is_dir() else base


def _load_weights(
    folder: Path,
    saved: Mapping[str, Any],
    dtype: Literal["float32", "bfloat16"],
    mesh: Mesh | None = None,
) -> tuple[Apply, Any, DecoderConfig]:
    """Model, parameters with adapters merged, and config."""
    weights = _weights(folder, saved)
    # As the run that trained it computes on such devices.
    platform = jax.local_devices()[0].platform
    config = resolve_execution(models.read_config(weights), Execution(), platform).config
    module = models.load(
        weights,
        dtype=dtype,
        compute_dtype=config.dtype if dtype == "float32" else dtype,
        attention=config.attention,
        scan_layers=config.scan_layers,
        mesh=mesh,
        rules=() if mesh is None else sharding.rules_for(config, mesh),
    )
    model, params = models.split(module)
    if saved.get("lora"):
        flat = paths.flatten(params)
        # Parameters of another type are rounded, and have another checksum.
        checksum = int(checkpoint.checksum(flat)) if dtype == "float32" else None
        adapters, lora, _ = load_lora(
            folder / saved["lora"], module.config, params, LoraOrigin(checksum=checksum)
        )
        params = paths.unflatten(adapting.merged({**flat, **paths.flatten({LORA: adapters})}, lora))
    return model, params, module.config


def save_reader(
    folder: Path,
    template: Template,
    grid: ScoreGrid | None,
    read_out: str,
    max_length: int,
    *,
    base_model: str = "",
    soft_prompt: str = "",
    lora: str = "",
) -> None:
    """Writes what a model folder needs besides weights and tokenizer to be asked.

    `soft_prompt` is the folder of the soft prompt, `lora` that of the adapters, `base_model` that of the
    weights and the tokenizer, where it is not this one; all as seen from `folder`.
    """
    saved = {
        "template": dataclasses.asdict(template),
        "grid": None if grid is None else dataclasses.asdict(grid),
        "read_out": read_out,
        "max_length": max_length,
    }
    if base_model:
        saved["base_model"] = base_model
    if soft_prompt:
        saved["soft_prompt"] = soft_prompt
    if lora:
        saved["lora"] = lora
    write_json(folder / READER_FILE, saved)


def find_model(folder: Path) -> Path:
    """The folder with regjax.json that `folder` is, or holds: a stage's, or the last stage's of a workdir."""
    if (folder / READER_FILE).is_file():
        return folder
    if (found := _of_stage(folder)) is not None:
        return found
    if (folder / "config.json").is_file() and not (folder / "model.safetensors").is_file():
        for name in reversed(_stage_names(folder / "config.json")):
            if (found := _of_stage(folder / name)) is not None:
                return found
        raise InputError(f"no stage of {folder} has finished yet: run `regjax train` to its end")
    raise InputError(
        f"{folder} is no model of ours: expected a workdir, or a folder with {READER_FILE} "
        "(written at the end of a stage and by `regjax export`)"
    )


def _of_stage(folder: Path) -> Path | None:
    """`model`, or where the stage trained nothing else `lora` or `soft_prompt`."""
    held = (folder / name for name in ("model", LORA, SOFT_PROMPT))
    return next((place for place in held if (place / READER_FILE).is_file()), None)


def _stage_names(path: Path) -> list[str]:
    try:
        return [stage["name"] for stage in json.loads(path.read_text(encoding="utf-8"))["stages"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no config of a run ({error}): give its --workdir") from error


def _read_reader_file(path: Path) -> dict[str, Any]:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        template, grid = saved["template"], saved["grid"]
        if not (isinstance(template, dict) and isinstance(saved["max_length"], int)):
            raise TypeError
        saved["read_out"], grid is None or (grid["values"], grid["texts"])
        return saved
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); export the model again") from error


def export(
    workdir: str | Path, output: str | Path, *, dtype: Literal["float32", "bfloat16"] = "float32"
) -> Path:
    """Writes the model of a workdir (its last stage) or of a stage's folder to a new folder.

    The folder holds config.json and safetensors that `transformers` loads, adapters merged, the
    tokenizer, the soft prompt in PEFT's layout if there is one (`soft_prompt`), and regjax.json, with
    which `Reader.load`, `regjax predict` and `regjax eval` read scores from it.

    Raises:
      InputError: if there is no finished model, or `output` exists.
    """
    source, output = find_model(Path(workdir)), Path(output)
    if output.exists():
        raise InputError(f"{output} exists already: give another --output")
    saved = _read_reader_file(source / READER_FILE)
    weights = models.resolve(_weights(source, saved))
    _, params, config = _load_weights(source, saved, dtype)
    models.save(output, config, params, dtype=dtype, source=weights)
    if saved.get("soft_prompt"):
        shutil.copytree(source / saved["soft_prompt"], output / SOFT_PROMPT)
        saved["soft_prompt"] = SOFT_PROMPT
    kept = {name: value for name, value in saved.items() if name not in ("base_model", "lora")}
    write_json(output / READER_FILE, kept)
    return output
