"""The books: how entries are chained, and the proof that a whole database is right.

`check` is pure: rows in, violations out. It proves the invariants I1 to I5, I7 to I9, I18 and I19
of `docs/money.md` on any database (I6 needs two moments and is kept by a trigger). Tests, the demo
and `x402mw escrow check` all ask this same judge.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.core.amounts import AMOUNT_MAX
from x402mw.escrow import schema
from x402mw.escrow.database import visiting
from x402mw.escrow.rows import fetch_escrows
from x402mw.escrow.rules import (
    ENDED_STATUSES,
    HOUSE,
    WORLD,
    Escrow,
    Transfer,
    agent_account,
    balance_changes,
    split_fee,
)

GENESIS = "0" * 64
"""The hash before the first entry."""

_TAG = b"x402mw/entry\x00\x01"
_ENCODER = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"))


class Entry(NamedTuple):
    """One entry of the books. `created_at` is when it was written, `effective_at` when it counts.

    They differ only when a deadline was applied late (T2). Times are whole seconds.
    """

    seq: int
    kind: str
    escrow_id: str | None
    asset: str
    created_at: int
    effective_at: int
    transfers: tuple[Transfer, ...]


@dataclass(frozen=True, slots=True)
class Chained:
    """An entry as it stands in the database, with both hashes."""

    entry: Entry
    previous_hash: str
    hash: str


@dataclass(frozen=True, slots=True)
class Books:
    """Everything there is to check, read in one moment."""

    entries: Sequence[Chained]
    balances: Mapping[str, int]
    escrows: Sequence[Escrow]
    head_seq: int
    head_hash: str


def hash_entry(entry: Entry, previous_hash: str) -> str:
    """Chains an entry to the one before: hex SHA-256 over that hash and all that it says."""
    # JSON writes a tuple as a list: [seq, ..., [[source, target, amount], ...]].
    text = _ENCODER.encode(entry).encode()
    return hashlib.sha256(_TAG + bytes.fromhex(previous_hash) + text).hexdigest()


async def audit(url: str) -> list[str]:
    """Reads a whole database and returns every violated invariant."""
    async with visiting(url) as connection:
        return check(await read_books(connection))


async def read_books(connection: AsyncConnection) -> Books:
    """Reads a whole database; the connection's transaction must see one moment."""
    service = (await connection.execute(select(schema.service))).one()
    balances = await connection.execute(
        select(schema.accounts.c.account, schema.accounts.c.balance)
    )
    return Books(
        entries=await _read_entries(connection),
        balances={row.account: row.balance for row in balances},
        escrows=await fetch_escrows(connection, select(schema.escrows)),
        head_seq=service.entry_seq,
        head_hash=service.entry_hash,
    )


async def _read_entries(connection: AsyncConnection) -> list[Chained]:
    lines: dict[int, list[Transfer]] = {}
    postings = schema.postings
    for row in await connection.execute(select(postings).order_by(postings.c.seq, postings.c.line)):
        lines.setdefault(row.seq, []).append(Transfer(row.source, row.target, row.amount))
    rows = await connection.execute(select(schema.entries).order_by(schema.entries.c.seq))
    return [
        Chained(
            Entry(
                seq=row.seq,
                kind=row.kind,
                escrow_id=row.escrow_id,
                asset=row.asset,
                created_at=row.created_at,
                effective_at=row.effective_at,
                transfers=tuple(lines.pop(row.seq, ())),
            ),
            row.previous_hash,
            row.hash,
        )
        for row in rows
    ]


def check(books: Books) -> list[str]:
    """Returns every violated invariant, in words; an empty list proves the books."""
    return [
        *_check_chain(books),
        *_check_entries(books.entries),
        *_check_balances(books),
        *(problem for escrow in books.escrows for problem in _check_escrow(books, escrow)),
        *_check_payouts(books),
    ]


def _check_chain(books: Books) -> Iterator[str]:
    previous = GENESIS
    for expected_seq, chained in enumerate(books.entries, start=1):
        entry = chained.entry
        if entry.seq != expected_seq or chained.previous_hash != previous:
            yield f"I19 entry {entry.seq} does not follow the one before it"
        if chained.hash != hash_entry(entry, chained.previous_hash):
            yield f"I19 entry {entry.seq} is not what was written"
        previous = chained.hash
    if (len(books.entries), previous) != (books.head_seq, books.head_hash):
        yield "I19 the chain does not end where the service row says"


def _check_entries(entries: Iterable[Chained]) -> Iterator[str]:
    for entry in (chained.entry for chained in entries):
        if not entry.transfers:
            yield f"I2 entry {entry.seq} moves nothing"
        for move in entry.transfers:
            if not _is_amount(move.amount) or move.amount == 0 or move.source == move.target:
                yield f"I2 entry {entry.seq} holds a line that does not balance"


def _check_balances(books: Books) -> Iterator[str]:
    if sum(books.balances.values()) != 0:
        yield f"I1 the balances sum to {sum(books.balances.values())}, not to 0"
    for account, balance in books.balances.items():
        if account != WORLD and not _is_amount(balance):
            yield f"I3 {account} has the balance {balance}"
    moves = (move for chained in books.entries for move in chained.entry.transfers)
    rebuilt = {name: change for name, change in balance_changes(moves).items() if change}
    stored = {name: balance for name, balance in books.balances.items() if balance}
    for account in sorted(rebuilt.keys() | stored.keys()):
        posted, balance = rebuilt.get(account, 0), stored.get(account, 0)
        if posted != balance:
            yield f"I18 {account} is stored as {balance}, but {posted} was posted"


def _check_escrow(books: Books, escrow: Escrow) -> Iterator[str]:
    name = escrow.escrow_id
    held = books.balances.get(escrow.account)
    if held != escrow.remaining:
        yield f"I4 {name} holds {held}, not L - R - F = {escrow.remaining}"
    amounts = (escrow.amount, escrow.released, escrow.redeemed, escrow.refunded)
    if not all(map(_is_amount, amounts)) or escrow.remaining < 0:
        yield f"I5 {name} has amounts out of range"
    if escrow.redeemed > escrow.released:
        yield f"I5 {name} has redeemed more than was released"
    ended = escrow.status in ENDED_STATUSES
    if not ended and escrow.refunded:
        yield f"I5 {name} was refunded before it ended"
    if (escrow.fee, escrow.referral) != split_fee(
        escrow.released, escrow.fee_bps, escrow.referral_bps
    ):
        yield f"I7 {name} has the fee {escrow.fee} on {escrow.released}"
    if ended and escrow.remaining:
        yield f"I9 {name} has ended and still holds {escrow.remaining}"


def _check_payouts(books: Books) -> Iterator[str]:
    """I8 and the rest of I9: what each escrow's own entries paid to whom, and when."""
    moves: dict[str | None, list[Transfer]] = {}
    last: dict[str | None, Entry] = {}
    for entry in (chained.entry for chained in books.entries):
        moves.setdefault(entry.escrow_id, []).extend(entry.transfers)
        last[entry.escrow_id] = entry
    for escrow in books.escrows:
        own = moves.get(escrow.escrow_id, [])
        if _paid(own) != _owed(escrow):
            yield f"I8 {escrow.escrow_id} paid {_paid(own)}, owed {_owed(escrow)}"
        if escrow.refunded and last[escrow.escrow_id].kind not in ("provider_close", "deadline"):
            yield f"I9 {escrow.escrow_id} moved money after it ended"


def _paid(moves: Iterable[Transfer]) -> dict[tuple[str, str], int]:
    paid: dict[tuple[str, str], int] = {}
    for move in moves:
        pair = (move.source, move.target)
        paid[pair] = paid.get(pair, 0) + move.amount
    return paid


def _owed(escrow: Escrow) -> dict[tuple[str, str], int]:
    buyer, provider = agent_account(escrow.buyer), agent_account(escrow.provider)
    owed = {
        (buyer, escrow.account): escrow.amount,
        (escrow.account, provider): escrow.released - escrow.fee,
        (escrow.account, HOUSE): escrow.fee,
        (escrow.account, buyer): escrow.refunded,
    }
    return {pair: amount for pair, amount in owed.items() if amount}


def _is_amount(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= AMOUNT_MAX
