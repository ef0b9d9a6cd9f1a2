"""Eight-bit latents on the device: the bytes that the CPU writes, and attention over them against the float64 reference."""

import pytest
import torch
from torch import Tensor

from kvmanager.attention import reference, torch_path
from kvmanager.attention.backend import MLABackend
from kvmanager.attention.compare import Problem, assert_close, check_attention, make_problem
from kvmanager.attention.layout import LatentLayout
from kvmanager.kernels.latent_formats import view_pages
from kvmanager.kernels.latent_write import FEW_TOKENS, Projection, write_latent, write_projection, write_quantised

FP8 = torch.float8_e4m3fn
SCALE = 0.03
OVERLAP = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def layouts(page_size: int) -> list[LatentLayout]:
    return [
        LatentLayout(512, 64, 3, page_size, "fp8_ds_mla"),
        LatentLayout(512, 64, 3, page_size, "float8_e4m3fn", scales=(0.002, 0.0013, 0.003)),
        LatentLayout(256, 32, 2, page_size, "float8_e4m3fn", scales=(0.002,)),
        LatentLayout(80, 48, 2, page_size, "float8_e4m3fn", scales=(0.002,)),
    ]


def backend_for(problem: Problem) -> MLABackend:
    return MLABackend(problem.memory, problem.q.shape[2], problem.scale, max_tokens=4096, max_batch=128, max_pages=16384)


def pool_on(device: str, dtype: torch.dtype, width: int, page_size: int) -> tuple[Tensor, Tensor]:
    whole = torch.full((42, 3, page_size, width), 7, dtype=torch.uint8, device=device)
    whole = whole.view(dtype) if dtype.itemsize == 1 else whole.to(dtype)
    return whole, whole[1:-1, 1]


def as_bytes(pages: Tensor) -> Tensor:
    return pages.cpu().contiguous().view(torch.uint8)


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("page_size", [16, 48, 128])
@pytest.mark.parametrize("dtype,rank,rope", [(torch.uint8, 512, 64), (FP8, 512, 64), (FP8, 80, 48)])
def test_quantised_write_gives_the_bytes_of_the_cpu_and_touches_nothing_else(
    dtype: torch.dtype, rank: int, rope: int, page_size: int, source: torch.dtype
) -> None:
    """NaN, infinities, subnormals and zeros among them; canary pages; slots -1, -64, num_slots, 2**31 and 2**62 are dropped."""
    width = 656 if dtype == torch.uint8 else rank + rope
    slots = torch.randperm(40 * page_size)[:300]
    slots[[0, 7, 50, 90, 299]] = torch.tensor([-1, -64, 40 * page_size, 2**31, 2**62])
    latent = (torch.randn((300, 2, rank + rope)) * torch.logspace(-6, 2, 300)[:, None, None]).to(source)[:, 1]
    latent[3], latent[4, ::7], latent[5, 3], latent[6, 5] = 0.0, float("nan"), float("inf"), -float("inf")
    (want, want_pages), (got, got_pages) = (pool_on(device, dtype, width, page_size) for device in ("cpu", "cuda"))
    torch_path.write_latent(latent, slots, want_pages, SCALE)
    write_quantised(latent.cuda(), slots.cuda(), view_pages(got_pages, rank, SCALE))
    got_bytes, want_bytes = as_bytes(got), as_bytes(want)
    if dtype == torch.uint8:  # which of bfloat16's many NaN is stored is the device's choice
        for stored in (got_bytes, want_bytes):
            k_pe = stored[..., 528:].view(torch.bfloat16)
            k_pe[torch.isnan(k_pe)] = float("nan")
    assert torch.equal(got_bytes, want_bytes)


@pytest.mark.skipif(not OVERLAP, reason="programmatic dependent launch needs sm_90")
@pytest.mark.parametrize("num_tokens", [3, 300, 3000])
def test_overlapped_write_waits_for_what_was_launched_before_it(num_tokens: int) -> None:
    """Each write reads what the kernel before it has just put there: latents, slots; eager and in a graph, 50 times over."""
    latent, slots = torch.zeros((num_tokens, 576), device="cuda").bfloat16(), torch.zeros(num_tokens, dtype=torch.int64, device="cuda")
    pages, back = torch.zeros((100, 64, 576), device="cuda").bfloat16(), torch.empty((num_tokens, 576), device="cuda").bfloat16()
    orders = [torch.randperm(6400, device="cuda")[:num_tokens] for _ in range(50)]
    sums = torch.zeros(50, device="cuda")

    def steps() -> None:
        for index, order in enumerate(orders):
            slots.copy_(order)
            latent.fill_(index + 1)
            write_latent(latent, slots, pages, 512, overlap=True)
            write_latent(latent * 2, slots, pages, 512, overlap=True)
            torch.index_select(pages.flatten(0, 1), 0, order, out=back)
            torch.sum(back, (0, 1), dtype=torch.float32, out=sums[index])

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    want = torch.arange(1, 51, device="cuda") * 2.0 * num_tokens * 576
    with torch.cuda.stream(stream):
        steps()
        assert torch.equal(sums, want)
        with torch.cuda.graph(graph, stream=stream):
            steps()
        for _ in range(20):
            sums.zero_()
            graph.replay()
            assert torch.equal(sums, want)


@pytest.mark.parametrize("source_order,target_order", [("interleaved", "interleaved"), ("interleaved", "half"), ("half", "half")])
@pytest.mark.parametrize(
    "dtype,source,rank,rope",
    [
        (torch.bfloat16, torch.bfloat16, 512, 64), (torch.float16, torch.float16, 256, 32), (torch.float32, torch.float32, 80, 48),
        (FP8, torch.bfloat16, 512, 64), (torch.uint8, torch.bfloat16, 512, 64), (torch.uint8, torch.float16, 512, 64),
    ],
)  # fmt: skip
def test_projection_equals_float64(
    dtype: torch.dtype, source: torch.dtype, rank: int, rope: int, source_order: str, target_order: str
) -> None:
    """Norm, rotation, rounding and write in one launch; other slots and canaries untouched."""
    raw = (torch.randn((300, rank + rope + 64)) * 2).to(source)[:, 32:-32]
    weight, angle = 1 + 0.1 * torch.randn(rank), torch.rand((5000, rope // 2)) * 6
    cos_sin, positions = torch.cat([angle.cos(), angle.sin()], 1), torch.randint(0, 5000, (300,))
    whole, pages = pool_on("cuda", dtype, 656 if dtype == torch.uint8 else rank + rope, 64)
    before = whole.clone()
    slots = torch.randperm(40 * 64)[:300]
    slots[[0, 7]] = torch.tensor([-1, 2**31])
    projection = Projection(weight.cuda(), 1e-6, cos_sin.cuda(), positions.cuda(), source_order, target_order)
    write_projection(raw.cuda(), slots.cuda(), view_pages(pages, rank, SCALE), projection)
    kept = (slots >= 0) & (slots < 40 * 64)
    want = reference.project(raw, weight, 1e-6, cos_sin, positions, source_order, target_order)[kept]
    got = reference.read_latent(reference.select(pages, slots[kept].cuda()), rank, SCALE if dtype == FP8 else 1.0).cpu()
    step = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-8}.get(dtype, 2**-4 + 2**-8)
    least = {FP8: SCALE * 2**-9, torch.uint8: 2**-4 * 2.0**-9}.get(dtype, 1e-5)
    assert ((got - want).abs() <= step * want.abs() + least).all()
    untouched = torch.ones_like(whole[..., 0], dtype=torch.bool)
    untouched[(1 + slots[kept] // 64).cuda(), 1, (slots[kept] % 64).cuda()] = False
    assert torch.equal(as_bytes(whole)[untouched.cpu()], as_bytes(before)[untouched.cpu()])


@pytest.mark.parametrize("rank,rope", [(512, 64), (256, 32), (80, 48)])
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32])
def test_row_from_the_projection_gets_the_same_bytes_alone_and_among_thousands(source: torch.dtype, rank: int, rope: int) -> None:
    """A norm's sum has one order, whatever the number of tokens makes of the launch; overlapped with the one before or not."""
    raw = (torch.randn((FEW_TOKENS + 37, rank + rope), device="cuda") * 2).to(source)
    weight, angle = 1 + 0.1 * torch.randn(rank, device="cuda"), torch.rand((5000, rope // 2), device="cuda") * 6
    cos_sin, positions = torch.cat([angle.cos(), angle.sin()], 1), torch.randint(0, 5000, (len(raw),), device="cuda")
    slots = torch.arange(len(raw), device="cuda")
    formats = (source, FP8, torch.uint8) if rank == 512 and source != torch.float32 else (source, FP8)
    for dtype in formats:
        written = []
        for step, overlap in ((len(raw), False), (1, False), (500, OVERLAP), (7, OVERLAP)):
            _, pages = pool_on("cuda", dtype, 656 if dtype == torch.uint8 else rank + rope, 64)
            for first in range(0, len(raw), step):
                part = slice(first, first + step)
                projection = Projection(weight, 1e-6, cos_sin, positions[part], "interleaved", "half")
                write_projection(raw[part], slots[part], view_pages(pages, rank, SCALE), projection, overlap)
            written.append(as_bytes(pages))
        assert all(torch.equal(written[0], other) for other in written[1:])


@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("which", range(4))
def test_step_equals_the_reference_of_what_the_bytes_mean(which: int, page_size: int) -> None:
    """Ragged decode rows around a page's edges, prefill of whole prompts and later chunks, 1 to 128 heads."""
    layout = layouts(page_size)[which]
    lengths = [1, 0, page_size - 1, page_size, page_size + 1, 777, 5000, 2, 65, 300, 1500]
    query_lens = [1] * 7 + [2, 65, 33, 4]
    for heads in (1, 16, 17, 63, 128) if page_size == 64 else (16, 40):
        problem = make_problem(layout, lengths, query_lens, heads, "cuda", seed=heads + page_size)
        backend = backend_for(problem)
        plan = backend.plan(problem.tables, problem.query_lens)
        for layer in range(layout.num_layers):
            backend.write(plan, layer, problem.latent[layer])
            out, lse = backend.decode(plan, layer, problem.q[layer, : plan.num_decode])
            more_out, more_lse = backend.prefill(plan, layer, problem.q[layer, plan.num_decode :])
            check_attention(problem, layer, torch.cat([out, more_out]), torch.cat([lse, more_lse]))
        assert (
            backend.kernel == ("hopper_fp8" if layout.kv_lora_rank == 512 and heads <= 64 and HOPPER else "triton")
            and layout.dtype in backend.why
        )


@pytest.mark.parametrize(
    "layout", [LatentLayout(512, 64, 2, 64), *layouts(64)], ids=lambda layout: f"{layout.dtype}-D{layout.kv_lora_rank}"
)
def test_selected_slots_equal_the_reference(layout: LatentLayout) -> None:
    """Few tokens, whose lists are cut, and many; heads 1 to 128; padding, slots out of range, an empty list, NaN in all other slots."""
    for tokens, heads, topk in ((3, 16, 2048), (120, 16, 300), (2, 128, 2048), (100, 128, 64), (5, 1, 1), (4, 65, 1000)):
        problem = make_problem(layout, [1000] * tokens, [1] * tokens, heads, "cuda", seed=heads, written=True)
        read = (~problem.unread).flatten().nonzero().flatten()
        lists = read[torch.randint(0, len(read), (tokens, topk))].int()
        lists[torch.rand(lists.shape) < 0.2] = -1
        lists[0, 0], lists[-1, -1] = problem.unread.numel(), -64
        lists[1] = -1
        backend = backend_for(problem)
        plan = backend.plan(problem.tables, problem.query_lens)
        out, lse = backend.attend_selected(plan, 1, problem.q[1], lists.cuda())
        pages, rank = problem.memory.layer(1), layout.kv_lora_rank
        for token in range(tokens) if tokens < 10 else (0, 1, 7, tokens - 1):
            latent = reference.read_latent(reference.select(pages, lists[token].cuda()), rank, layout.scale_of(1))
            want = reference.attend(problem.q[1, token : token + 1], latent, rank, problem.scale, causal=False)
            assert_close(out[token : token + 1], lse[token : token + 1], *want)
        again, again_lse = backend.attend_selected(plan, 1, problem.q[1], lists.cuda())
        assert torch.equal(out, again) and torch.equal(lse, again_lse)


def test_raw_write_and_selection_are_captured_and_never_wait_for_the_device() -> None:
    """One graph, replayed with other contents: the same bits as eager; torch raises on any synchronising call."""
    layout = LatentLayout(512, 64, 2, 64, "fp8_ds_mla")
    problem = make_problem(layout, [70, 3000, 1], [1, 1, 1], 16, "cuda", seed=4)
    backend = backend_for(problem)
    plan = backend.plan(problem.tables, problem.query_lens, graph_batch=4)
    raw = torch.randn((4, 576), device="cuda").bfloat16()
    q, weight = torch.randn((4, 16, 576), device="cuda").bfloat16(), torch.ones(512, device="cuda").bfloat16()
    cos_sin, positions = torch.randn((4000, 64), device="cuda"), torch.tensor([69, 2999, 0, 0], device="cuda")
    lists = torch.randint(-1, 3000, (4, 256), device="cuda", dtype=torch.int32)
    problem.memory.pages.zero_()

    def step() -> tuple[Tensor, Tensor]:
        backend.write_raw(plan, 1, raw, weight, 1e-6, cos_sin, positions)
        return backend.attend_selected(plan, 1, q, lists)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.graph(graph, stream=stream):
                out, lse = step()
            for _ in range(5):
                raw.normal_()
                lists.random_(-1, 3000)
                graph.replay()
                kept, kept_lse = out.clone(), lse.clone()
                eager, eager_lse = step()
                same = (kept == eager).all() & (kept_lse == eager_lse).all()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert bool(same)
