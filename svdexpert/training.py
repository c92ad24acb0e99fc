"""Skills into experts: one, or a library of them in one batch, trained so that they still work when they are added up.

    offsets (e n)     all that trains; frozen experts stand behind them in the bank
    mixture of a row  a_row . bank, the row's own expert at 1, the others at random weights: mixture dropout
    loss              sum over experts of the mean of the objective over their own rows
                      + sum over experts of the mean over their neutral rows of KL(base || mixture) a token
                      + penalty * sum |s d|^2

The reference of an objective is the same module without a mixture, in a pass without gradient: there is no second model
in memory. With nothing mixed in, the gradients of an expert are those of a run of its own. Mixture dropout and neutral
rows are ours; what they do is measured in benchmarks/compose.py. Lightning runs the loop.

A run folder holds

    run.json               what was asked, and of which weights: a run with other settings is refused here
    examples/NAME.parquet  what each expert learns from
    rollouts/*.parquet     samples and what they were worth, where an objective learns from samples
    checkpoints/last.ckpt  offsets and optimiser state; the same call goes on from it
    metrics/, curve.png    what happened
    experts/NAME/          the experts: a library
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import logging
import math
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import lightning
import numpy as np
import torch
from datasets import Dataset
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from pyarrow.parquet import write_table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from svdexpert import objectives
from svdexpert.batches import Neutral, Plan, Row, Steps
from svdexpert.completions import Batch, log_probabilities, logits, sample
from svdexpert.conversation import (
    Prompt,
    answers,
    context_of,
    invocation_of,
    opened_at,
    prompt_of,
    text_of,
    tokenizer_of,
    turn_ends,
)
from svdexpert.errors import SvdExpertError, TooLongError, TrainingError
from svdexpert.evaluate import KNOWING_TOKENS, act, fits, measure
from svdexpert.examples import Examples, counts, is_file, of_file, of_skill
from svdexpert.expert import Expert, flat_scale
from svdexpert.forward import Contexts
from svdexpert.layers import device_of
from svdexpert.library import Library
from svdexpert.mixture import Mixture
from svdexpert.model import SpectralModel
from svdexpert.objectives import Scored
from svdexpert.recipe import Recipe
from svdexpert.registry import stem
from svdexpert.report import draw_learning_curve
from svdexpert.skills import Case, Skill, load
from svdexpert.skills import names as skill_names
from svdexpert.storage import whole_file
from svdexpert.worlds import World


@dataclass(frozen=True)
class Task:
    """What one expert is trained for.

    Attributes:
        name: of the expert.
        source: name of the skill, or path of the file.
        skill: that judges its replies; None for a file, where nothing does.
        examples: of the training split.
        validation: cases of the validation split, positives and controls in turn, by which the expert is scored; the
            first of them are acted on while training.
    """

    name: str
    source: str
    skill: Skill | None
    examples: Examples
    validation: Sequence[Case] = ()


CHECKPOINT = "checkpoints/last.ckpt"
STATE = ("same_rewards", "all_right", "best", "waited", "ended")
"""What a checkpoint holds of a module beside offsets and optimiser."""
SAME_REWARDS = 20
"""Steps in a row in which all samples of every context are worth the same, after which a run stops."""


class ExpertModule(lightning.LightningModule):
    """Offsets in training, as Lightning sees them; the base is no part of its state.

    Args:
        model: attached.
        tasks: one an expert.
        frozen: experts that stand beside them.
        objective: name of the objective.
        recipe: how.
        neutrals: contexts of neutral rows.
        folder: of the run, for checkpoints and rollouts; None keeps neither.
        invocation: tokens from which on the experts act; () is everywhere.
        contexts: what the base has made of contexts so far; None begins anew.
    """

    frozen: Tensor
    scale: Tensor

    def __init__(
        self,
        model: SpectralModel,
        tasks: Sequence[Task],
        frozen: Mapping[str, Expert],
        objective: str,
        recipe: Recipe,
        neutrals: Sequence[Neutral],
        folder: Path | None = None,
        *,
        invocation: tuple[int, ...] = (),
        contexts: Contexts | None = None,
    ) -> None:
        super().__init__()
        self.model, self.tasks, self.recipe, self.folder = model, tasks, recipe, folder
        self.invocation = invocation
        self.contexts = contexts or Contexts(model, invocation, recipe.contexts)
        self.objective = objectives.load(objective)
        self.settings = objectives.settings_of(self.objective, recipe.settings, recipe.samples)
        examples = [task.examples for task in tasks]
        kind = self.objective.COMPLETIONS
        self.plan = Plan(
            examples,
            neutrals,
            list(frozen),
            kind,
            recipe.batch_size,
            recipe.mixing,
            recipe.neutral,
            recipe.seed,
            self.contexts.able,
            ["" if task.skill is None else task.skill.MOVE for task in tasks],
        )
        scale = flat_scale(model.basis.singular_values, recipe.core)
        flat = [one.flat(model.basis) for one in frozen.values()]
        self.offsets = nn.Parameter(torch.zeros(len(tasks), len(scale)))
        self.register_buffer("frozen", torch.stack(flat) if flat else torch.zeros(0, len(scale)), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.same_rewards, self.all_right = 0, True
        self.latest_samples: list[tuple[float, str]] = []
        self.best: tuple[float, Tensor] | None = None
        self.waited = 0
        self.ended = False
        self.rollouts: list[dict[str, Any]] = []
        self.latest: dict[str, float] = {}
        self.announces = False  # True prints a line at every validation, where there is no progress bar

    @property
    def trained(self) -> list[nn.Parameter]:
        """What the optimiser moves."""
        return [self.offsets]

    # --- Lightning's hooks

    def train_dataloader(self) -> DataLoader[list[Row]]:
        steps = Steps(
            self.plan,
            lambda: self.global_step,
            self.recipe.accumulate,
            self.global_rank,
            self.trainer.world_size,
        )
        return DataLoader(steps, batch_size=None)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # rows are lists of numbers until they are padded

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[recipe.optimizer]
        optimizer = kind(self.trained, lr=recipe.learning_rate)

        def share(step: int) -> float:
            rise, fall = (step + 1) / (recipe.warmup + 1), (recipe.steps - step) / (recipe.steps - recipe.warmup)
            return max(0.0, min(rise, fall))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        """Clip the gradient of every expert by itself."""
        assert self.offsets.grad is not None
        norms = self.offsets.grad.norm(dim=-1, keepdim=True)
        if torch.isfinite(norms).all():
            self.offsets.grad *= (self.recipe.clip / norms.clamp(min=1e-12)).clamp(max=1.0)
        elif self.recipe.precision != "16-mixed":  # there, the scaler skips such a step and lowers its scale
            raise self._diverged("The gradient is not finite")

    def training_step(self, rows: list[Row]) -> Tensor:
        self.note("step", float(self.global_step), shown=False)  # else Lightning counts one too many after a resume
        loss = self.loss(rows)
        if not torch.isfinite(loss):
            raise self._diverged(f"The loss is {loss.item()}")
        # Lightning takes the mean over parts and processes; ours is a sum over rows that they share out.
        return loss * self.recipe.accumulate * self.trainer.world_size

    def _diverged(self, what: str) -> TrainingError:
        return TrainingError(
            f"{what} at step {self.global_step}: lower learning_rate ({self.recipe.learning_rate}), or train "
            "in fp32, in another folder. The last checkpoint of this one is sound."
        )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Save before a step begins: Lightning counts a batch as done only when its last hook has returned."""
        step = self.global_step
        if batch_idx % self.recipe.accumulate == 0 and step and step % self.recipe.save_every == 0:
            self.save()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        step, recipe = self.global_step, self.recipe
        whole = (batch_idx + 1) % recipe.accumulate == 0
        watched = recipe.validation_cases and any(task.validation for task in self.tasks)
        if whole and watched and step % recipe.validate_every == 0:
            self.validate()

    def on_train_end(self) -> None:
        if self.recipe.patience is not None and self.best is not None:
            self.offsets.data.copy_(self.best[1])
        self.ended = True
        self.save()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["svdexpert"] = {name: getattr(self, name) for name in STATE}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, value in checkpoint["svdexpert"].items():
            setattr(self, name, value)

    def save(self) -> None:
        """Write the checkpoint, the metrics and the rollouts so far."""
        if self.folder is None:
            return
        for one in self.trainer.loggers:
            one.save()
        if self.rollouts:
            name = f"rollouts/step_{self.global_step:06}_process_{self.global_rank}.parquet"
            with whole_file(self.folder / name) as temporary:
                write_table(Dataset.from_list(self.rollouts).data.table, temporary)
            self.rollouts = []
        self.trainer.save_checkpoint(self.folder / CHECKPOINT)

    # --- the loss

    def loss(self, rows: Sequence[Row]) -> Tensor:
        """Return what these rows add to the loss of their step; of the penalty, their share."""
        own, neutral = [row for row in rows if row.target is None], [row for row in rows if row.target is not None]
        share = len(rows) / (self.plan.batch_size * len(self.tasks))
        total = self.recipe.penalty * share * (self.scale * self.offsets).square().sum()
        if own:
            total = total + self.own_loss(own).sum() / self.plan.own_rows
        elif self.objective.COMPLETIONS == "samples":
            self.check_rewards(torch.zeros(0, self.recipe.samples, device=self.device), [])  # all processes meet there
        if neutral:
            total = total + self.neutral_loss(neutral).sum() / self.plan.neutral_rows
        return total

    def mixture(self, weights: Sequence[Sequence[float]]) -> Mixture:
        """Return mixtures (b n) by weights (b e), fp32 whatever the precision; gradients flow into the offsets."""
        with torch.autocast(self.device.type, enabled=False):
            table = torch.tensor(weights, device=self.device)
            offsets = table @ torch.cat([self.offsets, self.frozen])
            return Mixture(offsets, self.recipe.core, invocation=self.invocation, reach=self.recipe.reach)

    def own_loss(self, rows: Sequence[Row]) -> Tensor:
        """Return the objective's loss of every row (b)."""
        mixture, rewards = self.mixture([row.weights for row in rows]), None
        completions = [row.completions for row in rows]
        if self.objective.COMPLETIONS == "samples":
            completions, rewards = self.samples(rows, mixture)
        batch, base = self.batch(rows, completions), None
        before = self.contexts.before(batch.contexts, batch.seen)
        if self.objective.REFERENCE:
            with torch.no_grad():
                base = log_probabilities(logits(self.model, None, batch, before), batch)
        found = logits(self.model, mixture, batch, before, recompute=self.recipe.gradient_checkpointing)
        scored = Scored(log_probabilities(found, batch), base, batch.mask, rewards)
        losses = self.objective.loss(scored, **self.settings)
        self.note_losses(rows, losses.detach(), scored)
        return losses

    def neutral_loss(self, rows: Sequence[Row]) -> Tensor:
        """Return KL(target || mixture) of every row (b), in nats a token of the base's reply."""
        batch = self.batch(rows, [row.completions for row in rows])
        targets = [row.target or [] for row in rows]
        before = self.contexts.before(batch.contexts, batch.seen)
        with torch.no_grad():
            target = self.mixture(targets) if any(map(any, targets)) else None
            fixed = logits(self.model, target, batch, before).float().log_softmax(-1)
        mixture = self.mixture([row.weights for row in rows])
        found = logits(self.model, mixture, batch, before, recompute=self.recipe.gradient_checkpointing)
        divergence = (fixed.exp() * (fixed - found.float().log_softmax(-1))).sum(-1).masked_fill(~batch.mask, 0.0)
        losses = divergence.sum((1, 2)) / batch.mask.sum((1, 2))
        self.note("neutral", losses.detach().mean())
        return losses

    def batch(self, rows: Sequence[Row], completions: Sequence[Sequence[list[int]]]) -> Batch:
        """Return rows as tensors where the base computes."""
        return Batch.of([row.prompt for row in rows], completions, device_of(self.model.hf.get_input_embeddings()))

    def samples(self, rows: Sequence[Row], mixture: Mixture) -> tuple[list[list[list[int]]], Tensor]:
        """Return completions of every row drawn from its mixture, and what they are worth (b g)."""
        shape = (self.recipe.samples, self.recipe.max_new_tokens)
        uniform = torch.from_numpy(np.stack([np.random.default_rng(row.draws).random(shape) for row in rows]))
        tokenizer, (_, ends) = tokenizer_of(self.model), turn_ends(self.model)
        fixed = replace(mixture, offsets=mixture.offsets.detach())
        drawn = sample(self.model, fixed, [row.prompt for row in rows], uniform, ends)
        rewards = []
        for row, some in zip(rows, drawn, strict=True):
            task = self.tasks[row.expert]
            assert task.skill is not None
            replies = [text_of(tokenizer, [one for one in ids if one not in ends]) for ids in some]
            verdicts = [task.skill.verify(task.examples.cases[row.case], reply) for reply in replies]
            rewards.append([one.score for one in verdicts])
            for ids, reply, verdict in zip(some, replies, verdicts, strict=True):
                about = {"step": self.global_step, "skill": task.name, "case": row.case, "ids": ids}
                self.rollouts.append(about | {"reply": reply, "reward": verdict.score, "error": verdict.error})
        found = torch.tensor(rewards, dtype=torch.float32, device=mixture.offsets.device)
        self.check_rewards(found, replies)
        return drawn, found

    def check_rewards(self, rewards: Tensor, replies: Sequence[str]) -> None:
        """Stop where there has been nothing to learn from for long: well, if all samples are right, else with an error.

        Args:
            rewards: of the samples of a step (b g); none where a process has only neutral rows.
            replies: samples of its last context.
        """
        if rewards.shape[1] < 2:
            return
        same, right = bool((rewards == rewards[:, :1]).all()), bool((rewards == 1).all())
        if self._trainer is not None and self.trainer.world_size > 1:
            same, right = (self.trainer.strategy.reduce_boolean_decision(one) for one in (same, right))
        self.same_rewards = self.same_rewards + 1 if same else 0
        self.all_right = right and (self.same_rewards < 2 or self.all_right)
        if len(rewards):
            self.latest_samples = list(zip(rewards[-1].tolist(), replies, strict=True))
        if self.same_rewards < SAME_REWARDS * self.recipe.accumulate:
            return
        if self.all_right:
            self.trainer.should_stop = True
            return
        shown = "\n".join(f"  {one:+.1f}  {reply!r}" for one, reply in self.latest_samples)
        raise TrainingError(
            f"For {SAME_REWARDS} steps all samples of every context were worth the same: there is nothing to learn "
            f"from. Train with sft or dpo first, or draw more samples. The last ones:\n{shown}"
        )

    def note_losses(self, rows: Sequence[Row], losses: Tensor, scored: Scored) -> None:
        """Note losses, and how often the preferred completion gained more, or what samples were worth."""
        self.note("loss", losses.mean())
        for place, task in enumerate(self.tasks):
            ours = torch.tensor([row.expert == place for row in rows], device=losses.device)
            if len(self.tasks) > 1 and ours.any():
                self.note(f"loss/{task.name}", losses[ours].mean(), shown=False)
        if scored.rewards is not None:
            self.note("reward", scored.rewards.mean())
        elif self.objective.COMPLETIONS == "pair" and scored.base is not None:
            preferred, rejected = scored.log_ratios.detach().sum(-1).unbind(-1)
            self.note("accuracy", (preferred > rejected).float().mean())

    def note(self, name: str, value: Tensor | float, *, shown: bool = True) -> None:
        """Log a value of this step."""
        self.latest[name] = float(value)
        self.log(name, value, prog_bar=shown, batch_size=1)

    # --- validation

    def validate(self) -> None:
        """Let every expert act alone on validation cases; stop where none of the last ones was better than the best."""
        found = []
        for place, task in enumerate(self.tasks):
            if task.skill is None or not task.validation:
                continue
            cases = task.validation[: self.recipe.validation_cases]
            with self.model.using(self.expert(place)):
                # not behind the run's contexts: their room is that of what it learns from
                replies = act(self.model, cases, max_new_tokens=self.recipe.max_new_tokens, progress=False)
            right = [task.skill.verify(case, reply).right for case, reply in zip(cases, replies, strict=True)]
            shares = {
                key: sum(one for one, case in zip(right, cases, strict=True) if case.positive is due)
                / max(1, sum(case.positive is due for case in cases))
                for key, due in (("doing", True), ("controls", False))
            }
            for key, share in shares.items():
                self.note(f"{key}/{task.name}" if len(self.tasks) > 1 else key, share)
            found.append(sum(shares.values()) / 2)
        if self.announces and is_rank_zero():
            values = ", ".join(f"{name} {value:.3f}" for name, value in self.latest.items() if name != "step")
            print(f"step {self.global_step} of {self.recipe.steps}: {values}", file=sys.stderr)  # noqa: T201
        score = sum(found) / len(found)
        if self.best is None or score > self.best[0]:
            self.best, self.waited = (score, self.offsets.detach().clone()), 0
        else:
            self.waited += 1
        if self.recipe.patience is not None and self.waited >= self.recipe.patience:
            self.trainer.should_stop = True

    def expert(self, place: int, **card: Any) -> Expert:
        """Return an expert as it stands."""
        described = {"core": self.recipe.core, "invocation": self.invocation, "reach": self.recipe.reach} | card
        return Expert.from_flat(self.model.basis, self.offsets[place], **described)


# --- runs


def train(
    model: SpectralModel,
    skill: str,
    objective: str = "dpo",
    *,
    recipe: Recipe = Recipe(),
    world: World | None = None,
    against: Mapping[str, Expert] | None = None,
    out: str | Path | None = None,
    trainer: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Expert:
    """Return an expert for one skill; see `train_library`."""
    found = train_library(
        model,
        [skill],
        objective,
        recipe=recipe,
        world=world,
        against=against,
        out=out,
        trainer=trainer,
        progress=progress,
    )
    return next(iter(found.values()))


def train_library(
    model: SpectralModel,
    skills: Sequence[str],
    objective: str = "dpo",
    *,
    recipe: Recipe = Recipe(),
    world: World | None = None,
    against: Mapping[str, Expert] | None = None,
    out: str | Path | None = None,
    trainer: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Expert]:
    """Return an expert for every skill, trained in one batch so that they can be added up.

    Args:
        model: attached, with a tokenizer; its base is not changed.
        skills: names of skills, or paths of files of examples.
        objective: name of an objective.
        recipe: how to train.
        world: where cases come from; the town if None.
        against: experts that are not touched, beside which the new ones must work.
        out: folder of the run, new or interrupted; None keeps nothing.
        trainer: arguments of Lightning's Trainer: accelerator, devices, strategy, num_nodes, callbacks, logger, ...
        progress: show progress on stderr.

    Returns:
        The experts by name, with the figures of the validation split in their scores.

    Raises:
        TrainingError: settings out of range, data that an objective cannot learn from, a run folder of other settings,
            a loss that is not finite, samples that are all worth the same.
        SkillError: there is no such skill.
        KeyboardInterrupt: as ever; the same call goes on from the last checkpoint.
    """
    if world is None:
        from svdexpert.worlds.town import Town

        world = Town()
    run = Run(
        model=model,
        skills=[skills] if isinstance(skills, str) else list(skills),
        objective=objective,
        recipe=recipe,
        world=world,
        against=dict(against or {}),
        out=None if out is None else Path(out),
        progress=progress,
    )
    return run.experts(dict(trainer or {}))


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: what it learns from, where it stands, what it leaves. For arguments see `train_library`."""

    model: SpectralModel
    skills: Sequence[str]
    objective: str
    recipe: Recipe
    world: World
    against: Mapping[str, Expert]
    out: Path | None
    progress: bool

    def __post_init__(self) -> None:
        names = [*self.names, *self.against]
        if not self.skills or len(set(names)) < len(names):
            raise TrainingError(f"Every expert needs a name of its own, found {names}.")
        for name, expert in self.against.items():
            expert.check_on(self.model.basis, core=self.recipe.core, who=name)
            if bool(expert.invocation) != self.recipe.activated:
                raise TrainingError(
                    f"{name} is {'' if expert.invocation else 'not '}activated, and experts that work together act on "
                    f"the same tokens: set activated to {bool(expert.invocation)}."
                )
            if expert.reach != self.recipe.reach:
                raise TrainingError(
                    f"{name} decides on {expert.reach or 'all'} tokens of a reply, and experts that work together on "
                    f"the same: set reach to {expert.reach}."
                )
            if expert.invocation != self.invocation:
                raise TrainingError(
                    f"{name} acts from the tokens {list(expert.invocation)} on; this chat template opens a reply with "
                    f"{list(self.invocation)}. Use the template that it was trained with."
                )
        for name, skill in zip(self.names, self.skills, strict=True):
            if self.out is not None:
                Library(self.out / "experts").folder(name)  # raises where it cannot be one
            if not is_file(skill) and not getattr(load(skill), "TRAINABLE", True):
                raise TrainingError(f"{skill} is for evaluation only: train the skills that it is made of.")

    @property
    def names(self) -> list[str]:
        """Names of the experts: those of the skills, or of the files."""
        found = [Path(one).stem if is_file(one) else stem(one) for one in self.skills]
        return [re.sub(r"[^A-Za-z0-9._-]+", "-", one) for one in found]

    @property
    def invocation(self) -> tuple[int, ...]:
        """Tokens from which on the experts act; () is everywhere."""
        return invocation_of(self.model) if self.recipe.activated else ()

    def asked(self) -> dict[str, Any]:
        """Return what the run is, as JSON: settings, and digests of all that it is made from."""
        model, key = self.model, self.model.basis.key
        settings = objectives.settings_of(objectives.load(self.objective), self.recipe.settings, self.recipe.samples)
        paths = [one for one in self.skills if is_file(one) or one.endswith(".py")]
        files = {one: Path(one).read_bytes() for one in paths if Path(one).is_file()}
        against = {name: one.flat(model.basis).numpy().tobytes() for name, one in self.against.items()}
        found = {
            "base": str(key),
            "k": key.k,
            "support": key.support,
            "first_layer": key.first_layer,
            "basis": _digest(repr(key).encode() + flat_scale(model.basis.singular_values, "diag").numpy().tobytes()),
            "dtype": str(model.hf.dtype),
            "chat_template": _digest(str(tokenizer_of(model).chat_template).encode()),
            "skills": list(self.skills),
            "files": {name: _digest(one) for name, one in files.items()},
            "world": self.world.name,
            "objective": self.objective,
            "recipe": asdict(self.recipe) | {"settings": settings},
            "against": {name: _digest(one) for name, one in against.items()},
        }
        return cast(dict[str, Any], json.loads(json.dumps(found)))

    def experts(self, settings: dict[str, Any]) -> dict[str, Expert]:
        """Train, or go on where the folder stands, and return the experts."""
        asked = self.asked()
        trained = self._trained(asked)
        if trained is not None:
            unscored = [skill for name, skill in zip(self.names, self.skills, strict=True) if not trained[name].scores]
            if not self.recipe.score_cases or all(map(is_file, unscored)):
                return trained  # nothing is computed, on whatever machine that is
            tasks = self.tasks()
        with TemporaryDirectory() as scratch:
            folder = self.out or Path(scratch)
            trainer = trainer_of(folder, self.recipe, settings, self.progress)
            with placed(self.model, trainer):
                if trained is None:
                    contexts = Contexts(self.model, self.invocation, self.recipe.contexts)
                    tasks = self.tasks(contexts)
                    module = self._module(tasks, folder, contexts)
                    fit(module, trainer, folder)
                    if self.out is not None and is_rank_zero():
                        draw_learning_curve(metrics(folder), folder / "curve.png")
                    card = {"objective": self.objective, "config": asked, "seed": self.recipe.seed}
                    trained = {
                        task.name: module.expert(place, skill=task.name, **card) for place, task in enumerate(tasks)
                    }
                    self._keep(trained)
                scored = {task.name: self._scored(trained[task.name], task) for task in tasks}
        self._keep(scored)
        return scored

    def _trained(self, asked: dict[str, Any]) -> dict[str, Expert] | None:
        """Return the experts of a folder in which training has ended, None for one that is new or was interrupted.

        Raises:
            TrainingError: the folder is that of another run, or of something else.
        """
        if self.out is None:
            return None
        card = self.out / "run.json"
        if not card.is_file():
            if not is_rank_zero():
                return None
            if self.out.exists() and any(self.out.iterdir()):
                raise TrainingError(f"{self.out} exists and is no run: choose another folder. Nothing was written.")
            with whole_file(card) as temporary:
                temporary.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
            return None
        found = json.loads(card.read_text(encoding="utf-8"))
        if found != asked:
            differing = [key for key in asked if found.get(key) != asked[key]]
            shown = "\n".join(f"  - {key}: {_differences(found.get(key), asked[key])}" for key in differing)
            raise TrainingError(
                f"{self.out} holds a run with other settings:\n{shown}\nChoose another folder, or give these settings "
                "to go on with that run."
            )
        library = Library(self.out / "experts")
        return {name: library[name] for name in self.names} if set(library) >= set(self.names) else None

    def tasks(self, contexts: Contexts | None = None) -> list[Task]:
        """Return what every expert learns from."""
        return [self._task(name, skill, contexts) for name, skill in zip(self.names, self.skills, strict=True)]

    def _task(self, name: str, skill: str, contexts: Contexts | None) -> Task:
        """Return what an expert learns from: as the folder keeps it, or made now."""
        recipe = self.recipe
        kept = self.out / "examples" / f"{name}.parquet" if self.out is not None else None
        there = kept is not None and kept.is_file()
        if is_file(skill):
            module, cases, validation = None, [], []
            examples = Examples.load(cast(Path, kept), name) if there else of_file(self.model, skill)
        else:
            module = load(skill)
            cases = module.cases(self.world, "train", recipe.cases, seed=recipe.seed)
            many = max(recipe.validation_cases, recipe.score_cases)
            validation = module.cases(self.world, "validation", many, seed=recipe.seed) if many else []
            validation = [case for case in validation if fits(self.model, case, recipe.max_new_tokens)]
            if there:
                examples = Examples.load(cast(Path, kept), name, cases)
            else:
                pairs = objectives.load(self.objective).COMPLETIONS == "pair"
                how: dict[str, Any] = {"max_new_tokens": recipe.max_new_tokens, "progress": self.progress}
                examples = of_skill(self.model, name, module, cases, rejected=pairs, contexts=contexts, **how)
        if kept is not None and not there and is_rank_zero():
            examples.save(kept)
        examples = replace(examples.fitting(self.objective), skill=name)
        if self.progress and is_rank_zero():
            print(f"{name}: {counts(examples)}", file=sys.stderr)  # noqa: T201
        return Task(name, skill, module, examples, validation)

    def _module(self, tasks: Sequence[Task], folder: Path, contexts: Contexts) -> ExpertModule:
        invocation = self.invocation
        for task in tasks if invocation else ():
            for one in task.examples.rows:
                if opened_at(one.prompt, invocation) is None:
                    raise TrainingError(
                        f"{task.name}, {one.id}: the prompt does not hold the tokens {list(invocation)}, with which "
                        "the chat template opens a reply and from which activated experts act. For prompts that are no "
                        "chats train with activated=False."
                    )
        if self.recipe.neutral:
            neutrals = self.neutrals(tasks, contexts)
        else:
            contexts.keeps(one.prompt for task in tasks for one in task.examples.rows)
            neutrals = []
        module = ExpertModule(
            self.model,
            tasks,
            self.against,
            self.objective,
            self.recipe,
            neutrals,
            folder,
            invocation=invocation,
            contexts=contexts,
        )
        module.announces = self.progress and not sys.stderr.isatty()
        return module

    def neutrals(self, tasks: Sequence[Task], contexts: Contexts | None = None) -> list[Neutral]:
        """Return contexts with the base's own replies: positives of all skills, knowing questions of a quarter of their
        cases, plain talk; and positives of frozen experts' skills, with the replies of these experts. Controls are
        none: what is a control of one skill may be a positive of another."""
        found = [
            Neutral(task.name, one.prompt, one.own_ids)
            for task in tasks
            for one in task.examples.rows
            if one.own_ids and one.positive is not False
        ]
        room, asked = self.recipe.max_new_tokens, []
        context = context_of(self.model)
        for task in tasks:
            if not task.examples.cases and len(tasks) > 1:  # alone, it has no neutral rows: all contexts are its own
                asked += [
                    (task.name, Prompt(one.prompt, [], room))
                    for one in task.examples.rows
                    if context is None or len(one.prompt) + room <= context
                ]
            some = list(task.examples.cases.values())[: self._few]
            asked += [("", one) for case in some if (one := self._question(case))]
        if any(task.examples.cases for task in tasks):
            asked += [("", one) for one in self._plain_talk()]
        end, ends = turn_ends(self.model)
        prompts = [one for _, one in asked]
        if contexts is not None:
            theirs_too = [one.ids for some in self.against.values() for one in self._prompts_for(some)]
            examples = [one.prompt for task in tasks for one in task.examples.rows]
            contexts.keeps([*examples, *(one.ids for one in prompts), *theirs_too])
        how: dict[str, Any] = {"batch_size": 64, "progress": self.progress, "contexts": contexts}
        with self.model.using(None):
            said = answers(self.model, prompts, ends, "the base replies", **how)
        said_of = list(zip(asked, said, strict=True))
        for name, expert in self.against.items():
            if not (theirs := self._prompts_for(expert)):
                continue
            with self.model.using(expert):
                said = answers(self.model, theirs, ends, f"{name} replies", **how)
            said_of += [((name, prompt), one) for prompt, one in zip(theirs, said, strict=True)]
        return found + [
            Neutral(owner, prompt.ids, [*one.reply, end] if len(one.reply) < prompt.room else one.reply)
            for (owner, prompt), one in said_of
        ]

    @property
    def _few(self) -> int:
        """A quarter as many contexts as a skill has in training, an even number: rows for what must stay are few."""
        return 2 * max(1, self.recipe.cases // 8)

    def _prompts_for(self, expert: Expert) -> list[Prompt]:
        """Return contexts in which a frozen expert's skill is due or not; none where it does not ship: a name in
        a file imports nothing."""
        if expert.skill not in skill_names() or not getattr(load(expert.skill), "TRAINABLE", True):
            return []
        cases = load(expert.skill).cases(self.world, "train", self._few, seed=self.recipe.seed)
        room = self.recipe.max_new_tokens
        some = [one for one in cases if one.positive and fits(self.model, one, room)]
        return [prompt_of(self.model, one.messages, one.tools, [], room) for one in some]

    def _question(self, case: Case) -> Prompt | None:
        """Return a case's knowing question, None where it is too long."""
        try:
            return prompt_of(self.model, case.knowing.messages, case.knowing.tools, [], KNOWING_TOKENS)
        except TooLongError:
            return None

    def _plain_talk(self) -> list[Prompt]:
        """Return openings of conversations in which nothing is asked for, none where the world has no such thing."""
        try:
            talk = self.world.requests("train", 2 * self._few, kind="unserved", seed=self.recipe.seed)
        except SvdExpertError:
            return []
        some = [one for one in talk if "talk" in one.tags or "small_talk" in one.tags]
        room = self.recipe.max_new_tokens
        return [prompt_of(self.model, one.messages, one.tools, [], room) for one in some]

    def _scored(self, expert: Expert, task: Task) -> Expert:
        """Return an expert with the figures of the validation split."""
        cases = task.validation[: self.recipe.score_cases]
        if expert.scores or task.skill is None or not cases or not is_rank_zero():
            return expert
        result = measure(
            self.model,
            task.source,
            cases,
            experts=expert,
            max_new_tokens=self.recipe.max_new_tokens,
            progress=self.progress,
        )
        kept = {key: result.figures[key] for key in ("knowing", "doing", "controls", "auc") if key in result.figures}
        figures = {key: [_plain(end) for end in (one.value, one.low, one.high)] for key, one in kept.items()}
        return replace(expert, scores={"split": "validation", "n": len(cases)} | figures)

    def _keep(self, experts: Mapping[str, Expert]) -> None:
        """Write experts into the folder of the run, those that are not there as they are."""
        if self.out is None or not is_rank_zero():
            return
        library = Library(self.out / "experts")
        for name, expert in experts.items():
            if name not in library or library[name].scores != expert.scores:
                library[name] = expert


# --- Lightning's loop


class _WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that a kill cannot cut in half."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        with whole_file(Path(path)) as temporary:
            torch.save(checkpoint, temporary)


def trainer_of(folder: Path, recipe: Recipe, settings: dict[str, Any], progress: bool) -> lightning.Trainer:
    """Return Lightning's trainer for a run, with the user's own settings, loggers and callbacks."""
    last = folder / CHECKPOINT
    began = torch.load(last, map_location="cpu", weights_only=True)["global_step"] if last.is_file() else 0
    loggers: list[Logger] = [CSVLogger(folder, "metrics", f"from_{began}")]
    if importlib.util.find_spec("tensorboard"):
        loggers.append(TensorBoardLogger(folder, "tensorboard", ""))
    callbacks: list[Callback] = [RichProgressBar(leave=True)] if progress and sys.stderr.isatty() else []
    theirs = {"accelerator": "auto", "devices": 1} | settings
    loggers += _listed(theirs.pop("logger", None))
    callbacks += _listed(theirs.pop("callbacks", None))
    with _quiet():
        return lightning.Trainer(
            **cast(Any, theirs),
            max_steps=recipe.steps,
            max_epochs=-1,
            precision=recipe.precision,
            accumulate_grad_batches=recipe.accumulate,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_checkpointing=False,  # the module saves itself, between steps
            enable_progress_bar=progress and sys.stderr.isatty(),
            logger=loggers,
            callbacks=callbacks,
            plugins=[_WholeCheckpoints()],
            default_root_dir=folder,
        )


def _listed(some: Any) -> list[Any]:
    return list(some) if isinstance(some, list | tuple) else [some] if some not in (None, True, False) else []


def fit(module: ExpertModule, trainer: lightning.Trainer, folder: Path) -> None:
    """Run Lightning's loop on a module, from the folder's last checkpoint if there is one."""
    last = folder / CHECKPOINT
    kept = torch.load(last, map_location="cpu", weights_only=True) if last.is_file() else None
    if kept is not None and kept["svdexpert"]["ended"]:
        module.load_state_dict(kept["state_dict"])
        return
    heard = signal.getsignal(signal.SIGINT)
    with _quiet():
        try:
            trainer.fit(module, ckpt_path=last if kept else None)
        except SystemExit:  # Lightning's answer to an interrupt, which it also stops listening to
            signal.signal(signal.SIGINT, heard)
            left = "the same call goes on from the last checkpoint" if last.is_file() else "there was no checkpoint yet"
            raise KeyboardInterrupt(left) from None


@contextmanager
def placed(model: SpectralModel, trainer: lightning.Trainer) -> Iterator[None]:
    """Let a base that is on the CPU compute where Lightning trains; a base that was placed elsewhere stays there."""
    there = trainer.strategy.root_device
    moves = device_of(model.hf.get_input_embeddings()).type == "cpu" and there.type != "cpu"
    if moves:
        cast(nn.Module, model.hf).to(there)
    training = model.hf.training
    model.hf.eval()
    try:
        yield
    finally:
        model.hf.train(training)
        if moves:
            cast(nn.Module, model.hf).to("cpu")


def is_rank_zero() -> bool:
    """Return whether this process is the one, of all that train together, that writes and prints."""
    return bool(getattr(rank_zero_only, "rank", 0) == 0)


def metrics(folder: Path) -> dict[str, dict[int, float]]:
    """Return what a run noted, by name and step; where it was resumed, what was noted last."""
    found: dict[str, dict[int, float]] = {}
    parts = sorted(folder.glob("metrics/from_*/metrics.csv"), key=lambda path: int(path.parent.name.rpartition("_")[2]))
    for part in parts:
        with part.open(newline="") as lines:
            for row in csv.DictReader(lines):
                for name, value in row.items():
                    if value and name not in ("step", "epoch"):
                        found.setdefault(name, {})[int(row["step"])] = float(value)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what Lightning tells about itself out of the user's terminal."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [one.level for one in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        try:
            for one in loggers:
                one.setLevel(logging.ERROR)
            yield
        finally:
            for one, level in zip(loggers, levels, strict=True):
                one.setLevel(level)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _plain(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _differences(found: Any, asked: Any) -> str:
    """Return in words how two settings differ."""
    if isinstance(found, dict) and isinstance(asked, dict):
        keys = [key for key in asked if found.get(key) != asked[key]]
        return ", ".join(f"{key} {found.get(key)}, now {asked[key]}" for key in keys)
    return f"{found}, now {asked}"
