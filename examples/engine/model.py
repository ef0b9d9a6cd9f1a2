"""DeepSeek-V2/V3 with its attention replaced: Hugging Face's embedding, norms, MLP/MoE, rotary frequencies and head, absorbed MLA on our pages.

Owns the weights of one worker. Knows nothing of pages or scheduling: a plan says where tokens go, the caller says at which position they are.
The attention below is the only part of the model that touches the KV cache, and the part an engine author copies.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvmanager.attention import LatentLayout, LongPrefill, MLABackend, Plan
from kvmanager.errors import InvalidValue
from kvmanager.examples.engine.checkpoint import quiet_transformers

__all__ = ["LatentModel", "read_config", "softmax_scale_of"]

MODEL_TYPES = ("deepseek_v3", "deepseek_v2")
# Frequencies of other types follow the length of the sequence, so that tokens cached earlier would have to be rotated again.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Of each token, [num_tokens, rope / 2]: V3's cos and sin, or V2's one complex number a pair, in float32.
Rotations = tuple[Tensor, ...]
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json of a checkpoint directory, checked as far as this engine relies on it.

    Raises InvalidValue naming the file and the field. Read before transformers does, because transformers fills a missing field with the
    real model's default and goes on.
    """
    file = Path(directory) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidValue(str(file), "a Hugging Face checkpoint directory (config.json and safetensors)", "no such file") from None
    except (OSError, ValueError) as error:  # not JSON, not UTF-8, not readable
        raise InvalidValue(str(file), "a readable JSON file", str(error)) from None
    if not isinstance(config, dict):
        raise InvalidValue(str(file), "a JSON object", type(config).__name__)
    if config.get("model_type") not in MODEL_TYPES:
        raise InvalidValue(f"{file}: model_type", "one of " + ", ".join(MODEL_TYPES), repr(config.get("model_type")))
    if config.get("quantization_config"):
        raise InvalidValue(f"{file}: quantization_config", "none (weights in float32, bfloat16 or float16)", "a quantised checkpoint")
    for field in SIZES:
        value = config.get(field)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidValue(f"{file}: {field}", "an integer of at least 1", "nothing" if field not in config else repr(value))
    rank = config.get("q_lora_rank", 0)
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise InvalidValue(f"{file}: q_lora_rank", "an integer of at least 1, or null", "nothing" if rank == 0 else repr(rank))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InvalidValue(f"{file}: rope_parameters", "an object", repr(rope))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise InvalidValue(f"{file}: rope_parameters.rope_type", "one of " + ", ".join(ROPE_TYPES), repr(rope_type))
    if rope_type == "yarn" and not (isinstance(rope.get("factor"), (int, float)) and rope["factor"] > 0):
        raise InvalidValue(f"{file}: rope_parameters.factor", "a positive number", repr(rope.get("factor")))
    try:
        LatentLayout(config["kv_lora_rank"], config["qk_rope_head_dim"], config["num_hidden_layers"])
    except InvalidValue as error:
        raise InvalidValue(f"{file}: {error.field}", str(error.details["expected"]), error.details["got"]) from None
    return config


def softmax_scale_of(qk_head_dim: int, rope: Mapping[str, Any]) -> float:
    """What scores are multiplied by: (nope + rope)^-0.5 of the expanded heads, never of the latent entry, times yarn's m squared.

    m = 0.1 * mscale_all_dim * ln(factor) + 1 if the frequencies are stretched (factor > 1) and mscale_all_dim is given (DeepSeek-V2's and
    V3's own inference code). yarn's other factor, on cos and sin, is in the rotary module's output.
    """
    scale = qk_head_dim**-0.5
    mscale_all_dim = rope.get("mscale_all_dim") or 0
    if rope.get("rope_type", "default") != "default" and mscale_all_dim and rope["factor"] > 1:
        m = 0.1 * mscale_all_dim * math.log(rope["factor"]) + 1.0
        scale = scale * m * m
    return scale


class LatentModel:
    """One worker's model. `forward` runs one step of a batch: any mix of decode and prefill rows, in the plan's order."""

    def __init__(self, causal_lm: Any, device: torch.device, dtype: torch.dtype) -> None:
        config = causal_lm.config
        self.device = device
        self.dtype = dtype
        self.vocab_size: int = config.vocab_size
        self.num_layers: int = config.num_hidden_layers
        self.num_heads: int = config.num_attention_heads
        self.kv_lora_rank: int = config.kv_lora_rank
        self.qk_rope_head_dim: int = config.qk_rope_head_dim
        self.qk_nope_head_dim: int = config.qk_nope_head_dim
        self.v_head_dim: int = config.v_head_dim
        # V3 lists first all first values of its pairs, then all second ones; V2 keeps pairs together. Same scores, different bytes.
        self.rope_order = "interleaved" if config.model_type == "deepseek_v2" else "half"
        self.softmax_scale = softmax_scale_of(config.qk_nope_head_dim + config.qk_rope_head_dim, config.rope_parameters)
        pairs_adjacent = config.model_type == "deepseek_v2" or bool(config.rope_interleave)
        self._head = causal_lm.lm_head
        self._body = causal_lm.model
        self.attention = [LatentAttention(layer.self_attn, config, pairs_adjacent) for layer in self._body.layers[: self.num_layers]]

    @classmethod
    def load(cls, directory: str | os.PathLike[str], device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> LatentModel:
        """Load a Hugging Face DeepSeek-V2/V3 checkpoint directory. Raises InvalidValue naming file and field if it is not one."""
        if dtype not in DTYPES:
            raise InvalidValue("dtype", "torch.float32, torch.bfloat16 or torch.float16", dtype)
        read_config(directory)
        from transformers import AutoModelForCausalLM

        loader: Any = AutoModelForCausalLM
        try:
            with quiet_transformers():
                causal_lm, report = loader.from_pretrained(
                    os.fspath(directory), local_files_only=True, trust_remote_code=False, dtype=dtype, output_loading_info=True
                )
        except Exception as error:  # transformers, huggingface_hub and safetensors raise a dozen types here, none of them ours
            raise InvalidValue(str(directory), "a loadable checkpoint", f"{type(error).__name__}: {error}") from error
        for name in sorted(report["missing_keys"]):  # transformers warns and draws them at random
            raise InvalidValue(f"{directory}: {name}", "a tensor in the checkpoint's safetensors", "nothing")
        where = torch.device(device)
        return cls(causal_lm.eval().requires_grad_(False).to(where), where, dtype)

    def layout(self, page_size: int = 64) -> LatentLayout:
        """What a page of this model's latents holds."""
        return LatentLayout(
            self.kv_lora_rank,
            self.qk_rope_head_dim,
            self.num_layers,
            page_size,
            DTYPES[self.dtype],  # type: ignore[arg-type]
            self.rope_order,  # type: ignore[arg-type]
        )

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Tensor | np.ndarray | Sequence[int],
        positions: Tensor | np.ndarray | Sequence[int],
        backend: MLABackend,
        plan: Plan,
        on_layer: Callable[[int], None] | None = None,
        before_layer: Callable[[int], None] | None = None,
        long_prefill: LongPrefill | None = None,
    ) -> Tensor:
        """Run one step; gives logits float32 [plan.batch, vocab] of each sequence's last token.

        token_ids  int64 [num_tokens]  tokens of this step in the plan's order: decode rows' first
        positions  int64 [num_tokens]  position of each in its sequence, from 0; where a token is stored is the plan's business
        on_layer   called with the number of layers so far once the kernels of each are launched: on a GPU they need not have run
        before_layer  called with the number of each before its kernels are launched: it may wait for pages, or raise
        long_prefill  attends with expanded heads where its table says that this step's rows gain by it; another order of sums

        Raises InvalidValue for ids or positions out of range where they come from the host; tensors on a GPU are taken as they are.
        """
        tokens = self._step_input("token_ids", token_ids, plan.num_tokens, self.vocab_size)
        where = self._step_input("positions", positions, plan.num_tokens, 2**31)
        if plan.num_tokens == 0:
            return torch.empty((0, self.vocab_size), device=self.device)
        hidden = self._body.embed_tokens(tokens)
        rotations = self.rotations(hidden, where)
        for number, layer in enumerate(self._body.layers[: self.num_layers]):
            attention = self.attention[number]
            if before_layer is not None:
                before_layer(number)
            hidden = hidden + attention(layer.input_layernorm(hidden), rotations, backend, plan, number, long_prefill)
            normed = layer.post_attention_layernorm(hidden)
            hidden = hidden + layer.mlp(normed[None])[0]  # some MLPs insist on [batch, tokens, hidden]
            if on_layer is not None:
                on_layer(number + 1)
        if plan.num_prefill:  # in a decode step every token is its sequence's last
            hidden = hidden[torch.from_numpy(plan.query_starts + plan.query_lens - 1).to(self.device, non_blocking=True)]
        return self._head(self._body.norm(hidden)).float()

    def rotations(self, hidden: Tensor, positions: Tensor) -> Rotations:
        """How far the pairs of each position turn, yarn's factor on cos and sin included."""
        angles = self._body.rotary_emb(hidden[None], positions[None])
        if isinstance(angles, Tensor):
            return (angles[0],)
        cos, sin = angles  # every angle twice
        half = self.qk_rope_head_dim // 2
        return cos[0, :, :half], sin[0, :, :half]

    def _step_input(self, field: str, values: Any, count: int, limit: int) -> Tensor:
        """`values` as int64 [count] on the device. On the host they are checked: out of range, a GPU would abort the process."""
        tensor = torch.as_tensor(values, dtype=torch.int64)
        if tuple(tensor.shape) != (count,):
            raise InvalidValue(field, f"{count} numbers, one a token of the plan", f"shape {tuple(tensor.shape)}")
        if tensor.device.type == "cpu" and count and (int(tensor.min()) < 0 or int(tensor.max()) >= limit):
            raise InvalidValue(field, f"0 to {limit - 1}", f"{int(tensor.min())} to {int(tensor.max())}")
        return tensor.to(self.device, non_blocking=True)


class LatentAttention:
    """One layer's absorbed MLA. Its projections are Hugging Face's modules; heads meet the cache in latent space.

    With W_UK [heads, nope, rank] and W_UV [heads, v, rank], views of kv_b_proj's weight: score = (q_nope W_UK) . c + q_pe . k_pe and
    out = W_UV (P c), which is q_nope . (W_UK c) and P (W_UV c) with the sums in another order, so that no head's K or V is ever stored
    (DeepSeek-V2 paper, section 2.1).
    """

    def __init__(self, module: Any, config: Any, pairs_adjacent: bool) -> None:
        self.module = module
        self.heads: int = config.num_attention_heads
        self.nope: int = config.qk_nope_head_dim
        self.rope: int = config.qk_rope_head_dim
        self.rank: int = config.kv_lora_rank
        self.pairs_adjacent = pairs_adjacent
        by_head = module.kv_b_proj.weight.view(self.heads, self.nope + config.v_head_dim, self.rank)
        self.w_uk = by_head[:, : self.nope]
        self.w_uv = by_head[:, self.nope :].transpose(1, 2)  # [heads, rank, v]

    def __call__(
        self, hidden: Tensor, rotations: Rotations, backend: MLABackend, plan: Plan, layer: int, long_prefill: LongPrefill | None = None
    ) -> Tensor:
        """hidden [num_tokens, hidden] to the same shape. Writes this step's latents, then attends to all of them."""
        backend.write(plan, layer, self.latent(hidden, rotations))
        if long_prefill is not None and plan.num_prefill and long_prefill.choose(plan).kernel == "expanded":
            out, _ = long_prefill.attend(plan, layer, *self.heads_of(hidden, rotations), self.w_uk, self.w_uv)
            return self.module.o_proj(out.flatten(1))
        q = self.query(hidden, rotations)
        decoded, _ = backend.decode(plan, layer, q[: plan.num_decode])
        prefilled, _ = backend.prefill(plan, layer, q[plan.num_decode :])
        out = torch.cat([decoded, prefilled]).transpose(0, 1)  # [heads, num_tokens, rank]
        expanded = torch.bmm(out, self.w_uv).transpose(0, 1).flatten(1)
        return self.module.o_proj(expanded)

    def latent(self, hidden: Tensor, rotations: Rotations) -> Tensor:
        """What is cached: [num_tokens, rank + rope]. The norm is on the compressed part alone; k_pe is rotated once, for all heads."""
        compressed, k_pe = self.module.kv_a_proj_with_mqa(hidden).split([self.rank, self.rope], dim=-1)
        return torch.cat([self.module.kv_a_layernorm(compressed), self._rotate(k_pe, rotations)], dim=-1)

    def query(self, hidden: Tensor, rotations: Rotations) -> Tensor:
        """Absorbed queries [num_tokens, heads, rank + rope]: q_nope W_UK beside the rotated q_pe."""
        q_nope, q_pe = self.heads_of(hidden, rotations)
        absorbed = torch.bmm(q_nope.transpose(0, 1), self.w_uk).transpose(0, 1)
        return torch.cat([absorbed, q_pe], dim=-1)

    def heads_of(self, hidden: Tensor, rotations: Rotations) -> tuple[Tensor, Tensor]:
        """Each head's query: q_nope [num_tokens, heads, nope], q_pe [num_tokens, heads, rope], rotated."""
        module = self.module
        projected = module.q_proj(hidden) if module.q_proj is not None else module.q_b_proj(module.q_a_layernorm(module.q_a_proj(hidden)))
        q_nope, q_pe = projected.unflatten(-1, (self.heads, self.nope + self.rope)).split([self.nope, self.rope], dim=-1)
        return q_nope, self._rotate(q_pe, tuple(part[:, None] for part in rotations))

    def _rotate(self, x: Tensor, rotations: Rotations) -> Tensor:
        """Turn the pairs of x [..., rope]; rotations [..., rope / 2]."""
        if len(rotations) == 1:  # as complex products and nothing equal to them: the last bit depends on it
            pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * rotations[0]).flatten(-2).to(x.dtype)
        cos, sin = rotations
        first, second = (x[..., 0::2], x[..., 1::2]) if self.pairs_adjacent else x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
