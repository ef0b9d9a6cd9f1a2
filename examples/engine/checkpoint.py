"""A small DeepSeek-V2/V3 checkpoint and prompts for it: seeded random weights, every feature of the real models switched on.

Owns what the demo and the tests run on. The weights mean nothing; they are chosen so that a mistake shows: standard deviation 0.08 (with
Hugging Face's 0.02 the greedy text collapses to two tokens and hides errors), norm gains and router biases away from their defaults.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from kvmanager.errors import InvalidValue

__all__ = ["FAMILIES", "make_checkpoint", "make_prompts", "quiet_transformers"]

WEIGHT_STD = 0.08
GAIN_STD = 0.2
ROUTER_BIAS_STD = 0.1

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

_SHARED: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "intermediate_size": 384,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 96,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 64,
    "max_position_embeddings": 5120,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,  # a demo counts tokens; an end token drawn by chance would end a request early
    "pad_token_id": None,
    "rope_parameters": _YARN,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {**_SHARED, "n_shared_experts": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "rope_interleave": True},
    "deepseek_v2": {**_SHARED, "n_shared_experts": 2, "routed_scaling_factor": 2.0, "topk_method": "group_limited_greedy"},
}


def make_checkpoint(directory: str | os.PathLike[str], seed: int = 0, family: str = "deepseek_v3", **overrides: Any) -> Path:
    """Write config.json and safetensors (float32) of a small random model to `directory`; the same arguments give the same bytes.

    family     "deepseek_v3" or "deepseek_v2"
    overrides  fields of the config, e.g. kv_lora_rank=512; a dict for rope_parameters replaces the whole of it; num_attention_heads also
               sets num_key_value_heads, which MLA does not use but Hugging Face's modules divide by
    """
    if family not in FAMILIES:
        raise InvalidValue("family", "one of " + ", ".join(FAMILIES), repr(family))
    for field in overrides:
        if field not in FAMILIES[family]:
            raise InvalidValue(f"overrides.{field}", "one of " + ", ".join(sorted(FAMILIES[family])), "an unknown field")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {**FAMILIES[family], **overrides}
    values["num_key_value_heads"] = values["num_attention_heads"]
    config = AutoConfig.for_model(family, **values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in _weights(model):
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("norm.weight"):
                tensor.copy_(1.0 + GAIN_STD * noise)
            elif name.endswith("e_score_correction_bias"):
                tensor.copy_(ROUTER_BIAS_STD * noise)
            else:
                tensor.copy_(WEIGHT_STD * noise)
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        model.save_pretrained(path)
    return path


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers without its progress bars, which would run through the engine's own output."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()


def _weights(model: Any) -> Iterator[tuple[str, Any]]:
    """What a checkpoint stores, in the order of names, so that a seed's numbers do not depend on the order of construction."""
    yield from sorted(model.state_dict().items())


# Suffixes behind the shared prefix, and whole prompts that share nothing: about a page, a token less, a token more, and a single token.
_SUFFIX_TOKENS = (24, 1, 56, 17, 40, 8, 31, 70)
_LONE_TOKENS = (1, 64, 130, 33)


def make_prompts(seed: int = 0, vocab: int = 512, count: int = 12, sharing: int = 8, prefix: int = 200) -> list[list[int]]:
    """`count` prompts of token ids, `sharing` of which begin with the same `prefix` tokens, spread evenly among the others.

    200 tokens are no multiple of any page size from 16 up to 128, but one: a shared prefix that ends inside a page. The first prompt
    that shares nothing has one token.
    """
    if count < 1 or not 0 <= sharing <= count:
        raise InvalidValue("sharing", f"0 to count ({count}), count at least 1", sharing)
    rng = np.random.default_rng(seed)

    def draw(tokens: int) -> list[int]:
        return rng.integers(0, vocab, tokens).tolist()

    shared = draw(prefix)
    prompts: list[list[int]] = []
    shared_made = 0
    for number in range(count):
        if shared_made < (number + 1) * sharing // count:
            prompts.append(shared + draw(_SUFFIX_TOKENS[shared_made % len(_SUFFIX_TOKENS)]))
            shared_made += 1
        else:
            lone = draw(_LONE_TOKENS[(number - shared_made) % len(_LONE_TOKENS)])
            if prefix and lone[0] == shared[0]:
                lone[0] = (lone[0] + 1) % vocab  # differs from the first token on, so that it shares nothing
            prompts.append(lone)
    return prompts
