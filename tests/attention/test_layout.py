import dataclasses
import subprocess
import sys

import pytest

from kvmanager.attention.layout import LatentLayout
from kvmanager.errors import InvalidValue


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
        ("dtype", "fp8"), ("dtype", None), ("rope_order", "neox"), ("rope_order", ["half"]),
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
    assert base.fingerprint == "6b53443ea49576bc"  # golden: peers of other versions compare it


def test_layout_costs_no_torch() -> None:
    """The control plane reads layouts; it must start without torch or triton."""
    code = (
        "import sys; from kvmanager.attention import LatentLayout; LatentLayout(512, 64, 61); print({'torch', 'triton'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
