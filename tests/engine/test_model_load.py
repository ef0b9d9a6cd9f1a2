"""Loading a checkpoint: every way a directory can be wrong gives InvalidValue that names file and field, before a token is computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file, save_file

from kvmanager.errors import InvalidValue
from kvmanager.examples.engine.checkpoint import make_checkpoint, make_prompts
from kvmanager.examples.engine.model import LatentModel
from kvmanager.examples.engine.oracle import Reference, SingleProcess, generate_reference, reference_cache

REMOVED = object()


@pytest.fixture
def copy(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint that a test may spoil."""
    return Path(shutil.copytree(checkpoint(), tmp_path / "copy"))


def edit_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config.update(changes)
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not REMOVED}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "llama"),
        ("model_type", REMOVED),
        ("kv_lora_rank", REMOVED),
        ("kv_lora_rank", "128"),
        ("kv_lora_rank", 100),
        ("qk_rope_head_dim", 40),
        ("num_hidden_layers", 0),
        ("num_attention_heads", True),
        ("v_head_dim", None),
        ("q_lora_rank", REMOVED),
        ("q_lora_rank", -5),
        ("quantization_config", {"quant_method": "fp8"}),
        ("rope_parameters", [1]),
        ("rope_parameters.rope_type", {"rope_type": "dynamic", "factor": 2.0}),
        ("rope_parameters.factor", {"rope_type": "yarn", "rope_theta": 10000.0}),
    ],
    ids=lambda value: "removed" if value is REMOVED else None,
)
def test_a_wrong_config_names_file_and_field(field, value, copy):
    edit_config(copy, **{field.split(".")[0]: value})
    with pytest.raises(InvalidValue) as caught:
        LatentModel.load(copy)
    assert caught.value.field == f"{copy / 'config.json'}: {field}"


@pytest.mark.parametrize("text", [b"", b"{", b"[1, 2]", b"\xff\xfe{}"], ids=["empty", "cut", "list", "not_utf8"])
def test_a_config_that_is_not_a_json_object_names_the_file(text, copy):
    (copy / "config.json").write_bytes(text)
    with pytest.raises(InvalidValue) as caught:
        LatentModel.load(copy)
    assert caught.value.field == str(copy / "config.json")


def test_a_directory_without_config_is_no_checkpoint(tmp_path):
    for directory in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InvalidValue, match="checkpoint directory") as caught:
            LatentModel.load(directory)
        assert caught.value.field == str(directory / "config.json")


def test_a_missing_tensor_is_named_and_not_drawn_at_random(copy):
    """transformers warns and goes on with random numbers."""
    file = copy / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.2.self_attn.kv_b_proj.weight"
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InvalidValue) as caught:
        LatentModel.load(copy)
    assert caught.value.field == f"{copy}: {name}"


def test_weights_that_do_not_fit_or_cannot_be_read_are_refused(copy):
    file = copy / "model.safetensors"
    edit_config(copy, kv_lora_rank=256)
    with pytest.raises(InvalidValue, match="loadable checkpoint"):
        LatentModel.load(copy)
    edit_config(copy, kv_lora_rank=128)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InvalidValue, match="loadable checkpoint"):
        LatentModel.load(copy)
    file.unlink()
    with pytest.raises(InvalidValue, match="loadable checkpoint"):
        LatentModel.load(copy)


def test_a_dtype_that_pages_cannot_hold_is_refused(checkpoint):
    with pytest.raises(InvalidValue, match="dtype"):
        LatentModel.load(checkpoint(), dtype=torch.float64)


def test_a_config_in_the_form_deepseek_published_loads_the_same_model(copy, reference, prompts):
    """rope_scaling with `type`, rope_theta beside it, no rope_interleave, fields that transformers doesn't know."""
    config = json.loads((copy / "config.json").read_text())
    scaling = dict(config["rope_parameters"])
    theta = scaling.pop("rope_theta")
    scaling["type"] = scaling.pop("rope_type")
    edit_config(
        copy,
        rope_parameters=REMOVED,
        rope_interleave=REMOVED,
        rope_scaling=scaling,
        rope_theta=theta,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        moe_layer_freq=1,
    )
    process = SingleProcess(LatentModel.load(copy), 16, 8)
    assert process.model.softmax_scale == reference().model.model.layers[0].self_attn.scaling
    assert process.generate(prompts[3], 16).tokens == reference().generate([prompts[3]], 16)[0]
    process.close()


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2"])
def test_layout_names_the_rotation_order(family, checkpoint):
    """V3's and V2's bytes differ for equal weights: the fingerprint must differ too."""
    layout = LatentModel.load(checkpoint(family=family), dtype=torch.bfloat16).layout(32)
    assert (layout.kv_lora_rank, layout.qk_rope_head_dim, layout.num_layers, layout.page_size) == (128, 32, 4, 32)
    assert (layout.dtype, layout.rope_order) == ("bfloat16", "half" if family == "deepseek_v3" else "interleaved")


def test_layout_refuses_a_page_size_that_kernels_cannot_use(checkpoint):
    with pytest.raises(InvalidValue, match="page_size"):
        LatentModel.load(checkpoint()).layout(20)


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2"])
def test_a_seed_names_a_checkpoint(family, tmp_path):
    """The same seed writes the same bytes, another seed others."""
    first, again, other = (make_checkpoint(tmp_path / name, seed, family) for name, seed in (("a", 5), ("b", 5), ("c", 6)))
    for file in ("model.safetensors", "config.json"):
        assert (first / file).read_bytes() == (again / file).read_bytes()
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_a_checkpoint_has_the_features_of_the_real_models(checkpoint):
    tensors = load_file(checkpoint() / "model.safetensors")
    prefix = "model.layers.1.mlp."
    assert tensors[prefix + "gate.e_score_correction_bias"].abs().min() > 0
    assert prefix + "shared_experts.up_proj.weight" in tensors
    assert "model.layers.0.mlp.up_proj.weight" in tensors  # the first layer is dense
    assert 0.15 < float(tensors["model.layers.0.self_attn.kv_a_layernorm.weight"].std()) < 0.25
    assert 0.07 < float(tensors["model.layers.0.self_attn.kv_b_proj.weight"].std()) < 0.09


def test_make_checkpoint_refuses_what_it_does_not_know(tmp_path):
    with pytest.raises(InvalidValue, match="family"):
        make_checkpoint(tmp_path, family="gpt")
    with pytest.raises(InvalidValue, match=r"overrides\.kv_rank"):
        make_checkpoint(tmp_path, kv_rank=64)


def test_prompts_share_what_they_say():
    prompts = make_prompts(seed=3, vocab=512, count=12, sharing=8, prefix=100)
    shared = [prompt for prompt in prompts if len(prompt) > 100 and prompt[:100] == prompts[1][:100]]
    others = [prompt for prompt in prompts if prompt not in shared]
    assert (len(shared), len(others)) == (8, 4)
    assert all(prompt[0] != shared[0][0] for prompt in others)
    assert min(len(prompt) for prompt in prompts) == 1
    assert len({len(prompt) for prompt in prompts}) == 12
    assert prompts == make_prompts(seed=3, vocab=512, count=12, sharing=8, prefix=100)
    assert prompts != make_prompts(seed=4, vocab=512, count=12, sharing=8, prefix=100)
    with pytest.raises(InvalidValue, match="sharing"):
        make_prompts(count=3, sharing=4)


def test_reference_ignores_an_end_token_and_sampling_of_the_checkpoint(copy, expected, prompts):
    """The demo counts tokens: a user's checkpoint must neither end a request early nor sample."""
    want = expected()[3]
    edit_config(copy, eos_token_id=want[3])
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [want[3], want[5]], "do_sample": True, "temperature": 9.0}))
    assert Reference(copy).generate([prompts[3]], len(want)) == [want]


def test_one_line_forms_of_the_oracle(checkpoint, reference, expected, prompts):
    assert generate_reference(checkpoint(), prompts[:2], 32) == expected()[:2]
    assert torch.equal(reference_cache(checkpoint(), prompts[1]), reference().cache(prompts[1]))
