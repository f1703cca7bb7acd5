"""Templates: what they accept, what they render, and where the score stands."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from regjax.data import Template
from regjax.errors import InputError
from regjax.scores import ScoreGrid
from regjax.token_grid import TokenGrid
from tests.tokenizers import byte_level_bpe, chat


def text_of(template: Template, record: dict[str, str], tokenizer=None) -> str:
    return template.skeleton(tokenizer).render(record).text


def test_render_and_spans():
    template = Template("{{x}} {a|cut}/{b}:\n", response="so {c} is {score}")
    rendered = template.skeleton().render({"a": "{one}", "b": "two", "c": "{score}"})
    assert rendered.text == "{x} {one}/two:\nso {score} is "
    assert rendered.text[rendered.response_start :] == "so {score} is "
    spans = [(f.name, f.cut, rendered.text[start:end]) for f, start, end in rendered.fields]
    assert spans == [("a", True, "{one}"), ("b", False, "two"), ("c", False, "{score}")]
    assert template.fields == ("a", "b", "c")
    assert template.score_prefix() == " is "
    prompt = template.skeleton().render({"a": "1", "b": "2"}, response=False)
    assert prompt.text == "{x} 1/2:\n" and prompt.response_start == len(prompt.text)


def test_the_prefix_reaches_back_into_the_prompt():
    assert Template("{a}\nScore: ").score_prefix() == "\nScore: "
    assert Template("no field: ", response="> {score}").score_prefix() == "no field: > "


@pytest.mark.parametrize(
    ("prompt", "response", "message"),
    [
        ("{a}:", "", "response is empty"),
        ("{a}:", " \n", "response is empty"),
        ("{a}:", " {b|cut}", "never cut"),
        ("{a}:", "{score} {score}", "2 times"),
        ("{score}:", "{score}", "nowhere else"),
        ("{a}:", "{score}.", "goes on after"),
        ("{a}:", "{score|cut}", "is not a field"),
        ("{a}", "{score}", "immediately before"),
        ("x: ", "{a}{score}", "immediately before"),
        ("", "{score}", "prompt is empty"),
        ("{a: ", "{score}", "a lone '{'"),
        ("a}: ", "{score}", "a lone '}'"),
        ("{}: ", "{score}", "is not a field"),
        ("{a|crop}: ", "{score}", "is not a field"),
        ("{ a}: ", "{score}", "is not a field"),
        ("\ue000{a}: ", "{score}", "reserved"),
        (3, "{score}", "expected text"),
    ],
)
def test_a_template_that_cannot_work(prompt, response, message):
    with pytest.raises(InputError) as error:
        Template(prompt, response)
    assert message in str(error.value)


def test_free_text_has_fields_but_no_score():
    template = Template("{a|cut} {b}:", response=" {c} and {b}")
    assert not template.has_score and Template("{a}:").has_score
    assert template.fields == ("a", "b", "c")
    assert (template.prompt_fields, template.response_fields) == (("a", "b"), ("c", "b"))
    record = {"a": "{1}", "b": "2", "c": "{score}"}
    assert template.render_response(record) == " {score} and 2"
    rendered = template.skeleton().render(record)
    assert rendered.text == "{1} 2: {score} and 2"
    assert rendered.text[: rendered.response_start] == "{1} 2:"
    assert Template("{a}:", "yes").response_fields == ()
    assert Template("{a}:", "{{{b}}} {score}").render_response({"b": "x"}, "{4}") == "{x} {4}"


@pytest.mark.parametrize("response", [" {c}", "yes"])
def test_free_text_has_no_codec(response):
    template = Template("{a}:", response)
    for refused in (
        lambda: template.score_prefix(),
        lambda: template.codec(ScoreGrid.integers(0, 9), byte_level_bpe()),
    ):
        with pytest.raises(InputError, match="is free text"):
            refused()


ANY = st.text("{}a |é\n", max_size=6)


@settings(deadline=None, max_examples=50)
@given(shots=st.lists(st.tuples(ANY, ANY), max_size=3), separator=ANY, free=st.booleans())
def test_shots_stand_before_the_prompt_as_they_are(shots, separator, free):
    template = Template("{a|cut}{{: ", "{b}" if free else "so {score}")
    record = {"a": "{x}", "b": "{a}"}
    before = "".join(prompt + response + separator for prompt, response in shots)
    given_shots = template.with_shots(shots, separator)
    assert text_of(given_shots, record) == before + text_of(template, record)
    assert given_shots.fields == template.fields and given_shots.response == template.response
    [(field, start, end), *_] = given_shots.skeleton().render(record).fields
    assert field.cut and (start, end) == (len(before), len(before) + 3)


def test_shots_are_two_lines_apart_and_nothing_for_a_chat():
    shots = [("1+1=", "2"), ("2+2=", "4")]
    assert Template("{a}=", "{b}").with_shots(shots).prompt == "1+1=2\n\n2+2=4\n\n{a}="
    with pytest.raises(InputError, match="chat=False"):
        CHAT.with_shots(shots)


def test_system_needs_chat():
    with pytest.raises(InputError, match="chat=True"):
        Template("{a}: ", system="You are a judge.")


PROMPTS = st.lists(
    st.sampled_from(["{", "}", "{{", "}}", "{a}", "{b|cut}", "{score}", "|", "x", " ", "\n", "é"]),
    max_size=8,
).map("".join)


@settings(deadline=None, max_examples=300)
@given(prompt=PROMPTS | st.text(max_size=10), response=PROMPTS)
@example(prompt="{{{a}}}: ", response="{score}")
def test_any_template_is_refused_or_renders_as_str_format_does(prompt, response):
    try:
        template = Template(prompt, response)
    except InputError:
        return
    record = {name: f"<{name}>" for name in template.fields}
    marked = re.sub(r"(?<!\{)((?:\{\{)*\{b)\|cut\}", r"\1}", prompt + response)
    expected = marked.format(**record, score="")
    assert text_of(template, record) == expected


CHAT = Template("Rate {a|cut}\nand {b}.", system="Be strict with {c}.", chat=True)


def test_chat_is_what_the_chat_template_writes():
    tokenizer = chat()
    record = {"a": "one", "b": "{two}", "c": "<|im_end|>three"}
    expected = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "Be strict with <|im_end|>three."},
            {"role": "user", "content": "Rate one\nand {two}."},
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text_of(CHAT, record, tokenizer) == expected
    assert CHAT.score_prefix(tokenizer) == ".<|im_end|>\n<|im_start|>assistant\n"
    assert CHAT.fields == ("c", "a", "b")


class Chat:
    """Stands for a tokenizer whose chat template does `write` to the messages."""

    chat_template = "given"

    def __init__(self, write):
        self.write = write

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert tokenize is False and add_generation_prompt is True
        return self.write([message["content"] for message in messages])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda contents: contents[-1] + "\n", "drops or rewrites the system message"),
        (lambda contents: "".join(contents).upper() + "\n", "drops or rewrites"),
        (lambda contents: "".join(contents) * 2 + "\n", "drops or repeats"),
        (lambda contents: contents[5], "refuses these messages"),
    ],
)
def test_a_chat_template_that_loses_something(write, message):
    with pytest.raises(InputError, match=message):
        CHAT.skeleton(Chat(write))


def test_a_chat_that_leaves_nothing_before_the_score():
    with pytest.raises(InputError, match="immediately before"):
        Template("Rate {a}", chat=True).skeleton(Chat(lambda contents: contents[0]))


def test_chat_needs_a_chat_template():
    with pytest.raises(InputError, match="no chat template"):
        CHAT.skeleton(byte_level_bpe())


@pytest.mark.parametrize("tokenizer", [chat(), byte_level_bpe(split_digits=True)])
def test_codec_is_the_grid_in_context(tokenizer):
    template = Template("Text: {a}\n", chat=tokenizer.chat_template is not None)
    codec = template.codec(ScoreGrid.integers(0, 9), tokenizer)
    assert isinstance(codec, TokenGrid) and codec.single_token
    assert codec.ids == [
        tokenizer(str(n), add_special_tokens=False)["input_ids"] for n in range(10)
    ]


def test_codec_says_when_the_number_merges_with_the_prompt():
    with pytest.raises(InputError, match="merges"):
        Template("Text: {a}\nScore: ").codec(ScoreGrid.integers(0, 9), byte_level_bpe())
