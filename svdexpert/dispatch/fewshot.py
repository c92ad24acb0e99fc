"""Few-shot: the weights under which a handful of replies to a new task are likeliest (Transformer^2, strategy C).

    gradient        a <- clip(a - rate * Adam(dL/da), 0, 1)     one evaluation is a forward and a backward pass
    cross-entropy   a ~ N(m, s), clipped to [0, 1]; m, s <- those of the best fifth; one evaluation is a forward pass
    L(a)            mean over the shots of -log p(reply | context) / tokens, under the mixture a

The mixture is linear in a, so one backward pass tells how every weight should change. The published method
(arXiv:2501.06252; population 32, an elite of a fifth, from mean 1 / e and deviation 1 / 2, the best one so far kept)
stands beside it for parity. One weight an expert, or one a matrix and expert. The shots say nothing about how good the
found weights are: measure that on other cases.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from einops import einsum
from torch import Tensor

from svdexpert.completions import Batch, log_probabilities, logits
from svdexpert.conversation import as_message, completion, prompt_of, tokenizer_of, turn_ends
from svdexpert.decision import Asked, Decision, present
from svdexpert.dispatch import Example, finite_weights
from svdexpert.errors import DispatchError, TooLongError
from svdexpert.expert import Expert, offset_shapes
from svdexpert.forward import prefill
from svdexpert.mixture import Bank, Mixture
from svdexpert.model import SpectralModel

POPULATION, ELITE = 32, 6
CHOOSES = False  # nothing on validation examples


@dataclass(frozen=True, eq=False)
class Found:
    """What a search found.

    Attributes:
        weights: of the experts, (e), or by matrix (m e); in [0, 1].
        losses: the lowest loss after every evaluation, in nats a token.
        expert: the mixture, as one expert.
    """

    weights: Tensor
    losses: list[float]
    expert: Expert


@dataclass(frozen=True)
class FewShot:
    """Weights found on a handful of replies; the same in every context of that task.

    Attributes:
        weights: by expert.
        loss: of the shots under them, in nats a token.
        evaluations: passes over the shots that it took.
    """

    weights: Mapping[str, float]
    loss: float = field(compare=False)
    evaluations: int = field(compare=False)
    reads: ClassVar[bool] = False
    strategy: ClassVar[str] = "fewshot"

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts that it may let speak."""
        return tuple(self.weights)

    def check(self, model: SpectralModel, library: Mapping[str, Expert] | Bank) -> None:
        """Raise a DispatchError unless the library holds its experts."""
        present(self.experts, library)

    def decide(self, model: SpectralModel, asked: Asked) -> list[Decision]:
        """Return the same decision for every row."""
        because = f"{self.evaluations} passes over the shots, {self.loss:.3f} nats a token"
        return [Decision(self.weights, 1.0, because) for _ in asked.ids]

    def stored(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what a file holds."""
        return {"weights": dict(self.weights), "loss": self.loss, "evaluations": self.evaluations}, {}


def restored(card: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> FewShot:
    """Return what was stored."""
    return FewShot(finite_weights(card["weights"]), float(card["loss"]), int(card["evaluations"]))


def fit(
    model: SpectralModel,
    library: Mapping[str, Expert],
    examples: Sequence[Example],
    validation: Sequence[Example],
    *,
    method: Literal["gradient", "cross-entropy"] = "gradient",
    evaluations: int = 30,
    rate: float = 0.1,
    seed: int = 0,
) -> FewShot:
    """Return the weights, one an expert, under which the examples' replies are likeliest; see `search`.

    Examples without a reply are not looked at; those that do not fit the model with it are left out, with a warning.

    Raises:
        DispatchError: no example has a reply and fits.
    """
    replied = [one for one in examples if one.reply]
    shots = [one for one in replied if _fits(model, one)]
    if not shots:
        raise DispatchError(
            f"Few-shot search needs examples with a reply: {len(replied)} of {len(examples)} have one, and of these "
            f"{len(shots)} fit the model. Give `reply` in each."
        )
    if len(shots) < len(replied):
        warnings.warn(
            f"{len(replied) - len(shots)} of {len(replied)} examples were left out: with their reply they are longer "
            "than the model's context.",
            stacklevel=2,
        )
    found = search(model, library, shots, method=method, evaluations=evaluations, rate=rate, seed=seed)
    weights = dict(zip(library, found.weights.tolist(), strict=True))
    return FewShot(weights, found.losses[-1], len(found.losses))


def _fits(model: SpectralModel, shot: Example) -> bool:
    """Return whether a context and its reply fit the model."""
    try:
        _tokens(model, shot)
    except TooLongError:
        return False
    return True


def _tokens(model: SpectralModel, shot: Example) -> tuple[list[int], list[int]]:
    """Return the ids of the prompt and of the reply.

    Raises:
        TooLongError: they do not fit the model.
    """
    tokenizer, (end, _) = tokenizer_of(model), turn_ends(model)
    messages, tools = list(shot.context.messages), list(shot.context.tools)
    reply = completion(tokenizer, messages, tools, as_message(shot.reply), end)
    return prompt_of(model, messages, tools, [], len(reply)).ids, reply


def search(
    model: SpectralModel,
    library: Mapping[str, Expert],
    shots: Sequence[Example],
    *,
    method: Literal["gradient", "cross-entropy"] = "gradient",
    by_matrix: bool = False,
    evaluations: int = 30,
    rate: float = 0.1,
    until: float = 0.0,
    seed: int = 0,
) -> Found:
    """Search the weights under which replies are likeliest.

    Args:
        model: attached, with a tokenizer that has a chat template.
        library: the experts.
        shots: with replies.
        method: see the top of this file.
        by_matrix: one weight a matrix and expert instead of one an expert.
        evaluations: passes over the shots, at most.
        rate: of Adam.
        until: loss at which to stop.
        seed: of the cross-entropy method's draws.

    Raises:
        DispatchError: no experts, no shots, a shot without a reply, an unknown method, no evaluation, a rate that is
            not positive.
    """
    present((), library)
    if evaluations < 1 or not (math.isfinite(rate) and rate > 0):
        raise DispatchError(f"evaluations is {evaluations}, rate {rate}; expected at least 1, and a positive number.")
    if not shots or not all(one.reply for one in shots):
        raise DispatchError(
            f"Few-shot search needs examples with a reply: {sum(bool(one.reply) for one in shots)} of {len(shots)} "
            "have one. Give `reply` in each."
        )
    if method not in ("gradient", "cross-entropy"):
        raise DispatchError(f"method is {method!r}; there are: gradient, cross-entropy.")
    bank = model.bank(library)
    sizes = torch.tensor(model._sizes(bank.core))
    device = bank.offsets.device
    shape = (len(sizes), len(bank.names)) if by_matrix else (len(bank.names),)

    def offsets(weights: Tensor) -> Tensor:
        rows = weights.repeat_interleave(sizes.to(device), 0) if by_matrix else weights.expand(int(sizes.sum()), -1)
        return einsum(rows, bank.offsets, "n e, e n -> n")

    loss = loss_of(model, bank, shots)
    start = torch.full(shape, 1 / len(bank.names), device=device)
    step = by_gradient if method == "gradient" else by_cross_entropy
    best, losses = step(lambda weights: loss(offsets(weights)), start, evaluations, rate, until, seed)
    shapes = offset_shapes(model.basis.key, bank.core)
    parts = zip(shapes.items(), offsets(best).split(sizes.tolist()), strict=True)
    sides = {name: part.reshape(sides) for (name, sides), part in parts}
    made = Expert.from_offsets(model.basis, sides, core=bank.core, invocation=bank.invocation, reach=bank.reach)
    return Found(best.cpu(), losses, made)


def loss_of(model: SpectralModel, bank: Bank, shots: Sequence[Example]) -> Callable[[Tensor], Tensor]:
    """Return the loss of shots as a function of offsets (n), in nats a token; contexts are read once."""
    prompts, replies = zip(*(_tokens(model, one) for one in shots), strict=True)
    batch = Batch.of(list(prompts), [[reply] for reply in replies], bank.offsets.device)
    before = prefill(model, batch.contexts, batch.seen, bank.invocation)

    def loss(offsets: Tensor) -> Tensor:
        mixture = Mixture(offsets, bank.core, bank.basis, bank.invocation, bank.reach)
        found = log_probabilities(logits(model, mixture, batch, before), batch)
        return -(found.sum(-1) / batch.mask.sum(-1)).mean()

    return loss


Search = Callable[[Callable[[Tensor], Tensor], Tensor, int, float, float, int], tuple[Tensor, list[float]]]


def by_gradient(
    loss: Callable[[Tensor], Tensor], start: Tensor, evaluations: int, rate: float, until: float, seed: int
) -> tuple[Tensor, list[float]]:
    """Return the best weights and the lowest loss after every evaluation."""
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], rate)
    best, losses = start, list[float]()
    for _ in range(evaluations):
        optimizer.zero_grad()
        found = loss(weights)
        now = found.item()
        if not losses or now < losses[-1]:
            best = weights.detach().clone()
        losses.append(min(now, losses[-1] if losses else now))
        if losses[-1] <= until:
            break
        found.backward()
        optimizer.step()
        with torch.no_grad():
            weights.clamp_(0, 1)
    return best, losses


@torch.no_grad()
def by_cross_entropy(
    loss: Callable[[Tensor], Tensor], start: Tensor, evaluations: int, rate: float, until: float, seed: int
) -> tuple[Tensor, list[float]]:
    """Return the best weights and the lowest loss after every evaluation."""
    draw = torch.Generator().manual_seed(seed)
    mean, deviation, best = start.clone(), torch.full_like(start, 0.5), start
    losses: list[float] = []
    while len(losses) < evaluations and (not losses or losses[-1] > until):
        noise = torch.randn((POPULATION, *start.shape), generator=draw).to(start.device)
        members = (mean + deviation * noise).clamp(0, 1)
        members[0] = best
        found = []
        for one in members:
            found.append(float(loss(one)))
            if not losses or found[-1] < losses[-1]:
                best = one.clone()
            losses.append(min(found[-1], losses[-1] if losses else found[-1]))
            if len(losses) == evaluations or losses[-1] <= until:
                return best, losses
        elite = members[torch.tensor(found).argsort()[:ELITE]]
        mean, deviation = elite.mean(0), elite.std(0, correction=0)
    return best, losses
