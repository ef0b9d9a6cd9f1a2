"""Commands and requests as bytes: whatever arrives becomes a command or a typed error, and nothing a client sends is believed unread."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmanager.errors import BadMessage, InvalidValue, KVError, OutOfPages, StaleStep, Unknown
from kvmanager.machine.command_wire import command_from_wire, command_to_wire
from kvmanager.machine.commands import Ack, Command, Join, Open, Step, Tick, WorkerGone
from kvmanager.service import wire

INT64_MAX = 2**63 - 1

ids = st.integers(1, INT64_MAX)
token_lists = st.lists(st.integers(0, 2**31 - 1), max_size=20)
names = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=64)
opens = st.builds(
    Open,
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20),
    names,
    st.binary(max_size=256),
    st.binary(max_size=9),
    st.integers(0, 1 << 24),
)


@st.composite
def steps(draw: Callable[..., Any]) -> Step:
    grow = draw(st.lists(ids, unique=True, max_size=6))
    counts = draw(st.none() | st.lists(st.integers(1, 1 << 24), min_size=len(grow), max_size=len(grow)))
    return Step(
        opens=draw(st.lists(opens, max_size=3)),
        grow=grow,
        grow_counts=counts,
        close=draw(st.lists(ids, max_size=4)),
        tokens=draw(st.lists(st.tuples(ids, token_lists), max_size=3)),
        hand_off=draw(st.lists(st.tuples(ids, names), max_size=3)),
        abort=draw(st.lists(ids, max_size=4)),
    )


@st.composite
def acks(draw: Callable[..., Any]) -> Ack:
    written = draw(st.lists(st.tuples(ids, st.integers(0, 1 << 24)), max_size=5))
    return Ack(
        draw(ids),
        draw(st.integers(0, INT64_MAX)),
        [one for one, _ in written],
        [two for _, two in written],
        draw(st.lists(ids, max_size=3)),
    )


commands: st.SearchStrategy[Command] = st.one_of(
    steps(),
    acks(),
    st.builds(Join, names, names, names, st.binary(max_size=300), st.integers(0, 86_400_000)),
    st.builds(WorkerGone, ids),
    st.just(Tick()),
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=70)
    | st.binary(max_size=40)
    | st.builds(msgpack.Timestamp, st.integers(0, 2**33))
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=3))
)
keys = st.text(max_size=5) | st.sampled_from(["c", "n", "t", "opens", "grow", "tokens", "worker", "version", "pool"])
packable = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=15)


def as_plain(value: Any) -> Any:
    """A command as something that == compares."""
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.tolist()
    if isinstance(value, (list, tuple)):
        return [as_plain(item) for item in value]
    if isinstance(value, (Open, Step, Join, Ack, WorkerGone, Tick)):
        return type(value).__name__, {name: as_plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return value


def read(wired: object) -> Command | KVError:
    """What a server makes of a message: a command, BadMessage or InvalidValue. Anything else is the test's failure."""
    try:
        command = command_from_wire(wired)
    except (BadMessage, InvalidValue) as error:
        assert len(wire.encode_error(1, error)) < 2500  # and it can be told to the sender
        return error
    assert isinstance(command, (Step, Join, Ack, WorkerGone, Tick))
    return command


@given(commands)
def test_a_command_comes_back_as_it_was(command: Command) -> None:
    """KVManager and KVClient build the same objects: what the server decides is what the caller asked for."""
    data = wire.encode_request(7, 9, command_to_wire(command))
    client, number, message = wire.decode_request(data)
    assert (client, number) == (7, 9)
    assert as_plain(command_from_wire(message)) == as_plain(command)


@given(commands, st.dictionaries(st.text(min_size=12, max_size=14), scalars, max_size=3))
def test_unknown_fields_of_a_command_are_ignored(command: Command, more: dict[str, Any]) -> None:
    """DESIGN: a newer client may send more. (An event's unknown field is an error: tests/wire/test_events.py.)"""
    wired = command_to_wire(command)
    for opened in wired.get("opens", []):
        opened.update(more)
    assert as_plain(command_from_wire({**more, **wired})) == as_plain(command)


@settings(max_examples=300)
@given(packable)
def test_any_object_gives_a_command_or_a_typed_error(value: Any) -> None:
    """Rule 5: whatever msgpack can carry, alone, as the fields of each kind, and as a whole request."""
    read(value)
    data = msgpack.packb(value)
    try:
        _, _, message = wire.decode_request(data)
    except (BadMessage, InvalidValue):
        pass
    else:
        read(message)
    for kind in ("step", "join", "ack", "gone", "tick"):
        read(
            {**value, "t": kind}
            if isinstance(value, dict)
            else {"t": kind, "opens": value, "tokens": value, "worker": value, "name": value}
        )


@settings(max_examples=300)
@given(commands, st.data())
def test_a_mutated_command_gives_a_command_or_a_typed_error(command: Command, data: st.DataObject) -> None:
    """Rule 5, close to what is valid: a field dropped, replaced by anything, or an item of a list replaced."""
    wired = command_to_wire(command)
    target: Any = wired
    if wired.get("opens") and data.draw(st.booleans()):
        target = wired["opens"][0]
    key = data.draw(st.sampled_from(sorted(target)))
    if data.draw(st.booleans()):
        del target[key]
    elif isinstance(target[key], list) and target[key] and data.draw(st.booleans()):
        target[key][data.draw(st.integers(0, len(target[key]) - 1))] = data.draw(packable)
    else:
        target[key] = data.draw(packable)
    read(wired)


@settings(max_examples=200)
@given(commands, st.data())
def test_a_flipped_or_cut_request_gives_a_command_or_a_typed_error(command: Command, data: st.DataObject) -> None:
    """Rule 5 on the bytes of a valid request."""
    request = bytearray(wire.encode_request(2**62, 5, command_to_wire(command)))
    for _ in range(data.draw(st.integers(1, 3))):
        request[data.draw(st.integers(0, len(request) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        _, _, message = wire.decode_request(bytes(request[: data.draw(st.integers(0, len(request)))]))
    except (BadMessage, InvalidValue):
        return
    read(message)


@given(st.binary(max_size=80) | packable.map(msgpack.packb))
def test_any_bytes_are_a_reply_a_heartbeat_or_a_bad_message(data: bytes) -> None:
    """The client's side of rule 5: KVClient and Follower see BadMessage, never a TypeError from inside."""
    for reader in (wire.decode_reply, wire.decode_heartbeat):
        with contextlib.suppress(BadMessage):
            reader(data)


@given(packable)
def test_any_error_or_body_in_a_reply_is_read_or_refused(value: Any) -> None:
    """A reply whose parts are anything: an error with odd details must not break the client that raises it."""
    details = value if isinstance(value, dict) else {"text": value, "self": value, "code": value}
    for reply in (
        {"n": 1, "err": value},
        {"n": 1, "err": ["unknown", "text", details]},
        {"n": 1, "ok": value},
        {"n": 1, "ok": msgpack.packb(value)},
    ):
        with contextlib.suppress(BadMessage):
            wire.decode_reply(msgpack.packb(reply))


@pytest.mark.parametrize(
    ("wired", "field", "limit"),
    [
        pytest.param({"t": "step", "opens": [{"tokens": [], "pool": "main"}]}, "open.tokens", "at least one token", id="no-tokens"),
        pytest.param({"t": "step", "opens": [{"tokens": [2**31], "pool": "main"}]}, "open.tokens", "0..2147483647", id="token-past-int32"),
        pytest.param({"t": "step", "opens": [{"tokens": [-1], "pool": "main"}]}, "open.tokens", "0..2147483647", id="token-negative"),
        pytest.param({"t": "step", "opens": [{"tokens": b"12345", "pool": "main"}]}, "open.tokens", "multiples of 4", id="token-bytes-odd"),
        pytest.param({"t": "step", "opens": [{"tokens": [1.5], "pool": "main"}]}, "open.tokens", "ints", id="token-float"),
        pytest.param({"t": "step", "opens": [{"tokens": [True], "pool": "main"}]}, "open.tokens", "ints", id="token-bool"),
        pytest.param({"t": "step", "opens": [{"tokens": [1]}]}, "open.pool", "1..64", id="open-nowhere"),
        pytest.param({"t": "step", "opens": [{"tokens": [1], "pool": "x" * 65}]}, "open.pool", "1..64", id="pool-long"),
        pytest.param({"t": "step", "opens": [{"tokens": [1], "pool": "a\nb"}]}, "open.pool", "printable", id="pool-newline"),
        pytest.param({"t": "step", "opens": [{"tokens": [1], "pool": "a", "tenant": b"x" * 257}]}, "open.tenant", "256", id="tenant-long"),
        pytest.param({"t": "step", "opens": [{"tokens": [1], "pool": "a", "chunk": 1 << 25}]}, "open.chunk", "16777216", id="chunk-large"),
        pytest.param({"t": "step", "opens": {"tokens": [1]}}, "step.opens", "a list", id="opens-map"),
        pytest.param({"t": "step", "opens": ["x"]}, "step.opens", "maps", id="opens-text"),
        pytest.param({"t": "step", "grow": b"1234567"}, "step.grow", "multiples of 8", id="grow-bytes-odd"),
        pytest.param({"t": "step", "grow": [5, 5]}, "step.grow", "once", id="grow-twice"),
        pytest.param({"t": "step", "grow": [0]}, "step.grow", "1..", id="grow-zero"),
        pytest.param({"t": "step", "grow": [2**63]}, "step.grow", "1..9223372036854775807", id="grow-past-int64"),
        pytest.param({"t": "step", "grow": [5], "grow_counts": [1, 1]}, "step.grow_counts", "1 counts", id="counts-many"),
        pytest.param({"t": "step", "grow": [5], "grow_counts": [0]}, "step.grow_counts", "1..16777216", id="count-zero"),
        pytest.param({"t": "step", "tokens": [[5]]}, "step.tokens[0]", "a pair", id="tokens-single"),
        pytest.param({"t": "step", "tokens": [[5, [1]], [0, [1]]]}, "step.tokens[1]", "1..", id="tokens-of-zero"),
        pytest.param({"t": "step", "hand_off": [[5, ""]]}, "step.hand_off[0]", "1..64", id="hand-off-nowhere"),
        pytest.param({"t": "step", "close": "5"}, "step.close", "int", id="close-text"),
        pytest.param({"t": "step", "abort": [None]}, "step.abort", "ints", id="abort-nil"),
        pytest.param({"t": "join", "name": "", "pool": "a", "layout": "b"}, "join.name", "1..64", id="join-unnamed"),
        pytest.param(
            {"t": "join", "name": "n", "pool": "a", "layout": "b", "memory": b"x" * 4097}, "join.memory", "4096", id="memory-long"
        ),
        pytest.param(
            {"t": "join", "name": "n", "pool": "a", "layout": "b", "lease_ms": -1}, "join.lease_ms", "0..86400000", id="lease-negative"
        ),
        pytest.param({"t": "ack", "worker": 0, "version": 1}, "ack.worker", "1..", id="worker-zero"),
        pytest.param({"t": "ack", "worker": True, "version": 1}, "ack.worker", "an int", id="worker-bool"),
        pytest.param({"t": "ack", "worker": 1, "version": -1}, "ack.version", "0..", id="version-negative"),
        pytest.param({"t": "ack", "worker": 1, "version": 1, "ids": [5]}, "ack.tokens", "1 lengths", id="lengths-missing"),
        pytest.param({"t": "gone", "worker": "1"}, "gone.worker", "an int", id="gone-text"),
    ],
)
def test_a_wrong_value_names_its_field_and_limit(wired: dict[str, Any], field: str, limit: str) -> None:
    """Issue 3: wrong use gets a typed error that names field and limit; also after its way over the wire."""
    with pytest.raises(InvalidValue) as caught:
        command_from_wire(msgpack.unpackb(msgpack.packb(wired)))
    number, error = wire.decode_reply(wire.encode_error(3, caught.value))
    assert number == 3 and isinstance(error, InvalidValue)
    assert error.field == field and limit in error.details["expected"]
    assert str(error) == str(caught.value) and str(error).startswith(f"{field}: expected ")


@pytest.mark.parametrize(
    "wired",
    [
        pytest.param([], id="list"),
        pytest.param(None, id="nil"),
        pytest.param({}, id="no-kind"),
        pytest.param({"t": "destroy"}, id="unknown-kind"),
        pytest.param({"t": ["step"]}, id="kind-list"),
        pytest.param({"t": "join", "name": "n"}, id="join-incomplete"),
        pytest.param({"t": "ack"}, id="ack-empty"),
        pytest.param({"t": "gone"}, id="gone-empty"),
    ],
)
def test_a_message_that_is_no_command_is_a_bad_message(wired: object) -> None:
    """BadMessage for what has no field to name."""
    with pytest.raises(BadMessage):
        command_from_wire(wired)


@pytest.mark.parametrize(
    "value", [{}, [], {"c": 1, "n": 1}, {"c": 5, "n": 0}, {"c": 5}, {"n": 5}, {"c": 2**63, "n": 1}, {"c": True, "n": 1}, 5, None]
)
def test_a_request_without_client_or_number_is_refused(value: object) -> None:
    """Client 1 is the embedding program's, never one on the wire: its reply would be overwritten."""
    with pytest.raises((BadMessage, InvalidValue)):
        wire.decode_request(msgpack.packb(value))


@pytest.mark.parametrize("depth", [9, 100, 1000, 1020, 3000])
@pytest.mark.parametrize(
    "before",
    [b"\x83\xa1c\x05\xa1n\x05\xa1t", b"\x84\xa1c\x05\xa1n\x05\xa1t\xa4step\xa5opens", b"\x82\xa1n\x05\xa1c"],
    ids=["kind", "opens", "client"],
)
def test_deep_nesting_is_refused_where_it_arrives(before: bytes, depth: int) -> None:
    """A thousand lists in lists pass msgpack, and repr() of them for an error text is a RecursionError: the server would have ended."""
    with pytest.raises(BadMessage):
        wire.decode_request(before + b"\x91" * depth + b"\xc0")


@pytest.mark.parametrize(
    "error", [InvalidValue("f", "1..2", 3), Unknown("pool", "x"), OutOfPages("main", 3, 1, 2), StaleStep(3, 4), BadMessage("x")]
)
def test_errors_keep_class_text_and_numbers(error: KVError) -> None:
    """One `except` serves the embedded manager and the client."""
    _, found = wire.decode_reply(wire.encode_error(1, error))
    assert type(found) is type(error) and str(found) == str(error) and found.details == error.details
