"""harbor's tokenizer: byte-level BPE of 2,048 pieces, every digit a piece of its own, and the chat template.

A word is the same piece wherever it stands: behind a space, in `book_table`, in `FindRestaurants`, behind a quotation
mark. What is rare is marked instead, a word without a space before it:

    Blue Heron        ->  ^Blue ^Heron                   ^ begins a word, and means a space where nothing else stands
    "Blue Heron"      ->  "+ ^Blue ^Heron "              + ends what a word follows without a space
    book_table        ->  ^book _+ ^table

Copying a value into a call is then copying pieces, which a model of 3 M parameters learns first; with the usual pieces
(" Blue" here, "Blue" there) it has to learn all pairs. The two marks are the bytes 1 and 2, which no text holds.

Turns are marked by special tokens; the two marks of a call are ordinary added tokens: decoding a reply keeps them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PIECES = 2048  # of 4,096 half were said less than 50 times in 27 M tokens (LOG.md)
CONTEXT = 1024
PAD, END = "<|pad|>", "<|end|>"
TURNS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
CALL = ("<tool_call>", "</tool_call>")
SPACE, JOIN, WORD = "\u0120", "\u0101", "\u0102"  # the bytes 32, 1 and 2 as byte-level BPE writes them
TEMPLATE = Path(__file__).parent / "chat_template.jinja"


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer trained on texts, which may contain the marks of turns and calls."""
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.Sequence(
        [
            normalizers.ByteLevel(),
            normalizers.Replace(Regex(rf"(?<![A-Za-z{SPACE}])(?<!^)(?=[A-Za-z])|(?<=[a-z])(?=[A-Z])"), JOIN + WORD),
            normalizers.Replace(Regex(rf"{SPACE}(?=[A-Za-z])|^(?=[A-Za-z])"), WORD),
        ]
    )
    words, others = rf"{WORD}[A-Za-z]+", rf"[^{WORD}{JOIN}A-Za-z0-9]+{JOIN}?"
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{words}|[0-9]|{others}|{JOIN}"), "isolated")
    raw.decoder = decoders.Sequence(
        [
            decoders.Fuse(),
            decoders.Replace(Regex(rf"{JOIN}{WORD}|^{WORD}"), ""),
            decoders.Replace(Regex(WORD), SPACE),
            decoders.Replace(Regex(JOIN), ""),
            decoders.ByteLevel(),
        ]
    )
    special = [PAD, END, *TURNS]
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES - len(CALL),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(_without_marks(texts, (*special, *CALL)), trainer)
    raw.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in CALL])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(TURNS),
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE.read_text(),
    )


def _without_marks(texts: Iterable[str], marks: tuple[str, ...]) -> Iterable[str]:
    for text in texts:
        for mark in marks:
            text = text.replace(mark, "\n")
        yield text
