"""Print the peak memory of a decomposition, in MiB, beyond the model and what is kept; run in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from svdexpert import decompose


def status(name: str) -> float:
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(name))
    return int(line.split()[1]) / 1024


def main() -> None:
    width = 2560  # the buffers of the linear algebra libraries, some 10 MiB a thread, are then small beside a matrix
    config = LlamaConfig(
        vocab_size=8, hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=8
    )
    hf = LlamaForCausalLM(config)
    small = LlamaConfig(vocab_size=8, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    decompose(LlamaForCausalLM(small), k=8, first_layer=0, progress=False)  # libraries and their buffers are loaded now
    torch.randn(512, 512).double() @ torch.randn(512, 512).double()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    basis = decompose(hf, ["*.q_proj", "*.o_proj", "*.up_proj"], k=64, first_layer=0, progress=False)
    kept = sum(f.v.nbytes + f.u_t.nbytes + f.s.nbytes for f in basis.factors.values()) / 2**20
    full = (2 * width * width + width) * 4 / 2**20
    result = {"beyond_mib": status("VmHWM") - before - kept, "two_full_factors_mib": 2 * full, "kept_mib": kept}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
