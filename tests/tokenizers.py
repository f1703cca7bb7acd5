"""Tiny tokenizers of the kinds that models come with, trained in memory: the same on every run.

They differ in what matters for numbers: whether digits are split, whether a space belongs to the
token after it, and whether a space is put before the text.
"""

from __future__ import annotations

import functools
import re
import string

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "The score is high.",
    "the score is low, so the answer is no.",
    "Rate how similar the two sentences are.",
    "So the overall score is",
    "Score: good or bad?",
    "[RESULT]",
    "(a, b, c, d, e)",
]
WORDS = sorted({word for line in SENTENCES for word in re.findall(r"\w+|[^\w\s]", line)})
NUMBERS = [str(number) for number in range(101)]
CORPUS = 8 * SENTENCES + [
    line for number in NUMBERS for line in 4 * [f"is {number}", f"({number})", number]
]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@functools.cache
def byte_level_bpe(split_digits: bool = False, chat: bool = False) -> PreTrainedTokenizerFast:
    """Like GPT-2 (" 10" is one token) or, with split digits, like Qwen (" ", "1", "0").

    No unknown token, since every byte has one. With `chat`, ChatML turns that end with the
    end-of-text token.
    """
    eos = "<|im_end|>" if chat else "<|endoftext|>"
    specials = ["<|pad|>", "<|bos|>", eos, "<|im_start|>"]
    tokenizer = Tokenizer(models.BPE())
    if split_digits:
        # Qwen's order: a space joins letters and signs, never a digit.
        words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(words, "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", bos_token="<|bos|>", eos_token=eos
    )
    if chat:
        wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def chat(split_digits: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a ChatML template."""
    return byte_level_bpe(split_digits, chat=True)


@functools.cache
def sentencepiece_style(
    split_digits: bool = True, prefix_space: bool = True, kind: str = "bpe"
) -> PreTrainedTokenizerFast:
    """Like Llama-2 and Mistral ("bpe") or T5 ("unigram"): "▁" is the space before a piece.

    With `prefix_space` one is put before the text ("5" -> "▁5"). "<s>" comes first when special
    tokens are asked for.
    """
    specials = ["<unk>", "<s>", "</s>", "<pad>"]
    scheme = "always" if prefix_space else "never"
    space: pre_tokenizers.PreTokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme)
    if split_digits:
        space = pre_tokenizers.Sequence([space, pre_tokenizers.Digits(individual_digits=True)])
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
        tokenizer.pre_tokenizer = space
        tokenizer.train_from_iterator(CORPUS, trainer)
    else:
        # The BPE tokenizer's pieces, longer ones likelier: training would sum floats in any order.
        pieces = sentencepiece_style(split_digits, prefix_space).get_vocab()
        ordered = sorted(pieces, key=pieces.__getitem__)
        scores = [(piece, 0.0 if piece in specials else -10.0 + len(piece)) for piece in ordered]
        tokenizer = Tokenizer(models.Unigram(scores, unk_id=0))
        tokenizer.pre_tokenizer = space
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme=scheme)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


@functools.cache
def wordpiece() -> PreTrainedTokenizerFast:
    """Like uncased BERT: no spaces in tokens, "##" before the later pieces of a word."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [*string.ascii_lowercase, *string.digits]
    # Given, because the trainer's ties fall differently from run to run.
    pieces = [*letters, *("##" + letter for letter in letters), *string.punctuation]
    words = [word.lower() for word in WORDS] + NUMBERS
    vocabulary = {
        piece: index for index, piece in enumerate(dict.fromkeys(specials + pieces + words))
    }
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
    )


@functools.cache
def word_level(numbers: int = 21, eos: bool = True) -> PreTrainedTokenizerFast:
    """One token per word, sign and whole number below `numbers`; spaces are lost."""
    specials = ["<unk>", "<s>", "</s>", "<pad>"]
    vocabulary = specials + [str(number) for number in range(numbers)] + WORDS
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>" if eos else None,
        pad_token="<pad>",
    )
