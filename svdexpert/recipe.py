"""How experts are trained, as a value: it stands in a run's folder, in the expert's file and in a config alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from svdexpert.errors import TrainingError

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
Core = Literal["diag", "dense"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How experts are trained.

    Args:
        steps: optimiser steps.
        batch_size: rows of one expert in a step, an even number.
        optimizer: "adam", or "sgd" without momentum.
        learning_rate: peak of a linear schedule, above 0.
        warmup: steps up to the peak, fewer than `steps`.
        clip: largest norm of an expert's gradient.
        penalty: weight of sum |s d|^2.
        settings: of the objective, by name.
        core: one offset a direction, or a matrix of them.
        activated: experts act from where the chat template opens the reply on (aLoRA, Greenewald et al. 2025): contexts
            stay the base's, so that their cache serves every mixture, and need no gradient. False: on all tokens, as in
            Transformer^2, and as a server does that knows LoRA alone.
        reach: tokens of a reply that the experts decide on, what follows is the base's again; 0 is all. Experts that
            only decide leave to the base what it can do by itself, and so can be added up (LOG.md); no server knows it.
        samples: completions that are drawn of a context, where the objective learns from samples.
        max_new_tokens: of every reply: samples, the base's own, those in validation.
        mixing: probability that another expert takes part in a row.
        neutral: share of rows whose target is the base.
        cases: of each skill in training, an even number.
        validation_cases: of each skill that are acted on while training, an even number; 0 for none.
        validate_every: steps.
        patience: validations in a row without a better one after which training stops, with the best offsets; None for
            never.
        score_cases: of each skill by which the finished expert is scored, an even number; 0 for none.
        save_every: steps.
        accumulate: parts that a step is computed in. Each has rows of similar length, so that little is padded, which
            saves time on a CPU (LOG.md).
        contexts: GiB for what the base makes of contexts, kept so that each is read once; 0 for none, and none are kept
            where they do not all fit. Activated experts alone have it.
        precision: as in Lightning.
        gradient_checkpointing: recompute layers in the backward pass: less memory, more time.
        seed: of every draw, at least 0.

    Raises:
        TrainingError: a value out of range.
    """

    steps: int = 100
    batch_size: int = 16
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 0.02
    warmup: int = 10
    clip: float = 1.0
    penalty: float = 0.0
    settings: Mapping[str, float | str | bool] = field(default_factory=dict)
    core: Core = "diag"
    activated: bool = True
    reach: int = 0
    samples: int = 4
    max_new_tokens: int = 96
    mixing: float = 0.5
    neutral: float = 0.25
    cases: int = 400
    validation_cases: int = 48
    validate_every: int = 25
    patience: int | None = None
    score_cases: int = 200
    save_every: int = 25
    accumulate: int = 1
    contexts: float = 1.0
    precision: Precision = "32-true"
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        least = dict.fromkeys(
            ("steps", "samples", "max_new_tokens", "validate_every", "save_every", "accumulate", "patience"), 1
        )
        least |= dict.fromkeys(("batch_size", "cases"), 2)
        least |= dict.fromkeys(("seed", "warmup", "validation_cases", "score_cases", "reach"), 0)
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise TrainingError(f"{name} is {value}; expected a whole number of at least {smallest}.")
        for name in ("batch_size", "cases", "validation_cases", "score_cases"):
            if getattr(self, name) % 2:
                raise TrainingError(
                    f"{name} is {getattr(self, name)}; expected an even number: half positives, half controls."
                )
        for name in ("learning_rate", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise TrainingError(f"{name} is {getattr(self, name)}; expected a number above 0.")
        for name in ("penalty", "contexts"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise TrainingError(f"{name} is {getattr(self, name)}; expected a number of at least 0.")
        for name in ("mixing", "neutral"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainingError(f"{name} is {getattr(self, name)}; expected a share from 0 to 1.")
        if self.reach and not self.activated:
            raise TrainingError(f"reach is {self.reach}: only activated experts know where a reply begins.")
        if self.warmup >= self.steps:
            raise TrainingError(f"warmup is {self.warmup}; expected fewer than the {self.steps} steps.")
        if self.patience is not None and not self.validation_cases:
            raise TrainingError("patience needs validation: set validation_cases.")
