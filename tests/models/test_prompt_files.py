"""Prompt folders: bit-exact there and back, and a reason for every one that is refused."""

import dataclasses
import json
import shutil

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from regjax.errors import InputError
from regjax.models.prompt_files import (
    CONFIG,
    TENSORS,
    PromptOrigin,
    load_prompt,
    save_prompt,
    tokenizer_fingerprint,
)
from tests import tokenizers

ORIGIN = PromptOrigin(
    model="owner/model",
    width=8,
    layers=2,
    heads=4,
    vocabulary_size=64,
    checksum=2**32 - 1,
    tokenizer="0123456789abcdef",
    after_bos=True,
)
OF_PEFT = {
    "auto_mapping": None,
    "base_model_name_or_path": "owner/model",
    "inference_mode": True,
    "modules_to_save": None,
    "num_attention_heads": 4,
    "num_layers": 2,
    "num_transformer_submodules": 1,
    "num_virtual_tokens": 3,
    "peft_type": "PROMPT_TUNING",
    "peft_version": "0.21.2",
    "prompt_tuning_init": "SAMPLE_VOCAB",
    "prompt_tuning_init_text": None,
    "revision": None,
    "task_type": "CAUSAL_LM",
    "token_dim": 8,
    "tokenizer_kwargs": None,
    "tokenizer_name_or_path": None,
}
"""What version 0.21.2 writes."""


def prompt_of(length=3, width=8, seed=0):
    return np.random.default_rng(seed).normal(size=(length, width)).astype(np.float32)


def peft_folder(folder, config=OF_PEFT, **tensors):
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config))
    tensors = tensors or {"prompt_embeddings": prompt_of()}
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    return folder


def test_round_trip_is_exact(tmp_path):
    prompt = prompt_of()
    prompt[0, :3] = [np.float32(1e-45), -0.0, np.finfo(np.float32).max]
    save_prompt(tmp_path / "a" / "prompt", prompt, ORIGIN)
    found, origin = load_prompt(tmp_path / "a" / "prompt", ORIGIN)
    assert isinstance(found, jax.Array) and found.dtype == np.float32
    assert np.asarray(found).tobytes() == prompt.tobytes()
    assert origin == ORIGIN
    save_prompt(tmp_path / "plain", found)
    assert load_prompt(tmp_path / "plain")[1] == PromptOrigin(width=8)
    # Fortran order, such as a transposed array has, is no part of the value.
    save_prompt(tmp_path / "plain", np.asfortranarray(prompt))
    np.testing.assert_array_equal(load_prompt(tmp_path / "plain")[0], prompt)


def test_the_folder_is_small_and_in_pefts_layout(tmp_path):
    save_prompt(tmp_path / "p", prompt_of(20, 64), dataclasses.replace(ORIGIN, width=64))
    assert {file.name for file in tmp_path.rglob("*")} == {"p", CONFIG, TENSORS}
    assert sum(file.stat().st_size for file in (tmp_path / "p").iterdir()) < 16 * 1024
    tensors = load_file(tmp_path / "p" / TENSORS)
    assert tensors.keys() == {"prompt_embeddings"}
    np.testing.assert_array_equal(tensors["prompt_embeddings"], prompt_of(20, 64))
    config = json.loads((tmp_path / "p" / CONFIG).read_text())
    # PEFT warns of keys that it does not know.
    assert config.keys() <= OF_PEFT.keys()
    changed = {"num_virtual_tokens": 20, "token_dim": 64, "prompt_tuning_init": "RANDOM"}
    expected = OF_PEFT | changed
    assert config == {name: expected[name] for name in config}
    assert {name for name, value in OF_PEFT.items() if value} - config.keys() == {"peft_version"}


def test_an_earlier_prompt_is_replaced_and_nothing_else_is(tmp_path):
    save_prompt(tmp_path / "p", prompt_of())
    save_prompt(tmp_path / "p", prompt_of(seed=1))
    np.testing.assert_array_equal(load_prompt(tmp_path / "p")[0], prompt_of(seed=1))
    (tmp_path / "empty").mkdir()
    save_prompt(tmp_path / "empty", prompt_of())

    (tmp_path / "p" / "model.safetensors").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("p", "file"):
        with pytest.raises(InputError, match="something other than a prompt"):
            save_prompt(tmp_path / name, prompt_of())
    assert (tmp_path / "p" / "model.safetensors").read_text() == "precious"
    assert (tmp_path / "file").read_text() == "precious"


def test_an_interrupted_write_leaves_the_earlier_prompt(tmp_path, monkeypatch):
    save_prompt(tmp_path / "p", prompt_of())

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.numpy.save_file", killed)
    for name in ("p", "new"):
        with pytest.raises(KeyboardInterrupt):
            save_prompt(tmp_path / name, prompt_of(seed=1))
    assert [file.name for file in tmp_path.iterdir()] == ["p"]
    np.testing.assert_array_equal(load_prompt(tmp_path / "p")[0], prompt_of())


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (prompt_of()[0], r"float32 \(8,\); expected float32 \[P, D\]"),
        (prompt_of()[:0], r"float32 \(0, 8\)"),
        (prompt_of().astype(np.float64), "the prompt is float64"),
        (np.where(prompt_of() > 0, np.inf, 0).astype(np.float32), "not finite"),
        (prompt_of(width=9), "the prompt has width 9, its origin 8"),
    ],
)
def test_what_is_no_prompt_is_not_written(tmp_path, prompt, message):
    with pytest.raises(ValueError, match=message):
        save_prompt(tmp_path / "p", prompt, ORIGIN)
    assert not any(tmp_path.iterdir())


def test_a_folder_of_pefts_loads_with_the_checks_it_allows(tmp_path):
    folder = peft_folder(tmp_path / "p")
    known = PromptOrigin("owner/model", width=8, layers=2, heads=4, after_bos=False)
    compared = dataclasses.replace(ORIGIN, model="other/name", after_bos=False)
    found, origin = load_prompt(folder, compared)
    np.testing.assert_array_equal(found, prompt_of())
    assert origin == known
    with pytest.raises(InputError, match="after_bos False; here after_bos is True"):
        load_prompt(folder, ORIGIN)
    # PEFT leaves these out where it was not told.
    for missing in ("task_type", "num_transformer_submodules", "num_layers"):
        peft_folder(folder, OF_PEFT | {missing: None})
        np.testing.assert_array_equal(load_prompt(folder, compared)[0], prompt_of())


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("width", 16),
        ("layers", 3),
        ("heads", 2),
        ("vocabulary_size", 65),
        ("checksum", 0),
        ("tokenizer", "f" * 16),
        ("after_bos", False),
    ],
)
def test_another_origin_is_refused(tmp_path, field, other):
    save_prompt(tmp_path / "p", prompt_of(), ORIGIN)
    here = PromptOrigin(**{field: other})
    recorded = getattr(ORIGIN, field)
    message = f"p: the prompt was made for owner/model with {field} {recorded}; here {field} is"
    with pytest.raises(InputError, match=f"{message} {other}. Use the model"):
        load_prompt(tmp_path / "p", here)
    # What one of the two does not know is not compared.
    if field != "width":
        save_prompt(tmp_path / "p", prompt_of(), dataclasses.replace(ORIGIN, **{field: None}))
        load_prompt(tmp_path / "p", here)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LORA"}, "adapter_config.json: peft_type is 'LORA'; expected 'PROMPT_TU"),
        ({"peft_type": "P_TUNING"}, "peft_type is 'P_TUNING'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type is 'SEQ_2_SEQ_LM'; expected 'CAUSAL_LM'"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules is 2; expected 1"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0; expected a positive"),
        ({"num_virtual_tokens": "3"}, "num_virtual_tokens is '3'"),
        ({"token_dim": True}, "token_dim is True"),
        ({"token_dim": None}, "token_dim is None"),
        ({"num_virtual_tokens": 4}, r"has shape \[3, 8\]; by adapter_config.json it is \[4, 8\]"),
        ({"token_dim": 4}, r"has shape \[3, 8\]; by adapter_config.json it is \[3, 4\]"),
    ],
)
def test_other_adapters_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        load_prompt(peft_folder(tmp_path / "p", OF_PEFT | changes))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"prompt_embeddings": prompt_of().astype(np.float16)}, "is F16; expected F32"),
        ({"prompt_embeddings": prompt_of().astype(np.int32)}, "is I32; expected F32"),
        ({"prompt_embeddings": prompt_of().T.copy()}, r"has shape \[8, 3\]"),
        ({"prompt_embeddings": prompt_of().ravel()}, r"has shape \[24\]"),
        ({"prompt_embeddings": prompt_of() * np.float32("nan")}, "entries that are not finite"),
        ({"embedding.weight": prompt_of()}, "holds 'embedding.weight'; a soft prompt is"),
        ({"prompt_embeddings": prompt_of(), "score": prompt_of()}, "holds .*'score'"),
    ],
)
def test_other_tensors_are_refused(tmp_path, tensors, message):
    with pytest.raises(InputError, match=f"{TENSORS}.*{message}"):
        load_prompt(peft_folder(tmp_path / "p", **tensors))


def test_missing_and_pickled_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere has no adapter_config.json"):
        load_prompt(tmp_path / "nowhere")
    folder = peft_folder(tmp_path / "p")
    (folder / TENSORS).unlink()
    with pytest.raises(InputError, match=r"p has no adapter_model.safetensors"):
        load_prompt(folder)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match=r"adapter_model.bin: pickles can run code"):
        load_prompt(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(InputError, match=r"p has no adapter_config.json"):
        load_prompt(folder)


@pytest.mark.parametrize("header", ["", "[1]", '{"weight": 1}', '{"width": 9}', "[" * 100_000])
def test_a_damaged_note_in_the_header_is_refused(tmp_path, header):
    folder = peft_folder(tmp_path / "p")
    tensors = {"prompt_embeddings": prompt_of()}
    save_file(tensors, folder / TENSORS, metadata={"format": "pt", "regjax": header})
    with pytest.raises(InputError, match=f"{TENSORS}.*(not readable|are not of one prompt)"):
        load_prompt(folder)


def test_files_of_two_prompts_are_told_apart(tmp_path):
    save_prompt(tmp_path / "a", prompt_of())
    save_prompt(tmp_path / "b", prompt_of(4))
    shutil.copy(tmp_path / "a" / TENSORS, tmp_path / "b" / TENSORS)
    with pytest.raises(
        InputError, match=r"has shape \[3, 8\]; by adapter_config.json it is \[4, 8"
    ):
        load_prompt(tmp_path / "b")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda values: (
        st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3)
    ),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "p"
    save_prompt(folder, prompt_of(), ORIGIN)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def damaged(tmp_path_factory, whole, **changed):
    folder = tmp_path_factory.mktemp("damaged")
    for name, content in (whole | changed).items():
        (folder / name).write_bytes(content)
    return folder


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(data=st.data())
def test_cut_files_are_refused(tmp_path_factory, whole, data):
    name = data.draw(st.sampled_from([CONFIG, TENSORS]))
    # The newline that ends the JSON may be missing.
    kept = data.draw(st.integers(0, len(whole[name]) - 2))
    folder = damaged(tmp_path_factory, whole, **{name: whole[name][:kept]})
    with pytest.raises(InputError, match=name):
        load_prompt(folder)


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(
    name=st.sampled_from([CONFIG, TENSORS]),
    replaced=st.lists(st.tuples(st.integers(0, 500), st.binary(min_size=1, max_size=9))),
)
def test_overwritten_bytes_end_in_a_prompt_or_an_input_error(
    tmp_path_factory, whole, name, replaced
):
    content = bytearray(whole[name])
    for place, values in replaced:
        content[place : place + len(values)] = values
    try:
        found, _ = load_prompt(damaged(tmp_path_factory, whole, **{name: bytes(content)}), ORIGIN)
    except InputError:
        return
    assert found.shape == (3, 8) and np.isfinite(found).all()


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(config=JSON, field=st.none() | st.sampled_from(sorted(OF_PEFT)))
def test_other_json_ends_in_a_prompt_or_an_input_error(tmp_path_factory, whole, config, field):
    if field is not None:
        config = json.loads(whole[CONFIG]) | {field: config}
    content = json.dumps(config).encode()
    try:
        found, _ = load_prompt(damaged(tmp_path_factory, whole, **{CONFIG: content}), ORIGIN)
    except InputError:
        return
    # Only what is not read may be anything.
    assert field is not None
    np.testing.assert_array_equal(found, prompt_of())


def test_fingerprint_is_of_the_vocabulary_and_the_special_tokens(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = tokenizers.byte_level_bpe()
    first = tokenizer_fingerprint(tokenizer)
    assert len(first) == 16 and int(first, 16) >= 0
    tokenizer.save_pretrained(tmp_path)

    def again(**changes):
        return AutoTokenizer.from_pretrained(tmp_path, **changes)

    assert tokenizer_fingerprint(again()) == first
    # Padding with the end token changes no id's meaning.
    assert tokenizer_fingerprint(again(pad_token="<|endoftext|>")) == first
    longer = again()
    longer.add_tokens(["extra"])
    special = again()
    special.add_special_tokens({"additional_special_tokens": ["extra"]})
    others = [longer, special, again(bos_token="<|endoftext|>"), tokenizers.byte_level_bpe(True)]
    assert len({first, *map(tokenizer_fingerprint, others)}) == 5
