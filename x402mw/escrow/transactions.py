"""One writing transaction of the ledger: decide first, write at the end, in a few set statements.

Every writing transaction starts by locking the `service` row, so there is one writer at a time and
entries and changes are numbered in the order in which they become visible. Operations only
collect what they want (`save`, `post`); `flush` writes it, `discard` forgets it. A refused
operation therefore leaves no row different (I10).
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.escrow import schema
from x402mw.escrow.books import Entry, hash_entry
from x402mw.escrow.keys import Signer
from x402mw.escrow.rules.money import balance_changes, transfers
from x402mw.escrow.rules.values import CHANGING, Escrow, Transfer
from x402mw.escrow.sets import Do, Set, Shape, write
from x402mw.escrow.settings import Settings

_CHANGES = attrgetter(*CHANGING, "escrow_id")


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

_NEW_ACCOUNT = Shape(Do.INSERT, schema.accounts, ("account", "asset", "balance"))
_NEW_ESCROW = Shape(Do.INSERT, schema.escrows, Escrow._fields)
_NEW_ENTRY = Shape(Do.INSERT, schema.entries, (*Entry._fields[:-1], "previous_hash", "hash"))
_NEW_POSTING = Shape(Do.INSERT, schema.postings, ("seq", "line", *Transfer._fields))
_BALANCE = Shape(Do.ADD, schema.accounts, ("balance", "account"))
_ESCROW = Shape(Do.UPDATE, schema.escrows, (*CHANGING, "escrow_id"))
_SERVICE = Shape(Do.UPDATE, schema.service, (*_HEADS, "id"))


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
        self._clean = _STATE(service)
        self._entries: list[Entry] = []
        self._new_escrows: dict[str, Escrow] = {}
        self._changed_escrows: dict[str, Escrow] = {}

    @classmethod
    async def begin(
        cls, connection: AsyncConnection, *, now: int, settings: Settings, signer: Signer
    ) -> "Transaction":
        """Takes the writer's lock and reads the service row."""
        # On SQLite BEGIN IMMEDIATE has taken it already, and FOR UPDATE is left out.
        row = (await connection.execute(_LOCK)).one()
        service = Service(**row._mapping)  # noqa: SLF001 (its documented name)
        return cls(connection, service, now=now, settings=settings, signer=signer)

    # What an operation wants.

    def save(
        self, before: Escrow, after: Escrow, kind: str, effective_at: int | None = None
    ) -> Escrow:
        """Keeps the new state of an escrow and posts the money that this moves."""
        self.service.change_seq += 1
        after = after._replace(change=self.service.change_seq)
        if not before.opened:
            after = after._replace(opened=after.change)
            self._new_escrows[after.escrow_id] = after
        else:
            self._changed_escrows[after.escrow_id] = after
        self.post(kind, transfers(before, after), after.asset, after.escrow_id, effective_at)
        return after

    def post(
        self,
        kind: str,
        moves: Iterable[Transfer],
        asset: str,
        escrow_id: str | None = None,
        effective_at: int | None = None,
    ) -> None:
        """Writes an entry, unless it would move nothing."""
        lines = tuple(moves)
        if not lines:
            return
        self.service.entry_seq += 1
        at = self.now if effective_at is None else effective_at
        self._entries.append(
            Entry(self.service.entry_seq, kind, escrow_id, asset, self.now, at, lines)
        )

    def discard(self) -> None:
        """Forgets everything since the last flush."""
        self.service = Service(*self._clean)
        self._forget()

    def _forget(self) -> None:
        self._entries.clear()
        self._new_escrows.clear()
        self._changed_escrows.clear()

    # Rows.

    async def open_account(self, account: str) -> None:
        """Makes an empty account."""
        await write(self.connection, Set(_NEW_ACCOUNT, [self._empty(account)]))

    def _empty(self, account: str) -> tuple[str, str, int]:
        return account, self.settings.asset.code, 0

    async def insert(self, table: Any, *rows: dict[str, Any]) -> None:
        """Writes new rows now; only after everything that might refuse was decided."""
        if rows:
            await self.connection.execute(insert(table), list(rows))

    # Writing.

    async def flush(self) -> None:
        """Writes everything collected so far."""
        await self._write_new_escrows()
        await self._write_entries()
        self._clean = _STATE(self.service)
        self._forget()

    async def _write_new_escrows(self) -> None:
        new = list(self._new_escrows.values())
        accounts = [self._empty(escrow.account) for escrow in new]
        await write(self.connection, Set(_NEW_ACCOUNT, accounts), Set(_NEW_ESCROW, new))

    async def _write_entries(self) -> None:
        """Writes entries, and all that they and their operations changed, at once."""
        moves = [move for entry in self._entries for move in entry.transfers]
        changes = [(change, of) for of, change in balance_changes(moves).items() if change]
        chained = [self._chain(entry) for entry in self._entries]
        lines = [
            (entry.seq, line, *move)
            for entry in self._entries
            for line, move in enumerate(entry.transfers)
        ]
        changed = list(map(_CHANGES, self._changed_escrows.values()))
        state = _STATE(self.service)
        heads = [] if state == self._clean else [(*state[3:], self.service.id)]
        await write(
            self.connection,
            # The database refuses a balance below zero, whatever was decided above it.
            Set(_BALANCE, changes),
            Set(_NEW_ENTRY, chained),
            Set(_NEW_POSTING, lines),
            Set(_ESCROW, changed),
            Set(_SERVICE, heads),
        )

    def _chain(self, entry: Entry) -> tuple[Any, ...]:
        previous = self.service.entry_hash
        self.service.entry_hash = hash_entry(entry, previous)
        return (*entry[:-1], previous, self.service.entry_hash)
