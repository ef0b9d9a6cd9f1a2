"""Accounts: the pages of one pool that each tenant has, its quota of them, and in which order its own cached pages give way.

A page belongs to the one tenant whose sequences, handoffs or pins hold it, or in whose namespaces it is cached: pages are never shared across
tenants. Free and quarantined pages are nobody's. A page that several sequences of a tenant share counts once.

Only tenants with a quota have an account, given to each by name or to everybody by default. So whoever sets none pays nothing.
"""

from __future__ import annotations

from kvmanager.pages.eviction import ListedOrder

__all__ = ["Account", "Accounts", "tenant_of"]


def tenant_of(namespace: bytes) -> bytes:
    """The tenant salt in a namespace (see `state.encode_namespace`)."""
    return namespace[4 : 4 + int.from_bytes(namespace[:2], "little")]


class Account:
    """One tenant's. `own` says that the quota was set for it, and is not everybody's; `roots` counts its namespaces in the index."""

    __slots__ = ("order", "own", "pages", "quota", "roots", "tenant")

    def __init__(self, tenant: bytes, quota: int, own: bool) -> None:
        self.tenant = tenant
        self.quota = quota
        self.own = own
        self.pages = 0
        self.roots = 0
        self.order = ListedOrder()


class Accounts:
    """The accounts of one pool."""

    __slots__ = ("everybody", "of")

    def __init__(self) -> None:
        self.everybody = -1  # pages for each tenant without a quota of its own; -1: none
        self.of: dict[bytes, Account] = {}

    def find(self, tenant: bytes) -> Account | None:
        """The tenant's account if it has one, or would have one as soon as it had a page. Changes nothing."""
        account = self.of.get(tenant)
        if account is None and self.everybody >= 0:
            account = Account(tenant, self.everybody, False)
        return account

    # --- changes: called by apply only ---------------------------------------------------------------------------------------

    def enter(self, tenant: bytes) -> Account | None:
        """The tenant has one more namespace in the index."""
        account = self.find(tenant)
        if account is not None:
            self.of[tenant] = account
            account.roots += 1
        return account

    def settle(self, account: Account) -> None:
        """Forget an account that is like that of a tenant never seen."""
        if not account.own and not account.pages and not account.roots:
            self.of.pop(account.tenant, None)
