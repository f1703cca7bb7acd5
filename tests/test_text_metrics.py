"""Shares of strings, against counts and the numbers printed in the paper."""

import math
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regjax import metrics, text_metrics
from regjax.text_metrics import (
    exact_match,
    first_word_accuracy,
    format_ratio,
    normalized_average,
    question_answering,
)

# Wang et al., 2024, Tables 3 to 5: CB, WiC, TriviaQA, web_questions, en-de, en-ro, XSum, WikiLingua.
PRETRAINED = [46.43, 49.69, 17.58, 9.70, 3.97, 1.82, 6.41, 4.59]
PROMOT = [66.07, 51.41, 17.64, 11.07, 2.02, 0.70, 7.02, 4.84]
MULTI_PROMOT = [83.93, 51.41, 16.99, 10.04, 18.83, 18.41, 4.50, 2.89]
TRANSLATION_TUNED = [16.07, 50.63, 3.20, 0.89, 0.81, 1.53, 0.05, 0.03]


@pytest.mark.parametrize(
    ("scores", "printed"),
    [(PRETRAINED, 17.524), (PROMOT, 20.096), (MULTI_PROMOT, 25.875), (TRANSLATION_TUNED, 9.151)],
)
def test_the_normalised_average_is_the_plain_mean(scores, printed):
    # The printed value is rounded to three digits; 20.09625 to even.
    assert normalized_average(scores) == pytest.approx(printed, abs=0.5001e-3)


@pytest.mark.parametrize(
    ("right", "items", "printed", "digits"),
    [
        (132, 277, 47.653, 3),
        (253, 277, 91.34, 2),
        (255, 277, 92.06, 2),
        (257, 277, 92.78, 2),
        (260, 277, 93.86, 2),
        (26, 56, 46.43, 2),
        (47, 56, 83.93, 2),
        (317, 638, 49.69, 2),
        (328, 638, 51.41, 2),
    ],
)
@pytest.mark.parametrize("metric", [exact_match, first_word_accuracy])
def test_accuracies_of_so_many_items_are_those_printed(metric, right, items, printed, digits):
    expected = ["True", "False"] * items
    wrong = {"True": "False", "False": "True"}
    answers = [
        label if index < right else wrong[label] for index, label in enumerate(expected[:items])
    ]
    found = metric(answers, expected[:items])
    assert found == right / items
    assert round(100 * found, digits) == printed


def test_the_format_ratio_is_1_of_labels_and_0_of_free_text():
    labels = ("True", "False")
    assert format_ratio(["True", "False", " True ", "False\n"], labels) == 1.0
    free = ["in Paris", "True or False", "true", "Tru", "", "True.", "TrueFalse", "True False"]
    assert format_ratio(free, labels) == 0.0
    assert format_ratio([*free, "True", "True"], labels) == 0.2
    assert format_ratio(["True"], ["True ", "False"]) == 1.0
    assert format_ratio(["True"], []) == 0.0


@pytest.mark.parametrize(
    ("answer", "right", "same"),
    [
        (" True\n", "True", True),
        ("true", "True", False),
        ("True.", "True", False),
        ("The True", "True", False),
        ("", "", True),
    ],
)
def test_an_exact_match_overlooks_white_space_at_the_ends_alone(answer, right, same):
    assert exact_match([answer], [right]) == float(same)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Rolling Stones", "rolling stones"),
        ("  a\tcat,\n AN  owl ", "cat owl"),
        ("Theatre and another thea", "theatre and another thea"),
        ("U.S.A.", "usa"),
        ("it's the 1990s!", "its 1990s"),
        ("the", ""),
        ("Äpfel-Baum", "äpfelbaum"),
    ],
)
def test_question_answering_overlooks_case_punctuation_articles_and_spaces(text, expected):
    assert question_answering(text) == expected
    assert exact_match([text], [expected], question_answering) == 1.0
    assert exact_match([expected + " x"], [text], question_answering) == 0.0


@settings(deadline=None, max_examples=50)
@given(st.text(alphabet=string.ascii_letters + string.punctuation + " \n\t"))
def test_normalising_twice_changes_nothing_unless_articles_meet(text):
    once = question_answering(text)
    assert not set(once) & set(string.punctuation + string.ascii_uppercase)
    assert not {"a", "an", "the"} & set(once.split())
    assert question_answering(once) == once
    assert question_answering(f" The {text} !") == once


@pytest.mark.parametrize(
    ("answer", "right", "same"),
    [
        ("True", "True", True),
        ("  True, because it follows", "True", True),
        ("True.", "True", True),
        ("False", "True", False),
        ("true", "True", False),
        ("It is True", "True", False),
        ("Trueish", "True", False),
        ("not entailment", "not_entailment", False),
        ("3.5 of 5", "3.5", True),
        ("3.4", "3.5", False),
        ("-1", "1", False),
        ("-", "-", True),
        ("", "True", False),
        ("", "", False),
        ("...", "?", False),
    ],
)
def test_the_first_word_decides(answer, right, same):
    assert first_word_accuracy([answer], [right]) == float(same)


def test_no_answers_have_no_share_and_no_scores_no_average():
    for found in (exact_match([], []), first_word_accuracy([], []), format_ratio([], ["True"])):
        assert isinstance(found, metrics.Undefined) and math.isnan(found)
        assert found.reason == "there are no answers"
    assert normalized_average([]).reason == "there are no scores"
    assert normalized_average([1.0, 2.0, 6.0]) == 3.0
    assert normalized_average([1.0, math.nan, math.inf]).reason == "2 of 3 scores are not finite"


@pytest.mark.parametrize("metric", [exact_match, first_word_accuracy])
def test_lists_of_different_lengths_are_refused(metric):
    with pytest.raises(ValueError, match="1 answers, but 2 expected"):
        metric(["True"], ["True", "False"])


def test_every_metric_is_its_count():
    answers = ["True", "False", "The cat", "false", "True story"]
    expected = ["True", "True", "cat", "False", "True"]
    assert exact_match(answers, expected) == 1 / 5
    assert exact_match(answers, expected, question_answering) == 3 / 5
    assert first_word_accuracy(answers, expected) == 2 / 5
    assert format_ratio(answers, ["True", "False"]) == 2 / 5
    assert text_metrics.exact_match(answers, answers) == 1.0
