"""Ranking by several labels on the training path, where the best rankings are known."""

import numpy as np
import pytest

import regjax
from regjax import InputError
from regjax.classification import ImageExperiment, ImageStage, load_classifier
from regjax.data.images import ImageData, ImageSet
from regjax.methods.bipartite_ranking import aggregations
from regjax.models.vision import Mlp
from regjax.objectives.classification import CrossEntropy, Distillation, LossAggregation
from regjax.optim import Optimizer

COUNTS = [45, 45, 5, 5]
ATTRIBUTES = ((0, 0), (1, 0), (0, 1), (1, 1))


def items():
    """A hundred items of four kinds, of which an image shows which one it is."""
    labels = np.repeat(np.arange(4), COUNTS).astype(np.int32)
    pixels = (255 * np.eye(4, dtype=np.uint8))[labels].reshape(-1, 2, 2, 1)
    return ImageSet(pixels, labels, tuple("abcd"), [str(n) for n in range(100)])


def experiment(stages, **changes):
    data = ImageData(items(), items(), **changes.pop("data", {}))
    rule = Optimizer(name="sgd", learning_rate=1.0, schedule="constant", warmup=0.0, clip_norm=0.0)
    fields = {"model": Mlp(()), "batch_size": 100, "epochs": 300, "attributes": ATTRIBUTES}
    return ImageExperiment(
        stages, data, optimizer=rule, checkpoint_every=300, **{**fields, **changes}
    )


def test_scorers_rank_as_the_best_ones_do(tmp_path):
    """Kinds of 45, 45, 5 and 5 %: the rare label decides under loss aggregation, and neither under label
    aggregation."""
    found = regjax.train(experiment(aggregations(2)), tmp_path, quiet=True)
    scores = {}
    for stage in ("loss_aggregation", "label_aggregation"):
        params, _, about = load_classifier(tmp_path, stage)
        inputs = (np.eye(4) - about["mean"][0]) / about["std"][0]
        scores[stage] = (inputs @ params["head/kernel"])[:, 0]
    assert (np.argsort(scores["loss_aggregation"]) == [0, 1, 2, 3]).all()
    low, first, second, high = scores["label_aggregation"]
    assert low < min(first, second) and max(first, second) < high
    # The gap between the two kinds is small beside those of one sum and the next.
    assert abs(first - second) < 0.2 * min(min(first, second) - low, high - max(first, second))
    (loss,) = found["stages"]["loss_aggregation"]["runs"]
    assert [loss["auc/0"], loss["auc/1"]] == pytest.approx([0.91, 1.0])
    assert [loss["auc_mean"], loss["auc_min"], loss["auc_gap"]] == pytest.approx(
        [0.955, 0.91, 0.09]
    )
    for k in range(2):
        assert found["stages"][f"label_{k}"]["runs"][0][f"auc/{k}"] == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attributes": ()},
            "expected K zeros and ones for each of 4 classes: stage 'loss_aggregation'",
        ),
        ({"attributes": ((0, 1),) * 3}, "for each of 4 classes"),
        ({"attributes": ((0, 2),) * 4}, "zeros and ones"),
        ({"attributes": ((0, 1), (0,), (1,), (1,))}, "zeros and ones"),
    ],
)
def test_attributes_that_cannot_be_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        regjax.train(experiment(aggregations(2), **changes), tmp_path / "new", quiet=True)
    assert not (tmp_path / "new").exists()


def test_weights_of_another_number_of_labels_are_refused(tmp_path):
    stages = (ImageStage("only", LossAggregation((1.0, 1.0, 1.0))),)
    with pytest.raises(
        InputError, match="stage 'only': weights has 3 numbers, but the items have 2"
    ):
        regjax.train(experiment(stages), tmp_path / "new", quiet=True)


def test_a_scorer_is_no_teacher(tmp_path):
    stages = (
        ImageStage("scorer", LossAggregation()),
        ImageStage("student", Distillation(), teachers=("scorer",)),
    )
    with pytest.raises(InputError, match="stage 'student': a stage that ranks is no teacher"):
        regjax.train(experiment(stages), tmp_path / "new", quiet=True)


def test_stages_that_classify_and_stages_that_rank_share_a_table(tmp_path):
    stages = (ImageStage("classes", CrossEntropy()), *aggregations(2)[:1])
    found = regjax.train(experiment(stages, epochs=20), tmp_path, quiet=True)
    first, second = found["table"]
    assert first.keys() == second.keys() >= {"accuracy", "auc_mean"}
    assert first["auc_mean"] is None and second["accuracy"] is None
