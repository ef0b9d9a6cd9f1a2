"""Event batches as bytes: the same bytes are journaled, applied and published, so they must never change and never surprise."""

from __future__ import annotations

import random
import tracemalloc

import msgpack
import numpy as np
import pytest

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.errors import BadMessage
from kvmanager.machine import events as ev
from kvmanager.machine.batch import EVENTS, EventBatch, decode_batch, encode_batch
from kvmanager.machine.commands import Open, Step
from kvmanager.manager import KVManager
from tests.wire.samples import GOLDEN, NAMES, equal, random_event, sample_batch

ARRAY32, MAP32, BIN32, STR32, EXT32 = b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9"


def decodes(data: bytes) -> EventBatch | None:
    """The batch, or None for BadMessage. Anything else is the test's failure."""
    try:
        batch = decode_batch(data)
    except BadMessage:
        return None
    assert isinstance(batch, EventBatch) and all(type(event) in EVENTS for event in batch.events)
    return batch


@pytest.mark.parametrize("cls", EVENTS, ids=NAMES)
def test_every_event_comes_back_as_it_was(cls: type) -> None:
    """DESIGN, one log, many readers: what is applied is what was encoded, to the last value and dtype."""
    rng = random.Random(cls.__name__)
    for _ in range(50):
        batch = EventBatch(rng.getrandbits(63), rng.getrandbits(63), rng.getrandbits(63), [random_event(cls, rng) for _ in range(3)])
        data = encode_batch(batch)
        found = decode_batch(data)
        assert found[:3] == batch[:3]
        assert all(equal(one, other) for one, other in zip(found.events, batch.events, strict=True))
        assert encode_batch(found) == data


@pytest.mark.parametrize("cls", EVENTS, ids=NAMES)
def test_golden_bytes_have_not_changed(cls: type) -> None:
    """A journal written by an older version is read by a newer one: codes, fields and their order are for ever.

    A new event gets its file by `python -m tests.wire.samples`; a file that is there is never written again.
    """
    golden = (GOLDEN / f"{cls.__name__}.bin").read_bytes()
    assert encode_batch(sample_batch(cls)) == golden
    assert equal(decode_batch(golden).events[0], sample_batch(cls).events[0])


def test_every_golden_file_belongs_to_an_event() -> None:
    """An event that went away would leave its bytes, and journals that hold it, unreadable."""
    assert sorted(path.stem for path in GOLDEN.iterdir()) == sorted(NAMES)


def test_every_truncation_is_a_bad_message() -> None:
    """Rule 5: half a batch is no batch, wherever it was cut. Nor is one with something behind it."""
    data = encode_batch(sample_batch(*EVENTS))
    for end in range(len(data)):
        assert decodes(data[:end]) is None, end
    assert decodes(data + b"\xc0") is None


def test_every_bit_flip_gives_a_batch_or_a_bad_message() -> None:
    """Rule 5: one wrong bit, anywhere in a batch of all events, raises nothing but BadMessage."""
    data = encode_batch(sample_batch(*EVENTS))
    refused = 0
    for at in range(len(data)):
        for bit in range(8):
            refused += decodes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]) is None
    assert refused > len(data)  # the loop does reach the decoder's checks


def test_random_bytes_give_a_batch_or_a_bad_message() -> None:
    """Rule 5, from nothing: random bytes, and random bytes behind a good beginning."""
    rng = random.Random(5)
    good = encode_batch(sample_batch(ev.SequencesGrown))
    for _ in range(5000):
        decodes(rng.randbytes(rng.randrange(60)))
        decodes(good[: rng.randrange(len(good))] + rng.randbytes(rng.randrange(60)))


@pytest.mark.parametrize(
    "message",
    [
        pytest.param({"epoch": 1}, id="map"),
        pytest.param([1, 1, 1], id="short"),
        pytest.param([1, 1, 1, [], 1], id="long"),
        pytest.param([True, 1, 1, []], id="bool-epoch"),
        pytest.param([1, 1.0, 1, []], id="float-version"),
        pytest.param([1, 1, None, []], id="nil-time"),
        pytest.param([1, 1, 1, {}], id="map-of-events"),
        pytest.param([1, 1, 1, "events"], id="text-for-events"),
        pytest.param([1, 1, 1, [b"\x19\x05"]], id="bytes-that-read-as-an-event"),
        pytest.param([1, 1, 1, [[]]], id="event-without-code"),
        pytest.param([1, 1, 1, [[0]]], id="code-0"),
        pytest.param([1, 1, 1, [[len(EVENTS) + 1]]], id="code-unknown"),
        pytest.param([1, 1, 1, [["9"]]], id="code-text"),
        pytest.param([1, 1, 1, [[True, 1]]], id="code-bool"),
        pytest.param([1, 1, 1, [[9, 0]]], id="field-too-many"),
        pytest.param([1, 1, 1, [[25]]], id="field-missing"),
        pytest.param([1, 1, 1, [[25, True]]], id="bool-for-int"),
        pytest.param([1, 1, 1, [[10, 1, b"123"]]], id="int32-of-3-bytes"),
        pytest.param([1, 1, 1, [[10, 1, "1234"]]], id="text-for-int32"),
        pytest.param([1, 1, 1, [[10, 1, [1, 2]]]], id="list-for-int32"),
        pytest.param([1, 1, 1, [[25, msgpack.ExtType(5, b"")]]], id="empty-ext"),
        pytest.param(msgpack.ExtType(5, b"abc"), id="ext"),
        pytest.param([1, 1, 1, [[25, msgpack.Timestamp(0)]]], id="timestamp"),
        pytest.param([1, 1, 1, [[25, {1: 2}]]], id="int-key"),
    ],
)
def test_a_message_of_another_shape_is_a_bad_message(message: object) -> None:
    """A reader that takes what it does not know diverges silently: anything but [code, *fields] of known codes is refused."""
    with pytest.raises(BadMessage):
        decode_batch(msgpack.packb(message))


@pytest.mark.parametrize("depth", [2, 500, 1020, 5000])
def test_deep_nesting_is_a_bad_message(depth: int) -> None:
    """Rule 5: no depth reaches the interpreter's recursion limit."""
    with pytest.raises(BadMessage):
        decode_batch(b"\x91" * depth + b"\x01")
    with pytest.raises(BadMessage):
        decode_batch(b"\x94\x01\x01\x01\x91" + b"\x91" * depth + b"\x01")


@pytest.mark.parametrize("head", [ARRAY32, MAP32, BIN32, STR32, EXT32], ids=["array", "map", "bin", "str", "ext"])
@pytest.mark.parametrize("length", [2**32 - 1, 2**31, 10**6])
def test_claimed_lengths_allocate_nothing(head: bytes, length: int) -> None:
    """Rule 5: a header of five bytes that claims gigabytes costs what was sent, not what was claimed."""
    claim = head + length.to_bytes(4, "big") + (b"\x05" if head == EXT32 else b"")
    for data in (claim, b"\x94\x01\x01\x01" + claim, b"\x94\x01\x01\x01\x91\x92\x0a\x01" + claim):
        assert _peak_of_refusal(data + b"\xc0" * 1000) < 100_000


def test_claims_inside_claims_allocate_nothing() -> None:
    """Each array alone claims no more items than the message has bytes; hundreds in each other would still take gigabytes."""
    size = 1_000_000
    head = ARRAY32 + size.to_bytes(4, "big")
    data = b"\x94\x01\x01\x01" + head * 500
    assert _peak_of_refusal(data + b"\xc0" * (size - len(data))) < 3 * size


def _peak_of_refusal(data: bytes) -> int:
    tracemalloc.start()
    try:
        assert decodes(data) is None
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_steady_decode_step_is_a_few_tens_of_bytes() -> None:
    """DESIGN, on the wire: 256 sequences that all grow by one token, nobody crossing a page, cost less than 100 bytes on the PUB socket."""
    sent: list[bytes] = []
    manager = KVManager(ManagerConfig((PoolConfig("main", 1024),)), clock=lambda: 10**9, epoch=1_800_000_000_000)
    manager.join("w0", "main", "bf16")
    client, number = 2**62 + 5, iter(range(1, 100))
    manager.execute(Step(opens=[Open(np.array([7]), "main", chunk=1) for _ in range(256)]), client, next(number))
    ids = manager.state.tables.open_ids()
    manager.execute(Step(grow=ids), client, next(number))
    manager.subscribe(lambda batch, data: sent.append(data))
    for _ in range(3):
        manager.execute(Step(grow=ids), client, next(number))
    assert [type(event) for event in decode_batch(sent[-1]).events] == [ev.GrownAgain, ev.ClientAnswered]
    assert [len(data) for data in sent] == [44, 44, 44]
    assert (manager.state.tables.lengths[manager.state.tables.rows(ids)] == 5).all()
