"""One writing transaction of the ledger: decide first, write at the end, in a few set statements.

Every writing transaction starts by locking the `service` row, so there is one writer at a time and
entries and changes are numbered in the order in which they become visible. Operations only
collect what they want (`save`, `post`); `flush` writes it, `discard` forgets it. A refused
operation therefore leaves no row different (I10).
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from sqlalchemy import bindparam, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.escrow import schema
from x402mw.escrow.books import Entry, hash_entry
from x402mw.escrow.keys import Signer
from x402mw.escrow.rules import Escrow, Transfer, balance_changes, transfers
from x402mw.escrow.settings import Settings


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
        self._clean = replace(service)
        self._entries: list[Entry] = []
        self._new_escrows: dict[str, Escrow] = {}
        self._changed_escrows: dict[str, Escrow] = {}

    @classmethod
    async def begin(
        cls, connection: AsyncConnection, *, now: int, settings: Settings, signer: Signer
    ) -> "Transaction":
        """Takes the writer's lock and reads the service row."""
        # On SQLite BEGIN IMMEDIATE has taken it already, and FOR UPDATE is left out.
        row = (await connection.execute(select(schema.service).with_for_update())).one()
        service = Service(**row._mapping)  # noqa: SLF001 (its documented name)
        return cls(connection, service, now=now, settings=settings, signer=signer)

    # What an operation wants.

    def save(
        self, before: Escrow, after: Escrow, kind: str, effective_at: int | None = None
    ) -> Escrow:
        """Keeps the new state of an escrow and posts the money that this moves."""
        self.service.change_seq += 1
        after = replace(after, change=self.service.change_seq)
        if not before.opened:
            after = replace(after, opened=after.change)
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
        self.service = replace(self._clean)
        self._entries.clear()
        self._new_escrows.clear()
        self._changed_escrows.clear()

    # Rows.

    async def open_account(self, account: str) -> None:
        """Makes an empty account."""
        await self.insert(
            schema.accounts, {"account": account, "asset": self.settings.asset.code, "balance": 0}
        )

    async def insert(self, table: Any, *rows: dict[str, Any]) -> None:
        """Writes new rows now; only after everything that might refuse was decided."""
        if rows:
            await self.connection.execute(insert(table), list(rows))

    # Writing.

    async def flush(self) -> None:
        """Writes everything collected so far."""
        for escrow in self._new_escrows.values():
            await self.open_account(escrow.account)
        await self.insert(schema.escrows, *map(asdict, self._new_escrows.values()))
        await self._write_entries()
        await self._write_escrows()
        await self._write_service()
        self._clean = replace(self.service)
        self.discard()

    async def _write_entries(self) -> None:
        moves = [move for entry in self._entries for move in entry.transfers]
        changes = {name: change for name, change in balance_changes(moves).items() if change}
        if changes:
            # The database refuses a balance below zero, whatever was decided above it.
            balance = schema.accounts.c.balance
            statement = (
                update(schema.accounts)
                .where(schema.accounts.c.account == bindparam("of"))
                .values(balance=balance + bindparam("change"))
            )
            rows = [{"of": name, "change": change} for name, change in sorted(changes.items())]
            await self.connection.execute(statement, rows)
        await self.insert(schema.entries, *map(self._chain, self._entries))
        await self.insert(
            schema.postings,
            *(
                {"seq": entry.seq, "line": line, **asdict(move)}
                for entry in self._entries
                for line, move in enumerate(entry.transfers)
            ),
        )

    def _chain(self, entry: Entry) -> dict[str, Any]:
        previous = self.service.entry_hash
        self.service.entry_hash = hash_entry(entry, previous)
        row = {field.name: getattr(entry, field.name) for field in fields(entry)}
        del row["transfers"]
        return {**row, "previous_hash": previous, "hash": self.service.entry_hash}

    async def _write_escrows(self) -> None:
        if not self._changed_escrows:
            return
        changing = [field.name for field in fields(Escrow) if field.name != "escrow_id"]
        statement = (
            update(schema.escrows)
            .where(schema.escrows.c.escrow_id == bindparam("of"))
            .values({name: bindparam(f"new_{name}") for name in changing})
        )
        rows = [
            {"of": escrow.escrow_id, **{f"new_{name}": getattr(escrow, name) for name in changing}}
            for escrow in self._changed_escrows.values()
        ]
        await self.connection.execute(statement, rows)

    async def _write_service(self) -> None:
        if self.service != self._clean:
            await self.connection.execute(update(schema.service).values(**asdict(self.service)))
