"""harbor's tokenizer: byte-level BPE of 4,096 pieces, every digit a piece of its own, and the chat template.

Turns are marked by special tokens; the two marks of a call are ordinary added tokens: decoding a reply keeps them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PIECES = 4096
CONTEXT = 1024
PAD, END = "<|pad|>", "<|end|>"
TURNS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
CALL = ("<tool_call>", "</tool_call>")
TEMPLATE = Path(__file__).parent / "chat_template.jinja"


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer trained on texts, which may contain the marks of turns and calls."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
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
