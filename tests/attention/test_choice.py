"""Which attention kernel a device gets, and what is said about it."""

import pytest

from kvmanager.attention.choice import choose_kernel
from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.options import PIECE_TOKENS_MULTIPLE, Options, piece_tokens
from kvmanager.errors import InvalidValue


@pytest.mark.parametrize("rank,rope", [(512, 64), (448, 64), (256, 32), (128, 16), (80, 48)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("version", ["3.6.0", "3.6.1+git12", "3.9.0"])
def test_hopper_cards_get_the_hopper_kernel(rank: int, rope: int, dtype: str, version: str) -> None:
    assert choose_kernel(LatentLayout(rank, rope, 1, 16, dtype), 90, version).kernel == "hopper"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "layout,arch,version,word",
    [
        (LatentLayout(512, 64, 1), 80, "3.6.0", "sm_80"),
        (LatentLayout(512, 64, 1), 100, "3.6.0", "sm_100"),
        (LatentLayout(512, 64, 1, dtype="float32"), 90, "3.6.0", "float32"),
        (LatentLayout(512, 64, 1, dtype="fp8_ds_mla"), 90, "3.6.0", "128 heads"),
        (LatentLayout(512, 32, 1, dtype="float8_e4m3fn", scales=(1.0,)), 90, "3.6.0", "512 + 32"),
        (LatentLayout(512, 64, 1, dtype="fp8_ds_mla"), 100, "3.6.0", "sm_100"),
        (LatentLayout(512, 64, 1, dtype="float8_e4m3fn", scales=(1.0,)), 89, "3.6.0", "sm_89"),
        (LatentLayout(576, 64, 1), 90, "3.6.0", "576"),
        (LatentLayout(64, 64, 1), 90, "3.6.0", "64"),
        (LatentLayout(512, 128, 1), 90, "3.6.0", "128"),
        (LatentLayout(512, 64, 1), 90, "3.5.1", "3.5.1"),
        (LatentLayout(512, 64, 1), 90, "3.10.0", "3.10.0"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_all_else_gets_the_plain_kernel_and_the_reason(layout: LatentLayout, arch: int, version: str, word: str) -> None:
    choice = choose_kernel(layout, arch, version)
    assert choice.kernel == "triton" and word in choice.why


@pytest.mark.parametrize(
    "layout", [LatentLayout(512, 64, 1, dtype="fp8_ds_mla"), LatentLayout(64, 32, 1, dtype="float8_e4m3fn", scales=(1.0,))]
)
def test_eight_bits_are_refused_where_nothing_converts_them(layout: LatentLayout) -> None:
    with pytest.raises(InvalidValue, match="sm_86"):
        choose_kernel(layout, 86, "3.6.0")


@pytest.mark.parametrize("options", [Options(logit_soft_cap=30.0), Options(sliding_window=64)], ids=str)
def test_options_that_the_hopper_kernel_lacks_get_the_plain_one_by_name(options: Options) -> None:
    choice = choose_kernel(LatentLayout(512, 64, 1), 90, "3.6.0", options)
    assert choice.kernel == "triton" and choice.why.split(":")[0] in ("logit_soft_cap", "sliding_window")
    assert choose_kernel(LatentLayout(512, 64, 1), 90, "3.6.0", Options(batch_invariant=True, has_sink=True)).kernel == "hopper"


def test_default_pieces_depend_on_heads_alone_and_fit_every_tile() -> None:
    """Pieces must be whole tiles of whichever kernel runs them: pairs of 64 or 128 latents on Hopper, 16 to 64 in the plain one."""
    assert piece_tokens(Options(), 128) == 0
    for heads in (1, 16, 17, 64, 65, 1024):
        assert piece_tokens(Options(batch_invariant=True), heads) % PIECE_TOKENS_MULTIPLE == 0
        assert piece_tokens(Options(batch_invariant=True, invariant_tokens=768), heads) == 768


@pytest.mark.parametrize(
    "layout", [LatentLayout(512, 64, 1, 16, "fp8_ds_mla"), LatentLayout(512, 64, 1, 16, "float8_e4m3fn", scales=(1.0,))]
)
def test_hopper_cards_get_the_hopper_kernel_of_eight_bits_for_few_heads(layout: LatentLayout) -> None:
    for options in (Options(batch_invariant=True), Options(has_sink=True), Options(sliding_window=8), Options(logit_soft_cap=1.0)):
        assert choose_kernel(layout, 90, "3.6.0", options, 16).kernel == "triton"
    for heads in (1, 16, 33, 64):
        assert choose_kernel(layout, 90, "3.6.0", None, heads).kernel == "hopper_fp8"
    assert "3.5.0" in choose_kernel(layout, 90, "3.5.0", None, 16).why and choose_kernel(layout, 90, "3.5.0", None, 16).kernel == "triton"
    assert choose_kernel(layout, 90, "3.6.0", None, 65) == choose_kernel(layout, 90, "3.6.0")._replace(
        why=choose_kernel(layout, 90, "3.6.0", None, 65).why
    )
