"""LatentModel in bfloat16 on a GPU, attention by the Triton path: as near to float32 as transformers' own bfloat16 run."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import numpy as np
import torch

from kvmanager.attention import MLABackend, PageMemory
from kvmanager.examples.engine.model import LatentModel
from kvmanager.examples.engine.oracle import PagedSequence, Reference, SingleProcess
from kvmanager.examples.engine.worker import long_prefill_for
from kvmanager.tables import BatchTables

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONFIGS = {
    "v3": {},
    "v3-512-64-16heads": {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_attention_heads": 16},
    "v2": {"family": "deepseek_v2"},
}


@pytest.mark.parametrize("chunk", [None, 64])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_bfloat16_on_the_gpu_is_as_near_to_float32_as_transformers(config, chunk, checkpoint, reference, expected, prompts):
    """Forced along the float32 tokens, the median step's error is like that of transformers' bfloat16 run on the same GPU; twice the same
    run gives the same bits."""
    theirs = Reference(checkpoint(**config), torch.bfloat16, "cuda")
    process = SingleProcess(LatentModel.load(checkpoint(**config), "cuda", torch.bfloat16), 64, 16, chunk, scatter_seed=3)
    process.memory.pages.fill_(float("nan"))
    errors: list[list[torch.Tensor]] = [[], []]
    for number in (0, 3, 5):
        prompt, tokens = prompts[number], expected(**config)[number]
        steps = slice(len(prompt) - 1, -1)
        exact = reference(**config).logits(prompt + tokens)[steps]
        ours = process.generate(prompt, len(tokens), forced=tokens).logits
        assert torch.equal(ours, process.generate(prompt, len(tokens), forced=tokens).logits)
        for row, logits in enumerate((ours, theirs.logits(prompt + tokens)[steps])):
            errors[row].append((logits - exact).norm(dim=-1) / exact.norm(dim=-1))
    ours_median, theirs_median = (float(torch.cat(rows).median()) for rows in errors)
    print(f"median relative error against float32: ours {ours_median:.4f}, transformers {theirs_median:.4f}")
    assert ours_median < 1.5 * theirs_median
    assert ours_median < 0.08


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_latents_on_the_gpu_are_those_of_transformers(config, checkpoint, prompts):
    """The first layer's, which no attention has touched yet, within two bfloat16 roundings."""
    theirs = Reference(checkpoint(**config), torch.bfloat16, "cuda").cache(prompts[5])
    process = SingleProcess(LatentModel.load(checkpoint(**config), "cuda", torch.bfloat16), 64, 16, scatter_seed=3)
    sequence = PagedSequence()
    process.prefill(sequence, prompts[5])
    ours = process.cached(sequence)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    print(f"first layer: {int((ours[0] != theirs[0]).sum())} of {ours[0].numel()} values differ")
    torch.testing.assert_close(ours[0], theirs[0], rtol=2**-7, atol=2**-8)


def test_long_chunks_on_the_gpu_are_as_near_to_float32_with_expanded_heads_as_with_absorbed(checkpoint, reference):
    """What a worker makes for itself where a step may be long enough, warmed up, and used for a prompt of two chunks."""
    directory = checkpoint(**CONFIGS["v3-512-64-16heads"])
    model = LatentModel.load(directory, "cuda", torch.bfloat16)
    text = [int(token) for token in np.random.default_rng(9).integers(0, model.vocab_size, 1800)]
    exact = reference(**CONFIGS["v3-512-64-16heads"]).logits(text)[[899, 1799]]
    memory = PageMemory(model.layout(64), 32, "cuda")
    memory.pages.fill_(float("nan"))
    backend = MLABackend(memory, model.num_heads, model.softmax_scale, max_tokens=1024, max_batch=4, max_pages=64)
    assert long_prefill_for(model, backend, 256) is None
    prefill = long_prefill_for(model, backend, 1024)
    assert prefill is not None
    prefill.warm_up(1024)
    pages, errors = np.random.default_rng(1).permutation(32).astype(np.int32), []
    for used in (prefill, None):
        rows = []
        for start, end in ((0, 900), (900, 1800)):
            plan = backend.plan(BatchTables(end, 64, np.array([end], np.int32), pages, np.array([0, 32], np.int64)), [end - start])
            rows.append(model.forward(text[start:end], range(start, end), backend, plan, long_prefill=used)[0].cpu())
            assert prefill.choose(plan).kernel == "expanded"
        errors.append(((torch.stack(rows) - exact).norm(dim=-1) / exact.norm(dim=-1)).tolist())
    print(f"relative error against float32: expanded {errors[0]}, absorbed {errors[1]}")
    assert max(errors[0]) < 1.5 * max(errors[1]) and max(errors[0]) < 0.1
    memory.close()
