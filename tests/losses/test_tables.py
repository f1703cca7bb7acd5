"""Every public loss is in a table of cases, so that what must hold for all of them is tested of it.

The tables: values and gradients against float64, masks over what is not finite, all masked, logits
of +-1e4, bfloat16, vmap, and input that does not fit.
"""

import inspect
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from regjax import losses
from tests.losses import distillation_cases, linear_cases, number_cases, score_cases
from tests.losses import test_label_losses as label_cases

# What is no loss, and the file that tests it.
OTHERS = {
    "test_soft_labels": {"gaussian_levels"},
    "test_read_outs": {
        "class_risk_sums",
        "discounted_returns",
        "exceedance",
        "post_hoc_adjusted",
        "thurstone",
    },
    "test_smoothing": {"smearing_matrix", "smearing_rate", "optimal_smoothing_rate"},
    "test_noise": {"anchor_noise_matrix", "confident_noise_matrix"},
    "test_early_learning": {"early_learning_targets"},
    "test_label_distribution": {"adaptive_temperature"},
    "test_long_tail": {"class_balanced_weights"},
    "test_worst_case": {"exponentiated_gradient", "post_shift", "robust_costs"},
    "test_example_weights": {"chi_square_weights", "cvar_weights", "group_dro", "kl_weights"},
    "test_adaptive_distillation": {"class_margins", "margin_offsets", "teacher_margins"},
    "test_policy": {"group_normalized", "leave_one_out"},
    # The losses of linear_cross_entropy, and beside them no loss.
    "test_linear": {"linear_cross_entropy_and_hits"},
}

PUBLIC = {
    name: getattr(losses, name)
    for name in losses.__all__
    if not isinstance(getattr(losses, name), type)
}


def every_case():
    """Functions without arguments that trace every case of every table."""
    for case in distillation_cases.CASES:
        logits = np.zeros(case.shape, np.float32)
        yield case.loss, logits, logits, np.ones(case.shape[:-1], bool)
    for case in [*number_cases.CASES, *score_cases.CASES]:
        targets = case.targets.astype(np.float32)
        yield case.loss, np.zeros(case.shape, np.float32), targets, np.ones(case.mask_shape, bool)
    for loss in label_cases.LOSSES.values():
        yield lambda z, loss=loss: loss(z, label_cases.LABELS), label_cases.LOGITS
    for case in linear_cases.CASES.values():
        yield (
            lambda x, head, case=case: case.linear(x, head, where=linear_cases.WHERE),
            linear_cases.HIDDEN,
            linear_cases.HEAD,
        )


@pytest.fixture(scope="module")
def in_tables():
    """Names of the public functions that the cases call themselves, not through another one."""
    names = {function.__code__: name for name, function in PUBLIC.items()}
    library = str(Path(inspect.getfile(losses)).parent)
    found = set()

    def note(frame, event, _):
        if event != "call" or frame.f_code not in names:
            return
        if not frame.f_back.f_code.co_filename.startswith(library):
            found.add(names[frame.f_code])

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        for loss, *arguments in every_case():
            # A function of its own: jax does not trace anew what another test has traced.
            jax.eval_shape(lambda *given, loss=loss: loss(*given), *arguments)
    finally:
        sys.setprofile(before)
    return found


def test_every_public_loss_is_in_a_table(in_tables):
    others = set().union(*OTHERS.values())
    missing = PUBLIC.keys() - in_tables - others
    assert not missing, f"give {sorted(missing)} a case in a table of tests/losses"
    assert sorted(others & in_tables) == []
    assert others <= PUBLIC.keys()


@pytest.mark.parametrize("file", OTHERS)
def test_what_is_no_loss_is_tested_where_the_list_says(file):
    text = Path(__file__).with_name(f"{file}.py").read_text()
    assert [name for name in OTHERS[file] if name not in text] == []


@pytest.mark.parametrize("name", PUBLIC)
def test_what_has_a_mask_calls_it_where_and_options_are_by_keyword(name):
    parameters = inspect.signature(PUBLIC[name]).parameters
    where = parameters.get("where")
    assert where is None or (where.kind is where.KEYWORD_ONLY and where.default is None)
    positional = [p for p in parameters.values() if p.kind is not p.KEYWORD_ONLY]
    # Arrays by position; numbers have a name at the call unless they are what it is about.
    assert all(p.default in (p.empty, None) for p in positional), name
