"""The smallest true run, end to end, as plain calls of the public API; read it as the tutorial.

A small random model stands in for yours, and random experts for trained ones: what it shows is the machinery, that
every row of a batch can have its own mixture, at what cost, and that a mixture leaves the library exactly.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from svdexpert import Expert, Library, Mixture, SpectralModel, check_lora, export_lora, merge


def run(folder: Path) -> None:
    """Decompose, mix in one batch, export, reload; print what was found."""
    say = Console().print
    small_model(folder / "base")

    # 1. Any causal LM: load it, decompose it (once: the factors are cached), attach the basis.
    model = SpectralModel.from_pretrained(folder / "base", k=64)
    say(f"[bold]1.[/] {model.basis!r}")

    # 2. Experts are vectors with algebra, kept in a folder.
    library = Library(folder / "experts")
    for seed, name in enumerate(("clarify", "disagree", "call")):
        library.add(name, Expert.random(model.basis, std=0.3, seed=seed), overwrite=True)
    say(f"[bold]2.[/] {library!r}: {sum(model.basis.sizes)} numbers each")

    # 3. Another mixture in every row of one batch.
    mixtures = [{}, {"clarify": 1.0}, {"clarify": 0.7, "disagree": 0.3}, {"call": 2.0}]
    prompts = ["Book a table for two."] * len(mixtures)
    together = model.generate(prompts, mixtures, library=library, max_new_tokens=24, do_sample=False)
    apart = [model.generate(prompts[0], m, library=library, max_new_tokens=24, do_sample=False)[0] for m in mixtures]
    table = Table(title="3. one batch, four mixtures (random weights, so the text is noise)")
    for column in ("mixture", "reply", "same as alone"):
        table.add_column(column)
    for mixture, reply, alone in zip(mixtures, together, apart, strict=True):
        cells = (str(mixture) if mixture else "base", repr(reply), "yes" if reply == alone else "NO")
        table.add_row(*map(Text, cells))
    say(table)

    # 4. What it costs, beside the bare base.
    ids = torch.randint(3, 90, (16, 64))
    bank = model.bank(library)
    ratio = overhead(model, ids, bank.mix(torch.rand(16, 3)))
    say(f"[bold]4.[/] 16 rows with 16 mixtures: a forward pass takes {ratio:.2f} times the base's")
    say("   (a small model, all tokens; benchmarks/speed.py measures larger ones)")

    # 5. A mixture leaves as one LoRA, or as a merged checkpoint; both reload elsewhere.
    mixed = 0.7 * library["clarify"] + 0.3 * library["disagree"]
    done = export_lora(mixed, model, folder / "lora", overwrite=True)
    merge(mixed, model, folder / "merged", overwrite=True)
    say(f"[bold]5.[/] LoRA of rank {done.rank}, retained energy {done.retained:.6f}: ", end="")
    say(check_lora(done.folder, model.hf))
    ids = ids[:4, :16]
    with torch.no_grad():
        ours, base = model.logits(ids, mixed), model.logits(ids)
        merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
        say(f"   merged, reloaded by transformers: largest difference {(merged(ids).logits - ours).abs().max():.1e}")
        hf = model.detach()
        say(f"[bold]6.[/] detached: the base is back bit for bit: {torch.equal(hf(ids).logits, base)}")
        try:
            from peft import PeftModel
        except ImportError:
            say("   PEFT is not installed: the LoRA was not reloaded (pip install peft)")
            return
        lora = PeftModel.from_pretrained(hf, str(folder / "lora"))
        say(f"   LoRA, reloaded by PEFT: largest difference {(lora(ids).logits - ours).abs().max():.1e}")


def overhead(model: SpectralModel, ids: torch.Tensor, mixture: Mixture) -> float:
    """Return the median ratio of a forward pass with a mixture to one without, interleaved."""
    ratios = []
    for _ in range(9):
        times = []
        for experts in (None, mixture):
            start = time.perf_counter()
            with torch.inference_mode():
                model.logits(ids, experts)
            times.append(time.perf_counter() - start)
        ratios.append(times[1] / times[0])
    return statistics.median(ratios)


def small_model(folder: Path) -> None:
    """Write a random Llama of 8 layers and width 256, with a tokenizer of printable characters."""
    special = ["<pad>", "<bos>", "<eos>"]
    vocabulary = {token: index for index, token in enumerate([*special, *map(chr, range(32, 127))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="?"
    )
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    hf = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
