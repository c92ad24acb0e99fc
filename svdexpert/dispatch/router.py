"""Router: what the base has in mind at the end of the prompt says who should speak.

    p_e = sigmoid(w_e . state + b_e)       state: the last token, as it enters the last layer and the output head (d)
    expert e speaks where p_e >= 1/2, at weight max(1, strength_e / how many speak), never above strength_e; nobody
    does where the set is less sure than `abstain_below`

One logistic regression an expert, on states of the base that the prompt's own forward pass has made anyway. Skills
show late: in harbor hardly at all in the layer where experts begin, almost fully in the last two. Activated experts
leave the prompt's cache as it is, so that only the tokens that open the reply are computed again under the mixture.

How loudly an expert speaks is chosen too: experts that were trained to be added up are small, and one that speaks alone
does more at twice its weight (LOG.md). The strength is the one under which right replies are likeliest.

No example has to want two experts. What pairs look like is guessed: between the state of one context and that of
another both experts are wanted (mixup, Zhang et al. 2018, arXiv:1710.09412), for pairs that do not exclude one another.
The penalty, the temperature (Guo et al. 2017, arXiv:1706.04599) and the threshold are chosen on the validation examples
and pairs that are guessed of these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import combinations
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from svdexpert.conversation import Prompt, answers, as_message, completion, prompt_of, tokenizer_of, turn_ends
from svdexpert.decision import Asked, Decision
from svdexpert.dispatch import Example, check, finite_weights, stamp, states_of
from svdexpert.errors import DispatchError, TooLongError
from svdexpert.expert import Expert
from svdexpert.forward import Contexts
from svdexpert.mixture import Bank
from svdexpert.model import SpectralModel

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Weights of |w|^2 that are tried, with standardised states and the mean loss of the examples."""
BETWEEN = (0.3, 0.7)
"""Shares of the one state in a guessed pair, the rest is the other's; drawn evenly."""
STRENGTHS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5)
"""Weights that are tried of an expert that speaks alone."""
MOST_REPLIES = 100
HELD_PAIRS = 0.25
"""Guessed pairs among what settings are chosen on, as a multiple of the examples that want either expert."""


@dataclass(frozen=True, eq=False)
class Router:
    """Logistic regressions on what the base has in mind.

    Attributes:
        weight: of the state, temperature included (e d).
        bias: (e).
        abstain_below: confidence under which nobody speaks, in [0, 1].
        made_for: the base and the experts, by digest.
        strengths: weight of each expert where it speaks alone, at least 1/2.
        scores: of the validation examples: accuracy, calibration error (JSON values).
    """

    weight: Tensor
    bias: Tensor
    abstain_below: float
    made_for: Mapping[str, Any]
    strengths: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, Any] = field(default_factory=dict)
    reads: ClassVar[bool] = True
    strategy: ClassVar[str] = "router"

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts that it may let speak."""
        return tuple(self.made_for["experts"])

    def check(self, model: SpectralModel, library: Mapping[str, Expert] | Bank) -> None:
        """Raise a DispatchError unless base and experts are those that it was fitted with."""
        check(self.made_for, model, library)

    def decide(self, model: SpectralModel, asked: Asked) -> list[Decision]:
        """Return a decision for every row of `asked.state`."""
        if asked.state is None:
            raise DispatchError("A router reads the state of the prompt, and was given none.")
        if asked.state.shape[-1] != self.weight.shape[-1]:
            raise DispatchError(
                f"The router reads states of {self.weight.shape[-1]} numbers, and this base has "
                f"{asked.state.shape[-1]}: fit one on it."
            )
        table = probabilities(asked.state, self.weight, self.bias)
        return [self._decision(dict(zip(self.experts, row, strict=True))) for row in table.tolist()]

    def _decision(self, scores: Mapping[str, float]) -> Decision:
        sure = 1.0
        for one in scores.values():
            sure *= max(one, 1 - one)
        speak = [name for name, one in scores.items() if one >= 0.5 and sure >= self.abstain_below]
        because = ", ".join(f"{name} {one:.2f}" for name, one in scores.items())
        alone = {name: self.strengths.get(name, 1.0) for name in scores}
        return Decision(self.weights_of(speak), sure, f"read from the prompt's last state: {because}", scores, alone)

    def weights_of(self, names: Sequence[str]) -> dict[str, float]:
        """Return how loudly experts speak where they are all that do."""
        strengths = {name: self.strengths.get(name, 1.0) for name in names}
        return {name: min(strength, max(1.0, strength / len(names))) for name, strength in strengths.items()}

    def stored(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what a file holds."""
        card = {"abstain_below": self.abstain_below, "made_for": dict(self.made_for), "scores": dict(self.scores)}
        card |= {"strengths": dict(self.strengths)}
        return card, {"weight": self.weight, "bias": self.bias}


def restored(card: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Router:
    """Return what was stored."""
    weight, bias = tensors["weight"], tensors["bias"]
    if weight.dim() != 2 or bias.shape != weight.shape[:1] or len(card["made_for"]["experts"]) != len(bias):
        raise ValueError(f"weight {tuple(weight.shape)}, bias {tuple(bias.shape)}")
    threshold, strengths = float(card["abstain_below"]), finite_weights(card["strengths"])
    if not 0 <= threshold <= 1:
        raise ValueError(f"abstain_below {threshold}")
    if strengths.keys() - card["made_for"]["experts"].keys():
        raise ValueError(f"strengths {strengths}")
    return Router(weight.float(), bias.float(), threshold, card["made_for"], strengths, dict(card["scores"]))


def probabilities(state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return how likely each expert should speak (b e), from states (b d)."""
    return (state.float() @ weight.to(state.device).mT + bias.to(state.device)).sigmoid()


def fit(
    model: SpectralModel,
    library: Mapping[str, Expert],
    examples: Sequence[Example],
    validation: Sequence[Example],
    *,
    pairs: float = 1.0,
    together: Sequence[Sequence[str]] | None = None,
    strength: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = False,
) -> Router:
    """Fit a router.

    Args:
        model: attached.
        library: the experts that it may let speak.
        examples: that want one expert or none, or several.
        validation: as many kinds; penalty, temperature and threshold are chosen on it.
        pairs: guessed examples of two experts, as a multiple of those that want either of them; 0 for none.
        together: pairs of experts that may both be due; None is all that do not exclude one another.
        strength: weight of an expert that speaks alone, at least 1/2; None chooses it for each, at
            least 1, on the validation examples that have a reply.
        seed: of their draw.
        batch_size: rows of a forward pass.
        progress: show a progress bar on stderr.

    Raises:
        DispatchError: an expert that no example wants, nothing to choose settings on, `together` names an expert that
            is not there, a strength below 1/2, pairs below 0, a batch without rows.
    """
    if not (math.isfinite(pairs) and pairs >= 0) or batch_size < 1:
        raise DispatchError(f"pairs is {pairs} and batch_size {batch_size}; expected at least 0, and at least 1.")
    if strength is not None and not (math.isfinite(strength) and strength >= 0.5):
        raise DispatchError(f"strength is {strength}: expected a number of at least 0.5, or none to have it chosen.")
    names = tuple(library)
    wanted, wanted_in_validation = labels(examples, names), labels(validation, names)
    for name, count in zip(names, wanted.sum(0).tolist(), strict=True):
        if not count:
            raise DispatchError(f"No example wants {name!r}: give some, or leave it out of the library.")
    if not validation:
        raise DispatchError(
            f"There are {len(examples)} examples and none to choose settings on: give at least 2 that want the same, "
            "or some for it alone."
        )
    states = states_of(model, [one.context for one in examples], batch_size=batch_size, progress=progress).double()
    held = states_of(model, [one.context for one in validation], batch_size=batch_size, progress=progress).double()
    mean, scale = states.mean(0), states.std(0) + 1e-6
    states, held = (states - mean) / scale, (held - mean) / scale
    both = kinds_of_pairs(examples, names, together)
    mixed, mixed_wanted = guessed_pairs(states, wanted, both, pairs, seed)
    rows, targets = torch.cat([states, mixed]), torch.cat([wanted, mixed_wanted])
    share = HELD_PAIRS if pairs else 0.0
    guessed, guessed_wanted = guessed_pairs(held, wanted_in_validation, both, share, seed + 1)
    held, held_wanted = torch.cat([held, guessed]), torch.cat([wanted_in_validation, guessed_wanted])

    best: tuple[float, float, Tensor, Tensor] | None = None
    for penalty in PENALTIES:
        weight, bias = regressions(rows, targets, penalty)
        logits = held @ weight.mT + bias
        loss = float(nn.functional.binary_cross_entropy_with_logits(logits, held_wanted))
        right = float(((logits >= 0) == held_wanted.bool()).all(-1).double().mean())
        if best is None or (right, -loss) > best[:2]:
            best = (right, -loss, weight, bias)
    assert best is not None
    weight, bias = best[2:]
    temperature = fitted_temperature(held @ weight.mT + bias, held_wanted)
    table = ((held @ weight.mT + bias) / temperature).sigmoid()
    threshold, _ = abstention(table, held_wanted)
    folded = weight / scale / temperature
    told = table[: len(validation)]  # of the examples themselves
    right_sets = choices(told, threshold) == wanted_in_validation.bool()
    scores = {
        "n": len(validation),
        "accuracy": float(right_sets.all(-1).double().mean()),
        "calibration_error": calibration_error(told, wanted_in_validation),
        "temperature": temperature,
    }
    if strength is None:
        strengths = {
            name: likeliest_strength(model, library, name, validation, batch_size, progress=progress) for name in names
        }
    else:
        strengths = dict.fromkeys(names, float(strength))
    made_for = stamp(model, names, library)
    return Router(folded.float(), (bias / temperature - folded @ mean).float(), threshold, made_for, strengths, scores)


def likeliest_strength(
    model: SpectralModel,
    library: Mapping[str, Expert],
    name: str,
    examples: Sequence[Example],
    batch_size: int = 32,
    *,
    progress: bool = False,
) -> float:
    """Return the one of STRENGTHS at which an expert, alone, makes the replies likeliest that are due from it alone.

    The mean over at most MOST_REPLIES examples of the log-probability of a token; 1 where no example has a reply.
    """
    due = [one for one in examples if one.wanted == {name} and one.reply][:MOST_REPLIES]
    tokenizer, (end, _) = tokenizer_of(model), turn_ends(model)
    prompts = []
    for one in due:
        messages, tools = list(one.context.messages), list(one.context.tools)
        reply = completion(tokenizer, messages, tools, as_message(one.reply), end)
        with suppress(TooLongError):
            prompts.append(Prompt(prompt_of(model, messages, tools, [], len(reply)).ids, [reply], 0))
    if not prompts:
        return 1.0
    contexts = Contexts(model, library[name].invocation)
    found: dict[float, float] = {}
    for strength in STRENGTHS:
        with model.using({name: strength}, library):
            doing = f"{name} at {strength:g}"
            given = answers(model, prompts, set(), doing, batch_size=batch_size, progress=progress, contexts=contexts)
        found[strength] = fmean(fmean(answer.scores[0]) for answer in given)
    return max(found, key=lambda one: found[one])


def labels(examples: Sequence[Example], names: Sequence[str]) -> Tensor:
    """Return 1 where an example wants an expert (n e)."""
    return torch.tensor([[float(name in one.wanted) for name in names] for one in examples], dtype=torch.float64)


def kinds_of_pairs(
    examples: Sequence[Example], names: Sequence[str], together: Sequence[Sequence[str]] | None = None
) -> list[tuple[int, int]]:
    """Return pairs of experts that may both be due, by place: those told, or all but those that exclude one another.

    Two exclude one another where a control of one wants the other.

    Raises:
        DispatchError: a name that is not there, or no pair.
    """
    if together is not None:
        for pair in together:
            if len(pair) != 2 or pair[0] == pair[1] or not set(pair) <= set(names):
                raise DispatchError(f"together holds {list(pair)}; expected two of {', '.join(names)}.")
        return [(names.index(one), names.index(other)) for one, other in together]
    excluded = {
        frozenset([one.skill, other])
        for one in examples
        for other in one.wanted
        if one.skill and one.skill not in one.wanted
    }
    places = combinations(range(len(names)), 2)
    return [(one, other) for one, other in places if frozenset([names[one], names[other]]) not in excluded]


def guessed_pairs(
    states: Tensor, wanted: Tensor, both: Sequence[tuple[int, int]], share: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Return what lies between two states that want one expert each, another one (n d), and the labels (n e)."""
    draw = torch.Generator().manual_seed(seed)
    alone = wanted.sum(-1) == 1
    rows, targets = [states[:0]], [wanted[:0]]
    for pair in both:
        pools = [((wanted[:, place] == 1) & alone).nonzero().squeeze(-1) for place in pair]
        count = round(share * sum(map(len, pools))) if all(map(len, pools)) else 0
        picked = [pool[torch.randint(len(pool), (count,), generator=draw)] for pool in pools] if count else []
        if picked:
            share_of_one = BETWEEN[0] + (BETWEEN[1] - BETWEEN[0]) * torch.rand(count, 1, generator=draw).to(states)
            rows.append(torch.lerp(states[picked[1]], states[picked[0]], share_of_one))
            targets.append(wanted[picked[0]] + wanted[picked[1]])
    return torch.cat(rows), torch.cat(targets)


def regressions(states: Tensor, wanted: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Return weights (e d) and biases (e) of one logistic regression an expert, by L-BFGS."""
    weight = torch.zeros(wanted.shape[1], states.shape[1], dtype=states.dtype, requires_grad=True)
    bias = torch.zeros(wanted.shape[1], dtype=states.dtype, requires_grad=True)
    search = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        losses = nn.functional.binary_cross_entropy_with_logits(states @ weight.mT + bias, wanted, reduction="none")
        total = losses.mean(0).sum() + penalty * weight.square().sum()
        total.backward()
        return total

    search.step(loss)
    return weight.detach(), bias.detach()


def fitted_temperature(logits: Tensor, wanted: Tensor) -> float:
    """Return what logits (n e) have to be divided by to be likeliest, in [1/4, 8]."""
    grid = torch.logspace(-2, 3, 101, base=2.0, dtype=logits.dtype)
    losses = [nn.functional.binary_cross_entropy_with_logits(logits / one, wanted) for one in grid]
    return float(grid[int(torch.stack(losses).argmin())])


def abstention(table: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Return the confidence under which it is best that nobody speaks, and the share of sets that are right with it."""
    sure = torch.maximum(table, 1 - table).prod(-1)
    best, found = 0.0, -1.0
    for threshold in [0.0, *sorted(set(sure.tolist()))]:
        right = float((choices(table, threshold) == wanted.bool()).all(-1).double().mean())
        if right > found + 1e-12:
            best, found = threshold, right
    return best, found


def choices(table: Tensor, threshold: float) -> Tensor:
    """Return who speaks (n e), by probabilities (n e) and the confidence under which nobody does."""
    sure = torch.maximum(table, 1 - table).prod(-1)
    return (table >= 0.5) & (sure >= threshold).unsqueeze(-1)


def calibration_error(table: Tensor, wanted: Tensor, bins: int = 10) -> float:
    """Return the expected calibration error of probabilities (n e): the mean distance, by bins of equal width."""
    places = (table * bins).long().clamp(max=bins - 1)
    total = 0.0
    for place in range(bins):
        inside = places == place
        if bool(inside.any()):
            total += float((table[inside].mean() - wanted[inside].mean()).abs() * inside.double().mean())
    return total
