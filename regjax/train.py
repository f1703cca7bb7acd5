"""Training: a list of stages, each prepared, run by the loop and reported on."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from regjax import (
    adapting,
    checkpoint,
    compilation,
    loop,
    model_flops,
    optim,
    paths,
    prompting,
    sharding,
    throughput,
)
from regjax.classification import ImageExperiment, train_runs
from regjax.data import Batches, Examples
from regjax.errors import InputError
from regjax.experiment import Experiment, write_config
from regjax.files import write_json
from regjax.log import Log, print_table
from regjax.loop import Work
from regjax.models import Apply
from regjax.prepare import (
    LARGEST_WINS,
    Prepared,
    PreparedStage,
    fingerprint,
    prepare,
    save_tokenizer,
)
from regjax.profiling import Profiler, Steps
from regjax.recorder import Chunk
from regjax.results import (
    StageEvaluation,
    finish_stage,
    print_results,
    results_table,
    text_table,
)
from regjax.stages import (
    INITIAL,
    PREVIOUS,
    TrainState,
    abstract_state,
    init_state,
    make_update,
    sharding_of,
)

Parameters = Mapping[str, jax.Array]


def train(
    experiment: Experiment | ImageExperiment,
    workdir: str | Path,
    *,
    model: tuple[Apply, Any] | None = None,
    mesh: Mesh | None = None,
    quiet: bool = False,
    profile: Steps | None = None,
) -> dict[str, Any]:
    """Runs the experiment's stages in `workdir` and returns what is written to its `results.json`.

    A run that was killed goes on from its last checkpoint when started again with the same arguments,
    and ends with the same bits as one that was not (on the same devices). Over several processes
    (`jax.distributed`) all call this with the same arguments and share `workdir`; the first writes.

    Args:
      experiment: what to run; of an `ImageExperiment` see `regjax.classification.train_runs`.
      workdir: folder for checkpoints, logs, predictions and results; made if absent.
      model: `(apply, params)` of a model of your own, in place of the experiment's: `apply` is an
        `Apply` or a function `(params, tokens [B, L]) -> logits [B, L, V]` such as a Linen
        `module.apply`, see `regjax.models.from_function`. No model folder is written for it;
        `regjax.checkpoint.load_params(workdir, stage)` gives what a stage ended with.
      mesh: in place of one of the experiment's shape over all devices, see `regjax.sharding.make_mesh`.
      quiet: print no table.
      profile: first and last step to trace in every stage, into `workdir/profile/STAGE`. TensorBoard and
        xprof open it (`pip install xprof`, `xprof --logdir workdir/profile`), and https://ui.perfetto.dev
        the trace.json.gz in it.

    Raises:
      InputError: for whatever is wrong with config, data or model, before any training.
      TrainingStopped: after `max_bad_steps` steps in a row that were not finite.
      preemption.Interrupted: on SIGTERM or SIGINT, once the step was saved; a `KeyboardInterrupt`.
    """
    if isinstance(experiment, ImageExperiment):
        if model is not None:
            raise InputError("model: an image experiment names its architectures itself")
        return train_runs([experiment], workdir, mesh=mesh, quiet=quiet, profile=profile)
    compilation.enable_cache()
    workdir = Path(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir {workdir} is a file; give a folder")
    workdir.mkdir(parents=True, exist_ok=True)
    run = prepare(experiment, workdir, model, mesh=mesh)
    longest = max(ready.stage.steps for ready in run.stages)
    if profile and profile[0] > longest:
        raise InputError(f"profile starts at step {profile[0]}; the longest stage has {longest}")
    log = Log(workdir, experiment.loggers)
    first = jax.process_index() == 0
    if first:
        save_tokenizer(run, workdir)
        write_config(experiment, workdir / "config.json")
    if first and run.mesh.size > 1 and not quiet:
        shape = ", ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
        every: dict[str, Any] = dict(run.params)
        for ready in run.stages:
            every |= {**ready.adapters.shapes, **prompting.shapes(ready.prompts)}
        print_table(
            f"{experiment.name}: parameters on {run.mesh.size} devices ({shape})",
            sharding.table(every, run.mesh, run.rules),
        )
    finished: dict[str, Parameters] = {INITIAL: run.params}
    results: dict[str, Any] = {"stages": {}}
    params: Parameters = run.params
    for index, ready in enumerate(run.stages):
        stage = ready.stage
        start = params if stage.start == PREVIOUS else finished[stage.start]
        profiler = Profiler(workdir / "profile" / stage.name, profile if first else None)
        params, results["stages"][stage.name], speed = _run_stage(
            run, index, start, workdir, log, profiler
        )
        if first and speed and not quiet:
            print(f"{stage.name}: {speed}", file=sys.stderr)
        if stage.name in {later.stage.start for later in run.stages[index + 1 :]}:
            finished[stage.name] = params
    results["table"] = results_table(run, results["stages"])
    results["text_table"] = text_table(run, results["stages"])
    if first:
        write_json(workdir / "results.json", results)
    multihost_utils.sync_global_devices("results are written")
    if first and not quiet:
        print_results(run, results)
    return results


def _run_stage(
    run: Prepared, index: int, start: Parameters, workdir: Path, log: Log, profiler: Profiler
) -> tuple[Parameters, dict[str, Any], str]:
    """Trains one stage, or what is left of it, and reports on its result and its speed."""
    experiment, ready = run.experiment, run.stages[index]
    stage = ready.stage
    folder = workdir / stage.name

    # state: what is trained goes through the optimizer and the checkpoints, the rest stays as it is
    position = _position(run, index, start)
    start = adapting.start_parameters(ready, start, experiment.seed)
    start = prompting.start_parameters(ready, start, run.tokenizer, experiment.seed)
    places = sharding.place(start, run.mesh, run.rules)
    start = {path: sharding.put(leaf, places[path]) for path, leaf in start.items()}
    trained, frozen = paths.split_by_patterns(paths.unflatten(start), stage.trainable)
    optimizer = optim.build(stage.optimizer, stage.steps, trained)
    state_places = sharding_of(abstract_state(trained, optimizer, run.mesh))
    state = init_state(trained, optimizer, state_places)
    batches = Batches(ready.splits.train, experiment.batch_size, experiment.seed, stage.data)
    rows = sharding.RowLayout(run.mesh, experiment.batch_size, experiment.accumulation)
    update = make_update(
        ready.model,
        stage.objective,
        optimizer,
        ready.codec,
        seed=_stage_seed(experiment.seed, index),
        sharding=state_places,
        parallelism=experiment.parallelism,
    )
    evaluation = StageEvaluation(run, index)

    def chunks(step: int) -> Iterator[Chunk]:
        known: dict[Any, float] = {}
        for batch in batches.only(rows.here).iterate(step, stage.steps):
            placed = rows.put({name: batch[name] for name in batch if name != "record_ids"})
            shapes = tuple((name, array.shape) for name, array in placed.items())
            if shapes not in known:
                known[shapes] = _flops(run, ready, placed, [*trained])
            yield Chunk(
                placed,
                shapes,
                throughput.Work(
                    *throughput.without_padding(batch, placed["tokens"].shape), flops=known[shapes]
                ),
                record_ids=functools.partial(_record_ids, ready.splits.train, batch["record_ids"]),
            )

    def evaluate(state: TrainState) -> dict[str, float]:
        return evaluation("validation", {**frozen, **state.params}).figures

    work = Work(
        name=stage.name,
        folder=folder,
        steps=stage.steps,
        update=lambda state, placed: update(state, frozen, placed),
        chunks=chunks,
        evaluate=evaluate if evaluation.has("validation") else None,
        position=position,
        eval_every=stage.eval_every,
        evaluate_first=bool(stage.eval_every and stage.probes),
        select=stage.select,
        largest=stage.select.rpartition("/")[2] in LARGEST_WINS,
    )
    policy = loop.Policy(
        log_every=experiment.log_every,
        checkpoint_every=experiment.checkpoint_every,
        keep_latest=experiment.keep_latest,
        max_bad_steps=experiment.max_bad_steps,
        keep_best=experiment.keep_best,
        keep_every=experiment.keep_every,
    )
    state, step, recorder = loop.run(work, state, policy, log, profiler)
    params = {**frozen, **state.params}
    result = finish_stage(run, index, params, step, evaluation, folder)
    return params, result, recorder.summary


def _record_ids(examples: Examples, record_ids: np.ndarray, step: int) -> list[str]:
    return [examples.ids[index] for index in np.unique(record_ids[record_ids >= 0])]


def _flops(run: Prepared, ready: PreparedStage, batch: Mapping[str, Any], trained: Any) -> float:
    """Model flops of a step on `batch`; NaN of a model that the caller brought."""
    if run.config is None:
        return math.nan
    objective = ready.stage.objective
    row = model_flops.of_row(run.config, objective, ready.codec, batch, trained)
    return row * math.prod(batch["tokens"].shape[:-1])


def _stage_seed(seed: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0] >> 1)


def _position(run: Prepared, index: int, start: Parameters) -> dict[str, Any]:
    """What has to be the same when a stage is resumed, besides the shapes of its state."""
    experiment, ready = run.experiment, run.stages[index]
    data = ready.stage.data
    # New parameters are a function of the seed, but not to the last bit on every kind of device.
    is_new = start is run.params and run.config is not None and not experiment.model
    return {
        "seed": experiment.seed,
        "data": fingerprint(ready.splits.train),
        "batches": f"batch_size {experiment.batch_size}, packing {data.packing}, "
        f"buckets {list(data.buckets)}{_prompt_place(ready)}",
        "start": 0 if is_new else int(checkpoint.checksum(dict(start))),
        **({"lora": repr(ready.stage.lora)} if ready.stage.lora else {}),
    }


def _prompt_place(ready: PreparedStage) -> str:
    prompt = ready.stage.soft_prompt
    return f", soft prompt {'after bos' if prompt.after_bos else 'first'}" if prompt else ""
