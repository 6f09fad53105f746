"""One writing transaction of the ledger: decide first, write at the end, in a few set statements.

Every writing transaction starts by locking the `service` row, so there is one writer at a time and
entries and changes are numbered in the order in which they become visible. Operations only
collect what they want (`save`, `post`); `flush` writes it, `discard` forgets it. A refused
operation therefore leaves no row different (I10).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

from sqlalchemy import Insert, Table, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.escrow import schema
from x402mw.escrow.books import Entry, hash_entry, write_data
from x402mw.escrow.events.marks import mark
from x402mw.escrow.keys import Signer
from x402mw.escrow.rules.money import balance_changes, transfers
from x402mw.escrow.rules.table import Event
from x402mw.escrow.rules.values import CHANGING, PAYING, Escrow, Transfer
from x402mw.escrow.sets import Do, Set, Shape, write
from x402mw.escrow.settings import Settings
from x402mw.escrow.terms import Extra, hash_terms

LOCK = "lock"
"""The kind of an escrow's first entry."""

OPERATOR = "operator"
"""The actor of what is done with the operator's commands, and the tenant whose admin keys book."""

LOW_BALANCE_PART = 10
_SILENT = Event.TOKEN.value
_PROVIDERS_OWN = Event.REDEEM.value
"""Only the provider redeems, so its entries need not name it."""
_CHANGES = attrgetter(*CHANGING, "escrow_id")
_PAID = attrgetter(*PAYING, "escrow_id")
_BESIDE = itemgetter(*(Escrow._fields.index(name) for name in CHANGING if name not in PAYING))


@dataclass(slots=True)
class Service:
    """The `service` row: who this escrow is, and the heads of its sequences."""

    id: int
    network: str
    root_key: str
    entry_seq: int
    entry_hash: str
    change_seq: int
    heartbeat: int
    up_since: int
    key_serial: int


_LOCK = select(schema.service).with_for_update()
_FIELDS = tuple(field.name for field in fields(Service))
_STATE = attrgetter(*_FIELDS)
# Which service this is stays as it was.
_HEADS = _FIELDS[3:]

_MOVES = Entry._fields.index("transfers")

_NEW_ACCOUNT = Shape(Do.INSERT, schema.accounts, ("account", "asset", "balance"))
_NEW_ESCROW = Shape(Do.INSERT, schema.escrows, Escrow._fields)
_ENTRY_COLUMNS = (
    *(*Entry._fields[:_MOVES], *Entry._fields[_MOVES + 1 :]),
    *("previous_hash", "hash"),
)
_NEW_ENTRY = Shape(Do.INSERT, schema.entries, _ENTRY_COLUMNS)
_NEW_CHECKPOINT = Shape(Do.INSERT, schema.checkpoints, ("seq", "hash", "created_at", "signature"))
_NEW_POSTING = Shape(Do.INSERT, schema.postings, ("seq", "line", *Transfer._fields))
_BALANCE = Shape(Do.ADD, schema.accounts, ("asset", "balance", "account"))
_ESCROW = Shape(Do.UPDATE, schema.escrows, (*CHANGING, "escrow_id"))
_PAID_ESCROW = Shape(Do.UPDATE, schema.escrows, (*PAYING, "escrow_id"))
_SERVICE = Shape(Do.UPDATE, schema.service, (*_HEADS, "id"))


@cache
def _insert(table: Table) -> Insert:
    """Made once: to build a statement costs more than to run it."""
    return insert(table)


class Transaction:
    """What an operation sees: the moment `now` (whole seconds), the service row, and the rows."""

    def __init__(
        self,
        connection: AsyncConnection,
        service: Service,
        *,
        now: int,
        settings: Settings,
        signer: Signer,
    ) -> None:
        self.connection = connection
        self.service = service
        self.now = now
        self.settings = settings
        self.signer = signer
        self.actor: str | None = None
        self.checkpoint_wanted = False
        self._clean = _STATE(service)
        self._entries: list[Entry] = []
        self._new_escrows: dict[str, Escrow] = {}
        self._changed_escrows: dict[str, Escrow] = {}
        self._changed_beside: set[str] = set()

    @classmethod
    async def begin(
        cls, connection: AsyncConnection, *, now: int, settings: Settings, signer: Signer
    ) -> "Transaction":
        """Takes the writer's lock and reads the service row."""
        # On SQLite BEGIN IMMEDIATE has taken it already, and FOR UPDATE is left out.
        row = (await connection.execute(_LOCK)).one()
        service = Service(**row._mapping)  # noqa: SLF001 (its documented name)
        return cls(connection, service, now=now, settings=settings, signer=signer)

    @contextmanager
    def by_time(self) -> Iterator[None]:
        """Within, what is entered has no actor: time does it, whoever sees it first."""
        actor, self.actor = self.actor, None
        try:
            yield
        finally:
            self.actor = actor

    # What an operation wants.

    def lock(self, empty: Escrow, locked: Escrow, extra: Extra | None = None) -> Escrow:
        """Keeps a new escrow; its entry holds one hash over all that is fixed from here on."""
        if locked.low_balance is None:
            locked = locked._replace(low_balance=locked.amount // LOW_BALANCE_PART)
        said = {"terms": hash_terms(locked, extra), "expires_at": locked.expires_at}
        said |= {"claim_until": locked.claim_until} if extra is None else {"carry": "0"}
        return self.save(empty, locked, LOCK, data=said)

    def save(
        self,
        before: Escrow,
        after: Escrow,
        kind: str,
        effective_at: int | None = None,
        *,
        actor: str | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> Escrow:
        """Keeps the new state of an escrow and enters what happened, with the money it moves.

        A renewed token is no news: it changes the row and enters nothing.
        """
        self.service.change_seq += 1
        last = before.last_entry
        if kind != _SILENT:
            moves = tuple(transfers(before, after))
            says = mark(before, after, data)
            self._enter(kind, moves, after.asset, after.escrow_id, effective_at, actor, says, last)
            last = self.service.entry_seq
        after = after._replace(change=self.service.change_seq, last_entry=last)
        if not before.opened:
            after = after._replace(opened=after.change)
            self._new_escrows[after.escrow_id] = after
        else:
            self._changed_escrows[after.escrow_id] = after
            # A column that is written is written in its indexes too, changed or not.
            if _BESIDE(after) != _BESIDE(before):
                self._changed_beside.add(after.escrow_id)
        return after

    def post(
        self,
        kind: str,
        moves: Iterable[Transfer],
        asset: str,
        *,
        actor: str | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Enters money that moves outside of escrows, unless none would move."""
        if lines := tuple(moves):
            self._enter(kind, lines, asset, actor=actor, data=data)

    def note(
        self, kind: str, *, actor: str | None = None, data: Mapping[str, Any] | None = None
    ) -> None:
        """Enters what happened outside of escrows and moved no money: a key revoked, say.

        What happens to an escrow goes through `save`, also if it leaves it as it was.
        """
        self._enter(kind, (), self.settings.asset.code, actor=actor, data=data or {})

    def _enter(
        self,
        kind: str,
        moves: tuple[Transfer, ...],
        asset: str,
        escrow_id: str | None = None,
        effective_at: int | None = None,
        actor: str | None = None,
        data: Mapping[str, Any] | None = None,
        before: int | None = None,
    ) -> None:
        self.service.entry_seq += 1
        at = self.now if effective_at is None else effective_at
        if actor is None and kind != _PROVIDERS_OWN:
            actor = self.actor
        says = None if data is None else write_data(data)
        self._entries.append(
            Entry(
                self.service.entry_seq, kind, escrow_id, asset, self.now, at, moves,
                actor, says, before,
            )
        )  # fmt: skip

    def discard(self) -> None:
        """Forgets everything since the last flush."""
        self.service = Service(*self._clean)
        self._forget()

    def _forget(self) -> None:
        self._entries.clear()
        self._new_escrows.clear()
        self._changed_escrows.clear()
        self._changed_beside.clear()

    # Rows.

    async def open_account(self, account: str, asset: str) -> None:
        """Makes an empty account."""
        await write(self.connection, Set(_NEW_ACCOUNT, [(account, asset, 0)]))

    async def insert(self, table: Table, *rows: dict[str, Any]) -> None:
        """Writes new rows now; only after everything that might refuse was decided."""
        if rows:
            await self.connection.execute(_insert(table), list(rows))

    # Writing.

    async def flush(self) -> None:
        """Writes everything collected so far."""
        await self._write_new_escrows()
        await self._write_entries()
        self._clean = _STATE(self.service)
        self._forget()

    async def _write_new_escrows(self) -> None:
        new = list(self._new_escrows.values())
        accounts = [(escrow.account, escrow.asset, 0) for escrow in new]
        await write(self.connection, Set(_NEW_ACCOUNT, accounts), Set(_NEW_ESCROW, new))

    async def _write_entries(self) -> None:
        """Writes entries, and all that they and their operations changed, at once."""
        changes = self._changes()
        chained = [self._chain(entry) for entry in self._entries]
        lines = [
            (entry.seq, line, *move)
            for entry in self._entries
            for line, move in enumerate(entry.transfers)
        ]
        paid, changed = [], []
        for name, escrow in self._changed_escrows.items():
            if name in self._changed_beside:
                changed.append(_CHANGES(escrow))
            else:
                paid.append(_PAID(escrow))
        checkpoints = self._checkpoints()
        state = _STATE(self.service)
        heads = [] if state == self._clean else [(*state[3:], self.service.id)]
        await write(
            self.connection,
            # The database refuses a balance below zero or another asset, whatever was decided.
            Set(_BALANCE, changes),
            Set(_NEW_ENTRY, chained),
            Set(_NEW_POSTING, lines),
            Set(_NEW_CHECKPOINT, checkpoints),
            Set(_PAID_ESCROW, paid),
            Set(_ESCROW, changed),
            Set(_SERVICE, heads),
        )

    def _changes(self) -> list[tuple[str, int, str]]:
        """Of which asset each account must be, and by how much its balance changes."""
        changes: dict[str, tuple[str, int, str]] = {}
        for asset in {entry.asset for entry in self._entries}:
            entries = (entry.transfers for entry in self._entries if entry.asset == asset)
            for account, change in balance_changes(chain.from_iterable(entries)).items():
                if account in changes:
                    raise ValueError(f"{account} cannot hold two assets")
                changes[account] = (asset, change, account)
        return [each for each in changes.values() if each[1]]

    def _checkpoints(self) -> list[tuple[int, str, int, str]]:
        """A checkpoint of the newest entry, if enough were written or somebody wants one."""
        service, every = self.service, self.settings.checkpoint_entries
        before = self._entries[0].seq - 1 if self._entries else service.entry_seq
        if before // every == service.entry_seq // every and not self.checkpoint_wanted:
            return []
        self.checkpoint_wanted = False
        seq, entry_hash = service.entry_seq, service.entry_hash
        return [(seq, entry_hash, self.now, self.signer.sign_checkpoint(seq, entry_hash, self.now))]

    def _chain(self, entry: Entry) -> tuple[Any, ...]:
        previous = self.service.entry_hash
        self.service.entry_hash = hash_entry(entry, previous)
        return (*entry[:_MOVES], *entry[_MOVES + 1 :], previous, self.service.entry_hash)
