"""The manager behind real sockets: who sends garbage pays for it alone, and what was asked once is done once."""

from __future__ import annotations

import hashlib
import os
import random
import socket
import stat
import threading
import time
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from kvmanager.errors import BadMessage, InvalidValue, KVError, ManagerUnreachable, Unknown
from kvmanager.machine.command_wire import command_to_wire
from kvmanager.machine.commands import Open, Step
from kvmanager.manager import KVManager
from kvmanager.service import wire
from kvmanager.service.client import KVClient
from kvmanager.service.server import Server
from tests.wire.conftest import Connect, MakeServer, config

WAIT_MS = 5000
DEEP = b"\x91" * 1000 + b"\xc0"
REQUEST = b"\x83\xa1c\x05\xa1n\x05\xa1t"  # {"c": 5, "n": 5, "t": ...: the value follows


def digest(client: KVClient) -> str:
    """Of the manager's whole state: asking for a snapshot does not change it."""
    return hashlib.sha256(client.snapshot()).hexdigest()


def dealer(context: zmq.Context[Any], address: str) -> zmq.Socket[bytes]:
    found = context.socket(zmq.DEALER)
    found.setsockopt(zmq.LINGER, 0)
    found.connect(address)
    return found


def answer(peer: zmq.Socket[bytes]) -> tuple[int, dict[str, Any] | KVError]:
    assert peer.poll(WAIT_MS, zmq.POLLIN), "no reply"
    frames = peer.recv_multipart()
    assert len(frames) == 1
    return wire.decode_reply(frames[0])


def packed(**fields: Any) -> bytes:
    return msgpack.packb({"c": 5, "n": 5, **fields})


# --- garbage ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param([b""], id="empty"),
        pytest.param([b"", b""], id="2-empty"),
        pytest.param([b"", packed(t="stats")], id="as-REQ-sends"),
        pytest.param([packed(t="stats")] * 3, id="3-frames"),
        pytest.param([b"x"] * 4, id="4-frames"),
        pytest.param([b"x", b"", b"y", b"\xc0", b"z"], id="5-frames"),
        pytest.param([b"\xc1"], id="reserved-byte"),
        pytest.param([packed(t="stats") + b"\xc0"], id="trailing-byte"),
        pytest.param([packed(t="stats")[:-1]], id="cut"),
        pytest.param([msgpack.packb([1, 2, 3])], id="list"),
        pytest.param([msgpack.packb("stats")], id="text"),
        pytest.param([msgpack.packb({})], id="empty-map"),
        pytest.param([msgpack.packb({1: 2})], id="int-key"),
        pytest.param([msgpack.packb({"c": 1, "n": 1, "t": "tick"})], id="the-embedding-program's-id"),
        pytest.param([msgpack.packb({"c": -5, "n": 1, "t": "tick"})], id="negative-client"),
        pytest.param([msgpack.packb({"c": 5, "n": 2**64 - 1, "t": "tick"})], id="number-past-int64"),
        pytest.param([msgpack.packb({"c": 5, "n": 1.0, "t": "tick"})], id="float-number"),
        pytest.param([packed()], id="no-kind"),
        pytest.param([packed(t="shutdown")], id="unknown-kind"),
        pytest.param([packed(t="step", grow=b"1234567")], id="odd-bytes"),
        pytest.param([packed(t="step", opens=[{"tokens": [2**31], "pool": "main"}])], id="token-past-int32"),
        pytest.param([packed(t="step", grow=[7] * 5000)], id="wide"),
        pytest.param([packed(t="ack", worker=1, version=2**62)], id="version-of-the-future"),
        pytest.param([packed(t="ack", worker=99, version=1)], id="unknown-worker"),
        pytest.param([packed(t=msgpack.ExtType(5, b"pickle"))], id="ext"),
        pytest.param([packed(t="step", tokens=[msgpack.ExtType(5, b"")])], id="empty-ext"),
        pytest.param([packed(t=msgpack.Timestamp(1))], id="timestamp"),
        pytest.param([b"\x83\xa1c\x05\xa1n\x05\xa1t\xd9\x02\xff\xfe"], id="no-utf8"),
        pytest.param([DEEP], id="deep"),
        pytest.param([REQUEST + DEEP], id="deep-kind"),
        pytest.param([b"\x83\xa1n\x05\xa1t\xa4tick\xa1c" + DEEP], id="deep-client"),
        pytest.param([b"\x84\xa1c\x05\xa1n\x05\xa1t\xa4join\xa4name" + DEEP], id="deep-name"),
        pytest.param([b"\x84\xa1c\x05\xa1n\x05\xa1t\xa4step\xa6tokens\x91" + DEEP], id="deep-pair"),
        pytest.param([REQUEST + b"\xdd\xff\xff\xff\xff"], id="claims-4-billion"),
        pytest.param([(b"\xdd" + (3000).to_bytes(4, "big")) * 500 + b"\xc0" * 500], id="claims-inside-claims"),
    ],
)
def test_garbage_costs_its_sender_an_error_reply(
    frames: list[bytes], make_server: MakeServer, connect: Connect, zmq_context: zmq.Context[Any]
) -> None:
    """Rule 5: one bad message, one error reply; nothing has changed, and the next client is served as if nothing had come."""
    server = make_server()
    client = connect(server)
    client.join("w0", "main", "bf16")
    client.open([1, 2, 3], "main", chunk=3)
    before = digest(client)
    with dealer(zmq_context, server.address) as peer:
        peer.send_multipart(frames)
        _, error = answer(peer)
        assert isinstance(error, KVError), error
        assert digest(client) == before
        peer.send(wire.encode_request(9, 1, {"t": "stats"}))  # the sender itself may go on, too
        number, stats = answer(peer)
        assert number == 1 and isinstance(stats, dict) and stats["pools"]["main"]["sequences"] == 1
    assert client.open([4], "main").length == 0


def test_random_bytes_never_end_the_server(make_server: MakeServer, connect: Connect, zmq_context: zmq.Context[Any]) -> None:
    """Rule 5, 500 times: random frames, and a valid request with random bytes in it. One reply each."""
    server = make_server()
    client = connect(server)
    before = digest(client)
    rng = random.Random(11)
    good = wire.encode_request(5, 5, command_to_wire(Step(opens=[Open([1, 2], "nowhere")])))
    with dealer(zmq_context, server.address) as peer:
        for number in range(500):
            if number % 2:
                frames = [rng.randbytes(rng.randrange(50)) for _ in range(rng.randrange(1, 6))]
            else:
                at = rng.randrange(3, len(good))  # c and n stay unreadable or refused: nothing here may be carried out
                frames = [b"\x83\xa1c\x01" + good[4:at] + rng.randbytes(9)]
            peer.send_multipart(frames)
        for _ in range(500):
            assert isinstance(answer(peer)[1], KVError)
    assert digest(client) == before
    assert 1 <= server.bad_messages <= 500


def test_oversized_message_costs_its_sender_the_connection(
    make_server: MakeServer, connect: Connect, zmq_context: zmq.Context[Any]
) -> None:
    """MAXMSGSIZE is always set: what is longer than message_bytes_max is not even read, and others do not notice."""
    server = make_server(KVManager(config(message_bytes_max=4096, sequences_max=64)))
    client = connect(server)
    before = digest(client)
    with dealer(zmq_context, server.address) as peer:
        monitor = peer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        peer.send(packed(t="stats", more=b"x" * 4096))
        assert monitor.poll(WAIT_MS, zmq.POLLIN), "still connected"
        peer.disable_monitor()
        monitor.close(0)
        assert not peer.poll(0, zmq.POLLIN)
    assert digest(client) == before


def test_client_refuses_to_send_what_the_manager_would_not_read(make_server: MakeServer, connect: Connect) -> None:
    """A typed error at once, not ManagerUnreachable after the time limit; the client goes on."""
    client = connect(make_server(), message_bytes_max=4096)
    with pytest.raises(InvalidValue, match=r"request: expected at most 4096 bytes, got 41\d\d bytes"):
        client.open([1] * 1024, "main")
    assert client.stats()["version"] == 1


def test_reply_beyond_the_bound_is_an_error_not_a_lost_connection(make_server: MakeServer, connect: Connect) -> None:
    """A snapshot of everything may outgrow a message; the tables that a replica needs still fit."""
    server = make_server(KVManager(config(message_bytes_max=8192, sequences_max=64)))
    client = connect(server)
    client.join("w", "main", "layout")
    for start in range(4):
        client.open(range(start * 1000, start * 1000 + 1000), "main")
    with pytest.raises(InvalidValue, match="reply: expected at most 8192 bytes"):
        client.snapshot()
    assert len(client.tables_snapshot()) < 8192
    client.stats()


def test_bytes_that_are_no_zmtp_leave_the_server_alone(make_server: MakeServer, connect: Connect) -> None:
    """Somebody speaks HTTP, or noise, to the socket itself."""
    server = make_server(address="tcp://127.0.0.1:*", publish="tcp://127.0.0.1:*")
    client = connect(server)
    before = digest(client)
    for address in (server.address, server.publish):
        host, port = address.removeprefix("tcp://").split(":")
        for noise in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"\xff" * 100,
            random.Random(3).randbytes(5000),
            b"\xff" + b"\0" * 8 + b"\x7f\x03" + b"x" * 200,
        ):
            with socket.create_connection((host, int(port)), timeout=5) as plain:
                plain.sendall(noise)
    assert digest(client) == before


def test_sender_that_is_gone_costs_nobody_its_reply(make_server: MakeServer, connect: Connect, zmq_context: zmq.Context[Any]) -> None:
    """Replies to a peer that has left, or never reads, are dropped."""
    server = make_server()
    client = connect(server)
    for _ in range(20):
        with dealer(zmq_context, server.address) as peer:
            peer.send(b"garbage")
    with dealer(zmq_context, server.address) as deaf:
        for _ in range(500):
            deaf.send(packed(t="stats"))
        assert client.stats()["version"] == 1


def test_an_ordinary_refusal_is_the_same_class_with_and_without_a_wire(make_server: MakeServer, connect: Connect) -> None:
    """KVManager and KVClient offer the same methods, errors included."""
    client = connect(make_server())
    embedded = KVManager(config())
    for call in (lambda kv: kv.close(5), lambda kv: kv.open([1], "nowhere"), lambda kv: kv.worker_gone(9)):
        with pytest.raises(Unknown) as far:
            call(client)
        with pytest.raises(Unknown) as near:
            call(embedded)
        assert str(far.value) == str(near.value) and far.value.details == near.value.details


# --- addresses -------------------------------------------------------------------------------------------------------------------


def test_ipc_sockets_are_for_their_owner_alone(make_server: MakeServer) -> None:
    """DESIGN, on the wire: mode 0600, whatever the umask; and the process's umask is what it was."""
    before = os.umask(0)
    try:
        server = make_server()
        assert os.umask(0) == 0
    finally:
        os.umask(before)
    for address in (server.address, server.publish):
        mode = os.stat(address.removeprefix("ipc://")).st_mode
        assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o600
    server.close()
    assert not any(os.path.exists(address.removeprefix("ipc://")) for address in (server.address, server.publish))


BAD_ADDRESSES = {
    "wildcard": "tcp://*:5555",
    "any-host": "tcp://0.0.0.0:5555",
    "any-host-v6": "tcp://[::]:5555",
    "public": "tcp://192.0.2.7:5555",
    "public-v6": "tcp://[2001:db8::1]:5555",
    "name": "tcp://example.org:5555",
    "interface": "tcp://lo:5555",
    "source-address": "tcp://0.0.0.0:1;127.0.0.1:5555",
    "loopback-lookalike": "tcp://127.0.0.1.example.org:5555",
    "no-port": "tcp://127.0.0.1",
    "port-past-65535": "tcp://127.0.0.1:65536",
    "port-in-other-digits": "tcp://127.0.0.1:" + "\N{ARABIC-INDIC DIGIT FIVE}" * 4,
    "path-of-101-bytes": "ipc://" + "x" * 101,
    "path-of-51-characters-and-102-bytes": "ipc://" + "é" * 51,
    "path-empty": "ipc://",
    "abstract": "ipc://@kvmanager",
    "newline": "ipc://a\nb",
    "nul": "ipc://a\0b",
    "surrogate": "ipc://\udcff",
    "inproc": "inproc://kvmanager",
    "pgm": "pgm://127.0.0.1:5555",
    "no-scheme": "127.0.0.1:5555",
    "empty": "",
    "bytes": b"ipc://x",
    "nothing": None,
}


@pytest.mark.parametrize("address", BAD_ADDRESSES.values(), ids=BAD_ADDRESSES)
def test_address_beyond_this_host_or_user_is_refused(address: Any, tmp_path: Path) -> None:
    """DESIGN, on the wire: ipc:// or loopback, as anything else needs keys; refused at once, by server and client alike."""
    good = f"ipc://{tmp_path}/good"
    for make in (
        lambda: Server(KVManager(config()), address=address, publish=good),
        lambda: Server(KVManager(config()), address=good, publish=address),
        lambda: KVClient(address),
    ):
        with pytest.raises(InvalidValue) as caught:
            make()
        assert caught.value.field == "address"
    assert not os.path.exists(f"{tmp_path}/good")


@pytest.mark.parametrize(
    "address", ["ipc://{}/no/such/folder", "ipc://{}", "tcp://127.0.0.1:{port}"], ids=["no-folder", "a-folder", "port-taken"]
)
def test_address_that_cannot_be_bound_is_refused(address: str, tmp_path: Path) -> None:
    """The operating system's refusal is an InvalidValue naming `address`, too, and leaves no socket behind."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = address.format(tmp_path, port=taken.getsockname()[1])
        for first, second in ((address, f"ipc://{tmp_path}/ok"), (f"ipc://{tmp_path}/ok", address)):
            with pytest.raises(InvalidValue) as caught:
                Server(KVManager(config()), address=first, publish=second)
            assert caught.value.field == "address"
            assert not os.path.exists(f"{tmp_path}/ok")


def test_client_cannot_connect_to_any_port(tmp_path: Path) -> None:
    """`*` means something to a server only; libzmq's refusal is a typed error."""
    with pytest.raises(InvalidValue, match="address"):
        KVClient("tcp://127.0.0.1:*")


def test_address_of_a_living_server_is_not_taken_over(make_server: MakeServer, connect: Connect, tmp_path: Path) -> None:
    """libzmq unlinks a path before it binds: two managers would each believe to own the pages."""
    server = make_server()
    client = connect(server)
    for first, second in ((server.address, f"ipc://{tmp_path}/new"), (f"ipc://{tmp_path}/new", server.publish)):
        with pytest.raises(InvalidValue) as caught:
            Server(KVManager(config()), address=first, publish=second)
        assert caught.value.field == "address"
    with pytest.raises(InvalidValue):
        Server(KVManager(config()), address=f"ipc://{tmp_path}/same", publish=f"ipc://{tmp_path}/same")
    client.join("w0", "main", "bf16")
    assert connect(server).stats()["version"] == 2


def test_socket_left_by_a_killed_server_is_replaced_but_another_file_never(
    make_server: MakeServer, connect: Connect, tmp_path: Path
) -> None:
    """A restart after SIGKILL needs no cleaning up; a mistyped path costs nobody a file."""
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "left"))
    assert (tmp_path / "left").exists()
    assert connect(make_server(address=f"ipc://{tmp_path}/left")).stats()["version"] == 1
    (tmp_path / "letter").write_text("dear")
    with pytest.raises(InvalidValue, match="a file of another kind"):
        Server(KVManager(config()), address=f"ipc://{tmp_path}/letter", publish=f"ipc://{tmp_path}/pub")
    assert (tmp_path / "letter").read_text() == "dear"


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:*", "tcp://localhost:*", "tcp://[::1]:*"])
def test_loopback_tcp_is_served(address: str, make_server: MakeServer, connect: Connect) -> None:
    """A free port is taken and told."""
    if "::1" in address:
        try:
            with socket.socket(socket.AF_INET6) as probe:
                probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
    client = connect(make_server(address=address, publish=address))
    assert client.hello()["publish"].startswith("tcp://")


# --- once ------------------------------------------------------------------------------------------------------------------------


def test_request_whose_reply_was_lost_is_carried_out_once(make_server: MakeServer, connect: Connect, zmq_context: zmq.Context[Any]) -> None:
    """DESIGN: a command sent again is answered again, not executed again - byte for byte, also from another connection."""
    server = make_server()
    client = connect(server)
    client.join("w0", "main", "bf16")
    request = wire.encode_request(77, 1, command_to_wire(Step(opens=[Open([1, 2, 3], "main", chunk=3)])))
    replies = []
    for _ in range(2):
        with dealer(zmq_context, server.address) as peer:
            for _ in range(2):
                peer.send(request)
                assert peer.poll(WAIT_MS, zmq.POLLIN)
                replies.append(peer.recv())
    assert len(set(replies)) == 1
    _, reply = wire.decode_reply(replies[0])
    stats = client.stats()
    assert isinstance(reply, dict) and stats["version"] == reply["version"] == 3
    assert stats["pools"]["main"]["sequences"] == 1 and stats["pools"]["main"]["pages"]["used"] == 1


def test_number_below_the_last_is_refused(make_server: MakeServer, connect: Connect, zmq_context: zmq.Context[Any]) -> None:
    """A request that was given up and arrives late is not carried out after its successor."""
    server = make_server()
    client = connect(server)
    client.join("w0", "main", "bf16")
    with dealer(zmq_context, server.address) as peer:
        for number in (5, 4):
            peer.send(wire.encode_request(77, number, command_to_wire(Step(opens=[Open([1], "main")]))))
        assert answer(peer)[0] == 5
        before = digest(client)
        number, error = answer(peer)
        assert number == 4 and isinstance(error, BadMessage) and "above 5" in str(error)
        assert digest(client) == before


def test_client_that_loses_a_reply_asks_again(make_server: MakeServer, zmq_context: zmq.Context[Any], tmp_path: Path) -> None:
    """KVClient sends again after resend_ms, over a new connection: one sequence is opened, and the caller sees one reply."""
    server = make_server()
    server_side, client_side = zmq_context.socket(zmq.DEALER), zmq_context.socket(zmq.ROUTER)
    for each in (server_side, client_side):
        each.setsockopt(zmq.LINGER, 0)
    server_side.connect(server.address)
    client_side.bind(f"ipc://{tmp_path}/relay")
    requests: list[bytes] = []

    def relay() -> None:
        """Passes everything on but the reply to the second request."""
        with server_side, client_side:
            for lose in (False, True, False):
                sender, request = client_side.recv_multipart()
                requests.append(request)
                server_side.send(request)
                reply = server_side.recv()
                if not lose:
                    client_side.send_multipart([sender, reply])

    thread = threading.Thread(target=relay, daemon=True)
    thread.start()
    with KVClient(f"ipc://{tmp_path}/relay", timeout_ms=WAIT_MS, resend_ms=50) as client:
        client.join("w0", "main", "bf16")
        opened = client.open([1, 2, 3], "main", chunk=3)
    thread.join(5)
    assert not thread.is_alive()
    assert requests[1] == requests[2]
    with KVClient(server.address) as client:
        assert client.stats()["version"] == 3
        assert client.close(opened.sequence) == 4


@pytest.mark.parametrize("listening", [False, True], ids=["nobody", "mute"])
def test_manager_that_does_not_answer_is_unreachable_in_time(listening: bool, zmq_context: zmq.Context[Any], tmp_path: Path) -> None:
    """A typed error that names the address, within the time limit; resending included."""
    address = f"ipc://{tmp_path}/nobody"
    with zmq_context.socket(zmq.ROUTER) as mute:
        mute.setsockopt(zmq.LINGER, 0)
        if listening:
            mute.bind(address)
        with KVClient(address, timeout_ms=150, resend_ms=40) as client:
            began = time.monotonic()
            with pytest.raises(ManagerUnreachable) as caught:
                client.stats()
            assert 0.1 <= time.monotonic() - began < 2
        assert caught.value.details["address"] == address and "150 ms" in str(caught.value)


def test_client_survives_a_server_restart_on_the_same_address(make_server: MakeServer, connect: Connect) -> None:
    """The manager lives on, its sockets are closed and bound anew: the client's next request finds the new ones."""
    first = make_server()
    client = connect(first, resend_ms=50)
    client.join("w0", "main", "bf16")
    sequence = client.open([1, 2, 3], "main", chunk=3).sequence
    for round_number in range(3):
        first.close()
        first = make_server(first.manager, address=first.address, publish=first.publish)
        assert client.grow(sequence) == 4 + round_number
    assert client.stats()["pools"]["main"]["sequences"] == 1


def test_request_in_flight_over_a_restart_is_carried_out_once(make_server: MakeServer, connect: Connect) -> None:
    """Asked while nobody listens, answered when somebody does."""
    server = make_server()
    client = connect(server, resend_ms=50)
    client.join("w0", "main", "bf16")
    server.close()
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(client.open([1], "main", chunk=1)))
    thread.start()
    again = make_server(server.manager, address=server.address, publish=server.publish)
    thread.join(10)
    assert not thread.is_alive() and found[0].length == 1
    assert connect(again).stats()["version"] == 3
