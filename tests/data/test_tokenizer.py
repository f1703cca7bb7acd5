"""Tokenizers from a folder and from texts."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regjax.data import load_tokenizer, rated_texts, train_tokenizer
from regjax.errors import InputError

TEXTS = [record["text"] for record in rated_texts(200)]
TOKENIZER = train_tokenizer(TEXTS, 350)


@settings(deadline=None, max_examples=100)
@given(text=st.text())
def test_any_text_reads_back(text):
    ids = TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert TOKENIZER.decode(ids) == text


def test_digits_stand_alone_and_a_text_begins_with_bos():
    ids = TOKENIZER("12 of 3.5")["input_ids"]
    tokens = TOKENIZER.convert_ids_to_tokens(ids)
    assert tokens[0] == "<bos>" == TOKENIZER.bos_token
    assert [token for token in tokens if any(map(str.isdigit, token))] == list("1235")
    assert TOKENIZER.eos_token == "<eos>" and TOKENIZER.pad_token == "<pad>"
    assert len(TOKENIZER) == 350


def test_training_gives_the_same_vocabulary_in_another_process(tmp_path):
    program = (
        "import json; from regjax.data import rated_texts, train_tokenizer;"
        "print(json.dumps(train_tokenizer([r['text'] for r in rated_texts(200)], 350).get_vocab()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == TOKENIZER.get_vocab()


def test_saved_and_loaded_it_is_the_same(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    for path in (tmp_path, str(tmp_path)):
        loaded = load_tokenizer(path)
        assert loaded(TEXTS)["input_ids"] == TOKENIZER(TEXTS)["input_ids"]
        assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, 2, 0)


def test_too_small_a_vocabulary():
    with pytest.raises(InputError, match="at least 259"):
        train_tokenizer(TEXTS, 258)


@pytest.mark.parametrize("name", ["", "./nowhere", "/no/such/folder", "a/b/c"])
def test_no_such_folder(name):
    with pytest.raises(InputError, match="no such folder"):
        load_tokenizer(name)


def test_a_folder_without_a_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
