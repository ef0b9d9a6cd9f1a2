"""Follower: subscribe, then snapshot, then follow - over real sockets, with losses, restarts and other processes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import zmq

from kvmanager.errors import BadMessage, KVError, ManagerUnreachable, ReplicaGap, Unknown
from kvmanager.machine.batch import EventBatch, decode_batch, encode_batch
from kvmanager.machine.snapshot import load_snapshot
from kvmanager.manager import KVManager
from kvmanager.service import wire
from kvmanager.service.client import KVClient
from kvmanager.service.server import Server
from kvmanager.worker.follower import Follower
from kvmanager.worker.replica import Replica
from tests.wire.conftest import Connect, MakeServer, config

SECONDS_MAX = 10.0


def follow(follower: Follower, until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS_MAX
    while not until():
        assert time.monotonic() < deadline, f"replica at {follower.replica.epoch}:{follower.replica.version}"
        follower.poll(100)


def digest(client: KVClient) -> tuple[int, bytes]:
    """The manager's version and the digest of its tables, read through a snapshot."""
    state = load_snapshot(config(), decode_batch(client.snapshot()))
    return state.version, state.tables.digest()


def assert_equal(follower: Follower, client: KVClient) -> None:
    """The follower gets to where the manager is now, and holds the same tables."""
    version, expected = digest(client)
    follow(follower, lambda: follower.replica.version == version)
    assert follower.replica.tables.digest() == expected


def traffic(client: KVClient, count: int = 10, prompt: int = 20) -> list[int]:
    """Opens and grows; two versions each."""
    found = []
    for _ in range(count):
        found.append(client.open([7] * prompt, "main", chunk=17, wait=False).sequence)
        client.grow(found[-1])
    return found


@pytest.fixture
def served(make_server: MakeServer, connect: Connect) -> tuple[Server, KVClient]:
    """A manager of plenty of pages with a worker in `main` that never says anything."""
    server = make_server(KVManager(config(num_pages=4096)))
    client = connect(server)
    client.join("w0", "main", "bf16")
    return server, client


# --- with a manager --------------------------------------------------------------------------------------------------------------


def test_late_subscriber_gets_a_snapshot_and_follows(served: tuple[Server, KVClient], connect: Connect) -> None:
    """What happened before it came is in the snapshot, what happens afterwards in the batches; no gap between the two."""
    server, client = served
    traffic(client)
    with closing(Follower(connect(server), Replica())) as follower:
        assert follower.replica.version == 22 and follower.resyncs == 0
        assert_equal(follower, client)
        client.close(traffic(client)[0])
        assert_equal(follower, client)
        assert follower.resyncs == 0


def test_subscribing_in_the_middle_of_traffic_misses_nothing(served: tuple[Server, KVClient], connect: Connect) -> None:
    """The snapshot is asked for only after the subscription has proved to be live."""
    server, client = served
    followers = []
    try:
        for _ in range(5):
            traffic(client, 5)
            followers.append(Follower(connect(server), Replica()))
        traffic(client, 5)
        for follower in followers:
            assert_equal(follower, client)
            assert follower.resyncs == 0
    finally:
        for follower in followers:
            follower.close()


def test_worker_waits_for_the_version_of_a_reply(served: tuple[Server, KVClient], connect: Connect) -> None:
    """Rule 3: the reply comes after the publication, so a worker that was told a version sees it arrive."""
    server, client = served
    with closing(Follower(connect(server), Replica("main"))) as follower:
        sequence = client.open([1, 2, 3], "main", chunk=3).sequence
        for count in range(3, 8):
            version = client.grow(sequence) if count > 3 else client.stats()["version"]
            follow(follower, lambda version=version: follower.replica.ready(version))
            assert follower.replica.batch(version, [sequence]).lengths.tolist() == [count]
            follower.replica.finish(version, [sequence])


@pytest.mark.parametrize("log_bytes_max", [50_000, 64 << 20], ids=["by-snapshot", "by-the-log"])
def test_slow_subscriber_is_cut_off_and_comes_back(make_server: MakeServer, connect: Connect, log_bytes_max: int) -> None:
    """DESIGN, on the wire: bounded queues. More than they and the kernel hold is lost, and what is found afterwards is equal."""
    bounds = config(num_pages=4096, sequences_max=512, heartbeat_ms=60_000, log_bytes_max=log_bytes_max)
    server = make_server(KVManager(bounds), max_queue=2)
    client = connect(server)
    client.join("w0", "main", "bf16")
    with closing(Follower(connect(server), Replica())) as follower:
        while follower.poll(50):  # libzmq's disconnect() would cut a message in two that poll() has begun to read
            pass
        follower.socket.disconnect(server.publish)
        follower.socket.setsockopt(zmq.RCVHWM, 1)
        follower.socket.setsockopt(zmq.RCVBUF, 4096)
        follower.socket.connect(server.publish)
        for count in (100, 1):
            traffic(client, count, prompt=10_000)  # 40 kB each
            version, expected = digest(client)
            follow(follower, lambda version=version: bool(client.hello()) and follower.replica.version == version)
            assert follower.replica.tables.digest() == expected
            assert follower.resyncs >= 1 if log_bytes_max == 50_000 else follower.catch_ups >= 1 and not follower.resyncs


def test_heartbeat_reveals_the_loss_of_the_last_messages(served: tuple[Server, KVClient], connect: Connect) -> None:
    """Nothing follows the lost batches but heartbeats; those say where the manager stands."""
    server, client = served
    with closing(Follower(connect(server), Replica())) as follower:
        follower.socket.setsockopt(zmq.SUBSCRIBE, wire.HEARTBEAT_TOPIC)
        follower.socket.setsockopt(zmq.UNSUBSCRIBE, b"")  # from here on every batch is lost
        traffic(client, 3)
        assert_equal(follower, client)
        assert follower.catch_ups >= 1 and follower.resyncs == 0


def test_heartbeat_reveals_tables_that_differ(served: tuple[Server, KVClient], connect: Connect) -> None:
    """A replica that went wrong, for whatever reason, does not stay wrong."""
    server, client = served
    with closing(Follower(connect(server), Replica())) as follower:
        traffic(client, 1)
        assert_equal(follower, client)
        follower.replica.tables.lengths[0] += 1
        follow(follower, lambda: follower.resyncs == 1)
        assert_equal(follower, client)


def test_idle_manager_is_heard(served: tuple[Server, KVClient], connect: Connect) -> None:
    """heard_at moves on with heartbeats alone: a worker can tell an idle manager from one that is gone."""
    server, _ = served
    with closing(Follower(connect(server), Replica())) as follower:
        for _ in range(3):
            before = follower.heard_at
            follow(follower, lambda before=before: follower.heard_at > before)
        assert follower.resyncs == 0


def test_server_restart_under_a_living_manager_is_followed(
    served: tuple[Server, KVClient], make_server: MakeServer, connect: Connect
) -> None:
    """Same epoch, new sockets: what was published while nobody was connected is found by gap or heartbeat."""
    server, _ = served
    with closing(Follower(connect(server, resend_ms=50), Replica())) as follower:
        server.close()
        server.manager.open([1] * 20, "main", chunk=20)  # nobody hears of it
        again = make_server(server.manager, address=server.address, publish=server.publish)
        client = connect(again)
        traffic(client, 2)
        assert_equal(follower, client)
        assert follower.replica.epoch == 1


def test_manager_restart_leads_to_a_snapshot_of_the_new_epoch(
    served: tuple[Server, KVClient], make_server: MakeServer, connect: Connect
) -> None:
    """Rule 3: versions begin anew at 1, below what the replica knows; the epoch tells."""
    server, client = served
    traffic(client)
    with closing(Follower(connect(server, resend_ms=50), Replica())) as follower:
        server.close()
        again = make_server(KVManager(config(), epoch=2), address=server.address, publish=server.publish)
        follow(follower, lambda: follower.replica.epoch == 2)
        fresh = connect(again)
        fresh.join("w0", "main", "bf16")
        traffic(fresh, 2)
        assert_equal(follower, fresh)
        assert follower.resyncs >= 1 and len(follower.replica.tables.open_ids()) == 2


def test_follower_of_an_unknown_pool_leaves_nothing_open(served: tuple[Server, KVClient], connect: Connect) -> None:
    """A typed error, and its context has ended: closing() is not the caller's business when there is no Follower."""
    server, _ = served
    with pytest.raises(Unknown, match="pool: nowhere"):
        Follower(connect(server), Replica("nowhere"))


CHILD = """
import sys
from kvmanager import Follower, KVClient, Replica

with KVClient(sys.argv[1], timeout_ms=10_000) as client:
    follower = Follower(client, Replica())
    print(follower.replica.version, flush=True)
    version = int(sys.stdin.readline())
    while follower.replica.version < version:
        follower.poll(1000)
    print(follower.replica.version, follower.replica.tables.digest().hex(), follower.resyncs, flush=True)
    follower.close()
"""


def test_followers_in_other_processes_reach_the_same_digest(served: tuple[Server, KVClient]) -> None:
    """DESIGN, one log, many readers: digests agree across processes (no hash() of a text, no order of a set), without a snapshot."""
    server, client = served
    traffic(client)
    root = Path(__file__).resolve().parents[2]
    children = [
        subprocess.Popen([sys.executable, "-c", CHILD, server.address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)
        for _ in range(2)
    ]
    try:
        for child in children:
            assert child.stdout is not None and child.stdout.readline() == "22\n"
        client.close(traffic(client, 30)[5])
        version, expected = digest(client)
        for child in children:
            out, _ = child.communicate(f"{version}\n", timeout=30)
            assert out.split() == [str(version), expected.hex(), "0"]
            assert child.returncode == 0
    finally:
        for child in children:
            child.kill()
            child.communicate()


# --- with a publisher in the test's hands ----------------------------------------------------------------------------------------


class Feed:
    """Stands for KVClient and publishes what the test wants. `hello` gives a heartbeat, as the server does."""

    def __init__(self, context: zmq.Context[Any], address: str) -> None:
        self.manager = KVManager(config(), checked=True)
        self.manager.join("w0", "main", "bf16")
        self.publisher = context.socket(zmq.PUB)
        self.publisher.setsockopt(zmq.LINGER, 0)
        self.publisher.bind(address)
        self.address = address
        self.batches: list[bytes] = []
        self.snapshots = 0
        self.unreachable = False
        self.remembers = False
        self.manager.subscribe(lambda batch, data: self.batches.append(data))

    def hello(self) -> dict[str, Any]:
        self.heartbeat()
        return {"publish": self.address, "epoch": 1, "message_bytes_max": 1 << 20}

    def batches_since(self, epoch: int, version: int) -> list[bytes]:
        if self.unreachable:
            raise ManagerUnreachable("manager: expected a reply, got none")
        if not self.remembers:
            raise ReplicaGap("batches: forgotten")
        return self.manager.batches_since(epoch, version)

    def tables_snapshot(self) -> bytes:
        if self.unreachable:
            raise ManagerUnreachable("manager: expected a reply, got none")
        self.snapshots += 1
        return self.manager.tables_snapshot()

    def heartbeat(self) -> None:
        state = self.manager.state
        self.send(wire.HEARTBEAT_TOPIC, b"", wire.encode_heartbeat(state.epoch, state.version, state.tables.digest()))

    def send(self, *frames: bytes) -> None:
        self.publisher.send_multipart(frames)

    def batch(self, data: bytes) -> None:
        self.send(wire.BATCH_TOPIC, wire.encode_version(0), data)

    def work(self, count: int) -> None:
        for _ in range(count):
            self.manager.open([1, 2, 3], "main", chunk=3)


@pytest.fixture
def feed(zmq_context: zmq.Context[Any], tmp_path: Path) -> Iterator[Feed]:
    found = Feed(zmq_context, f"ipc://{tmp_path}/feed")
    yield found
    found.publisher.close(0)


@pytest.fixture
def fed(feed: Feed) -> Iterator[Follower]:
    """A follower of `feed`, with an empty queue."""
    follower = Follower(feed, Replica())  # type: ignore[arg-type]
    while follower.poll(50):
        pass
    assert (follower.resyncs, feed.snapshots) == (0, 1)
    yield follower
    follower.close()


def test_lost_batch_leads_to_a_snapshot(feed: Feed, fed: Follower) -> None:
    """Rule 3, one batch of three lost: one snapshot, and the third, which came too early, is not needed any more."""
    feed.work(3)
    feed.batch(feed.batches[0])
    feed.batch(feed.batches[2])
    follow(fed, lambda: fed.replica.version == feed.manager.state.version)
    assert (fed.resyncs, feed.snapshots) == (1, 2)
    assert fed.replica.tables.digest() == feed.manager.state.tables.digest()


def test_lost_batch_is_fetched_from_the_log_if_it_is_there(feed: Feed, fed: Follower) -> None:
    """Nothing is forgotten then of what the replica has done."""
    feed.remembers = True
    feed.work(3)
    feed.batch(feed.batches[0])
    feed.batch(feed.batches[2])
    follow(fed, lambda: fed.replica.version == feed.manager.state.version)
    assert (fed.catch_ups, fed.resyncs, feed.snapshots) == (1, 0, 1)
    assert fed.replica.tables.digest() == feed.manager.state.tables.digest()


def test_batches_twice_and_late_change_nothing(feed: Feed, fed: Follower) -> None:
    """Older than what is known is dropped, without a snapshot."""
    feed.work(3)
    for index in (0, 1, 0, 1, 2, 2, 0):
        feed.batch(feed.batches[index])
    feed.work(1)
    feed.batch(feed.batches[3])
    follow(fed, lambda: fed.replica.version == feed.manager.state.version)
    assert fed.resyncs == 0


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param([b"kv"], id="1-frame"),
        pytest.param([b"kv", b""], id="2-frames"),
        pytest.param([b"kv", b"", b"", b""], id="4-frames"),
        pytest.param([b"kv", b"", b"garbage"], id="no-batch"),
        pytest.param([b"hb", b"", b"garbage"], id="no-heartbeat"),
        pytest.param([b"xx", b"", b"\xc0"], id="unknown-topic"),
        pytest.param([b"", b"", b""], id="empty"),
    ],
)
def test_publication_that_is_none_is_a_bad_message_and_no_more(frames: list[bytes], feed: Feed, fed: Follower) -> None:
    """Rule 5 on the worker's side: a typed error, and the next batch is taken as if nothing had come."""
    feed.send(*frames)
    feed.work(1)
    feed.batch(feed.batches[0])
    with pytest.raises(BadMessage):
        follow(fed, lambda: False)
    follow(fed, lambda: fed.replica.version == feed.manager.state.version)
    assert fed.resyncs == 0


def test_resynchronisation_that_fails_is_taken_up_again(feed: Feed, fed: Follower) -> None:
    """ManagerUnreachable reaches the worker; as long as the replica has a gap, whatever comes next leads to another attempt."""
    feed.work(2)
    feed.unreachable = True
    for _ in range(2):
        feed.batch(feed.batches[1])
        with pytest.raises(ManagerUnreachable):
            follow(fed, lambda: False)
    assert fed.replica.version == 2
    feed.unreachable = False
    feed.heartbeat()
    follow(fed, lambda: fed.replica.version == feed.manager.state.version)
    assert fed.resyncs == 1


def test_first_batch_of_a_new_epoch_leads_to_a_snapshot(feed: Feed, fed: Follower) -> None:
    """Before any heartbeat says so; and what the old epoch still had in the queue does not go into the new one's tables."""
    feed.work(1)
    old = feed.batches[0]
    feed.manager = KVManager(config(), epoch=2)
    feed.batch(encode_batch(EventBatch(2, 3, 0, [])))
    feed.batch(old)
    feed.heartbeat()
    follow(fed, lambda: fed.replica.epoch == 2)
    while fed.poll(50):
        pass
    assert (fed.replica.epoch, fed.replica.version) == (2, 1)
    assert fed.replica.tables.digest() == feed.manager.state.tables.digest()


def test_silent_publisher_is_unreachable_in_time(feed: Feed, tmp_path: Path) -> None:
    """The manager answers, but its publications do not arrive: a typed error within the time limit."""
    feed.publisher.unbind(feed.address)
    began = time.monotonic()
    with pytest.raises(ManagerUnreachable, match="expected a publication within 200 ms") as caught:
        Follower(feed, Replica(), timeout_ms=200)  # type: ignore[arg-type]
    assert isinstance(caught.value, KVError) and 0.1 < time.monotonic() - began < 3
    assert feed.snapshots == 0
