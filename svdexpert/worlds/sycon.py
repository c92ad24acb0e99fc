"""Questions with a false premise, and ordinary ones: SYCON-Bench's false presuppositions, for measuring any model.

    world = Sycon("SYCON-Bench/false_presupposition")     # of a clone of github.com/JiseungHong/SYCON-Bench
    world.claims("heldout", 50, kind="false")

Line i of questions.txt, presuppositions.txt and corrections.txt is one item; control_normal_questions.txt has questions
that presuppose nothing false. A false claim is a question whose presupposition is false; a true one is an ordinary
question, whose statement to be judged apart is the correction of some item, so that "false" is not always the answer.

Source: Hong et al. 2025, SYCON-Bench, MIT; the premises are those of CREPE (Yu et al. 2022).
"""

from __future__ import annotations

import random
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from svdexpert.errors import WorldError
from svdexpert.worlds import Claim, ClaimKind, Composite, Dialogue, Request, RequestKind, Split, user

FILES = ("questions", "presuppositions", "corrections", "control_normal_questions")


class Sycon:
    """The items of the files.

    Args:
        folder: that holds FILES as .txt.

    Attributes:
        skipped: lines that were left out, each with the reason.
        version: of the rules by which lines become scenes.

    Raises:
        WorldError: a file is not there, or the files do not have as many lines as one another.
    """

    name: ClassVar[str] = "sycon"
    version: ClassVar[int] = 1

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.skipped: list[str] = []

    def claims(self, split: Split, n: int, *, kind: ClaimKind, seed: int = 0) -> list[Claim]:
        """Return n questions: "false" have a false premise, "true" and "update" have none."""
        if split != "heldout":
            raise WorldError(f"{self.name} is for measuring alone: its split is heldout, found {split!r}.")
        found = list(self._items if kind == "false" else self._ordinary)
        if kind == "update":
            raise WorldError("sycon holds no corrections by users: measure the family premise in it.")
        if n > len(found):
            raise WorldError(f"{self.name} holds {len(found)} questions of this kind, {n} were asked for: lower n.")
        random.Random(f"{self.name}/{seed}").shuffle(found)
        return found[:n]

    def requests(self, split: Split, n: int, *, kind: RequestKind, seed: int = 0) -> list[Request]:
        """There are none."""
        raise WorldError("sycon holds no requests: measure the family premise in it.")

    def composites(self, split: Split, n: int, *, seed: int = 0) -> list[Composite]:
        """There are none."""
        raise WorldError("sycon holds no composites.")

    def dialogues(self, split: Split, n: int, *, seed: int = 0) -> list[Dialogue]:
        """There are none."""
        raise WorldError("sycon holds no whole dialogues: nothing is trained on it.")

    @cached_property
    def _lines(self) -> dict[str, list[str]]:
        missing = [f"{name}.txt" for name in FILES if not (self.folder / f"{name}.txt").is_file()]
        if missing:
            raise WorldError(f"{self.folder} lacks {', '.join(missing)}: expected SYCON-Bench's false_presupposition.")
        found = {name: (self.folder / f"{name}.txt").read_text(encoding="utf-8").splitlines() for name in FILES}
        counts = {name: len(found[name]) for name in FILES[:3]}
        if len(set(counts.values())) > 1:
            raise WorldError(f"{self.folder}: line i of three files is one item, and they have {counts} lines.")
        return found

    @cached_property
    def _items(self) -> list[Claim]:
        """Questions with a false premise."""
        found = []
        for place, item in enumerate(zip(*(self._lines[name] for name in FILES[:3]), strict=True)):
            question, presupposition, correction = (one.strip() for one in item)
            if not (question and presupposition and correction):
                self.skipped.append(f"line {place + 1}: one of question, presupposition and correction is empty")
                continue
            found.append(_claim(place, question, presupposition, correction, false=True))
        return found

    @cached_property
    def _ordinary(self) -> list[Claim]:
        """Ordinary questions, each with the correction of an item to be judged apart."""
        questions = [one.strip() for one in self._lines["control_normal_questions"] if one.strip()]
        facts = [one.fact for one in self._items]
        return [
            _claim(place, question, fact, fact, false=False)
            for place, (question, fact) in enumerate(zip(questions, facts, strict=False))
        ]


def _claim(place: int, question: str, statement: str, fact: str, *, false: bool) -> Claim:
    kind: ClaimKind = "false" if false else "true"
    return Claim(
        id=f"sycon/{'premise' if false else 'ordinary'}/{place}",
        split="heldout",
        cluster=f"sycon/{place}",
        messages=(user(question),),
        tools=(),
        kind=kind,
        in_context=False,
        truth=fact,
        claimed=statement,
        other=statement,
        fact=fact,
        statement=statement,
        holds=(fact,),
        confirms=(statement,),
        contradicts=(fact,),
    )
