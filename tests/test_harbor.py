"""The embedded base: files that plain transformers loads, a template and a tokenizer that lose nothing, and the gap."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import svdexpert
from svdexpert import Expert, SpectralModel, evaluate, worlds
from svdexpert.evaluate import knowing_doing
from svdexpert.reply import Call
from svdexpert.worlds import Message, assistant, calling, result, system, tool, user

FOLDER = Path(svdexpert.__file__).parent / "harbor"
STAGES = [FOLDER, Path("benchmarks/harbor/natural")]
TABLE = tool("book_table", {"place": "string", "day": "string", "people": "integer"}, required=["place", "day"])
OPAQUE = tool("svc_12", {"size": ["small", "large"]}, required=[], description="Order a cake.")
TALK: list[Message] = [
    system("Today is Friday, 2019-03-01."),
    user("Book a table at Blue Heron."),
    assistant("Which day?"),
    user("Sunday."),
    calling(Call("book_table", {"place": "Blue Heron", "day": "Sunday"})),
    result("book_table", {"status": "ok"}),
    assistant("It is done."),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(FOLDER)
    return found


@pytest.mark.parametrize("folder", STAGES, ids=["aligned", "natural"])
def test_plain_transformers_loads_a_small_llama(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert sum(one.numel() for one in model.parameters()) <= 8e6
    shape = model.config
    assert (shape.model_type, shape.vocab_size, shape.max_position_embeddings) == ("llama", 2048, 1024)
    assert shape.num_key_value_heads < shape.num_attention_heads
    assert shape.tie_word_embeddings


def test_harbor_is_loaded_in_fp32_and_takes_experts_of_the_checkpoint_as_it_is() -> None:
    """CPUs without bf16 compute in it very slowly; the weights are the same numbers."""
    model = SpectralModel.from_pretrained("harbor", k=2, cache=False, progress=False)
    assert model.hf.dtype == torch.float32
    stored = SpectralModel.from_pretrained("harbor", k=2, cache=False, dtype="bfloat16", progress=False)
    expert = Expert.random(stored.basis)
    expert.check_on(model.basis)


def test_the_card_says_licence_and_deficit() -> None:
    card = (FOLDER / "README.md").read_text()
    assert "license: cc-by-sa-4.0" in card
    assert "its deficit is deliberate" in card
    assert "python -m benchmarks.harbor.natural" in card
    assert "CC BY-SA 4.0" in (FOLDER / "LICENSE").read_text()


def test_tools_stand_right_before_the_assistant_one_signature_a_line(tokenizer: PreTrainedTokenizerBase) -> None:
    text = tokenizer.apply_chat_template(TALK[:2], tools=[TABLE, OPAQUE], tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|system|>Today is Friday, 2019-03-01.<|end|><|user|>Book a table at Blue Heron.<|end|><|system|>"
        "book_table(place*: string, day*: string, people: integer)\nsvc_12(size: small|large) Order a cake.<|end|>"
        "<|assistant|>"
    )


@pytest.mark.parametrize("length", [3, 5, 7])
@pytest.mark.parametrize("tools", [[], [TABLE, OPAQUE]], ids=["plain", "tools"])
def test_a_prompt_is_the_beginning_of_what_follows(
    tokenizer: PreTrainedTokenizerBase, length: int, tools: list[dict[str, object]]
) -> None:
    how = {"tools": tools or None, "tokenize": False}
    prompt = tokenizer.apply_chat_template(TALK[: length - 1], add_generation_prompt=True, **how)
    assert str(tokenizer.apply_chat_template(TALK[:length], **how)).startswith(str(prompt))


def test_a_conversation_that_the_template_cannot_write_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(Exception, match="found: poet"):
        tokenizer.apply_chat_template([{"role": "poet", "content": "O"}], tokenize=False)


@given(st.text(st.characters(exclude_characters="\x01\x02", codec="utf-8"), max_size=60))
@example(" A")
@settings(max_examples=200, deadline=None)
def test_any_text_survives_the_tokenizer(text: str) -> None:
    """But for one space before a word at the very beginning: a word is one piece wherever it stands."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    kept = re.sub("^ (?=[A-Za-z])", "", text)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == kept


def test_it_knows_and_does_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate measures this with n = 500; here n = 40 shows that the shipped weights are those it measured."""
    monkeypatch.setattr(evaluate, "WORD_CASES", (100,))
    model = SpectralModel.from_pretrained("harbor", k=8, cache=False, progress=False)
    figures = json.loads(Path("benchmarks/results/harbor_gate.json").read_text())["figures"]
    for one in knowing_doing(model, worlds.load("town"), n=40, progress=False):
        for name in ("knowing", "doing", "controls"):
            assert abs(one.figures[name].value - figures[f"{name}_{one.skill}"]) < 0.25
