"""Writing new latents to random slots on one GPU: checks the bytes, then times it beside torch's index_copy_ in the same run.

    python3 benchmarks/bench_write.py

Floor: each latent read once and written once at copy bandwidth, measured in the same run.
"""

from __future__ import annotations

import torch
from measure import COLD_BYTES, graph_ms, print_header

from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.memory import PageMemory
from kvmanager.kernels.latent_write import write_latent


def bench(num_tokens: int, copy: float) -> None:
    layout = LatentLayout(512, 64, 4)
    memory = PageMemory(layout, 4096, "cuda")
    memory.pages.zero_()
    sets = max(4, min(64, COLD_BYTES // (num_tokens * layout.slot_bytes * 2)))
    num_slots = memory.num_pages * layout.page_size
    latent = [torch.randn((num_tokens, layout.entry), device="cuda").bfloat16() for _ in range(sets)]
    slots = [torch.randperm(num_slots, device="cuda")[:num_tokens] for _ in range(sets)]
    write_latent(latent[0], slots[0], memory.layer(1), layout.kv_lora_rank)
    got = memory.layer(1)[slots[0] // layout.page_size, slots[0] % layout.page_size]
    if not torch.equal(got, latent[0]) or int(memory.pages.count_nonzero(dim=(1, 2, 3)).ne(0).sum()) > num_tokens:
        raise SystemExit("write: wrong bytes")

    def ours(index: int) -> None:
        write_latent(latent[index], slots[index], memory.layer(index % 4), layout.kv_lora_rank)

    flat = torch.empty((num_slots, layout.entry), dtype=torch.bfloat16, device="cuda")
    ms = graph_ms([lambda index=index: ours(index) for index in range(sets)])  # type: ignore[misc]
    peer = graph_ms([lambda index=index: flat.index_copy_(0, slots[index], latent[index]) for index in range(sets)])  # type: ignore[misc]
    floor = 2 * num_tokens * layout.slot_bytes / copy / 1e6
    print(
        f"{num_tokens:>8} tokens  floor {floor * 1e3:6.1f} us  write {ms * 1e3:6.1f} us  {floor / ms:5.1%} of floor"
        f"  torch index_copy_ (one contiguous layer) {peer * 1e3:6.1f} us",
        flush=True,
    )


def main() -> None:
    copy, _, _ = print_header()
    print("512 + 64, bf16, page 64, 4 layers page-major, random slots; bytes checked first")
    for num_tokens in (128, 4096, 65536):
        bench(num_tokens, copy)


if __name__ == "__main__":
    main()
