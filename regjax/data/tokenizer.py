"""Tokenizers: loaded from a folder or the hub, or trained on a few texts."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from regjax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")


def _transformers() -> Any:
    # Only its tokenizers are used: that torch is missing is nothing to advise on.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


def load_tokenizer(path: str | pathlib.Path) -> Any:
    """The fast tokenizer of a model folder, or of a model's name on the hub; runs none of its code.

    Raises:
        InputError: no such folder or model, or a tokenizer without a fast form.
    """
    AutoTokenizer = _transformers().AutoTokenizer

    name = str(path)
    folder = pathlib.Path(name).expanduser()
    looks_local = isinstance(path, pathlib.Path) or name.startswith((".", "/", "~"))
    if not name or name.count("/") > 1 or looks_local:
        if not name or not folder.is_dir():
            raise InputError(f"tokenizer {name!r}: no such folder")
        name = str(folder)
    elif folder.is_dir():
        name = str(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True, trust_remote_code=False)
    except Exception as error:  # a broken folder fails in many ways, all of them the input's
        first = str(error).strip().split("\n")[0]
        raise InputError(f"tokenizer {name!r} cannot be loaded: {first}") from error
    if not tokenizer.is_fast:
        raise InputError(f"tokenizer {name!r} has no fast form (tokenizer.json)")
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with single digits, deterministic; knows any text, `<bos>` begins each.

    It has `vocabulary_size` entries, or fewer where the texts have no more pairs to merge.

    `save_pretrained(folder)` keeps it for `load_tokenizer`.

    Raises:
        InputError: `vocabulary_size` below 259, the 256 bytes and three special tokens.

    >>> tokenizer = train_tokenizer(["a score of 12"] * 3, 290)
    >>> tokenizer.tokenize("a score of 12")
    ['a', 'Ġscore', 'Ġof', 'Ġ', '1', '2']
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    smallest = 256 + len(SPECIAL_TOKENS)
    if vocabulary_size < smallest:
        raise InputError(f"vocabulary_size is {vocabulary_size}: expected at least {smallest}")
    model = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    bos = SPECIAL_TOKENS[1]
    model.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, model.token_to_id(bos))]
    )
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token=SPECIAL_TOKENS[0],
        bos_token=bos,
        eos_token=SPECIAL_TOKENS[2],
        clean_up_tokenization_spaces=False,
    )
