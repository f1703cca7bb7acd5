"""Training image experiments: the stages of one run, or of several side by side."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from regjax import checkpoint, compilation, loop, optim, sharding
from regjax.classification import program, results
from regjax.classification.batches import chunks_of
from regjax.classification.experiment import NEW, ImageExperiment, ImageStage
from regjax.classification.prepare import (
    Prepared,
    check_stage,
    facts_of,
    given_of,
    prepare_runs,
)
from regjax.classification.runs import check_alike, numbers_of, stacked
from regjax.classification.saved import save_classifiers
from regjax.errors import InputError
from regjax.experiment import to_json
from regjax.files import write_json
from regjax.log import Log, print_table
from regjax.models import vision
from regjax.profiling import Profiler, Steps
from regjax.sharding import replicated


class Finished(NamedTuple):
    """The models of a stage."""

    classifier: vision.Classifier
    params: dict[str, jax.Array]
    statistics: dict[str, jax.Array]


def train_runs(
    experiments: Sequence[ImageExperiment],
    workdir: str | Path,
    *,
    mesh: Mesh | None = None,
    quiet: bool = False,
    profile: Steps | None = None,
) -> dict[str, Any]:
    """Trains experiments that differ in seed, noise of the labels and numbers of their objectives, side by
    side in one compiled program; returns what is written to `results.json`.

    A call that was killed goes on from its last checkpoint when given again with the same arguments, and
    ends with the same bits. `regjax.train(experiment, workdir)` is this with one experiment.

    Args:
      experiments: the runs.
      workdir: folder for checkpoints, logs and results; made if absent.
      mesh: in place of one of the experiment's shape over all devices.
      quiet: print no table.
      profile: first and last step to trace in every stage, into `workdir/profile/STAGE`.

    Raises:
      InputError: for whatever is wrong with configs or data, before any training.
      TrainingStopped: after `max_bad_steps` steps in a row that were not finite, in every run.
      preemption.Interrupted: on SIGTERM or SIGINT, once the step was saved; a `KeyboardInterrupt`.
    """
    check_alike(experiments)
    workdir = Path(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir {workdir} is a file; give a folder")
    compilation.enable_cache()
    run = prepare_runs(experiments, mesh)
    return _train(run, workdir, quiet, profile)


def _train(run: Prepared, workdir: Path, quiet: bool, profile: Steps | None) -> dict[str, Any]:
    """The stages in order, and what they are worth."""
    for stage in run.experiment.stages:
        check_stage(run, stage)
    workdir.mkdir(parents=True, exist_ok=True)
    log = Log(workdir, run.experiment.loggers)
    first = jax.process_index() == 0
    if first:
        write_json(workdir / "config.json", [to_json(each) for each in run.experiments])
    finished: dict[str, Finished] = {}
    found: dict[str, Any] = {"stages": {}, "runs": [numbers_of(each) for each in run.experiments]}
    logits: dict[str, np.ndarray] = {}
    shared = _shared(run)
    for index, stage in enumerate(run.experiment.stages):
        profiler = Profiler(workdir / "profile" / stage.name, profile if first else None)
        finished[stage.name], speed, lost = _run_stage(
            run, shared, index, finished, workdir, log, profiler
        )
        if first and speed and not quiet:
            print(f"{stage.name}: {speed}", file=sys.stderr)
        logits[stage.name], found["stages"][stage.name] = _report(
            run, shared, stage, finished, logits, workdir / stage.name, lost
        )
    found["table"] = results.table(found["stages"])
    if first:
        write_json(workdir / "results.json", found)
    multihost_utils.sync_global_devices("results are written")
    if first and not quiet:
        print_table(results.title(run.experiment, len(run.experiments)), found["table"])
    return found


def _run_stage(
    run: Prepared,
    shared: program.Shared,
    index: int,
    finished: Mapping[str, Finished],
    workdir: Path,
    log: Log,
    profiler: Profiler,
) -> tuple[Finished, str, list[int]]:
    """Trains one stage of all runs, or what is left of it."""
    experiment, stage = run.experiment, run.experiment.stages[index]
    splits, mesh, count = run.splits, run.mesh, len(run.experiments)
    folder = workdir / stage.name
    images = splits.train.images
    config = experiment.model_of(stage)
    outputs = experiment.outputs_of(stage, run.num_classes)
    classifier = vision.build(config, images.shape[1:], outputs)
    attributes = run.attributes_of(stage)
    by = runs_by(experiment)

    # what the steps read
    teachers = [finished[name] for name in stage.teachers]
    cached = stage.teacher == "cached"
    score = functools.partial(_logits, run, shared)
    teacher_logits = np.stack([score(t, "train") for t in teachers], 1) if teachers else None
    held_out_teacher = (
        np.stack([score(t, "held_out") for t in teachers], 1)
        if teachers and splits.held_out is not None
        else None
    )
    labels = run.labels_of(stage)
    objectives = [each.stages[index].objective for each in run.experiments]
    given = [
        given_of(
            stage,
            objective,
            facts_of(run, stage, number, teacher_logits, held_out_teacher),
        )
        for number, objective in enumerate(objectives)
    ]
    held_out = None
    if splits.held_out is not None:
        held_out = {
            "labels": np.broadcast_to(splits.held_out.labels, (count, len(splits.held_out.labels)))
        }
        if held_out_teacher is not None:
            held_out["teacher_logits"] = held_out_teacher
    own = _put(
        program.Own(
            objective=stacked(objectives),
            given=jax.tree.map(lambda *leaves: np.stack(leaves), *given),
            labels=labels.astype(np.int32),
            teacher_logits=teacher_logits if cached else None,
            teachers=(),
            held_out=held_out,
        ),
        mesh,
    )
    if not cached:
        own = own._replace(teachers=tuple((t.params, t.statistics) for t in teachers))

    # the steps
    per_epoch = len(images) // experiment.batch_size
    steps = per_epoch * experiment.epochs_of(stage)
    shapes, _ = jax.eval_shape(classifier.init, jax.random.key(0))
    optimizer = optim.build(experiment.optimizer_of(stage), steps, shapes)
    start = None
    if stage.start != NEW:
        start = (finished[stage.start].params, finished[stage.start].statistics)
    seeds = np.array([_seed(each.seed, index) for each in run.experiments], np.uint32)
    state = program.init_state(
        classifier, optimizer, stage.objective,
        {"seed": seeds, "objective": own.objective, "given": own.given, "start": start},
        average=stage.average, mesh=mesh,
    )  # fmt: skip
    update = program.make_chunk(
        classifier, [] if cached else [t.classifier for t in teachers], optimizer, stage.objective,
        experiment.data.augmentation, num_classes=run.num_classes, attributes=attributes,
        count=count, by=by,
        order_seed=_seed(experiment.order_seed, index), average=stage.average, mesh=mesh,
        eval_batch_size=experiment.eval_batch_size,
    )  # fmt: skip
    chunks = functools.partial(
        chunks_of, run, steps, per_epoch, _seed(experiment.order_seed, index)
    )

    def evaluate(state: program.ClassifierState) -> dict[str, float]:
        model = _result(classifier, state, stage.average)
        assert splits.held_out is not None
        return results.held_out_figures(
            score(model, "held_out"), splits.held_out.labels, attributes
        )

    work = loop.Work(
        name=stage.name,
        folder=folder,
        steps=steps,
        update=lambda state, indices: update(state, own, shared, indices),
        chunks=chunks,
        evaluate=None if splits.held_out is None else evaluate,
        position=_position(run, index, labels, [*([] if start is None else [start]), *teachers]),
        eval_every=experiment.eval_every * per_epoch,
    )
    policy = loop.Policy(
        log_every=experiment.log_every * per_epoch,
        checkpoint_every=experiment.checkpoint_every * per_epoch,
        keep_latest=experiment.keep_latest,
        max_bad_steps=experiment.max_bad_steps,
    )
    state, _, recorder = loop.run(work, state, policy, log, profiler)
    return _result(classifier, state, stage.average), recorder.summary, recorder.given_up


def _result(
    classifier: vision.Classifier, state: program.ClassifierState, average: bool
) -> Finished:
    if average:
        _, params, statistics = state.runs.average
        return Finished(classifier, params, statistics)
    return Finished(classifier, state.runs.params, state.runs.statistics)


def runs_by(experiment: ImageExperiment) -> program.RunsBy:
    if experiment.runs != "auto":
        return experiment.runs
    return "map" if jax.default_backend() == "cpu" else "vmap"


def _put(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(lambda leaf: sharding.put(np.asarray(leaf), replicated(mesh)), tree)


def _shared(run: Prepared) -> program.Shared:
    held_out = run.splits.held_out
    images = (
        run.splits.train.images,
        run.mean,
        run.std,
        None if held_out is None else held_out.images,
    )
    return _put(program.Shared(*images), run.mesh)


def _logits(run: Prepared, shared: program.Shared, model: Finished, split: str) -> np.ndarray:
    """`[R, N, C]` of every run's model on the images of a split, as they are."""
    experiment = run.experiment
    images = {
        "train": lambda: shared.images,
        "held_out": lambda: shared.held_out_images,
        "test": lambda: _put(run.splits.test.images, run.mesh),
    }[split]()
    score = program.make_logits(
        model.classifier, count=len(run.experiments), by="map", mesh=run.mesh,
        eval_batch_size=experiment.eval_batch_size,
    )  # fmt: skip
    return sharding.fetch(score(model.params, model.statistics, images, shared.mean, shared.std))


def _seed(seed: int, index: int) -> int:
    """Of a stage."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


def _position(
    run: Prepared, index: int, labels: np.ndarray, before: Sequence[Any]
) -> dict[str, Any]:
    """What has to be the same when a stage is resumed, besides the shapes of its state."""
    digest = hashlib.sha256(np.ascontiguousarray(run.splits.train.images).tobytes())
    digest.update(np.ascontiguousarray(labels).tobytes())
    arrays = [
        (each.params, each.statistics) if isinstance(each, Finished) else each for each in before
    ]
    return {
        "seed": [each.seed for each in run.experiments],
        "data": digest.hexdigest()[:16],
        "batches": f"batch_size {run.experiment.batch_size}, order_seed {run.experiment.order_seed}, "
        f"{run.experiment.data.augmentation}",
        "start": int(checkpoint.checksum(arrays)) if arrays else 0,
        "runs": [repr(each.stages[index].objective) for each in run.experiments],
    }


def _report(
    run: Prepared,
    shared: program.Shared,
    stage: ImageStage,
    finished: Mapping[str, Finished],
    logits: Mapping[str, np.ndarray],
    folder: Path,
    lost: Sequence[int],
) -> tuple[np.ndarray, dict[str, Any]]:
    """The stage's logits of the test images, and what they are worth; both are written down."""
    model, splits = finished[stage.name], run.splits
    test = _logits(run, shared, model, "test")
    scores = {"test": test, "test_labels": splits.test.labels}
    if splits.held_out is not None:
        scores["held_out"] = _logits(run, shared, model, "held_out")
        scores["held_out_labels"] = splits.held_out.labels
    attributes = run.attributes_of(stage)
    noisy = any(each.data.noise is not None for each in run.experiments) and attributes is None
    train = _logits(run, shared, model, "train") if noisy else None
    reports = []
    for number in range(len(run.experiments)):
        if attributes is not None:
            reports.append(results.ranking(test[number], attributes[splits.test.labels]))
            continue
        teacher = None
        if stage.teachers:
            teacher = np.mean([logits[name][number] for name in stage.teachers], 0)
        known = None
        if train is not None:
            known = train[number], splits.train.true_labels, run.labels[number]
        reports.append(
            results.report(
                test[number], splits.test.labels,
                worst_k=run.experiment.worst_k, teacher=teacher, train=known,
            )
        )  # fmt: skip
    found = {"runs": reports, "given_up": list(lost), "classes": list(splits.class_names)}
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        about = {
            "model": to_json(run.experiment.model_of(stage)),
            "image_shape": list(splits.train.images.shape[1:]),
            "classes": list(splits.class_names),
            "mean": run.mean.tolist(),
            "std": run.std.tolist(),
        }
        save_classifiers(
            folder,
            {path: sharding.fetch(leaf) for path, leaf in model.params.items()},
            {path: sharding.fetch(leaf) for path, leaf in model.statistics.items()},
            about,
        )
        results.write_scores(folder, scores)
        write_json(folder / "results.json", found)
    return test, found
