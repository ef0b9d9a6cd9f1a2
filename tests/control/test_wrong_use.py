"""Wrong use gets a typed error that names the field and the limit, costs nobody else anything, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmanager.config import ManagerConfig, PoolConfig, config_from_mapping
from kvmanager.errors import Fenced, InvalidValue, KVError, LayoutMismatch, PoolNotReady, SequenceTooLarge, TooMany, Unknown, WrongState
from kvmanager.machine.command_wire import command_from_wire, command_to_wire
from kvmanager.machine.commands import Ack, Join, Open, Step
from tests.control.conftest import Rig, tokens

MakeRig = Callable[[ManagerConfig], Rig]
CONFIG = ManagerConfig(
    pools=(PoolConfig("A", 8, page_size=16), PoolConfig("B", 4, page_size=16), PoolConfig("C", 4, page_size=32)),
    sequences_max=4,
    sequence_tokens_max=200,
    batch_max=8,
    workers_max=4,
    handoffs_max=1,
)


# --- configuration ---


@pytest.mark.parametrize("page_size", [0, 1025, -16, 64.0, "64", None, True, [16]])
def test_page_size_is_any_int_up_to_1024(page_size: Any) -> None:
    """The manager only counts slots; the layout checks what kernels take."""
    assert [PoolConfig("A", 8, page_size=good).page_size for good in (1, 20, 1024)] == [1, 20, 1024]
    with pytest.raises(InvalidValue, match=r"pool.page_size: expected an int in 1..1024, got"):
        PoolConfig("A", 8, page_size=page_size)


@pytest.mark.parametrize(
    ("values", "field", "limit"),
    [
        ([], "config", "a table"),
        ({}, "config.pools", "at least one"),
        ({"pools": []}, "config.pools", "at least one"),
        ({"pools": {"name": "A"}}, "config.pools", "a list"),
        ({"pools": ["A"]}, "config.pools[0]", "a table"),
        ({"pools": [{"name": "A", "num_pages": 8}, {"name": "A"}]}, "config.pools[1]", "num_pages"),
        ({"pools": [{"name": "A", "num_pages": 8, "pagesize": 64}]}, "config.pools[0].pagesize", "page_size"),
        ({"pools": [{"name": "A", "num_pages": 8, "page_size": 2000}]}, "config.pools[0]: pool.page_size", "an int in 1..1024"),
        ({"pools": [{"name": "A", "num_pages": 0}]}, "config.pools[0]: pool.num_pages", "1..2147483647"),
        ({"pools": [{"name": "A", "num_pages": 2**31}]}, "config.pools[0]: pool.num_pages", "1..2147483647"),
        ({"pools": [{"name": "A", "num_pages": True}]}, "config.pools[0]: pool.num_pages", "1..2147483647"),
        ({"pools": [{"name": "", "num_pages": 8}]}, "config.pools[0]: pool.name", "1..64"),
        ({"pools": [{"name": "A\n", "num_pages": 8}]}, "config.pools[0]: pool.name", "printable"),
        ({"pools": [{"name": "A", "num_pages": 8}] * 2}, "config: pools", "distinct names"),
        ({"pools": [{"name": "A", "num_pages": 8}], "lease": 5}, "config.lease", "lease_ms"),
        ({"pools": [{"name": "A", "num_pages": 8}], "lease_ms": 5}, "config: lease_ms", "10..86400000"),
        ({"pools": [{"name": "A", "num_pages": 8}], "sequences_max": 0}, "config: sequences_max", "1..1048576"),
        ({"pools": [{"name": "A", "num_pages": 8}], "message_bytes_max": "64M"}, "config: message_bytes_max", "4096.."),
    ],
)
def test_bad_config_names_table_key_and_limit(values: Any, field: str, limit: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        config_from_mapping(values)
    assert caught.value.field == field
    assert limit in str(caught.value)


@pytest.mark.parametrize("pools", [(), [PoolConfig("A", 8)], ("A",), None])
def test_config_takes_a_tuple_of_pools(pools: Any) -> None:
    with pytest.raises(InvalidValue, match=r"^pools: expected"):
        ManagerConfig(pools=pools)


def test_good_config_is_read() -> None:
    config = config_from_mapping({"pools": [{"name": "A", "num_pages": 8, "page_size": 16}], "lease_ms": 50})
    assert config == ManagerConfig(pools=(PoolConfig("A", 8, page_size=16),), lease_ms=50)


# --- values that make no command ---


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ([-1], "-1"),
        ([0, 2**31], "2147483648"),
        ([2**63], "0..2147483647"),
        ([2**64], "0..2147483647"),
        ([1.0], "float"),
        (np.array([1.0]), "float64"),
        ([1, 2.5], "float"),
        ([True], "bool"),
        ([1, True], "bool"),
        (np.array([True]), "bool"),
        ([[1, 2], [3, 4]], "list"),
        ([[1], [2, 3]], "list"),
        (np.zeros((2, 2), np.int32), "2 dimensions"),
        (np.zeros((0, 3), np.int32), "2 dimensions"),
        (np.array(5), "0 dimensions"),
        (["1"], "str"),
        ([None], "NoneType"),
        ("123", "str"),
        (b"abc", "3 bytes"),
        (7, "int"),
        (None, "NoneType"),
        ({1: 2}, "dict"),
        ([], "none"),
        (b"", "none"),
        (np.zeros(0), "none"),
    ],
    ids=repr,
)
def test_prompt_is_at_least_one_int32_token_id(make_rig: MakeRig, value: Any, shown: str) -> None:
    rig = make_rig(CONFIG)
    before = rig.kv.snapshot()
    with pytest.raises(InvalidValue, match=r"^open.tokens: expected .*int|token") as caught:
        rig.kv.open(value, "A")
    assert shown in str(caught.value)
    assert caught.value.details["field"] == "open.tokens"
    assert rig.kv.snapshot() == before


@pytest.mark.parametrize(
    "value", [[5, 0], (5, 0), np.array([5, 0], np.int64), np.array([5, 0], np.uint8), b"\5\0\0\0\0\0\0\0", range(5, 4, -1)]
)
def test_tokens_come_as_array_list_or_bytes(value: Any) -> None:
    made = Open(value, "A")
    assert made.tokens.dtype == np.int32
    assert made.tokens.tolist()[0] == 5


def test_commands_hold_a_copy_of_what_they_were_given() -> None:
    given_tokens, given_ids = tokens(3), np.array([1, 2])
    made = Step(opens=[Open(given_tokens, "A")], grow=given_ids)
    given_tokens[:], given_ids[:] = 99, 99
    assert made.opens[0].tokens.tolist() == [0, 1, 2] and made.grow.tolist() == [1, 2]


BAD_CALLS: list[tuple[str, Callable[[Rig, int], Any], type[KVError], str]] = [
    ("unknown-sequence", lambda rig, s: rig.kv.grow(s + (1 << 20)), Unknown, "sequence"),
    ("row-beyond-the-table", lambda rig, s: rig.kv.grow((1 << 20) - 1), Unknown, "sequence"),
    ("close-unknown", lambda rig, s: rig.kv.close(77), Unknown, "77"),
    ("append-to-unknown", lambda rig, s: rig.kv.append_tokens(77, [1]), Unknown, "77"),
    ("hand-off-unknown", lambda rig, s: rig.kv.hand_off(77, "B"), Unknown, "77"),
    ("hand-off-to-unknown-pool", lambda rig, s: rig.kv.hand_off(s, "Z"), Unknown, "pool: Z"),
    ("hand-off-to-itself", lambda rig, s: rig.kv.hand_off(s, "A"), InvalidValue, "a pool other than A"),
    ("hand-off-to-unknown-group", lambda rig, s: rig.kv.hand_off(s, group="Z"), Unknown, "group: Z"),
    ("drain-unknown-pool", lambda rig, s: rig.kv.drain("Z"), Unknown, "pool: Z"),
    ("drain-unknown-worker", lambda rig, s: rig.kv.drain(worker=99), Fenced, "99"),
    ("abort-unknown", lambda rig, s: rig.kv.abort(5), Unknown, "handoff: 5"),
    ("open-in-unknown-pool", lambda rig, s: rig.kv.open([1], "Z"), Unknown, "pool: Z"),
    ("grow-past-the-pool", lambda rig, s: rig.kv.grow(s, 128), SequenceTooLarge, "at most 8 pages, got a sequence of 9"),
    ("grow-past-the-limit", lambda rig, s: rig.kv.grow(s, 191), InvalidValue, "at most 200 tokens a sequence, got 201"),
    ("open-past-the-limit", lambda rig, s: rig.kv.open(tokens(201), "A"), InvalidValue, "at most 200 tokens, got 201"),
    ("open-past-the-pool", lambda rig, s: rig.kv.open(tokens(65), "B"), SequenceTooLarge, "at most 4 pages, got a sequence of 5"),
    ("append-past-the-limit", lambda rig, s: rig.kv.append_tokens(s, tokens(191)), InvalidValue, "at most 200 tokens a sequence, got 201"),
    ("join-unknown-pool", lambda rig, s: rig.kv.join("x", "Z", "bf16"), Unknown, "pool: Z"),
    ("join-a-full-pool", lambda rig, s: rig.kv.join("x", "A", "bf16"), WrongState, "at most 1 live workers"),
    ("gone-unknown", lambda rig, s: rig.kv.worker_gone(77), Unknown, "worker: 77"),
    ("ack-of-the-future", lambda rig, s: rig.kv.ack(rig.workers["A"][0], 10_000), InvalidValue, "ack.version"),
    (
        "ack-beyond-the-length",
        lambda rig, s: rig.kv.ack(rig.workers["A"][0], 1, ids=[s], tokens=[11]),
        InvalidValue,
        "at most the 10 tokens",
    ),
    ("grow-twice", lambda rig, s: rig.kv.step(grow=[s, s]), InvalidValue, "step.grow: expected each sequence once"),
    ("grow-by-none", lambda rig, s: rig.kv.grow(s, 0), InvalidValue, "step.grow_counts: expected ints in 1..16777216, got 0"),
    ("grow-by-less", lambda rig, s: rig.kv.grow(s, -5), InvalidValue, "step.grow_counts"),
    ("grow-by-half", lambda rig, s: rig.kv.grow(s, 0.5), InvalidValue, "step.grow_counts"),
    (
        "grow-counts-missing",
        lambda rig, s: rig.kv.step(grow=[s], grow_counts=[1, 2]),
        InvalidValue,
        "1 counts, one for each sequence, got 2",
    ),
    ("id-zero", lambda rig, s: rig.kv.grow(0), InvalidValue, "step.grow: expected ints in 1..9223372036854775807, got 0"),
    ("id-negative", lambda rig, s: rig.kv.close(-s), InvalidValue, "step.close"),
    ("id-true", lambda rig, s: rig.kv.close(True), InvalidValue, "step.close"),
    ("id-beyond-64-bits", lambda rig, s: rig.kv.close(2**63), InvalidValue, "step.close"),
    ("tokens-not-a-pair", lambda rig, s: rig.kv.step(tokens=[s]), InvalidValue, "step.tokens[0]: expected a pair"),
    ("tokens-negative", lambda rig, s: rig.kv.append_tokens(s, [-1]), InvalidValue, "step.tokens[0]"),
    ("hand-off-without-name", lambda rig, s: rig.kv.hand_off(s, ""), InvalidValue, "hand_off.pool"),
    ("hand-off-to-a-pool-and-a-group", lambda rig, s: rig.kv.hand_off(s, "B", group="default"), InvalidValue, "hand_off.group"),
    ("hand-off-reserve", lambda rig, s: rig.kv.hand_off(s, "B", reserve=1), InvalidValue, "hand_off.reserve"),
    ("drain-a-pool-and-a-worker", lambda rig, s: rig.kv.drain("A", worker=1), InvalidValue, "drain.worker"),
    ("drain-nothing", lambda rig, s: rig.kv.drain(), InvalidValue, "drain.pool"),
    ("opens-of-something-else", lambda rig, s: rig.kv.step(opens=[[1, 2]]), InvalidValue, "step.opens: expected Open objects"),
    ("opens-not-a-list", lambda rig, s: Step(opens=Open([1], "A")), InvalidValue, "step.opens: expected a list"),
    ("batch-too-long", lambda rig, s: rig.kv.step(grow=list(range(1, 10))), InvalidValue, "step.grow: expected at most 8 items, got 9"),
    ("chunk-negative", lambda rig, s: rig.kv.open([1], "A", chunk=-1), InvalidValue, "open.chunk"),
    ("chunk-true", lambda rig, s: rig.kv.open([1], "A", chunk=True), InvalidValue, "open.chunk"),
    ("tenant-too-long", lambda rig, s: rig.kv.open([1], "A", tenant=b"x" * 257), InvalidValue, "open.tenant: expected at most 256 bytes"),
    ("tenant-a-number", lambda rig, s: rig.kv.open([1], "A", tenant=5), InvalidValue, "open.tenant"),
    ("pool-a-number", lambda rig, s: rig.kv.open([1], 5), InvalidValue, "open.pool"),
    (
        "memory-too-long",
        lambda rig, s: rig.kv.join("x", "A", "bf16", memory=b"x" * 4097),
        InvalidValue,
        "join.memory: expected at most 4096",
    ),
    ("layout-empty", lambda rig, s: rig.kv.join("x", "A", ""), InvalidValue, "join.layout"),
    ("worker-negative", lambda rig, s: rig.kv.ack(-1, 0), InvalidValue, "ack.worker"),
    ("version-negative", lambda rig, s: rig.kv.ack(1, -1), InvalidValue, "ack.version"),
    ("ack-lengths-missing", lambda rig, s: rig.kv.ack(1, 0, ids=[s]), InvalidValue, "ack.tokens: expected 1 lengths"),
]


@pytest.mark.parametrize(("call", "error", "text"), [row[1:] for row in BAD_CALLS], ids=[row[0] for row in BAD_CALLS])
def test_wrong_call_raises_a_typed_error_and_changes_nothing(
    make_rig: MakeRig, call: Callable[[Rig, int], Any], error: type[KVError], text: str
) -> None:
    """A refused item still makes a version (the reply is part of the log), but no table, page, handoff or worker changes."""
    rig = make_rig(CONFIG)
    opened = rig.prefilled(tokens(10), "A")

    def books() -> tuple[Any, ...]:
        state = rig.state
        pools = [
            (
                pool.free.array().tolist(),
                pool.counts(),
                list(pool.publishable),
                [(q.version, q.pages.tolist()) for q in pool.quarantine.values()],
            )
            for pool in state.pools
        ]
        workers = [(each.worker_id, each.acked, each.deadline_ms, each.fenced) for each in state.workers.values()]
        written = [(each.written, bytes(each.tokens)) for each in state.sequences.values()]
        return state.tables.digest(), pools, workers, written, list(state.handoffs), state.free_slots, state.next_generation

    before = books()
    with pytest.raises(error) as caught:
        call(rig, opened.sequence)
    assert text in str(caught.value)
    assert type(caught.value) is error
    assert books() == before
    rig.kv.grow(opened.sequence)


def test_raised_error_is_not_even_logged(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    before = rig.kv.snapshot()
    for call in (lambda: rig.kv.join("x", "Z", "bf16"), lambda: rig.kv.ack(99, 0), lambda: rig.kv.step(grow=[5, 5])):
        with pytest.raises(KVError):
            call()
    assert rig.kv.snapshot() == before


def test_one_wrong_item_harms_no_other(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    good = rig.prefilled(tokens(10), "A").sequence
    reply = rig.kv.step(
        close=[777],
        abort=[5],
        tokens=[(777, [1]), (good, [50])],
        hand_off=[(good, "A"), (good, "B")],
        grow=[777, good],
        opens=[Open([1], "Z"), Open(tokens(300), "A"), Open([1, 2], "A", chunk=2)],
    )
    assert [(each.kind, each.index, each.error.code) for each in reply.refused] == [
        ("close", 0, "unknown"),
        ("abort", 0, "unknown"),
        ("tokens", 0, "unknown"),
        ("hand_off", 0, "invalid_value"),
        ("grow", 0, "unknown"),
        ("open", 0, "unknown"),
        ("open", 1, "invalid_value"),
    ]
    assert reply.handoffs[0] == 0 and reply.handoffs[1] > 0
    assert reply.opened[:2] == [None, None] and reply.opened[2].length == 2
    assert rig.length(good) == 11
    assert len(rig.state.sequences[good].tokens) == 4 * 11


def test_limit_of_known_tokens_counts_all_items_of_a_step(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    opened = rig.prefilled(tokens(10), "A")
    reply = rig.kv.step(tokens=[(opened.sequence, tokens(100)), (opened.sequence, tokens(100))])
    assert [(each.kind, each.index, each.error.code) for each in reply.refused] == [("tokens", 1, "invalid_value")]


def test_bounded_tables_say_that_they_are_full(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    opened = [rig.kv.open([each], "A", chunk=1).sequence for each in range(4)]
    with pytest.raises(TooMany, match="sequences: expected at most 4"):
        rig.kv.open([9], "A")
    rig.kv.hand_off(opened[0], "B")
    with pytest.raises(TooMany, match="handoffs: expected at most 1"):
        rig.kv.hand_off(opened[1], "B")
    config = ManagerConfig(pools=(PoolConfig("A", 4, workers=3),), workers_max=2)
    with pytest.raises(TooMany, match="workers: expected at most 2"):
        make_rig(config)


def test_worker_of_another_layout_may_not_join(make_rig: MakeRig) -> None:
    with pytest.raises(LayoutMismatch) as caught:
        rig = make_rig(ManagerConfig(pools=(PoolConfig("A", 4, workers=2),)))
        rig.die(rig.workers["A"][1])
        rig.kv.join("A1", "A", "fp16")
    assert caught.value.details == {"what": "pool A", "expected": "bf16", "got": "fp16"}


def test_pool_with_too_few_workers_opens_nothing(make_rig: MakeRig) -> None:
    rig = make_rig(ManagerConfig(pools=(PoolConfig("A", 4, workers=2), PoolConfig("B", 4))))
    rig.die(rig.workers["A"][0])
    with pytest.raises(PoolNotReady) as caught:
        rig.kv.open([1], "A")
    assert caught.value.details == {"pool": "A", "expected": 2, "live": 1, "fenced": 0}
    here = rig.kv.open([1], "B", chunk=1)
    with pytest.raises(PoolNotReady):
        rig.kv.hand_off(here.sequence, "A")


def test_worker_with_fresh_memory_may_not_join_beside_pages_that_hold_something(make_rig: MakeRig) -> None:
    """It would read garbage where the others hold a prefix. A pool that lost a worker has lost all of it, so it is empty again."""
    rig = make_rig(ManagerConfig(pools=(PoolConfig("A", 4, workers=2),)))
    first, _ = rig.workers["A"]
    opened = rig.prefilled(tokens(65), "A")
    assert rig.die(first) == [opened.sequence]
    rig.workers["A"].append(rig.kv.join("A0", "A", "bf16"))
    assert rig.kv.open(tokens(65), "A", chunk=65).cached_tokens == 0


# --- anything at all ---

anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8) | st.binary(max_size=16),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
names = (
    "opens",
    "grow",
    "grow_counts",
    "close",
    "tokens",
    "hand_off",
    "abort",
    "worker",
    "version",
    "ids",
    "pulled",
    "name",
    "pool",
    "layout",
)
command_maps = st.fixed_dictionaries({"t": st.sampled_from(["step", "join", "ack", "gone", "tick"])}).flatmap(
    lambda kind: st.dictionaries(st.sampled_from(names), anything, max_size=5).map(lambda more: {**more, **kind})
)
open_maps = st.dictionaries(st.sampled_from(["tokens", "pool", "tenant", "extra", "chunk"]), anything, max_size=5)


@given(anything | command_maps | open_maps.map(lambda item: {"t": "step", "opens": [item]}))
def test_any_map_gives_a_command_or_a_typed_error(wire: Any) -> None:
    """Rule 5, below the sockets: whatever msgpack can carry becomes a command or an error reply, never anything else."""
    try:
        command = command_from_wire(wire)
    except KVError as error:
        assert error.code in ("invalid_value", "bad_message")
    else:
        assert command_to_wire(command_from_wire(command_to_wire(command))) == command_to_wire(command)


def test_text_among_ids_costs_no_more_than_it_weighs() -> None:
    """numpy makes an array of texts as wide as the longest: a 3 MB message would ask for 4 TB."""
    for make in (lambda value: Open(value, "A"), lambda value: Step(grow=value), lambda value: Ack(1, 0, pulled=value)):
        with pytest.raises(InvalidValue, match="str"):
            make([*[""] * 1_000_000, "x" * 1_000_000])


def test_unknown_fields_of_a_command_are_ignored() -> None:
    """A newer client may send more; see DESIGN.md. (An event with an unknown field is an error instead.)"""
    assert command_from_wire({"t": "join", "name": "x", "pool": "A", "layout": "bf16", "colour": "red"}) == Join("x", "A", "bf16")
