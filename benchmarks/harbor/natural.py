"""Stage 1: train the natural service assistant from scratch, on the assistant's tokens of the corpus.

    python -m benchmarks.harbor.natural [--minutes 150] [--seed 0]       again after a stop: it goes on where it was
    python -m benchmarks.harbor.natural --run runs/after --after runs/harbor --minutes 75    from where another ended

Writes runs/harbor/natural: the model in Hugging Face format (bfloat16), training.json (settings, loss curve, seconds).
On Linux the C library hands large tensors back to the system after every step; keeping them gains a fifth of the speed:

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000 python -m ...

One process of one thread a core: 6,480 tokens/s of 2 x 1,024 a batch, two threads 3,878 of 1,024 (with eager
attention). Every process has batches of its own, gradients are averaged, and each runs Muon for its share of the
matrices. Rows of a batch are of similar length, in an order that is a function of the seed. The learning rate follows
the share of the time that is used up, so that the same command ends well on faster and slower machines.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy, rms_norm
from transformers import AttentionInterface, AttentionMaskInterface, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.harbor.corpus import RUN
from benchmarks.harbor.tokenizer import CONTEXT, PIECES
from benchmarks.provenance import commit

PROCESSES = 2
BLOCK = 128  # queries
GUIDED = 4  # layers
TOKENS = 2048  # of a process's batch of the corpus, padding included
PEAK, FLOOR, WARMUP = 2.5e-3, 0.04, 100  # learning rate, its last value as a share, steps
AFTER = 0.25  # its first value, as a share, for a run that goes on from the end of another
# Before the corpus: lessons, each until it is mastered or for so many steps (and tokens of a process's batch) at most.
# Abilities to find something break through after a number of steps, so in small batches (LOG.md).
LESSONS = {
    "copying": (400, 1024),
    "comparing": (300, 2048),
    "judging": (300, 2048),
    "naming": (700, 1024),
    "asking": (900, 2048),
    "ordering": (1500, 2048),
    "claiming": (1000, 2048),
    "everything": (300, 2048),
}
MASTERED, WINDOW = 0.9, 50  # share of right replies, over so many steps, with which a lesson is over
DECIDES = 3.0  # weight of the first token of a reply, which decides what it does
SAVE_EVERY = 180.0  # seconds


def config() -> LlamaConfig:
    """Return harbor's shape: 6 layers, width 192, 3 query heads and 1 key-value head; 2.75 M parameters.

    On two cores 75 minutes are 37 M tokens for this one, 14 M for 8 layers of width 256.
    """
    return LlamaConfig(
        vocab_size=PIECES,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.04,
    )


def fresh() -> LlamaForCausalLM:
    """Return a new model in which every query matrix starts as its layer's key matrix (after Trockman and Kolter 2023).

    So heads begin by looking for what is alike, which is what copying, comparing and finding need: copying after 360
    steps 0.65 begun rightly and 1.07 nats a token, 0.50 and 2.36 with independent matrices.
    """
    model = LlamaForCausalLM(config())
    with torch.no_grad():
        for layer in model.model.layers:
            keys = layer.self_attn.k_proj.weight
            layer.self_attn.q_proj.weight.copy_(keys.repeat(3, 1))
    return model


def attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **named: Any
) -> tuple[torch.Tensor, None]:
    """Return causal attention (b t h d) of queries (b h t d) to one head of keys and values (b 1 t d), in bfloat16.

    In blocks of queries, which meet no key behind their block: 10,091 tokens/s of training, 8,948 with eager attention
    (medians of three interleaved rounds); sdpa is slower still, because of its backward pass on CPUs.
    """
    with torch.autocast("cpu", enabled=False):
        batch, heads, length, size = query.shape
        query, key, value = (one.to(torch.bfloat16) for one in (query * named["scaling"], key[:, 0], value[:, 0]))
        made = []
        for start in range(0, length, BLOCK):
            end = min(length, start + BLOCK)
            rows = query[:, :, start:end].reshape(batch, -1, size)
            scores = torch.bmm(rows, key[:, :end].transpose(1, 2)).view(batch, heads, end - start, end)
            later = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
            scores[..., start:].masked_fill_(later, float("-inf"))
            shares = scores.softmax(-1).view(batch, -1, end)
            made.append(torch.bmm(shares, value[:, :end]).view(batch, heads, end - start, size))
        return torch.cat(made, 2).transpose(1, 2), None


AttentionInterface.register("harbor", attention)
AttentionMaskInterface.register("harbor", lambda *_, **named: None)


class Batch(NamedTuple):
    """Rows of tokens, padded on the right."""

    ids: torch.Tensor  # (b t)
    labels: torch.Tensor  # (b t), -100 where there is nothing to learn
    hints: torch.Tensor  # (b t), indices of corpus.HINTS
    names: torch.Tensor  # (b t), the first token of the name of what a hint is about, 0 without one


class Guide(torch.nn.Linear):
    """Says whether a function is wanted, a parameter given, a claimed value right, at the places that name them, from
    what GUIDED layers have made of these; and, with the model's own head, how the name begins. Not kept.

    Deep supervision (Lee et al. 2015): a conversation has one first token of a reply to learn from, and a dozen of
    these. What is wanted shows in a name's last word or behind it, what is to be said is its first, and a causal model
    has to carry that along: without it `spark_village` was called `book_village`.
    """

    def __init__(self, width: int):
        super().__init__(width, 7, bias=False)

    def loss(self, hidden: torch.Tensor, batch: Batch, head: torch.nn.Module) -> torch.Tensor:
        """Return the negative log-likelihood of the hints after hidden states (b t d): the sum of the means over
        functions, parameters, claims, beginnings of functions' names, and of parameters' values (or names)."""
        kept = batch.hints > 0
        hint, name = batch.hints[kept] - 1, batch.names[kept]
        normed = rms_norm(hidden[kept].float(), hidden.shape[-1:])
        logits, total = self(normed).float(), torch.zeros(())
        for first, last in ((0, 2), (2, 5), (5, 7)):
            mine = (hint >= first) & (hint < last)
            each = cross_entropy(logits[mine, first:last], hint[mine] - first, reduction="sum")
            total = total + each / max(1, int(mine.sum()))
        for mine in ((hint < 2) & (name > 0), (hint >= 2) & (name > 0)):
            each = cross_entropy(head(normed[mine]).float(), name[mine], reduction="sum")
            total = total + each / max(1, int(mine.sum()))
        return total


class Corpus:
    """The documents of one file in batches of similar length."""

    def __init__(self, path: Path, seed: int, tokens: int):
        stored = np.load(path)
        self.ids, self.learn, self.starts = stored["ids"], stored["learn"], stored["starts"]
        self.hints, self.names = stored["hints"], stored["names"]
        self.seed, self.tokens = seed, tokens

    def order(self, epoch: int) -> list[np.ndarray[Any, Any]]:
        """Return the batches of one pass: document numbers, at most so many tokens with padding."""
        rng = np.random.default_rng((self.seed, epoch))
        lengths = np.diff(self.starts)
        shuffled = rng.permutation(len(lengths))
        batches: list[np.ndarray[Any, Any]] = []
        for pool in np.array_split(shuffled, max(1, len(shuffled) // 4096)):
            ranked = pool[np.argsort(lengths[pool], kind="stable")]
            first = 0
            for last in range(1, len(ranked) + 1):
                if last == len(ranked) or int(lengths[ranked[last]]) * (last - first + 1) > self.tokens:
                    batches.append(ranked[first:last])
                    first = last
        return [batches[place] for place in rng.permutation(len(batches))]

    def rows(self, documents: np.ndarray[Any, Any]) -> Batch:
        """Return some documents as a batch."""
        longest = max(int(self.starts[one + 1] - self.starts[one]) for one in documents)
        ids, hints, names = (np.zeros((len(documents), longest), dtype=np.int64) for _ in range(3))
        labels = np.full((len(documents), longest), -100, dtype=np.int64)
        for row, one in enumerate(documents):
            piece = slice(int(self.starts[one]), int(self.starts[one + 1]))
            size = piece.stop - piece.start
            ids[row, :size] = self.ids[piece]
            labels[row, :size] = np.where(self.learn[piece], self.ids[piece], -100)
            hints[row, :size], names[row, :size] = self.hints[piece], self.names[piece]
        return Batch(*(torch.from_numpy(one) for one in (ids, labels, hints, names)))

    def batches(self, skip: int) -> Iterator[Batch]:
        """Yield this process's batches for ever, without the first `skip`."""
        rank, processes = dist.get_rank(), dist.get_world_size()
        epoch = 0
        while True:
            order = self.order(epoch)[rank::processes]
            for documents in order[skip:]:
                yield self.rows(documents)
            skip, epoch = max(0, skip - len(order)), epoch + 1


def loss_of(model: LlamaForCausalLM, batch: Batch, speaks: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return the mean negative log-likelihood of the labelled tokens, the guide's loss, and the share of replies all of
    whose tokens are likeliest where the gold ones come before them.

    The first token of a reply, behind `speaks`, counts DECIDES times: it says whether the reply asks, calls or agrees.
    """
    embedded = model.model.embed_tokens(batch.ids).to(torch.bfloat16)  # layers add to it in bfloat16, as in use
    made = model.model(inputs_embeds=embedded, output_hidden_states=True)  # rows are padded on the right: no mask
    target = batch.labels[:, 1:]
    keep = target != -100
    logits = model.lm_head(made.last_hidden_state[:, :-1][keep])  # (kept v): only these rows meet the head
    wanted, decides = target[keep], batch.ids[:, :-1][keep] == speaks
    each = cross_entropy(logits.float(), wanted, reduction="none")
    weight = torch.where(decides, DECIDES, 1.0)
    wrong = torch.zeros(int(decides.sum())).index_add_(0, decides.cumsum(0) - 1, (logits.argmax(-1) != wanted).float())
    guided = model.guide.loss(made.hidden_states[GUIDED], batch, model.lm_head)
    return (each * weight).sum() / weight.sum(), guided, (wrong == 0).float().mean().item()


@dataclass
class Progress:
    """How far a run is; what a stop must not lose, beside the weights."""

    step: int = 0
    used: float = 0.0  # seconds
    tokens: int = 0
    lesson: int = 0  # index
    inside: int = 0  # steps of this lesson
    recent: list[float] = field(default_factory=list)  # share of right replies, last steps
    curve: list[dict[str, Any]] = field(default_factory=list)  # one entry every 50 steps

    def over(self, longest: int) -> bool:
        """Return whether the lesson, of so many steps at most, is over."""
        right = sum(self.recent) / max(1, len(self.recent))
        return self.inside >= longest or (len(self.recent) == WINDOW and right >= MASTERED)


def train(model: LlamaForCausalLM, parts: Mapping[str, Corpus], speaks: int, run: Run) -> None:
    """Train on the parts, one after the other, for a number of minutes of wall time, over all starts together."""
    optimizers = optimizers_of(model)
    now = run.load(model, optimizers)
    began, saved_at, losses = time.monotonic() - now.used, now.used, []
    names = list(parts)
    batches = parts[names[now.lesson]].batches(now.inside)
    while now.used < 60 * (run.until or run.minutes):
        rate = min(1.0, (now.step + 1) / WARMUP) * _schedule(now.used / (60 * run.minutes), run.first)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = PEAK * rate
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            loss, guided, right = loss_of(model, batch, speaks)
        (loss + guided).backward()
        now.used = time.monotonic() - began
        numbers = [loss.item(), guided.item(), right, float(batch.ids.numel()), now.used]
        *loss_now, right, tokens, now.used = _average(model, numbers)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        _share(model)
        now.step, now.inside = now.step + 1, now.inside + 1
        now.tokens += round(tokens * dist.get_world_size())
        now.recent = [*now.recent[1 - WINDOW :], right]
        losses = [*losses[1 - WINDOW :], loss_now]
        if now.step % 50 == 0:
            means = [round(sum(some) / len(some), 4) for some in (*zip(*losses, strict=True), now.recent)]
            point = {"lesson": names[now.lesson], "step": now.step, "seconds": round(now.used), "tokens": now.tokens}
            now.curve.append(point | dict(zip(("loss", "guide", "right"), means, strict=True)))
            if dist.get_rank() == 0:
                pace = f"{now.used / 60:.1f} min  {now.tokens / 1e6:.2f} M tokens  {now.tokens / now.used:.0f}/s"
                measured = "  ".join(f"{key} {now.curve[-1][key]:.3f}" for key in ("loss", "guide", "right"))
                print(f"{names[now.lesson]}  step {now.step}  {pace}  {measured}", flush=True)
        if names[now.lesson] in LESSONS and now.over(LESSONS[names[now.lesson]][0]):
            now.lesson, now.inside, now.recent = now.lesson + 1, 0, []
            batches = parts[names[now.lesson]].batches(0)
        if now.used - saved_at > SAVE_EVERY:
            saved_at = now.used
            run.save(model, optimizers, now)
    run.save(model, optimizers, now)
    if dist.get_rank() == 0:
        report = run.settings | {
            "steps": now.step,
            "tokens": now.tokens,
            "seconds": round(now.used),
            "curve": now.curve,
            "commit": commit(),
        }
        (run.out / "training.json").write_text(json.dumps(report) + "\n")


def _average(model: LlamaForCausalLM, numbers: list[float]) -> list[float]:
    """Average gradients over the processes, and return some numbers averaged."""
    gradients = [one.grad for one in model.parameters() if one.grad is not None]
    flat = torch.cat([torch.tensor(numbers), *(one.flatten() for one in gradients)])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    place = len(numbers)
    for one in gradients:
        one.copy_(flat[place : place + one.numel()].view_as(one))
        place += one.numel()
    return flat[: len(numbers)].tolist()


def matrices(model: LlamaForCausalLM) -> list[torch.nn.Parameter]:
    """Return the matrices of the layers."""
    return [one for name, one in model.named_parameters() if one.dim() == 2 and "layers" in name]


def optimizers_of(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for this process's share of the layers' matrices (Jordan et al. 2024; update scaled to AdamW's, Liu
    et al. 2025), AdamW for embeddings and norms. After 0.64 M tokens of drills: 2.13 nats a token, 2.45 with AdamW."""
    inner = matrices(model)[dist.get_rank() :: dist.get_world_size()]
    outer = [one for name, one in model.named_parameters() if one.dim() != 2 or "layers" not in name]
    return [
        torch.optim.Muon(inner, lr=PEAK, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=PEAK, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def _share(model: LlamaForCausalLM) -> None:
    """Give every process the matrices that the others have stepped."""
    processes = dist.get_world_size()
    for owner in range(processes):
        theirs = matrices(model)[owner::processes]
        flat = torch.cat([one.detach().flatten() for one in theirs])
        dist.broadcast(flat, owner)
        for one, piece in zip(theirs, flat.split([one.numel() for one in theirs]), strict=True):
            one.data.copy_(piece.view_as(one))


def _schedule(share: float, first: float) -> float:
    """Return the learning rate as a share of its peak: from `first` down by the same factor in every minute.

    Copying breaks through fastest at the peak. Asking, from one state, after 400 steps: 0.49 of the replies are right
    at the peak, 0.62 at a quarter of it.
    """
    return first * (FLOOR / first) ** share


@dataclass(frozen=True)
class Run:
    """A run's folder, and what it must have been started with to go on."""

    out: Path
    minutes: float
    settings: dict[str, Any]
    after: Path | None = None  # another run, whose end this one begins with
    until: float | None = None  # minutes after which to stop before that

    @property
    def first(self) -> float:
        """The first learning rate, as a share of the peak."""
        return AFTER if self.after else 1.0

    def load(self, model: LlamaForCausalLM, optimizers: Sequence[torch.optim.Optimizer]) -> Progress:
        """Return how far the run is, after giving model and optimizers what it had there."""
        state = self.out / "state.pt"
        if not state.exists():
            if self.after:
                stored = torch.load(self.after / "natural" / "state.pt", weights_only=True)
                self._restore(stored, model, optimizers)
            return Progress()
        stored = torch.load(state, weights_only=True)
        if stored["settings"] != self.settings:
            raise SystemExit(
                f"{state} belongs to a run with {stored['settings']}, this is {self.settings}; take another folder."
            )
        self._restore(stored, model, optimizers)
        return Progress(**stored["progress"])

    def _restore(
        self, stored: Mapping[str, Any], model: LlamaForCausalLM, optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        model.load_state_dict(stored["model"])
        for optimizer, kept in zip(optimizers, stored["optimizers"][dist.get_rank()], strict=True):
            optimizer.load_state_dict(kept)

    def save(self, model: LlamaForCausalLM, optimizers: Sequence[torch.optim.Optimizer], now: Progress) -> None:
        """Write all of it, at once or not at all."""
        kept: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(kept, [one.state_dict() for one in optimizers])
        if dist.get_rank() == 0:
            everything = {"model": model.state_dict(), "optimizers": kept, "settings": self.settings}
            torch.save(everything | {"progress": asdict(now)}, self.out / "state.new")
            (self.out / "state.new").rename(self.out / "state.pt")


def work(rank: int, meeting: str, options: argparse.Namespace) -> None:
    """Be one of the processes."""
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=options.processes)
    torch.set_num_threads(1)
    out = options.run / "natural"
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    model = fresh()
    model.set_attn_implementation("harbor")
    model.guide = Guide(model.config.hidden_size)
    settings = {
        "seed": options.seed,
        "minutes": options.minutes,
        "processes": options.processes,
        "tokens_a_batch": TOKENS,
        "peak": PEAK,
        "lessons": {name: list(lesson) for name, lesson in LESSONS.items()},
        "mastered": MASTERED,
        "decides": DECIDES,
        "guided": GUIDED,
        "corpus": json.loads((options.run / "corpus.json").read_text()),
    }
    if options.after:
        before = json.loads((options.after / "natural" / "training.json").read_text())
        settings |= {"first": AFTER, "lessons": {}, "after": before}
    lessons = {} if options.after else LESSONS
    tokenizer = AutoTokenizer.from_pretrained(options.run / "tokenizer")
    parts = {name: Corpus(options.run / f"{name}.npz", options.seed, tokens) for name, (_, tokens) in lessons.items()}
    parts["corpus"] = Corpus(options.run / "corpus.npz", options.seed, TOKENS)
    run = Run(out, options.minutes, settings, options.after, options.until)
    train(model, parts, tokenizer.convert_tokens_to_ids("<|assistant|>"), run)
    if rank == 0:
        del model.guide
        model.to(torch.bfloat16).save_pretrained(out)
        tokenizer.save_pretrained(out)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=RUN)
    parser.add_argument("--after", type=Path, help="run to go on from the end of")
    parser.add_argument("--minutes", type=float, default=150)
    parser.add_argument("--until", type=float, help="minute at which to stop before that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=PROCESSES)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (f"file://{folder}/meeting", options), options.processes)


if __name__ == "__main__":
    main()
