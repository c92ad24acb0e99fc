"""Print the peak memory of a decomposition, in MiB, beyond the model and what is kept; run in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from svdexpert import decompose
from svdexpert.basis import factorise


def status(name: str) -> float:
    """Return a field of /proc/self/status in MiB."""
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(name))
    return int(line.split()[1]) / 1024


def main() -> None:
    width = 2560
    config = LlamaConfig(
        vocab_size=8, hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=8
    )
    hf = LlamaForCausalLM(config)
    factorise(torch.randn(width, width), 64)  # libraries and their buffers, some 30 MiB, are there once and for all
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    basis = decompose(hf, ["*.q_proj", "*.o_proj", "*.up_proj"], k=64, first_layer=0, progress=False)
    kept = sum(f.v.nbytes + f.u_t.nbytes + f.s.nbytes for f in basis.factors.values()) / 2**20
    full = (2 * width * width + width) * 4 / 2**20
    result = {"beyond_mib": status("VmHWM") - before - kept, "two_full_factors_mib": 2 * full, "kept_mib": kept}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
