"""What the demo shows of a run: replies side by side, a dialogue of several turns, pictures, and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from svdexpert.decision import Dispatcher
from svdexpert.dialogue import Conversation
from svdexpert.evaluate import DecisionResult, SkillResult
from svdexpert.expert import Expert
from svdexpert.model import SpectralModel
from svdexpert.page import Part, write_page
from svdexpert.report import draw_shares, draw_slopes, draw_turns, people
from svdexpert.skills import Case
from svdexpert.worlds import result

TITLE = "What it knows, it does"
LEAD = (
    "A language model can know that a detail is missing, that a claim is false, which function fits, and still not act "
    "on it. This is what three small vectors of offsets to its singular values, and a router that decides who speaks, "
    "change in that."
)
FIGURES = {"knowing": "knowing_positives", "doing": "doing", "controls": "controls"}


@dataclass(frozen=True)
class Sample:
    """One context, as the base answers it and as the experts do that the dispatcher lets speak.

    Attributes:
        skill: whose case it is.
        said: what the user said last.
        base: the base's reply.
        reply: the dispatched one.
        speaks: who spoke.
        due: a right reply.
    """

    skill: str
    said: str
    base: str
    reply: str
    speaks: str
    due: str

    def rows(self) -> list[tuple[str, str]]:
        """Return what a table shows."""
        return [("user", self.said), ("base", self.base), (self.speaks, self.reply), ("is due", self.due)]


def sample(
    model: SpectralModel, library: Mapping[str, Expert], dispatcher: Dispatcher, cases: Sequence[Case]
) -> Sample:
    """Return the first positive case in which the two replies differ, or the first of all."""
    found = []
    for case in (one for one in cases if one.positive):
        talk = Conversation(model, library, dispatcher, case.tools)
        turn = talk.reply_to(*case.messages)
        speaks = " + ".join(sorted(turn.decision.chosen)) or "nobody"
        said = str(case.messages[-1]["content"])
        found.append(Sample(case.skill, said, talk.base_reply(), turn.text, speaks, case.gold[0]))
        if found[-1].base != found[-1].reply:
            return found[-1]
    return found[0]


def dialogue(
    model: SpectralModel, library: Mapping[str, Expert], dispatcher: Dispatcher, cases: Sequence[Case]
) -> tuple[Conversation, list[str]]:
    """Return a dialogue that needs another register in every turn, and what the user says in each.

    The user leaves a detail out, gives it, is told what became of it, claims something else, and says good-bye. The
    function is one that the train split has.
    """
    case = next(
        one
        for one in cases
        if one.positive and len(one.followup) == 1 and len(one.messages) == 1 and "seen_tool" in one.tags
    )
    name, answer = case.truth["call"]["name"], next(iter(case.followup.values()))
    talk = Conversation(model, library, dispatcher, case.tools)
    said = [str(case.messages[-1]["content"]), answer, "(the function replies)", *CLAIMS]
    talk.say(said[0])
    talk.say(said[1])
    talk.reply_to(result(name, {"status": "done", "contact": "Nora Keller", "price": "45 pounds"}))
    for words in CLAIMS:
        talk.say(words)
    return talk, said


CLAIMS = ("I am certain that the contact is Viktor Hale.", "Thank you, that was all.")


def summary(results: Mapping[str, Sequence[SkillResult]]) -> Table:
    """Return knowing, doing and controls of every skill, a line a mixture."""
    table = Table(title="4. held-out: knowing / doing / controls")
    for column in ("who speaks", *(one.skill for one in next(iter(results.values())))):
        table.add_column(column)
    for who, some in results.items():
        table.add_row(Text(who), *(Text(_three(one)) for one in some))
    return table


def _three(one: SkillResult) -> str:
    return " / ".join(f"{one.figures[name].value:.2f}" for name in FIGURES.values())


def side_by_side(one: Sample) -> Table:
    """Return a sample as a table."""
    table = Table(title=f"6. {one.skill}", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in one.rows():
        table.add_row(label, Text(text))
    return table


def show(
    folder: Path,
    results: Mapping[str, Sequence[SkillResult]],
    judged: DecisionResult,
    samples: Sequence[Sample],
    talk: Conversation,
    said: Sequence[str],
) -> Path:
    """Draw the pictures and write the page; return where it is."""
    skills = [one.skill for one in results["base"]]
    pictures = {name: folder / f"{name}.png" for name in ("slopes", "interference", "decisions", "turns")}
    draw_slopes(results["base"], results["dispatched"], pictures["slopes"])
    doing = [[one.figures["doing"].value for one in some] for some in results.values()]
    draw_shares(doing, list(results), skills, pictures["interference"])
    wanted, chosen = (sorted({pair[side] for pair in judged.confusion}, key=people) for side in (0, 1))
    counts = [[judged.confusion.get((who, one), 0) for one in chosen] for who in wanted]
    shares = [[count / sum(row) for count in row] for row in counts]
    draw_shares(shares, list(map(people, wanted)), list(map(people, chosen)), pictures["decisions"])
    draw_turns([one.decision.weights for one in talk.turns], skills, [_short(one) for one in said], pictures["turns"])
    n = len(results["base"][0].rows)
    parts = [
        Part(
            "Before and after",
            [
                f"Held-out cases of a generated town, {n} a skill, half of them controls, in which the skill's move "
                "would be wrong. Knowing is asked in a context of its own; bars are 95 % intervals.",
                "In the table, by mixture: knowing / doing / controls.",
            ],
            pictures["slopes"],
            "knowing, doing and controls of the base and of the dispatched experts, by skill",
            ("who speaks", *skills),
            [(who, *(_three(one) for one in some)) for who, some in results.items()],
        ),
        Part(
            "Who does what",
            ["Positives done, a row a mixture: an expert should raise its own column and leave the others."],
            pictures["interference"],
            "doing by mixture and skill",
        ),
        Part(
            "Who is let speak",
            [f"Who should speak (rows), whom the router chose: right in {judged.accuracy:.2f} of {judged.n}."],
            pictures["decisions"],
            "decisions of the router",
        ),
        Part(
            "One dialogue",
            ["The mixture of every turn; the router decides anew in each, in the prompt's own forward pass."],
            pictures["turns"],
            "weights of the experts over the turns of a dialogue",
            ("user", "who speaks", "reply"),
            [
                (words, " + ".join(sorted(turn.decision.chosen)) or "nobody", turn.text)
                for words, turn in zip(said, talk.turns, strict=True)
            ],
        ),
        *(Part(f"{one.skill}, side by side", head=("who", "says"), rows=one.rows()) for one in samples),
        Part(
            "Your own model",
            ["The same on any Hugging Face model with a chat template, and in the server you run:"],
            code=(
                "svdexpert train clarify --model Qwen/Qwen3-0.6B --out runs/clarify",
                "svdexpert export Qwen/Qwen3-0.6B runs/clarify/experts/clarify lora",
            ),
        ),
    ]
    path = folder / "index.html"
    base = results["base"][0].model
    write_page(
        path, TITLE, LEAD, parts, f"Made by svdexpert demo on {base}; its deficit is deliberate (its model card)."
    )
    return path


def _short(words: str) -> str:
    return words if len(words) <= 40 else f"{words[:38]}..."
