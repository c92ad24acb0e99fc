"""Knowing and doing: what a model can tell when it is asked apart, and what it does when it is due.

    knowing   options scored by their log-probability as the whole reply; sum over tokens, the turn-ending one included
    doing     greedy replies, judged by the skill's own rule
    controls  the same where the skill's move is not due: a gap without them rewards one-sided policies
    log-odds  mean over openings of the move of log p(opening), minus the same over openings of its opposite

Each case is asked in two contexts that never meet. All prompts of one kind go through one engine: rows sorted by length
and padded on the left, every prompt computed once, its cache forked for the options and kept for the reply. The
decoding is plain argmax: sampling settings and penalties of a checkpoint's generation config do not apply.

The paired analysis is that of Mancoridis et al. (2025, Potemkin understanding), with controls and whole-cluster
intervals added; the formulas are in `statistics`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import torch

from svdexpert.conversation import (
    Prompt,
    answers,
    context_of,
    continuation,
    opening,
    prompt_of,
    text_of,
    tokenizer_of,
    turn_ends,
    watch,
)
from svdexpert.decision import Context, Decision
from svdexpert.errors import MeasurementError, SvdExpertError, TooLongError, WorldError
from svdexpert.expert import Expert
from svdexpert.forward import Contexts, Forward, left_padded
from svdexpert.mixture import Bank, Blend
from svdexpert.model import SpectralModel
from svdexpert.reply import Call, read
from svdexpert.skills import Case, Openings, Skill, load
from svdexpert.statistics import (
    Estimate,
    Floats,
    auc_interval,
    bag_of_words_auc,
    chance_corrected,
    difference_interval,
    doing_given_knowing,
    kappa,
    mean_interval,
    paired_gap,
    share_interval,
    sign_flip,
)
from svdexpert.worlds import Split, World, assistant, user

KNOWING_TOKENS = 16
"""Tokens that a free answer to a knowing item may take, at least; longer options get their length and one more."""

CLAIMS = ("false", "true", "update")
QUESTIONS = 3


Speakers = Blend | Callable[[Sequence[Context]], Sequence[Mapping[str, float]]]
"""A mixture for all contexts, or what gives one for every context."""
Found = TypeVar("Found")


@dataclass(frozen=True)
class KnowingAnswer:
    """How a model answered a knowing item.

    Attributes:
        scores: log-probability of each option, in nats; per token where that was asked for.
        chosen: the option that scored best, the first of equals.
        right: it is the answer.
        exact: what the model wrote by itself equals the answer, but for case, outer spaces and punctuation.
        reply: what it wrote.
        dropped: turns that did not fit the context.
    """

    scores: tuple[float, ...]
    chosen: str
    right: bool
    exact: bool
    reply: str
    dropped: int = 0


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """What one case came to.

    Attributes:
        id: of the case.
        cluster: of the case.
        positive: the skill's move was due.
        kind: "false", "true" or "update" where the case is a claim, else "".
        chance: share of right answers that guessing reaches on its knowing item.
        knew: the right option scored best.
        exact: the right answer was written.
        reply: what the model did.
        score: the verdict's, in [-1, 1].
        move: the verdict's.
        error: the verdict's, "" where there is none.
        format: the verdict's.
        log_odds: of the move against its opposite, in nats.
        finished: where questions have scripted answers, whether asking and then calling succeeded; else None.
        dropped: turns that did not fit the context, of both prompts.
    """

    id: str
    cluster: str
    positive: bool
    kind: str
    chance: float
    knew: bool
    exact: bool
    reply: str
    score: float
    move: str
    error: str
    format: bool
    log_odds: float
    finished: bool | None = None
    dropped: int = 0

    @property
    def right(self) -> bool:
        """The decision was right."""
        return self.score > 0


@dataclass(frozen=True, kw_only=True)
class SkillResult:
    """A skill, measured.

    Attributes:
        skill: its name.
        model: the base, as its basis names it.
        experts: what was in force, in words.
        rows: one a case.
        figures: estimates by name: see `figures`.
        p_values: of the gap: "mcnemar" (cases independent) and "sign_flip" (whole clusters).
        errors: how often each class of error was made.
        too_long: cases that were left out, because the model's context is too short for them.
    """

    skill: str
    model: str
    experts: str
    rows: tuple[CaseResult, ...]
    figures: Mapping[str, Estimate]
    p_values: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, int] = field(default_factory=dict)
    too_long: int = 0

    @property
    def dropped(self) -> int:
        """Turns that did not fit the context, over all prompts."""
        return sum(row.dropped for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, floats rounded to six places, NaN as None; `from_json` takes them back."""
        return cast(dict[str, Any], _plain(asdict(self)))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SkillResult:
        """Return the result that `to_json` wrote.

        Raises:
            SvdExpertError: a part is missing, or unknown.
        """
        try:
            ends = ("value", "low", "high")
            figures = {
                name: Estimate(**one | {end: math.nan if one[end] is None else one[end] for end in ends})
                for name, one in values["figures"].items()
            }
            rows = tuple(CaseResult(**row) for row in values["rows"])
            return cls(**{**values, "rows": rows, "figures": figures})
        except (KeyError, TypeError, AttributeError) as error:
            raise SvdExpertError(
                f"This is no result of an evaluation ({error}): expected what to_json wrote."
            ) from error


# --- knowing, doing, log-odds


def answer_knowing(
    model: SpectralModel,
    cases: Sequence[Case],
    *,
    batch_size: int = 32,
    per_token: bool = False,
    progress: bool = True,
    contexts: Contexts | None = None,
) -> list[KnowingAnswer]:
    """Return how the model, under the mixture in force, answers the knowing item of every case.

    Args:
        model: with a tokenizer that has a chat template.
        cases: whose `knowing` is asked, each in a context of its own.
        batch_size: rows of a forward pass.
        per_token: divide the score of an option by its tokens, the turn-ending one included.
        progress: show a progress bar on stderr.
        contexts: keeps what the base makes of contexts, for the next mixture that is asked the same.

    Raises:
        SvdExpertError: no chat template, or a question longer than the context.
        MixtureError: a mixture by row or token is in force.
    """
    tokenizer, (_, ends) = tokenizer_of(model), turn_ends(model)
    prompts = [_question(model, case) for case in cases]
    how: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "contexts": contexts}
    given = answers(model, prompts, ends, "asking", **how)
    found = []
    for case, prompt, answer in zip(cases, prompts, given, strict=True):
        scores = tuple(sum(one) / (len(one) if per_token else 1) for one in answer.scores)
        chosen = case.knowing.options[max(range(len(scores)), key=lambda place: (scores[place], -place))]
        reply = text_of(tokenizer, answer.reply)
        right, exact = chosen == case.knowing.answer, normalised(reply) == normalised(case.knowing.answer)
        found.append(KnowingAnswer(scores, chosen, right, exact, reply, prompt.dropped))
    return found


def _question(model: SpectralModel, case: Case) -> Prompt:
    """Return a knowing item with its options as continuations."""
    tokenizer, (end, _) = tokenizer_of(model), turn_ends(model)
    options = [[*continuation(tokenizer, option), end] for option in case.knowing.options]
    room = max(KNOWING_TOKENS, *map(len, options))
    return prompt_of(model, case.knowing.messages, case.knowing.tools, options, room)


def fits(model: SpectralModel, case: Case, max_new_tokens: int = 96) -> bool:
    """Return whether a case can be asked about, and replied to, within the model's context."""
    try:
        prompt_of(model, case.messages, case.tools, [], max_new_tokens)
        _question(model, case)
    except TooLongError:
        return False
    return True


def act(
    model: SpectralModel,
    cases: Sequence[Case],
    *,
    max_new_tokens: int = 96,
    batch_size: int = 32,
    progress: bool = True,
    contexts: Contexts | None = None,
) -> list[str]:
    """Return the greedy reply to every case, under the mixture in force; marks of calls stay in the text.

    Args:
        model: with a tokenizer that has a chat template.
        cases: whose `messages` are replied to.
        max_new_tokens: of a reply.
        batch_size: rows of a forward pass.
        progress: show a progress bar on stderr.
        contexts: as in `answer_knowing`.

    Raises:
        SvdExpertError: no chat template, or a last turn longer than the context.
        MixtureError: a mixture by row or token is in force.
    """
    return [one.reply for one in _acted(model, cases, None, max_new_tokens, batch_size, progress, contexts)]


def move_log_odds(
    model: SpectralModel,
    cases: Sequence[Case],
    openings: Openings,
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> list[float]:
    """Return how much likelier than its opposite the skill's move begins, in nats, for every case.

    Mean over `openings.move` of log p(opening | conversation), minus the same over `openings.opposite`.
    For arguments and errors see `act`.
    """
    return [one.log_odds for one in _acted(model, cases, openings, 0, batch_size, progress)]


def normalised(text: str) -> str:
    """Return a short answer without case, outer spaces and punctuation.

    >>> normalised(" None. ") == normalised('"none"')
    True
    """
    return re.sub(r"^\W+|\W+$", "", text).casefold()


@dataclass(frozen=True)
class _Acted:
    reply: str
    log_odds: float
    dropped: int


def _acted(
    model: SpectralModel,
    cases: Sequence[Case],
    openings: Openings | None,
    max_new_tokens: int,
    batch_size: int,
    progress: bool,
    contexts: Contexts | None = None,
) -> list[_Acted]:
    """Return reply and log-odds of every case out of one pass over its prompt."""
    tokenizer, (_, ends) = tokenizer_of(model), turn_ends(model)
    starts = [opening(tokenizer, text) for text in (*openings.move, *openings.opposite)] if openings else []
    prompts = [prompt_of(model, case.messages, case.tools, starts, max_new_tokens) for case in cases]
    how: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "contexts": contexts}
    given = answers(model, prompts, ends, "acting", **how)
    found = []
    for prompt, answer in zip(prompts, given, strict=True):
        log_odds = math.nan
        if openings:
            sums = [sum(one) for one in answer.scores]
            move, opposite = sums[: len(openings.move)], sums[len(openings.move) :]
            log_odds = sum(move) / len(move) - sum(opposite) / len(opposite)
        found.append(_Acted(text_of(tokenizer, answer.reply), log_odds, prompt.dropped))
    return found


def _plain(value: Any) -> Any:
    """Return values that JSON has: numbers rounded, NaN as None."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


# --- a skill


def measure(
    model: SpectralModel,
    skill_name: str,
    cases: Sequence[Case],
    *,
    experts: Speakers = None,
    library: Mapping[str, Expert] | Bank | None = None,
    max_new_tokens: int = 96,
    batch_size: int = 32,
    progress: bool = True,
    contexts: Contexts | None = None,
) -> SkillResult:
    """Return what a model knows and does of a skill, case by case and in figures.

    Args:
        model: with a tokenizer that has a chat template.
        skill_name: as in `skills.load`.
        cases: of that skill, positives and controls.
        experts: one mixture for all cases: an expert, a name, weights by name; None is the base. Or what gives one for
            every context (`svdexpert.dispatch.chooser`), those of knowing items too.
        library: where names are looked up.
        max_new_tokens: of a reply.
        batch_size: rows of a forward pass.
        progress: show progress bars on stderr.
        contexts: as in `answer_knowing`: measuring several mixtures on the same cases then reads them once.

    Raises:
        MeasurementError: there are no cases.
        SkillError: there is no such skill.
        SvdExpertError: as in `answer_knowing`.
    """
    if not cases:
        raise MeasurementError(f"There are no cases to measure {skill_name} on.")
    skill = load(skill_name)

    def know(some: Sequence[Case]) -> list[KnowingAnswer]:
        return answer_knowing(model, some, batch_size=batch_size, progress=progress, contexts=contexts)

    def speak(some: Sequence[Case], openings: Openings | None = skill.OPENINGS) -> list[_Acted]:
        return _acted(model, some, openings, max_new_tokens, batch_size, progress, contexts)

    def carry_on(some: Sequence[Case]) -> list[str]:
        said = _under(model, experts, library, some, _said, partial(speak, openings=None))
        return [one.reply for one in said]

    answers = _under(model, experts, library, cases, _asked, know)
    acted = _under(model, experts, library, cases, _said, speak)
    finished = _finished(skill, cases, [one.reply for one in acted], carry_on)
    rows = []
    for case, answer, one, done in zip(cases, answers, acted, finished, strict=True):
        verdict, kind = skill.verify(case, one.reply), case.truth.get("kind")
        rows.append(
            CaseResult(
                id=case.id,
                cluster=case.cluster,
                positive=case.positive,
                kind=kind if kind in CLAIMS else "",
                chance=case.knowing.chance,
                knew=answer.right,
                exact=answer.exact,
                reply=one.reply,
                log_odds=one.log_odds,
                finished=done,
                dropped=answer.dropped + one.dropped,
                **asdict(verdict),
            )
        )
    return SkillResult(
        skill=skill_name,
        model=str(model.basis.key),
        experts=_in_words(experts),
        rows=tuple(rows),
        figures=figures(rows, skill.MOVE),
        p_values=_gap_p_values([row for row in rows if row.positive]),
        errors=dict(Counter(row.error for row in rows if row.error).most_common()),
    )


def _asked(case: Case) -> Context:
    return Context(case.knowing.messages, case.knowing.tools)


def _said(case: Case) -> Context:
    return Context(case.messages, case.tools)


def _under(
    model: SpectralModel,
    experts: Speakers,
    library: Mapping[str, Expert] | Bank | None,
    cases: Sequence[Case],
    context: Callable[[Case], Context],
    measured: Callable[[Sequence[Case]], list[Found]],
) -> list[Found]:
    """Return what is measured of every case, under the mixture that is due in its context."""
    if not callable(experts):
        with model.using(experts, library):
            return measured(cases)
    groups: dict[tuple[tuple[str, float], ...], list[int]] = {}
    for place, weights in enumerate(experts([context(case) for case in cases])):
        groups.setdefault(tuple(sorted((name, one) for name, one in weights.items() if one)), []).append(place)
    found: dict[int, Found] = {}
    for mixture, places in groups.items():
        with model.using(dict(mixture), library):
            found.update(zip(places, measured([cases[place] for place in places]), strict=True))
    return [found[place] for place in range(len(cases))]


FAMILIES = ("clarify", "disagree", "call")
FAMILIES_OF: Mapping[str, Sequence[str]] = {"bfcl": ("call",), "bfcl-asks": ("clarify",), "sycon": ("premise",)}
"""What is measured in worlds that are not for all families."""
WORD_CASES = (1000, 500, 200, 100)
"""Training cases to which the bag-of-words control is fitted: as many as the world has."""


def knowing_doing(
    model: SpectralModel,
    world: World,
    *,
    families: Sequence[str] = FAMILIES,
    split: Split = "heldout",
    n: int = 200,
    seed: int = 0,
    experts: Speakers = None,
    library: Mapping[str, Expert] | Bank | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> list[SkillResult]:
    """Return the knowing-versus-doing benchmark: every family measured on n cases of a world.

    Cases that the model's context is too short for are left out, and counted in `too_long`.

    Beside its own figures each result has "words": the AUC of a bag of words on the last user turn, fitted on other
    cases of the train split, without an interval. Near 0.5 nothing but the context tells positives from controls. It is
    left out where a world has fewer than 100 cases to fit.

    Args:
        model: with a tokenizer that has a chat template.
        world: where the cases come from.
        families: names of skills.
        split: of the world.
        n: cases a family, an even number: half positives, half controls.
        seed: of the cases.
        experts: one mixture for all cases, or what gives one for every context; None is the base.
        library: where names are looked up.
        batch_size: rows of a forward pass.
        progress: show progress bars on stderr.

    Raises:
        SkillError: n is odd, or there is no such skill. WorldError: the world has fewer cases.
        MeasurementError: no case of a family fits the model's context. SvdExpertError: as in `measure`.
    """
    results = []
    for name in families:
        skill = load(name)
        drawn = skill.cases(world, split, n, seed=seed)
        cases = [one for one in drawn if fits(model, one)]
        if not cases:
            raise MeasurementError(f"{name}: none of {n} cases fits the model's {context_of(model)} tokens.")
        result = measure(model, name, cases, experts=experts, library=library, batch_size=batch_size, progress=progress)
        result = replace(result, too_long=len(drawn) - len(cases))
        fitted = _other_cases(skill, world, cases, seed)
        if fitted and {case.positive for case in cases} == {True, False}:
            words = Estimate(bag_of_words_auc(fitted, cases), math.nan, math.nan, len(cases))
            result = replace(result, figures={**result.figures, "words": words})
        results.append(result)
    return results


def _other_cases(skill: Skill, world: World, cases: Sequence[Case], seed: int) -> list[Case]:
    """Return as many cases of the train split as there are, WORD_CASES at most, none with a last turn of `cases`."""
    spoken = {case.messages[-1]["content"] for case in cases}
    for many in WORD_CASES:
        try:
            found = skill.cases(world, "train", many, seed=seed + 1)
        except WorldError:  # files that are not there, or hold too few
            continue
        rest = [case for case in found if case.messages[-1]["content"] not in spoken]
        return rest if {case.positive for case in rest} == {True, False} else []
    return []


def figures(rows: Sequence[CaseResult], move: str) -> dict[str, Estimate]:
    """Return the figures of a skill by name; those that no row speaks of are left out.

    knowing, knowing_positives, knowing_controls    the right option scored best
    knowing_corrected                               the same, (accuracy - chance) / (1 - chance)
    knowing_exact                                   the right answer was written
    doing, controls                                 the decision was right, on positives and on controls
    gap                                             knowing - doing on positives, with McNemar's p; means little
                                                    where knowing_controls is low: one answer to all is not knowing
    doing_given_knowing, potemkin                   a / (a + b) and b / (a + b) on positives
    format, score                                   form obeyed; mean score
    move, kappa                                     replies that make the skill's move; its agreement with "positive"
    auc                                             of the log-odds of the move, positives against controls
    capitulation, updating, contrarian, discernment on claims: F, U, C and J = U - F
    finished                                        asked for what is missing, then called exactly: "two-turn success"

    Args:
        rows: at least one.
        move: the skill's.
    """
    found: dict[str, Estimate] = {}

    def share(name: str, some: Sequence[CaseResult], claim: Callable[[CaseResult], bool | None]) -> None:
        if some:
            found[name] = share_interval([bool(claim(row)) for row in some], _clusters(some))

    positives, controls = [row for row in rows if row.positive], [row for row in rows if not row.positive]
    for name, some in (("knowing", rows), ("knowing_positives", positives), ("knowing_controls", controls)):
        share(name, some, lambda row: row.knew)
    found["knowing_corrected"] = _corrected(found["knowing"], float(np.mean([row.chance for row in rows])))
    share("knowing_exact", rows, lambda row: row.exact)
    share("doing", positives, lambda row: row.right)
    share("controls", controls, lambda row: row.right)
    if positives:
        knew, did = [row.knew for row in positives], [row.right for row in positives]
        found["gap"] = paired_gap(knew, did, _clusters(positives))
        if any(knew):
            one = found["doing_given_knowing"] = doing_given_knowing(knew, did, _clusters(positives))
            found["potemkin"] = Estimate(1 - one.value, 1 - one.high, 1 - one.low, one.n)
    share("format", rows, lambda row: row.format)
    found["score"] = mean_interval([row.score for row in rows], _clusters(rows))
    share("move", rows, lambda row: row.move == move)
    if positives and controls:
        due = [row.positive for row in rows]
        found["kappa"] = kappa([row.move == move for row in rows], due, _clusters(rows))
        found["auc"] = auc_interval([row.log_odds for row in rows], due, _clusters(rows))
    _claims(rows, found, share)
    share("finished", [row for row in rows if row.finished is not None], lambda row: row.finished)
    return found


def _claims(
    rows: Sequence[CaseResult],
    found: dict[str, Estimate],
    share: Callable[[str, Sequence[CaseResult], Callable[[CaseResult], bool]], None],
) -> None:
    """Add F, U, C and J."""
    false, true, update = ([row for row in rows if row.kind == kind] for kind in CLAIMS)
    share("capitulation", false, lambda row: row.error == "capitulation")
    share("updating", update, lambda row: row.right)
    share("contrarian", true, lambda row: row.score < 0)
    if false and update:
        taken, given_in = [row.right for row in update], [row.error == "capitulation" for row in false]
        clusters = (_clusters(update), _clusters(false))
        found["discernment"] = difference_interval(taken, given_in, clusters)


def _corrected(accuracy: Estimate, chance: float) -> Estimate:
    low, value, high = (
        one if math.isnan(one) else chance_corrected(one, chance)
        for one in (accuracy.low, accuracy.value, accuracy.high)
    )
    return Estimate(value, low, high, accuracy.n)


def _gap_p_values(positives: Sequence[CaseResult]) -> dict[str, float]:
    if not positives:
        return {}
    gap = paired_gap([row.knew for row in positives], [row.right for row in positives], resamples=1)
    deltas = [float(row.knew) - float(row.right) for row in positives]
    return {"mcnemar": cast(float, gap.p), "sign_flip": sign_flip(deltas, _clusters(positives))}


def _clusters(rows: Sequence[CaseResult]) -> list[str]:
    return [row.cluster for row in rows]


def _in_words(experts: Speakers) -> str:
    if callable(experts):
        return "dispatched"
    if experts is None:
        return "base"
    if isinstance(experts, Expert):
        return experts.skill or "an expert"
    if isinstance(experts, str):
        return experts
    return " + ".join(f"{weight:g} {name}" for name, weight in experts.items()) or "base"


def _finished(
    skill: Skill, cases: Sequence[Case], replies: Sequence[str], carry_on: Callable[[Sequence[Case]], list[str]]
) -> list[bool | None]:
    """Return, where questions have scripted answers, whether asking led to the exact call; else None.

    A question counts if the skill finds it right; its scripted answer follows, up to `QUESTIONS` times, and then only
    the exact call, nothing around it, is success. A skill offers this by `asked(case, reply)`.
    """
    asked: Callable[[Case, str], str | None] | None = getattr(skill, "asked", None)
    found: list[bool | None] = [False if asked and case.positive and case.followup else None for case in cases]
    if asked is None:
        return found
    same_call = getattr(load("call"), "same_call")  # noqa: B009  not part of the protocol
    talks = {place: (cases[place], replies[place]) for place, one in enumerate(found) if one is False}
    answered: dict[int, set[str]] = {place: set() for place in talks}
    for _ in range(QUESTIONS):
        longer = {}
        for place, (case, reply) in talks.items():
            detail = asked(case, reply)
            if detail is None or detail in answered[place] or detail not in case.followup:
                continue
            if not skill.verify(case, reply).right:
                continue
            answered[place].add(detail)
            longer[place] = replace(case, messages=(*case.messages, assistant(reply), user(case.followup[detail])))
        talks = dict(zip(longer, zip(longer.values(), carry_on(list(longer.values())), strict=True), strict=True))
        for place, (case, reply) in talks.items():
            made, due = read(reply), Call(case.truth["call"]["name"], case.truth["call"]["arguments"])
            found[place] = len(made.calls) == 1 and made.obeyed and same_call(made.calls[0], due, case.tools)
    return found


# --- what the hidden states tell


def probe(
    model: SpectralModel,
    cases_by_skill: Mapping[str, Sequence[Case]],
    *,
    folds: int = 5,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> list[float]:
    """Return how well each layer tells the skills apart at the last token of the prompt, on clusters not fitted.

    A ridge classifier on standardised hidden states, one output a skill (penalty: a hundredth of the cases),
    cross-validated by cluster. Guessing reaches the share of the largest skill.

    Args:
        model: with a tokenizer that has a chat template; its mixture in force counts.
        cases_by_skill: at least two skills.
        folds: at least 2, and no more than there are clusters.
        seed: of the assignment of clusters to folds.
        batch_size: rows of a forward pass.
        progress: show a progress bar on stderr.

    Returns:
        Accuracies in [0, 1]: of the embeddings, then of each layer.

    Raises:
        MeasurementError: fewer than two skills, or than `folds` clusters.
    """
    cases = [case for some in cases_by_skill.values() for case in some]
    labels = np.repeat(np.arange(len(cases_by_skill)), [len(some) for some in cases_by_skill.values()])
    clusters = list(dict.fromkeys(case.cluster for case in cases))
    if len(set(labels)) < 2 or not 2 <= folds <= len(clusters):
        raise MeasurementError(
            "A probe needs at least two skills, two folds, and as many clusters as folds; found "
            f"{len(set(labels))} skills with cases, {folds} folds and {len(clusters)} clusters."
        )
    np.random.default_rng(seed).shuffle(clusters)
    fold_of = {cluster: place % folds for place, cluster in enumerate(clusters)}
    fold = np.array([fold_of[case.cluster] for case in cases])
    states = _states(model, cases, batch_size, progress)  # layers of (cases width)
    wanted = np.eye(len(cases_by_skill))[labels]
    found = []
    for layer in states:
        guesses = np.empty(len(cases), np.int64)
        for held in range(folds):
            out = fold == held
            guesses[out] = _ridge(layer[~out], wanted[~out], layer[out]).argmax(-1)
        found.append(float((guesses == labels).mean()))
    return found


def _ridge(x: Floats, y: Floats, at: Floats) -> Floats:
    """Return what ridge regression of y (n outputs) on x (n width) gives at other points; in its dual form."""
    mean, scale, middle = x.mean(0), x.std(0) + 1e-6, y.mean(0)
    x, at = (x - mean) / scale, (at - mean) / scale
    weights = np.linalg.solve(x @ x.T + 0.01 * len(x) * np.eye(len(x)), y - middle)
    return cast(Floats, at @ x.T @ weights + middle)


def _states(model: SpectralModel, cases: Sequence[Case], batch_size: int, progress: bool) -> list[Floats]:
    """Return the hidden state of every prompt's last token, a matrix (cases width) for embeddings and each layer."""
    prompts = [prompt_of(model, case.messages, case.tools, [], 0).ids for case in cases]
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    forward = Forward(model.hf)
    states: dict[int, Floats] = {}
    with torch.inference_mode():
        for batch in watch(batches, "probing", progress):
            ids, mask = left_padded([prompts[place] for place in batch], forward.device)
            layers = torch.stack([one[:, -1] for one in forward.hidden(ids, mask)], 1).float().cpu().numpy()
            states.update(zip(batch, layers, strict=True))  # (layers width) each
    table = np.stack([states[place] for place in range(len(prompts))]).astype(np.float64)
    return list(table.transpose(1, 0, 2))


# --- decisions


@dataclass(frozen=True)
class DecisionResult:
    """What decisions were worth.

    Attributes:
        n: contexts.
        accuracy: share of them in which exactly those speak who should.
        confusion: how often who should speak (first) met who was chosen (second).
        calibration_error: distance between confidence and accuracy, mean over ten bins of confidence.
    """

    n: int
    accuracy: float
    confusion: Mapping[tuple[frozenset[str], frozenset[str]], int]
    calibration_error: float


def judge(wanted: Sequence[frozenset[str]], decisions: Sequence[Decision]) -> DecisionResult:
    """Compare decisions with who should speak; a weight of at least one half counts as speaking.

    Args:
        wanted: names of experts, by context.
        decisions: on the same contexts.

    Raises:
        MeasurementError: none, or lengths that differ.
    """
    if not wanted or len(wanted) != len(decisions):
        raise MeasurementError(f"There are {len(wanted)} contexts and {len(decisions)} decisions: one is due for each.")
    pairs = [(who, made.chosen) for who, made in zip(wanted, decisions, strict=True)]
    right = [who == chosen for who, chosen in pairs]
    bins: dict[int, list[tuple[float, bool]]] = {}
    for made, one in zip(decisions, right, strict=True):
        bins.setdefault(min(9, int(made.confidence * 10)), []).append((made.confidence, one))
    gaps = [abs(sum(sure for sure, _ in some) - sum(one for _, one in some)) for some in bins.values()]
    return DecisionResult(len(right), sum(right) / len(right), Counter(pairs), sum(gaps) / len(right))
