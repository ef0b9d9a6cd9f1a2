"""Quotas of pages, and the flush of everything that a tenant has cached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmanager import KVManager, ManagerConfig, Open, PoolConfig
from kvmanager.errors import InvalidValue, KVError, OutOfPages, OverQuota, TooMany, Unknown
from kvmanager.machine.commands import Flush, SetQuota
from kvmanager.machine.snapshot import load_snapshot, snapshot, state_digest
from tests.control.conftest import Rig
from tests.control.test_eviction import PAGE, text

MakeRig = Callable[[ManagerConfig], Rig]
RED, BLUE = b"red", b"blue"


def small(pages: int = 8, quota: int = -1, **more: Any) -> ManagerConfig:
    return ManagerConfig(pools=(PoolConfig("p", pages, page_size=PAGE, tenant_quota=quota),), **more)


@pytest.fixture
def rig(make_rig: MakeRig) -> Rig:
    return make_rig(small())


def take(rig: Rig, pages: int, tenant: bytes = RED, token: int = 9) -> int:
    """A sequence of so many pages that shares nothing with others."""
    return rig.kv.open([token] * pages * PAGE, "p", chunk=1 << 20, wait=False, tenant=tenant).sequence


def finished(rig: Rig, *pages: int, tenant: bytes = RED, **more: Any) -> None:
    opened = rig.prefilled(text(*pages), "p", tenant=tenant, **more)
    rig.kv.close(opened.sequence)
    rig.ack("p")


def cached(rig: Rig, *pages: int, tenant: bytes = RED) -> int:
    """Leading pages of a prompt that an open would find now."""
    opened = rig.kv.open(text(*pages), "p", tenant=tenant, wait=False)
    rig.kv.close(opened.sequence)
    rig.ack("p")
    return opened.cached_tokens // PAGE


def usage(rig: Rig) -> dict[bytes, tuple[int | None, int | None]]:
    return {row["tenant"]: (row["pages"], row["quota"]) for row in rig.kv.tenants()}


# --- quotas ----------------------------------------------------------------------------------------------------------------------


def test_at_its_quota_a_tenant_gives_up_its_own_cached_pages_first(rig: Rig) -> None:
    """FEATURES.md b: nobody has a quota on GPU pages. Free pages do not help it, and older pages of others stay."""
    finished(rig, 5, tenant=BLUE)
    finished(rig, 1)
    finished(rig, 2)
    rig.kv.set_quota(RED, 3)
    take(rig, 2)
    assert [cached(rig, each) for each in (1, 2)] == [0, 1]
    assert cached(rig, 5, tenant=BLUE) == 1
    assert usage(rig)[RED] == (3, 3)


def test_over_its_quota_an_open_is_refused_and_names_both_numbers(rig: Rig) -> None:
    rig.kv.set_quota(RED, 3)
    take(rig, 2)
    with pytest.raises(OverQuota) as caught:
        take(rig, 2, token=8)
    assert (caught.value.details["tenant"], caught.value.details["needed"], caught.value.details["quota"]) == ("red", 4, 3)
    take(rig, 2, BLUE)
    take(rig, 1, token=7)


def test_growth_beyond_the_quota_is_refused_alone(rig: Rig) -> None:
    rig.kv.set_quota(RED, 3)
    one, other, blue = take(rig, 1), take(rig, 1, token=8), take(rig, 1, BLUE)
    reply = rig.kv.step(grow=[one, other, blue], grow_counts=[1, 1, 1])
    assert [(item.kind, item.index, type(item.error)) for item in reply.refused] == [("grow", 1, OverQuota)]
    assert [rig.length(each) - PAGE for each in (one, other, blue)] == [1, 0, 1]
    again = rig.kv.step(grow=[one, blue], grow_counts=[PAGE, PAGE])  # the steady step, page by page
    assert [item.index for item in again.refused] == [0]
    rig.kv.close(other)
    assert not rig.kv.step(grow=[one, blue], grow_counts=[PAGE, PAGE]).refused


def test_growth_makes_room_among_the_tenants_own_pages(rig: Rig) -> None:
    finished(rig, 1)
    rig.kv.set_quota(RED, 2)
    sequence = take(rig, 1)
    rig.ack("p")
    rig.kv.grow(sequence)
    assert usage(rig)[RED] == (2, 2)
    assert rig.counts("p").cached == 0


def test_shared_pages_are_charged_once(rig: Rig) -> None:
    rig.kv.set_quota(RED, 5)
    for _ in range(3):
        rig.prefilled(text(1, 2), "p", tenant=RED)
    assert usage(rig)[RED] == (5, 5)  # two that all share, and one for each one's last token


def test_a_quota_for_everybody_and_one_of_its_own(make_rig: MakeRig) -> None:
    rig = make_rig(small(quota=2))
    rig.kv.set_quota(BLUE, 3)
    take(rig, 2)
    take(rig, 3, BLUE)
    with pytest.raises(OverQuota):
        take(rig, 1, token=8)
    rig.kv.set_quota(BLUE, None)  # back to everybody's
    with pytest.raises(OverQuota):
        take(rig, 1, BLUE, token=8)
    rig.kv.set_quota(None, None)
    take(rig, 1, token=8)
    assert usage(rig) == {}


def test_two_newcomers_of_one_step_share_their_quota(make_rig: MakeRig) -> None:
    rig = make_rig(small(quota=3))
    reply = rig.kv.step(opens=[Open([each] * 2 * PAGE, "p", tenant=RED, chunk=1 << 20) for each in (1, 2)])
    assert [bool(item) for item in reply.opened] == [True, False]


def test_a_quota_set_below_what_is_there_takes_nothing_away(rig: Rig) -> None:
    sequence = take(rig, 3)
    rig.kv.set_quota(RED, 1)
    assert usage(rig)[RED] == (3, 1)
    with pytest.raises(OverQuota):
        rig.kv.grow(sequence)
    assert rig.length(sequence) == 3 * PAGE


def test_forks_are_charged(rig: Rig) -> None:
    opened = rig.prefilled(text(1), "p", tenant=RED)
    rig.kv.set_quota(RED, 3)
    rig.kv.fork(opened.sequence)
    assert usage(rig)[RED] == (3, 3)
    with pytest.raises(OverQuota):
        rig.kv.fork(opened.sequence)


def test_a_handoff_waits_for_the_quota_of_its_target(make_rig: MakeRig) -> None:
    rig = make_rig(ManagerConfig(pools=tuple(PoolConfig(name, 4, page_size=PAGE) for name in "pq")))
    rig.kv.set_quota(RED, 2, "q")
    rig.prefilled(text(9)[:PAGE], "q", tenant=RED)
    opened = rig.prefilled(text(1), "p", tenant=RED)
    handoff = rig.kv.hand_off(opened.sequence, "q")
    assert rig.handoff_state(handoff) == "reserving"
    rig.kv.set_quota(RED, 3, "q")
    rig.kv.step()
    assert rig.handoff_state(handoff) == "moving"
    assert {row["pool"]: row["pages"] for row in rig.kv.tenants()} == {"q": 3}


def test_a_handoff_that_a_quota_can_never_let_in_ends_with_the_reason(make_rig: MakeRig) -> None:
    """At once if it is known when it is asked for; as soon as it is known if the quota is set later."""
    rig = make_rig(ManagerConfig(pools=tuple(PoolConfig(name, 4, page_size=PAGE) for name in "pq")))
    opened = rig.prefilled(text(1), "p", tenant=RED)
    rig.kv.set_quota(RED, 1, "q")
    with pytest.raises(OverQuota, match="at most 1 pages of tenant 'red', got 2"):
        rig.kv.hand_off(opened.sequence, "q")
    rig.kv.set_quota(RED, 4, "q")
    blocker = rig.prefilled([9] * 3 * PAGE, "q")
    handoff = rig.kv.hand_off(opened.sequence, "q")
    assert rig.handoff_state(handoff) == "reserving"
    rig.kv.set_quota(RED, 1, "q")
    rig.kv.step()
    [notice] = rig.kv.step().notices
    assert (notice.kind, notice.handoff, notice.code) == ("aborted", handoff, "over_quota")
    rig.kv.step(grow=[opened.sequence], close=[blocker.sequence])
    assert rig.length(opened.sequence) == len(text(1)) + 1


def test_pages_that_an_aborted_handoff_held_are_no_longer_charged_once_it_has_ended(make_rig: MakeRig) -> None:
    """The simulator's find: nothing of the sequence was in the index, its root had left it, and with it went the account to credit."""
    rig = make_rig(ManagerConfig(pools=(PoolConfig("A", 8, page_size=16), PoolConfig("B", 8, page_size=16))))
    opened = rig.prefilled(range(10), "A", tenant=b"red")
    rig.kv.hand_off(opened.sequence, "B")
    rig.kv.close(opened.sequence)
    rig.kv.set_quota(b"red", 1)
    with pytest.raises(OverQuota):
        rig.kv.open(range(10), "A", tenant=b"red", chunk=10)
    rig.ack("B")
    rig.ack("A")
    assert rig.kv.open(range(10), "A", tenant=b"red", chunk=10).length == 10


def test_quotas_are_bounded_in_number(make_rig: MakeRig) -> None:
    rig = make_rig(small(quotas_max=1))
    rig.kv.set_quota(RED, 1)
    rig.kv.set_quota(RED, 2)
    with pytest.raises(TooMany):
        rig.kv.set_quota(BLUE, 1)
    with pytest.raises(Unknown):
        rig.kv.set_quota(RED, 1, "nowhere")


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: SetQuota(RED, -1), "quota.pages"),
        (lambda: SetQuota(RED, 1.5), "quota.pages"),
        (lambda: SetQuota(b"x" * 257, 1), "quota.tenant"),
        (lambda: SetQuota(5, 1), "quota.tenant"),
        (lambda: SetQuota(RED, 1, 5), "quota.pool"),
        (lambda: Flush(b"x" * 257), "flush.tenant"),
        (lambda: Flush(None), "flush.tenant"),
        (lambda: PoolConfig("p", 1, tenant_quota=-2), "pool.tenant_quota"),
    ],
)
def test_malformed_values_name_their_field(make: Callable[[], object], field: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        make()
    assert caught.value.field == field


# --- flush -----------------------------------------------------------------------------------------------------------------------


def test_what_is_flushed_is_found_by_nobody_and_free_once_acknowledged(rig: Rig) -> None:
    """FEATURES.md c: flush of one tenant. Through quarantine, as any page that is freed."""
    finished(rig, 1, 2)
    finished(rig, 1, tenant=BLUE)
    assert rig.kv.flush(RED) == 2
    assert (rig.counts("p").cached, rig.counts("p").quarantined) == (1, 2)
    rig.ack("p")
    assert rig.counts("p").free == 7
    assert cached(rig, 1, 2) == 0
    assert cached(rig, 1, tenant=BLUE) == 1


def test_open_sequences_go_on_unlisted(rig: Rig) -> None:
    """They keep what they hold; nobody shares it, also not what they compute from now on."""
    opened = rig.prefilled(text(1, 2), "p", tenant=RED)
    table = rig.table(opened.sequence)
    assert rig.kv.flush(RED) == 0
    rig.kv.grow(opened.sequence, 40)
    rig.kv.append_tokens(opened.sequence, [7] * 40)
    rig.write(opened.sequence)
    assert rig.table(opened.sequence)[:3] == table
    assert cached(rig, 1, 2) == 0
    rig.kv.close(opened.sequence)
    rig.ack("p")
    assert (rig.counts("p").free, rig.counts("p").cached) == (8, 0)


def test_pages_that_two_flushed_sequences_share_stay_shared(rig: Rig) -> None:
    one = rig.prefilled(text(1, 2), "p", tenant=RED).sequence
    other = rig.prefilled(text(1, 2), "p", tenant=RED).sequence
    rig.kv.flush(RED)
    rig.kv.truncate(other, 20)  # it will write into its second page: that must not be the other's
    assert rig.table(other)[1] != rig.table(one)[1]
    rig.kv.close(one)
    rig.ack("p")
    assert rig.counts("p").used == 2


def test_a_prompt_computed_after_the_flush_is_shared_again(rig: Rig) -> None:
    finished(rig, 1)
    rig.kv.flush(RED)
    finished(rig, 1)
    assert cached(rig, 1) == 1


def test_a_flush_ends_pins_and_leaves_waiting_prompts(rig: Rig) -> None:
    finished(rig, 1, 2)
    rig.kv.pin(text(1), "p", tenant=RED)
    waiting = rig.kv.enqueue(text(1, 2), "p", tenant=RED)
    rig.kv.flush(RED)
    assert rig.kv.pins() == []
    assert list(rig.state.waiting) == [waiting]
    rig.ack("p")
    finished(rig, 1, 2)
    finished(rig, 3, tenant=BLUE)
    take(rig, 6, BLUE)
    assert cached(rig, 1, 2) == 2


def test_a_handoff_under_way_survives_a_flush_of_either_pool(make_rig: MakeRig) -> None:
    for pool in "pq":
        rig = make_rig(ManagerConfig(pools=tuple(PoolConfig(name, 6, page_size=PAGE) for name in "pq")))
        rig.kv.close(rig.prefilled(text(1), "q", tenant=RED).sequence)
        opened = rig.prefilled(text(1, 2), "p", tenant=RED)
        handoff = rig.kv.hand_off(opened.sequence, "q")
        rig.kv.flush(RED, pool)
        rig.ack("q", pulled=[handoff])
        assert rig.state.sequences[opened.sequence].pool == 1
        rig.kv.close(opened.sequence)
        for name in "pq":
            rig.ack(name)
        counts = [rig.counts(name) for name in "pq"]
        assert [each.free + each.cached for each in counts] == [6, 6]


def test_a_handoff_that_shares_flushed_pages_publishes_them_no_more(make_rig: MakeRig) -> None:
    """The simulator's find: once resident it published a page again that another sequence held unlisted. When it closed, the page could be
    evicted under that one, and it might be written into by a truncation."""
    rig = make_rig(ManagerConfig(pools=tuple(PoolConfig(name, 6, page_size=PAGE) for name in "pq")))
    holder = rig.prefilled(text(1), "q", tenant=RED)
    moved = rig.prefilled(text(1, 2), "p", tenant=RED)
    handoff = rig.kv.hand_off(moved.sequence, "q")
    rig.kv.flush(RED, "q")
    state = rig.state
    assert state_digest(load_snapshot(rig.config, snapshot(state))) == state_digest(state)
    rig.ack("q", pulled=[handoff])
    assert rig.state.sequences[moved.sequence].pool == 1
    shared = rig.table(moved.sequence)[0]
    assert rig.table(holder.sequence)[0] == shared
    rig.write(moved.sequence)
    assert not rig.state.pool("q").prefix.pages_indexed
    rig.kv.step(truncate=[(moved.sequence, 1)])
    assert rig.table(moved.sequence)[0] != shared  # a copy: the page is somebody else's too
    rig.kv.close(moved.sequence)
    rig.kv.close(holder.sequence)
    rig.ack("q")
    assert rig.counts("q").free == 6


def test_flush_and_quota(rig: Rig) -> None:
    """What open sequences hold is charged until they close."""
    finished(rig, 1, 2)
    sequence = take(rig, 1)
    rig.kv.set_quota(RED, 3)
    rig.kv.flush(RED)
    assert usage(rig)[RED] == (1, 3)
    rig.kv.close(sequence)
    assert usage(rig)[RED] == (0, 3)
    with pytest.raises(Unknown):
        rig.kv.flush(RED, "nowhere")
    assert rig.kv.flush(b"nobody") == 0


# --- against a model -------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(
    day=st.lists(
        st.one_of(
            *[st.tuples(st.just("open"), st.lists(st.integers(1, 2), min_size=1, max_size=3), st.sampled_from((RED, BLUE)), st.booleans())]
            * 4,
            st.tuples(st.just("close"), st.integers(0, 9)),
            st.tuples(st.just("quota"), st.sampled_from((RED, BLUE, None)), st.one_of(st.none(), st.integers(0, 7))),
            st.tuples(st.just("flush"), st.sampled_from((RED, BLUE))),
            st.tuples(st.just("reload")),
        ),
        min_size=10,
        max_size=40,
    )
)
def test_nobody_has_more_than_its_quota_and_nobody_pays_for_another(day: list[tuple[Any, ...]]) -> None:
    """The rule as a model of sets of pages would tell it; that counts are right is checked by `check_invariants` after each command."""
    config = small(7)
    kv = KVManager(config, clock=lambda: 0, checked=True)
    worker = kv.join("w", "p", "bf16")
    opened: dict[int, bytes] = {}
    quotas: dict[bytes, int | None] = {}
    default: int | None = None

    def pages(tenant: bytes) -> tuple[set[int], set[int]]:
        """What a tenant's sequences hold, and all it has."""
        held = {page for each, owner in opened.items() if owner == tenant for page in kv.state.tables.pages_of(each).tolist()}
        indexed = {page for node in kv.state.pool("p").prefix.nodes_of(tenant) for page in node.pages}
        return held, held | indexed

    for action, *rest in day:
        if action == "open":
            prompt, tenant, stays = rest
            others = BLUE if tenant == RED else RED
            quota = quotas[tenant] if quotas.get(tenant) is not None else default
            held, has = pages(tenant)
            _, theirs = pages(others)
            try:
                made = kv.open(text(*prompt), "p", chunk=1 << 20, tenant=tenant, wait=False)
            except OverQuota as error:
                assert quota is not None
                assert error.details["needed"] > quota
                assert len(held) + len(prompt) + 1 > quota
                assert pages(tenant) == (held, has)
                continue
            except OutOfPages:
                continue
            opened[made.sequence] = tenant
            held, now = pages(tenant)
            assert quota is None or len(now) <= quota
            if len(theirs) > len(pages(others)[1]):
                assert kv.state.pool("p").counts().free == 0  # others give way only to a full pool
            kv.ack(worker, kv.state.version, ids=[made.sequence], tokens=[made.length])
            if not stays:
                kv.close(made.sequence)
                del opened[made.sequence]
        elif action == "close" and opened:
            sequence = list(opened)[rest[0] % len(opened)]
            kv.close(sequence)
            del opened[sequence]
        elif action == "quota":
            kv.set_quota(*rest)
            if rest[0] is None:
                default = rest[1]
            else:
                quotas[rest[0]] = rest[1]
        elif action == "flush":
            kv.flush(rest[0])
            assert not [node for node in kv.state.pool("p").prefix.nodes_of(rest[0]) if node.ids]
        elif action == "reload":
            digest = state_digest(kv.state)
            kv.state = load_snapshot(config, snapshot(kv.state))
            assert state_digest(kv.state) == digest
        kv.ack(worker, kv.state.version)
    for sequence in opened:
        kv.close(sequence)
    kv.ack(worker, kv.state.version)
    counts = kv.state.pool("p").counts()
    assert counts.free + counts.cached == counts.total


def test_wrong_pools_name_themselves(rig: Rig) -> None:
    with pytest.raises(KVError, match="nowhere"):
        rig.kv.flush(RED, "nowhere")
