"""Errors that others cause, each with a wire code and the numbers that explain it.

A `KVError` crosses the wire as `{code, text, details}` and is raised again on the client as the same class, so a caller writes one
`except` for the embedded manager and for the client. `InvariantBroken` is the exception: it is this project's own fault.
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = [
    "BadMessage",
    "ChecksumMismatch",
    "Fenced",
    "Internal",
    "InvalidValue",
    "InvariantBroken",
    "JournalCorrupt",
    "JournalFailed",
    "JournalMismatch",
    "KVError",
    "LayoutMismatch",
    "ManagerUnreachable",
    "NoConversion",
    "NotCached",
    "OutOfPages",
    "OverPinBudget",
    "OverQuota",
    "PoolDrains",
    "PoolNotReady",
    "PrefixPending",
    "PullFailed",
    "ReplicaGap",
    "SequenceTooLarge",
    "StaleEpoch",
    "StaleStep",
    "TooMany",
    "TransportUnavailable",
    "Unknown",
    "WrongState",
    "error_from_wire",
]


class KVError(Exception):
    """Base of every error that a caller, a worker or a peer can cause. `details` holds plain ints and strings."""

    code: ClassVar[str] = "error"

    def __init__(self, text: str, **details: int | str) -> None:
        super().__init__(text)
        self.text = text
        self.details: dict[str, Any] = details

    def to_wire(self) -> dict[str, Any]:
        return {"code": self.code, "text": self.text, "details": self.details}


class InvalidValue(KVError):
    """A field has the wrong type or lies outside its limits. Raised before anything is allocated."""

    code = "invalid_value"

    def __init__(self, field: str, expected: str, got: object) -> None:
        super().__init__(f"{field}: expected {expected}, got {got}", field=field, expected=expected, got=str(got)[:200])
        self.field = field


class BadMessage(KVError):
    """Bytes from the wire are not a message of this protocol. Costs its sender this reply and nobody else anything."""

    code = "bad_message"


class Unknown(KVError):
    """An id names nothing that is alive: a sequence that was closed or lost, a worker that left, a pool never configured."""

    code = "unknown"

    def __init__(self, kind: str, ident: object) -> None:
        super().__init__(f"{kind}: {ident} is not known (never opened, closed, or lost)", kind=kind, ident=str(ident)[:200])


class WrongState(KVError):
    """The thing exists, and cannot do this now: growing a sealed sequence, handing off one that is being handed off."""

    code = "wrong_state"

    def __init__(self, kind: str, ident: object, expected: str, got: str) -> None:
        super().__init__(f"{kind} {ident}: expected {expected}, got {got}", kind=kind, ident=str(ident)[:200], expected=expected, got=got)


class OutOfPages(KVError):
    """The pool has too few pages now; more come back by closing sequences or when workers acknowledge (`quarantined`)."""

    code = "out_of_pages"

    def __init__(self, pool: str, needed: int, free: int, quarantined: int) -> None:
        super().__init__(
            f"pool {pool}: expected {needed} free pages, got {free} (free or evictable; {quarantined} more wait for acknowledgements)",
            pool=pool,
            needed=needed,
            free=free,
            quarantined=quarantined,
        )


class PrefixPending(KVError):
    """Not an error but a hint to come again: `sequence` is computing `tokens` tokens of this prompt that could be shared soon.

    Nothing was taken. Ask again at the next step: the refusal ends by itself, when the tokens are there, or when the sequence ends or
    makes no progress for `inflight_wait_ms`. An open with wait=False is never refused with it, and computes the tokens again.
    """

    code = "prefix_pending"

    def __init__(self, pool: str, sequence: int, tokens: int) -> None:
        super().__init__(
            f"pool {pool}: {tokens} more tokens of this prompt are being computed by sequence {sequence}; ask again, or do not wait",
            pool=pool,
            sequence=sequence,
            tokens=tokens,
        )


class NotCached(KVError):
    """No page of the prefix is in the pool's index now: there is nothing to pin."""

    code = "not_cached"

    def __init__(self, pool: str) -> None:
        super().__init__(f"pool {pool}: expected a prefix with cached pages, got one without", pool=pool)


class OverPinBudget(KVError):
    """With this pin a tenant, or all of them together (tenant "*"), would hold more distinct pages than the budget of the pool."""

    code = "over_pin_budget"

    def __init__(self, pool: str, tenant: bytes | None, needed: int, budget: int) -> None:
        name = "*" if tenant is None else tenant.decode(errors="replace")
        whose = "of all tenants" if tenant is None else f"of tenant {name!r}"
        super().__init__(
            f"pool {pool}: expected at most {budget} pinned pages {whose}, got {needed}",
            pool=pool,
            tenant=name,
            needed=needed,
            budget=budget,
        )


class OverQuota(KVError):
    """The tenant would have more pages of the pool than its quota, even with all of its own evicted that can go."""

    code = "over_quota"

    def __init__(self, pool: str, tenant: bytes, needed: int, quota: int) -> None:
        name = tenant.decode(errors="replace")
        super().__init__(
            f"pool {pool}: expected at most {quota} pages of tenant {name!r}, got {needed}",
            pool=pool,
            tenant=name,
            needed=needed,
            quota=quota,
        )


class SequenceTooLarge(KVError):
    """The sequence could not fit its pool even if it were alone. Refused at once: waiting would never help."""

    code = "sequence_too_large"

    def __init__(self, pool: str, needed: int, total: int) -> None:
        super().__init__(f"pool {pool}: expected at most {total} pages, got a sequence of {needed}", pool=pool, needed=needed, total=total)


class TooMany(KVError):
    """A bounded table (sequences, workers, clients, handoffs) is full."""

    code = "too_many"

    def __init__(self, what: str, limit: int) -> None:
        super().__init__(f"{what}: expected at most {limit}", what=what, limit=limit)


class PoolNotReady(KVError):
    """The pool has fewer live workers than its config asks for, or one that is fenced and not yet known dead."""

    code = "pool_not_ready"

    def __init__(self, pool: str, expected: int, live: int, fenced: int) -> None:
        super().__init__(
            f"pool {pool}: expected {expected} live workers, got {live} live and {fenced} fenced",
            pool=pool,
            expected=expected,
            live=live,
            fenced=fenced,
        )


class PoolDrains(KVError):
    """The pool is being emptied: nothing new comes into it."""

    code = "pool_draining"

    def __init__(self, pool: str) -> None:
        super().__init__(f"pool {pool}: expected one that takes new sequences, got one that is being drained", pool=pool)


class LayoutMismatch(KVError):
    """Two memories do not hold the same bytes for the same tokens: fingerprints differ."""

    code = "layout_mismatch"

    def __init__(self, what: str, expected: str, got: str) -> None:
        super().__init__(f"{what}: expected layout {expected}, got {got}", what=what, expected=expected, got=got)


class NoConversion(LayoutMismatch):
    """The latents are the same, and stored in another format, which nobody converts from: raised where pages would have to move."""

    code = "no_conversion"

    def __init__(self, what: str, source: str, target: str) -> None:
        text = f"{what}: expected a target that stores or converts {source or 'what names no format'}, got one of {target or 'no format'}"
        KVError.__init__(self, text, what=what, expected=source, got=target)


class TransportUnavailable(KVError):
    """No way to move pages between two workers, or not the one that was asked for. `details["reason"]` says what to install or set."""

    code = "transport_unavailable"

    def __init__(self, transport: str, reason: str) -> None:
        super().__init__(f"transport {transport}: {reason}"[:2000], transport=transport, reason=reason[:1900])


class PullFailed(KVError):
    """Pages did not arrive. The transfer has ended: nothing writes into the target pages any more, whatever lies in them."""

    code = "pull_failed"

    def __init__(self, transport: str, reason: str) -> None:
        super().__init__(f"pull over {transport}: {reason}"[:500], transport=transport, reason=reason[:400])


class ChecksumMismatch(PullFailed):
    """Pages arrived with other bytes than their source had. `page` is the source's page id."""

    code = "checksum_mismatch"

    def __init__(self, transport: str, page: int, expected: int, got: int) -> None:
        KVError.__init__(
            self,
            f"pull over {transport}: page {page}: expected checksum {expected:016x}, got {got:016x}",
            transport=transport,
            page=page,
            expected=f"{expected:016x}",
            got=f"{got:016x}",
        )


class Fenced(KVError):
    """The worker's lease ended or its epoch is void: it must stop touching pages, drain and join again."""

    code = "fenced"


class StaleStep(KVError):
    """A worker was asked to run a step at or below a version it already acknowledged; its pages may be somebody else's by now."""

    code = "stale_step"

    def __init__(self, version: int, acked: int) -> None:
        super().__init__(f"step: expected a version above {acked} (acknowledged), got {version}", version=version, acked=acked)


class ReplicaGap(KVError):
    """A replica missed a batch, or its digest differs: it must load a snapshot, never guess."""

    code = "replica_gap"


class StaleEpoch(KVError):
    """It speaks from a life of the manager that this one does not continue, or from a part of it that was lost with its host.

    What a worker holds then is not what this manager believes: it must stop touching pages, drain and join again.
    """

    code = "stale_epoch"


class JournalFailed(KVError):
    """A batch could not be written (full disk, broken disk), so the command changed nothing. It may be sent again later."""

    code = "journal_failed"

    def __init__(self, folder: str, text: str) -> None:
        super().__init__(f"journal {folder}: {text}"[:1000], folder=folder)


class JournalCorrupt(KVError):
    """A journal is damaged in its middle: what follows is there, and cannot be trusted. A torn tail is not this: it is cut."""

    code = "journal_corrupt"

    def __init__(self, file: str, offset: int, expected: str, got: str) -> None:
        super().__init__(f"{file}, offset {offset}: expected {expected}, got {got}", file=file, offset=offset, expected=expected, got=got)


class JournalMismatch(KVError):
    """The journal belongs to a manager with another config. Names the difference; pools may only be added, at the end."""

    code = "journal_mismatch"

    def __init__(self, what: str, expected: object, got: object) -> None:
        super().__init__(f"{what}: expected {expected} as in the journal, got {got}", what=what, expected=str(expected), got=str(got))


class Internal(KVError):
    """The manager failed to decide this command, by a fault of its own; it changed nothing. The text is for a bug report."""

    code = "internal"


class ManagerUnreachable(KVError):
    """No reply within the time limit. The command may or may not have been applied: sending the same number again is safe."""

    code = "manager_unreachable"


class InvariantBroken(Exception):
    """Our own fault: the books do not add up. Carries the numbers; never caught inside this project."""


_BY_CODE: dict[str, type[KVError]] = {
    cls.code: cls
    for cls in (
        InvalidValue,
        BadMessage,
        Unknown,
        WrongState,
        NotCached,
        OutOfPages,
        OverPinBudget,
        OverQuota,
        PrefixPending,
        SequenceTooLarge,
        TooMany,
        PoolDrains,
        PoolNotReady,
        LayoutMismatch,
        NoConversion,
        TransportUnavailable,
        PullFailed,
        ChecksumMismatch,
        Fenced,
        StaleStep,
        StaleEpoch,
        JournalFailed,
        JournalCorrupt,
        JournalMismatch,
        ReplicaGap,
        Internal,
        ManagerUnreachable,
    )
}


def error_from_wire(code: str, text: str, details: dict[str, Any]) -> KVError:
    """The error a reply describes, as the class that `code` names; an unknown code gives a plain `KVError`."""
    cls = _BY_CODE.get(code, KVError)
    error = cls.__new__(cls)  # its __init__ would rebuild the text from arguments that did not travel
    KVError.__init__(error, text, **{str(key): value for key, value in details.items() if isinstance(value, (int, str))})
    if isinstance(error, InvalidValue):
        error.field = str(details.get("field", ""))
    return error
