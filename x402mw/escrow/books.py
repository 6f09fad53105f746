"""The books: how entries are chained, and the proof that a whole database is right.

`Judge` is pure: rows in, violations out. It proves the invariants I1 to I5, I7 to I9, I18 and I19
of `docs/money.md` on any database (I6 needs two moments and is kept by a trigger), and `Facts`
proves I20. Both see entries one by one, so what they remember grows with the rows that entries
speak of, not with payments. Tests, the demo and `x402mw escrow check` all ask the same two.
"""

import hashlib
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from sys import intern
from typing import Any, NamedTuple

from sqlalchemy import Select, Table, bindparam, select
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.core.amounts import AMOUNT_MAX
from x402mw.escrow import modes, schema
from x402mw.escrow.database import visiting
from x402mw.escrow.facts import Facts, Row
from x402mw.escrow.people import People
from x402mw.escrow.rules.money import balance_changes, read_payees, split_fee
from x402mw.escrow.rules.table import Event
from x402mw.escrow.rules.values import (
    ENDED_STATUSES,
    MANUAL,
    Escrow,
    Transfer,
    agent_account,
    escrow_account,
)

GENESIS = "0" * 64
"""The hash before the first entry."""

ROWS_AT_ONCE = 1000
"""How many rows are read at a time: one is as many waits, and all are more than fits in memory."""

_TAG, _SPEAKING_TAG = b"x402mw/entry\x00\x01", b"x402mw/entry\x00\x02"
_ENCODER = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"))


class Entry(NamedTuple):
    """One entry of the books. `created_at` is when it was written, `effective_at` when it counts.

    They differ only when a deadline was applied late (T2). Times are whole seconds. `actor` is who
    caused it (an agent, `operator`, or None for time), `data` a small JSON text that says more,
    and `before` the entry before it about the same escrow.
    """

    seq: int
    kind: str
    escrow_id: str | None
    asset: str
    created_at: int
    effective_at: int
    transfers: tuple[Transfer, ...]
    actor: str | None = None
    data: str | None = None
    before: int | None = None

    @property
    def plain(self) -> bool:
        """Tells whether it says nothing but what it moves, as all entries did once."""
        return self.before is None and self.actor is None and self.data is None


_PLAIN = Entry._fields.index("actor")


@dataclass(frozen=True, slots=True)
class Chained:
    """An entry as it stands in the database, with both hashes."""

    entry: Entry
    previous_hash: str
    hash: str


def entry_text(entry: Entry) -> str:
    """What the hash of an entry covers, as JSON.

    A tuple is written as a list: [seq, ..., [[source, target, amount], ...], actor, data, before],
    without the last three if there are none of them, as it was before there could be.
    """
    return _ENCODER.encode(entry[:_PLAIN] if entry.plain else entry)


def hash_entry(entry: Entry, previous_hash: str) -> str:
    """Chains an entry to the one before: hex SHA-256 over that hash and all that it says."""
    return hash_text(entry_text(entry), previous_hash, plain=entry.plain)


def hash_text(text: str, previous_hash: str, *, plain: bool) -> str:
    """The same for the text of an entry."""
    tag = _TAG if plain else _SPEAKING_TAG
    return hashlib.sha256(tag + bytes.fromhex(previous_hash) + text.encode()).hexdigest()


def write_data(data: Mapping[str, Any]) -> str:
    """Writes what an entry says as its column holds it."""
    return _ENCODER.encode(data)


async def audit(url: str) -> list[str]:
    """Reads a whole database and returns every violated invariant."""
    async with visiting(url) as connection:
        return await check(connection)


async def check(connection: AsyncConnection) -> list[str]:
    """Returns every violated invariant, in words; an empty list proves the books.

    The connection's transaction must see one moment.
    """
    service = (await connection.execute(select(schema.service))).one()
    balances, assets = await _read_accounts(connection)
    judge, people = Judge(balances, assets), People(assets)
    facts = Facts(people)
    violations: list[str] = []
    async for chained in read_entries(connection):
        violations += judge.see(chained)
        violations += facts.see(chained.entry)
    violations += judge.see_all_entries(service.entry_seq, service.entry_hash)
    for table, see in _beside(facts, people):
        async for row in _stream(connection, select(table)):
            violations += see(row._asdict())
    async for row in _stream(connection, _ESCROWS):
        escrow = Escrow._make(row)
        violations += judge.see_escrow(escrow)
        violations += facts.see_escrow(escrow)
        violations += people.see_escrow(escrow)
    violations += facts.end()
    violations += people.end()
    return violations


async def _read_accounts(connection: AsyncConnection) -> tuple[dict[str, int], dict[str, str]]:
    """Balances and assets, by account."""
    balances, assets = {}, {}
    accounts = schema.accounts.c
    query = select(accounts.account, accounts.balance, accounts.asset)
    async for account, balance, asset in _stream(connection, query):
        name = _shared(account)
        balances[name], assets[name] = balance, _shared(asset)
    return balances, assets


async def _stream(connection: AsyncConnection, query: Select[Any]) -> AsyncIterator[Any]:
    """The rows of a query; a cursor for a few of them would cost more than the rows."""
    few = (await connection.execute(query.limit(ROWS_AT_ONCE))).all()
    if len(few) < ROWS_AT_ONCE:
        for row in few:
            yield row
        return
    async for rows in (await connection.stream(query)).partitions(ROWS_AT_ONCE):
        for row in rows:
            yield row


_ESCROWS = select(*(schema.escrows.c[name] for name in Escrow._fields))


def _beside(
    facts: Facts, people: People
) -> tuple[tuple[Table, Callable[[Row], Iterator[str]]], ...]:
    """The tables of what entries speak of beside the money, and who looks at their rows."""
    return (
        (schema.tenants, people.see_tenant),
        (schema.agents, people.see_agent),
        (schema.api_keys, people.see_key),
        (schema.webhooks, people.see_webhook),
        (schema.journals, people.see_journal),
        (schema.transfers, facts.see_transfer),
        (schema.faucet_claims, facts.see_claim),
        (schema.bookings, facts.see_booking),
        (schema.agreements, facts.see_agreement),
        (schema.parts, facts.see_part),
        (schema.disputes, facts.see_dispute),
        (schema.evidence, facts.see_evidence),
    )


async def read_entries(connection: AsyncConnection, since: int = 0) -> AsyncIterator[Chained]:
    """Every entry after `since`, in order."""
    while rows := (await connection.execute(_PAGE, {"since": since})).all():
        for _, lines in groupby(rows, key=_SEQ):
            yield _chained(list(lines))
        since = rows[-1].seq


def _page() -> Select[Any]:
    """Whole entries after one, `ROWS_AT_ONCE` at most."""
    entries, postings = schema.entries, schema.postings
    after = select(entries.c.seq).where(entries.c.seq > bindparam("since"))
    page = after.order_by(entries.c.seq).limit(ROWS_AT_ONCE).subquery()
    rows = page.join(entries, entries.c.seq == page.c.seq)
    rows = rows.outerjoin(postings, postings.c.seq == entries.c.seq)
    query = select(entries, postings.c.source, postings.c.target, postings.c.amount)
    return query.select_from(rows).order_by(entries.c.seq, postings.c.line)


_PAGE, _SEQ = _page(), attrgetter("seq")


def _chained(lines: Sequence[Any]) -> Chained:
    row = lines[0]
    moves = tuple(
        Transfer(_shared(line.source), _shared(line.target), line.amount)
        for line in lines
        if line.source
    )
    says = {name: getattr(row, name) for name in Entry._fields if name != "transfers"}
    return Chained(Entry(**says, transfers=moves), row.previous_hash, row.hash)


def _shared(name: Any) -> Any:
    """The same text, once in memory; what somebody put in its place in the database as it is."""
    return intern(name) if type(name) is str else name


class _Life:
    """What entries say of one escrow. There may be very many, so it is kept small."""

    __slots__ = ("held", "last_kind", "last_seq", "moved_late", "paid")

    def __init__(self) -> None:
        self.paid: dict[tuple[str, str], int] = {}
        self.held: int | None = None
        self.moved_late = False
        self.last_kind: str | None = None
        self.last_seq: int | None = None

    def see(self, entry: Entry) -> None:
        """The next entry about it."""
        for move in entry.transfers:
            pair = (move.source, move.target)
            self.paid[pair] = self.paid.get(pair, 0) + move.amount
        self.last_seq = entry.seq
        # What a provider gives back is its own, and moves nothing of the escrow.
        if not entry.transfers or entry.kind == Event.RETURN.value:
            return
        self.moved_late = self.moved_late or self.held == 0
        account = escrow_account(entry.escrow_id or "")
        self.held = (self.held or 0) + balance_changes(entry.transfers).get(account, 0)
        self.last_kind = _shared(entry.kind)


_NOTHING = _Life()
"""What entries say of an escrow that none is about."""


class Judge:
    """Sees every entry in order, then their end, then every escrow; says what is wrong."""

    def __init__(self, balances: Mapping[str, int], assets: Mapping[str, str]) -> None:
        """Both by account. An asset says whether its money is live or test (`modes`)."""
        self._balances = balances
        self._assets = assets
        self._seq = 0
        self._hash = GENESIS
        self._posted: dict[str, int] = {}
        self._lives: dict[str, _Life] = {}
        self._links = False

    def see(self, chained: Chained) -> Iterator[str]:
        """The next entry: I2, I19, and what it adds to the rest."""
        entry = chained.entry
        if entry.seq != self._seq + 1 or chained.previous_hash != self._hash:
            yield f"I19 entry {entry.seq} does not follow the one before it"
        if chained.hash != hash_entry(entry, chained.previous_hash):
            yield f"I19 entry {entry.seq} is not what was written"
        self._seq, self._hash = entry.seq, chained.hash
        yield from self._see_life(entry)
        if entry.plain and not entry.transfers:
            yield f"I2 entry {entry.seq} moves nothing and says nothing"
        for move in entry.transfers:
            if not _is_amount(move.amount) or move.amount == 0 or move.source == move.target:
                yield f"I2 entry {entry.seq} holds a line that does not balance"
            if not self._assets.get(move.source) == self._assets.get(move.target) == entry.asset:
                yield f"I1 entry {entry.seq} moves money between two assets"
        for account, change in balance_changes(entry.transfers).items():
            self._posted[account] = self._posted.get(account, 0) + change

    def _see_life(self, entry: Entry) -> Iterator[str]:
        """Entries name the one before about their escrow; the oldest do not, and have no link."""
        name = entry.escrow_id
        life = None if name is None else self._lives.setdefault(name, _Life())
        self._links = self._links or entry.before is not None
        last = None if life is None else life.last_seq
        if entry.before != last and (self._links or not entry.plain):
            yield f"I19 entry {entry.seq} does not name the one before it about its escrow"
        if life is not None:
            life.see(entry)

    def see_all_entries(self, head_seq: int, head_hash: str) -> Iterator[str]:
        """There are no more entries: the end of the chain, and I1, I3 and I18."""
        if (self._seq, self._hash) != (head_seq, head_hash):
            yield "I19 the chain does not end where the service row says"
        totals: dict[str, int] = {}
        for account, balance in self._balances.items():
            asset = self._assets.get(account, "")
            totals[asset] = totals.get(asset, 0) + balance
        for asset, total in totals.items():
            if total != 0:
                yield f"I1 the balances of {asset} sum to {total}, not to 0"
        for account in sorted(self._posted.keys() | self._balances.keys()):
            balance, posted = self._balances.get(account, 0), self._posted.get(account, 0)
            if account != modes.world(self._assets.get(account, "")) and not _is_amount(balance):
                yield f"I3 {account} has the balance {balance}"
            if posted != balance:
                yield f"I18 {account} is stored as {balance}, but {posted} was posted"

    def see_escrow(self, escrow: Escrow) -> Iterator[str]:
        """One escrow, when all entries were seen: I4, I5, I7 to I9."""
        name = escrow.escrow_id
        held = self._balances.get(escrow.account)
        if held != escrow.remaining:
            yield f"I4 {name} holds {held}, not L - R - F = {escrow.remaining}"
        yield from _check_escrow(escrow)
        life = self._lives.get(name, _NOTHING)
        if escrow.last_entry != life.last_seq:
            yield f"I19 {name} does not name its newest entry"
        paid = _join_payees(escrow, life.paid)
        if paid != _owed(escrow):
            yield f"I8 {name} paid {paid}, owed {_owed(escrow)}"
        if _ended_twice(escrow, life):
            yield f"I9 {name} moved money after it ended"


def _ended_twice(escrow: Escrow, life: _Life) -> bool:
    if escrow.kind == MANUAL:
        # It ends when nothing is held; a session may be empty and go on.
        return life.moved_late
    ends = (Event.PROVIDER_CLOSE.value, Event.DEADLINE.value)
    return escrow.refunded > 0 and life.last_kind not in ends


def _check_escrow(escrow: Escrow) -> Iterator[str]:
    name = escrow.escrow_id
    amounts = [getattr(escrow, field) for field in _AMOUNTS]
    if not all(map(_is_amount, amounts)) or escrow.free < 0:
        yield f"I5 {name} has amounts out of range"
    if escrow.redeemed > escrow.released:
        yield f"I5 {name} has redeemed more than was released"
    if escrow.returned > escrow.released:
        yield f"I5 {name} has returned more than was released"
    ended = escrow.status in ENDED_STATUSES
    if not ended and escrow.refunded and escrow.kind != MANUAL:
        yield f"I5 {name} was refunded before it ended"
    if (escrow.fee, escrow.referral) != split_fee(
        escrow.released, escrow.fee_bps, escrow.referral_bps
    ):
        yield f"I7 {name} has the fee {escrow.fee} on {escrow.released}"
    if ended and escrow.remaining:
        yield f"I9 {name} has ended and still holds {escrow.remaining}"
    if ended != (escrow.due_at is None):
        yield f"I9 {name} is {escrow.status} and due at {escrow.due_at}"


_AMOUNTS = (
    *("amount", "released", "redeemed", "refunded", "disputed", "returned", "fee", "referral"),
)


def _owed(escrow: Escrow) -> dict[tuple[str, str], int]:
    buyer, provider = agent_account(escrow.buyer), agent_account(escrow.provider)
    owed = {
        (buyer, escrow.account): escrow.amount,
        (escrow.account, provider): escrow.released - escrow.fee,
        (escrow.account, modes.house(escrow.asset)): escrow.fee - escrow.referral,
        (escrow.account, agent_account(escrow.referrer)): escrow.referral,
        (escrow.account, buyer): escrow.refunded,
        (provider, buyer): escrow.returned,
    }
    return {pair: amount for pair, amount in owed.items() if amount}


def _join_payees(escrow: Escrow, paid: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    """What was paid, with a revenue split counted as the provider's."""
    provider = agent_account(escrow.provider)
    payees = {agent_account(agent) for agent, _ in read_payees(escrow.payees)}
    joined: dict[tuple[str, str], int] = {}
    for (source, target), amount in paid.items():
        pair = (source, provider if target in payees else target)
        joined[pair] = joined.get(pair, 0) + amount
    return joined


def _is_amount(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= AMOUNT_MAX
