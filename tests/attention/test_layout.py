import dataclasses
import subprocess
import sys

import pytest

from kvmanager.attention.layout import LatentLayout
from kvmanager.errors import InvalidValue
from kvmanager.pages.layouts import LayoutText


def test_sizes_of_deepseek_v3() -> None:
    """A page of 64 tokens in all 61 layers is one run of 4.5 MB."""
    layout = LatentLayout(512, 64, 61)
    assert (layout.entry, layout.slot_bytes, layout.page_bytes) == (576, 1152, 64 * 61 * 1152)
    assert LatentLayout(512, 64, 61, dtype="float32").slot_bytes == 2304


@pytest.mark.parametrize(
    "field,value",
    [
        ("page_size", 20), ("page_size", 0), ("page_size", 144), ("page_size", 64.0), ("kv_lora_rank", 500), ("kv_lora_rank", 1040),
        ("kv_lora_rank", True), ("qk_rope_head_dim", 0), ("qk_rope_head_dim", 272), ("num_layers", 0), ("num_layers", 1025),
        ("dtype", "fp8"), ("dtype", None), ("dtype", "float8_e5m2"), ("scales", (1.0,)), ("scales", None), ("scales", 1.0), ("rope_order", "neox"), ("rope_order", ["half"]),
    ],
)  # fmt: skip
def test_wrong_value_is_named_with_its_limit(field: str, value: object) -> None:
    """`page_size: expected a multiple of 16 from 16 to 128, got 20`, before anything is allocated."""
    with pytest.raises(InvalidValue, match=f"^{field}: expected .*got ") as caught:
        dataclasses.replace(LatentLayout(512, 64, 61), **{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field


def test_fingerprint_changes_with_every_field() -> None:
    """Anything that changes what the bytes mean, the rotation order included, keeps two memories apart."""
    base = LatentLayout(512, 64, 61)
    others = [
        dataclasses.replace(base, **change)
        for change in (
            {"kv_lora_rank": 256},
            {"qk_rope_head_dim": 32},
            {"num_layers": 60},
            {"page_size": 32},
            {"dtype": "float16"},
            {"rope_order": "half"},
        )
    ]
    assert len({layout.fingerprint for layout in [base, *others]}) == 7
    # Pages of another size hold the same slots, and another format the same latents.
    assert len({layout.content_fingerprint for layout in [base, *others]}) == 5
    assert base.fingerprint == "a37815e2d560fdec:bfloat16/p64"  # golden: peers of other versions compare it


def test_sizes_of_the_eight_bit_formats() -> None:
    """656 bytes a token, FlashMLA's and vLLM's figure; per tensor 576. A page is still one run of bytes."""
    mixed = LatentLayout(512, 64, 61, dtype="fp8_ds_mla")
    assert (mixed.entry, mixed.storage_width, mixed.storage_dtype, mixed.slot_bytes) == (576, 656, "uint8", 656)
    assert mixed.page_bytes == 61 * 64 * 656 and mixed.value_dtype == "bfloat16" and mixed.is_fp8
    plain = LatentLayout(256, 32, 2, dtype="float8_e4m3fn", scales=(0.5, 2))
    assert (plain.storage_width, plain.storage_dtype, plain.slot_bytes, plain.value_dtype) == (288, "float8_e4m3fn", 288, "bfloat16")
    assert [plain.scale_of(layer) for layer in (0, 1)] == [0.5, 2.0]
    assert LatentLayout(256, 32, 2, dtype="float8_e4m3fn", scales=(0.5,)).scale_of(1) == 0.5
    assert LatentLayout(256, 32, 2).scale_of(1) == 1.0


@pytest.mark.parametrize(
    "field,change",
    [
        ("dtype", {"dtype": "fp8_ds_mla", "kv_lora_rank": 256}),
        ("dtype", {"dtype": "fp8_ds_mla", "qk_rope_head_dim": 32}),
        ("scales", {"dtype": "fp8_ds_mla", "scales": (1.0,)}),
        ("scales", {"dtype": "float8_e4m3fn"}),
        ("scales", {"dtype": "float8_e4m3fn", "scales": (1.0, 1.0)}),
        ("scales", {"dtype": "float8_e4m3fn", "scales": [1.0]}),
        *(("scales", {"dtype": "float8_e4m3fn", "scales": (bad,)}) for bad in (0.0, -1.0, float("nan"), float("inf"), 2.0**61, True, "1")),
    ],
)
def test_formats_and_scales_that_do_not_go_together_are_named(field: str, change: dict[str, object]) -> None:
    """A scale where the format has none, none where it needs one, dimensions that the 656 bytes don't hold."""
    with pytest.raises(InvalidValue) as caught:
        dataclasses.replace(LatentLayout(512, 64, 61), **change)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_fingerprint_knows_the_format_and_each_scale() -> None:
    """Latents under another scale are other numbers; one scale for all layers and the same one by layer are compared as they are written."""
    base = LatentLayout(512, 64, 2)
    fp8 = [dataclasses.replace(base, dtype="float8_e4m3fn", scales=scales) for scales in ((1.0,), (0.5,), (1.0, 0.5), (0.5, 1.0))]
    layouts = [base, dataclasses.replace(base, dtype="fp8_ds_mla"), *fp8]
    assert len({layout.fingerprint for layout in layouts}) == len({layout.format for layout in layouts}) == 6


def test_what_workers_join_with_says_what_their_pages_are_made_from() -> None:
    """And fits what a command carries: 64 characters, for the longest there is."""
    base = LatentLayout(512, 64, 2, 128)
    content = base.content_fingerprint
    e4m3 = dataclasses.replace(base, dtype="float8_e4m3fn", scales=(1.0, 0.5))
    assert LayoutText.of(base.fingerprint) == (content, "bfloat16", "p128", ())
    assert LayoutText.of(e4m3.fingerprint) == (content, e4m3.format, "p128", ("bfloat16",))
    assert dataclasses.replace(base, dtype="fp8_ds_mla").fingerprint == f"{content}:fp8_ds_mla/p128<bfloat16"
    assert len(e4m3.fingerprint) <= 64


def test_layout_costs_no_torch() -> None:
    """The control plane reads layouts; it must start without torch or triton."""
    code = (
        "import sys; from kvmanager.attention import LatentLayout; LatentLayout(512, 64, 61); print({'torch', 'triton'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
