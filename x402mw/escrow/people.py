"""What entries say of tenants, agents, keys and webhooks, and where their rows say otherwise (I20).

Pure, as `facts` is. Whoever registers alone enters nothing, so of an agent that no entry names it
is known only that it came without a tenant of its own, a referrer and a handle.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from x402mw.escrow import modes
from x402mw.escrow.facts import Row, differ, hash_content
from x402mw.escrow.rules.values import Escrow, agent_account

if TYPE_CHECKING:
    from x402mw.escrow.books import Entry

_PUBLIC = {tenant: mode for mode, tenant in modes.PUBLIC.items()}
_FIRST = {**_PUBLIC, "operator": modes.LIVE}
"""The tenants that every database begins with."""

_NEW_WORDS = frozenset({"handle", "claim_until", "carry"})
"""What entries of a lock or of an agent say since those of agents say their handles."""


class People:
    """Sees every entry that is about no escrow, then every row; says what is wrong."""

    def __init__(self, assets: Mapping[str, str]) -> None:
        """The assets of all accounts."""
        self._assets = assets
        self._modes = dict(_FIRST)
        self._agents: dict[str, dict[str, Any]] = {}
        self._revoked: dict[str, int] = {}
        self._keys: dict[str, dict[str, Any]] = {}
        self._with_first: set[str] = set()
        self._hooks: dict[str, dict[str, Any]] = {}
        self._owners: dict[str, str] = {}
        self._handles_since: int | None = None
        self._seeing: dict[str, Callable[[Entry, Mapping[str, Any]], None]] = {
            "tenant_created": self._see_tenant,
            "agent_created": self._see_agent,
            "agent_revoked": self._see_agent_end,
            "key_created": self._see_key,
            "key_rotated": self._see_rotation,
            "key_revoked": self._see_key_end,
            "webhook_created": self._see_webhook,
        }

    def see(self, entry: "Entry", data: Mapping[str, Any]) -> None:
        """The next entry; `facts` catches what it may raise."""
        if self._handles_since is None and not _NEW_WORDS.isdisjoint(data):
            self._handles_since = entry.created_at
        if entry.kind in self._seeing:
            self._seeing[entry.kind](entry, data)

    def _see_tenant(self, _entry: "Entry", data: Mapping[str, Any]) -> None:
        self._modes[data["tenant"]] = data["mode"]

    def _see_agent(self, entry: "Entry", data: Mapping[str, Any]) -> None:
        said = {"tenant": data["tenant"], "referrer": data["referrer"] or None}
        said |= {"handle": data["handle"]} if "handle" in data else {}
        self._agents[entry.actor or ""] = {**said, "created_at": entry.created_at}

    def _see_agent_end(self, entry: "Entry", data: Mapping[str, Any]) -> None:
        self._revoked[data["agent_id"]] = entry.created_at

    def _see_key(self, entry: "Entry", data: Mapping[str, Any]) -> None:
        agent = data.get("agent_id", entry.actor)
        said = {"scopes": " ".join(data["scopes"])} if "scopes" in data else {}
        self._new_key(data["key_id"], agent, **said)

    def _see_rotation(self, entry: "Entry", data: Mapping[str, Any]) -> None:
        grace, now = data["grace_seconds"], entry.created_at
        ends = {"expires_at": now + grace} if grace else {"revoked_at": now}
        self._end_key(entry, data["key_id"], ends)
        self._new_key(data["successor"], entry.actor)

    def _see_key_end(self, entry: "Entry", data: Mapping[str, Any]) -> None:
        self._end_key(entry, data["key_id"], {"revoked_at": entry.created_at})

    def _new_key(self, key_id: str, agent: str | None, **said: Any) -> None:
        # All keys die with their agent; only the operator makes one after that.
        late = {"revoked_at": None} if agent in self._revoked else {}
        self._keys[key_id] = {"agent_id": agent, **said, **late}

    def _end_key(self, entry: "Entry", key_id: str, ends: Mapping[str, int]) -> None:
        self._keys[key_id] = {**self._keys.get(key_id, {}), "agent_id": entry.actor, **ends}

    def _see_webhook(self, entry: "Entry", data: Mapping[str, Any]) -> None:
        said = {"url_sha256": data["url_sha256"]} if "url_sha256" in data else {}
        self._hooks[data["webhook_id"]] = {"agent_id": entry.actor, **said}

    # Rows, once all entries were seen; tenants first, journals before escrows.

    def see_tenant(self, row: Row) -> Iterator[str]:
        """Who runs agents."""
        said = self._modes.get(row["tenant"])
        if said is None:
            yield f"I20 tenant {row['tenant']} is in no entry"
        elif said != row["mode"]:
            yield f"I20 tenant {row['tenant']} has another mode than its entry says"

    def see_agent(self, row: Row) -> Iterator[str]:
        """An agent: whence it came, what it is called, its end, and what money it has."""
        name = row["agent_id"]
        said = self._agents.pop(name, None)
        if said is None:
            alone = row["tenant"] in _PUBLIC and row["referrer"] is None
            since = self._handles_since
            unsaid = row["handle"] is not None and since is not None and row["created_at"] >= since
            if not alone or unsaid:
                yield f"I20 agent {name} came with what no entry says"
        yield from differ(f"agent {name}", row, said or {})
        if row["revoked_at"] != self._revoked.get(name):
            yield f"I20 agent {name} has another end than its entries say"
        asset = self._assets.get(agent_account(name))
        if asset is None or modes.mode_of(asset) != self._modes.get(row["tenant"]):
            yield f"I20 agent {name} has money of another mode than its tenant"

    def see_key(self, row: Row) -> Iterator[str]:
        """An API key: whose it is, and its end. Only the first of each agent is in no entry."""
        agent, said = row["agent_id"], self._keys.pop(row["key_id"], None)
        if said is None:
            if agent in self._with_first:
                yield f"I20 key {row['key_id']} is in no entry"
            self._with_first.add(agent)
        end = {"revoked_at": self._revoked.get(agent), "expires_at": None}
        yield from differ(f"key {row['key_id']}", row, {**end, **(said or {})})

    def see_webhook(self, row: Row) -> Iterator[str]:
        """A webhook: who is told, and where."""
        name, shown = row["webhook_id"], {**row, "url_sha256": hash_content(row["url"])}
        said = self._hooks.get(name)
        if said is None:
            yield f"I20 webhook {name} is in no entry"
        yield from differ(f"webhook {name}", shown, said or {})

    def see_journal(self, row: Row) -> Iterator[str]:
        """A provider's book; its sessions tell whose it is."""
        self._owners[row["journal"]] = row["agent_id"]
        yield from ()

    def see_escrow(self, escrow: Escrow) -> Iterator[str]:
        """A session, whose terms name both its provider and its journal."""
        if escrow.journal is not None and self._owners.get(escrow.journal) != escrow.provider:
            yield f"I20 the journal of {escrow.escrow_id} belongs to another agent"

    def end(self) -> Iterator[str]:
        """There are no more rows: what entries speak of and is gone."""
        for name in sorted(self._agents.keys() | self._keys.keys()):
            yield f"I20 the row of {name} is gone"
