"""The log: who did what, each entry about an escrow naming the one before, and it all verifies."""

import asyncio
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from sqlalchemy import select

from tests.escrow.conftest import DATABASES
from tests.escrow.market import Market, market
from tests.escrow.test_books import Stranger
from tests.support.escrow import ROOT_SEED, reading
from tests.support.postgresql import database_name, fresh_database
from x402mw import cli
from x402mw.core.checkpoints import Checkpoint, sign_checkpoint
from x402mw.core.keys import public_key
from x402mw.core.strict import b64url_encode
from x402mw.escrow import schema
from x402mw.escrow.audit.items import End, Link, write_item
from x402mw.escrow.books import Entry, audit, entry_text, hash_entry
from x402mw.escrow.keys import Signer
from x402mw.escrow.settings import NETWORK, Settings
from x402mw.escrow.transactions import OPERATOR

pytestmark = pytest.mark.anyio
ROOT_KEY = b64url_encode(public_key(ROOT_SEED))


async def entries_of(m: Market) -> list[Any]:
    """All entries, oldest first."""
    entries = schema.entries
    async with reading(m.escrow.ledger) as connection:
        rows = await connection.execute(select(entries).order_by(entries.c.seq))
        return list(rows)


# Entries.


async def test_every_change_is_entered_with_its_actor(db: str) -> None:
    """Audit: who did it stands with what was done, also where no money moved; time has no name."""
    async with market(db) as m:
        name = (await m.open())["escrow_id"]
        await m.redeem({"voucher": m.voucher(name, "1"), "amount": "1"})
        await m.post(m.buyer, f"/escrow/{name}/close")
        await m.escrow.pass_time(1000)
        found = [row for row in await entries_of(m) if row.escrow_id == name]
        deposit = (await entries_of(m))[0]
    assert [(row.kind, row.actor) for row in found] == [
        ("lock", m.buyer.agent_id),
        ("redeem", None),
        ("buyer_close", m.buyer.agent_id),
        ("deadline", None),
    ]
    assert (deposit.kind, deposit.actor) == ("deposit", OPERATOR)


async def test_entries_of_one_escrow_are_linked(db: str) -> None:
    """Log: each entry names the one before about its escrow, and the escrow names its newest."""
    async with market(db) as m:
        names = [(await m.open())["escrow_id"] for _ in range(2)]
        for name in names * 2:
            await m.post(m.buyer, f"/escrow/{name}/topup", {"amount": "1"})
        found = await entries_of(m)
        async with reading(m.escrow.ledger) as connection:
            escrows = schema.escrows.c
            rows = await connection.execute(select(escrows.escrow_id, escrows.last_entry))
            newest = dict(map(tuple, rows))
    for name in names:
        mine = [row for row in found if row.escrow_id == name]
        assert [row.before for row in mine] == [None, *(row.seq for row in mine[:-1])]
        assert newest[name] == mine[-1].seq


async def test_what_changes_nothing_is_not_entered(db: str) -> None:
    """Log: a renewed token and a repeated total are no news."""
    async with market(db) as m:
        name = (await m.open())["escrow_id"]
        await m.post(m.buyer, f"/escrow/{name}/release", {"cumulative": "1"})
        before = len(await entries_of(m))
        await m.post(m.buyer, f"/escrow/{name}/token")
        await m.post(m.buyer, f"/escrow/{name}/release", {"cumulative": "1"})
        await m.redeem({"voucher": m.voucher(name, "1"), "amount": "0.5"})
        kinds = [row.kind for row in await entries_of(m)]
    assert len(kinds) - before <= 1
    assert "token" not in kinds


async def test_what_entries_led_to_is_marked(db: str) -> None:
    """Events: low, exhausted and ended are decided in the transaction that causes them."""
    async with market(db) as m:
        name = (await m.open("10"))["escrow_id"]
        for total in ("8.99", "9.00", "9.50", "10.00"):
            await m.redeem({"voucher": m.voucher(name, total), "amount": total})
        await m.post(m.buyer, f"/escrow/{name}/close")
        await m.escrow.pass_time(1000)
        said = [row.data for row in await entries_of(m) if row.escrow_id == name]
    low, none, exhausted = ('{"low_balance":true}', None, '{"exhausted":true}')
    closing = '{"closing_deadline":1800000900}'
    assert said.pop(0).startswith('{"terms":"')
    assert said == [none, low, none, exhausted, closing, '{"ended":"buyer_close"}']


@pytest.mark.parametrize(("wish", "marked"), [("4", True), ("3.99", False), ("0", False)])
async def test_the_warning_is_set_at_creation(db: str, wish: str, *, marked: bool) -> None:
    """Events: who opens an escrow says below what it warns; 0 is never, of both kinds."""
    async with market(db) as m:
        name = (await m.open("10", low_balance=wish))["escrow_id"]
        manual = {"to_agent_id": m.provider.agent_id, "amount": "10", "low_balance": wish}
        other = (await m.post(m.buyer, "/escrow", manual)).json()["escrow_id"]
        await m.post(m.buyer, f"/escrow/{name}/release", {"cumulative": "6"})
        await m.post(m.buyer, f"/escrow/{other}/release", {"amount": "6"})
        said = [row.data for row in await entries_of(m) if row.kind == "release"]
    assert ["low_balance" in (data or "") for data in said] == [marked, marked]


async def test_a_note_moves_nothing_and_is_proven(db: str) -> None:
    """Audit: what an account did without money is entered, chained, and passes the check."""
    async with market(db) as m:
        async with m.escrow.ledger.write() as tx:
            tx.note("noted", actor=m.buyer.agent_id, data={"key": "é"})
            tx.note("noted_again")
        rows = (await entries_of(m))[-2:]
        assert [(row.kind, row.actor, row.data) for row in rows] == [
            ("noted", m.buyer.agent_id, '{"key":"\\u00e9"}'),
            ("noted_again", None, "{}"),
        ]
        assert await m.escrow.check() == []


async def test_each_proof_stays_in_the_history(db: str) -> None:
    """Audit: what was delivered first is still to be read after another delivery, word by word."""
    async with market(db) as m:
        body = {"to_agent_id": m.provider.agent_id, "amount": "9.00"}
        name = (await m.post(m.buyer, "/escrow", body)).json()["escrow_id"]
        await m.post(m.provider, f"/escrow/{name}/deliver", {"proof": "the first"})
        await m.post(m.buyer, f"/escrow/{name}/reject", {"reason": "junk"})
        await m.post(m.provider, f"/escrow/{name}/deliver", {"proof": "the second"})
        history = (await m.get(m.buyer, f"/escrow/{name}/history")).json()["items"]
    proofs = [line["data"]["proof"] for line in history if line["kind"] == "deliver"]
    assert proofs == ["the second", "the first"]


# The whole log, verified and tampered with.


@pytest.fixture(scope="module", params=DATABASES)
def logged(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A database with a log and checkpoints under two signing keys."""
    if request.param == "sqlite":
        url = str(tmp_path_factory.mktemp("logged") / "escrow.db")
        asyncio.run(_make_log(url))
        yield url
    else:
        with fresh_database() as url:
            asyncio.run(_make_log(url))
            yield url


async def _make_log(url: str) -> None:
    async with market(url, checkpoint_entries=4) as m:
        names = [(await m.open())["escrow_id"] for _ in range(3)]
        await m.escrow.ledger.rotate_keys()
        for name in names:
            await m.redeem({"voucher": m.voucher(name, "1"), "amount": "1"})
            await m.post(m.buyer, f"/escrow/{name}/close")


@pytest.fixture
def stranger(logged: str, tmp_path: Path) -> Iterator[Stranger]:
    """A copy of that database, in the hands of a stranger without guards in the way."""
    if "://" not in logged:
        found = Stranger(str(shutil.copy(logged, tmp_path / "escrow.db")))
        found.drop_guards()
        yield found
    else:
        with fresh_database(database_name(logged)) as url:
            found = Stranger(url)
            found.drop_guards()
            found.run("ALTER TABLE checkpoints DISABLE TRIGGER USER")
            yield found


def command(*words: str) -> tuple[int, str]:
    """Runs `x402mw audit ...`; its exit status and what it printed."""
    out, err = StringIO(), StringIO()
    status = 0
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        patch.object(sys, "argv", ["x402mw", "audit", *words]),
    ):
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
    return status, out.getvalue().strip() or err.getvalue().strip()


def test_a_whole_log_verifies(logged: str, tmp_path: Path) -> None:
    """Audit: books and their export verify under the root key, also over a change of keys."""
    file = str(tmp_path / "log.jsonl")
    assert command("export", "--db", logged, "--out", file) == (0, "")
    # Who pays whom is for the operator only.
    assert Path(file).stat().st_mode & 0o777 == 0o600
    whole = "10 entries verify; signed up to entry 8"
    assert command("verify", "--db", logged, "--root", ROOT_KEY) == (0, whole)
    assert command("verify", "--file", file, "--root", ROOT_KEY) == (0, whole)
    assert command("verify", "--file", file, "--against", file) == (0, whole)
    other = b64url_encode(public_key(b"x" * 32))
    assert command("verify", "--db", logged, "--root", other) == (
        1,
        "these are books of another root key",
    )


def test_an_export_goes_on_where_another_ended(logged: str, tmp_path: Path) -> None:
    """Audit: an export since an entry verifies alone and against the older one; a gap is told."""
    whole, rest = str(tmp_path / "whole"), str(tmp_path / "rest")
    command("export", "--db", logged, "--out", whole)
    command("export", "--db", logged, "--since", "6", "--out", rest)
    answer = (0, "4 entries verify; signed up to entry 8")
    assert command("verify", "--file", rest, "--against", whole, "--root", ROOT_KEY) == answer
    short = tmp_path / "short"
    lines = Path(whole).read_text().splitlines(keepends=True)
    short.write_text("".join(lines[:4]))
    status, said = command("verify", "--file", rest, "--against", str(short))
    assert (status, "nothing compares" in said) == (1, True)
    assert command("export", "--db", logged, "--since", "99")[0] == 1


TAMPERING = [
    ("UPDATE entries SET kind = 'gift' WHERE seq = 5", "entry 5 is not what was written"),
    ("UPDATE entries SET actor = 'ag_me' WHERE seq = 5", "entry 5 is not what was written"),
    ("UPDATE entries SET actor = NULL WHERE seq = 2", "entry 2 is not what was written"),
    ("UPDATE entries SET data = '{}' WHERE seq = 3", "entry 3 is not what was written"),
    ("UPDATE entries SET before = 1 WHERE seq = 6", "entry 6 is not what was written"),
    ("UPDATE entries SET created_at = 1 WHERE seq = 6", "entry 6 is not what was written"),
    ("UPDATE postings SET amount = amount + 1 WHERE seq = 2", "entry 2 is not what was written"),
    ("DELETE FROM postings WHERE seq = 2", "entry 2 is not what was written"),
    ("UPDATE entries SET hash = previous_hash WHERE seq = 4", "entry 4 is not what was written"),
    (
        "UPDATE entries SET previous_hash = hash WHERE seq = 4",
        "entry 4 does not follow the one before it",
    ),
    ("DELETE FROM entries WHERE seq = 7", "entry 7 is missing"),
    ("DELETE FROM entries WHERE seq = 10", "the books end at entry 9, but should at 10"),
    (
        "DELETE FROM entries WHERE seq > 6",
        "the checkpoint at entry 8 is about an entry that is gone: the books end at 6",
    ),
    (
        "UPDATE checkpoints SET hash = previous_hash FROM entries WHERE entries.seq = 4"
        " AND checkpoints.seq = 4",
        "the checkpoint at entry 4 was signed for another history: it was rewritten",
    ),
    (
        "UPDATE checkpoints SET created_at = 1 WHERE seq = 8",
        "the checkpoint at entry 8 was signed for something else",
    ),
    (
        "UPDATE checkpoints SET signature = (SELECT signature FROM checkpoints WHERE seq = 4)"
        " WHERE seq = 8",
        "the checkpoint at entry 8 was signed for something else",
    ),
    (
        "UPDATE signing_keys SET proof = NULL WHERE number = 1",
        "the checkpoint at entry 4 is signed by a key that nobody vouches for",
    ),
    (
        "UPDATE signing_keys SET proof = (SELECT signature FROM checkpoints WHERE seq = 4)"
        " WHERE number = 1",
        "the root key does not vouch for signing key 1",
    ),
]


@pytest.mark.parametrize(("tampering", "told"), TAMPERING)
def test_the_first_bad_item_is_named(stranger: Stranger, tampering: str, told: str) -> None:
    """Audit: whatever was done to the log, the first entry or checkpoint that tells is named."""
    stranger.run(*_without_lines(tampering))
    assert command("verify", "--db", stranger.url, "--root", ROOT_KEY) == (1, told)


def _without_lines(statement: str) -> list[str]:
    """Lines of entries go first, which the databases themselves insist on."""
    if not statement.startswith("DELETE FROM entries"):
        return [statement]
    return [statement.replace("entries", "postings"), statement]


def test_a_forged_checkpoint_is_told(stranger: Stranger) -> None:
    """Audit: a checkpoint signed by a stranger's key, for the very same history, is none."""
    seq, head = 10, "(SELECT hash FROM entries WHERE seq = 10)"
    forged = sign_checkpoint(Checkpoint(NETWORK, seq, "ab" * 32, 1), b"stranger" * 4)
    stranger.run(f"INSERT INTO checkpoints VALUES ({_ordered(seq, head, 1, forged, stranger)})")
    status, said = command("verify", "--db", stranger.url, "--root", ROOT_KEY)
    assert (status, said) == (
        1,
        "the checkpoint at entry 10 is signed by a key that nobody vouches for",
    )


def _ordered(seq: int, head: str, at: int, signature: str, _: Stranger) -> str:
    return f"{seq}, {head}, {at}, '{signature}'"


def test_a_rewritten_log_is_told_by_what_others_remember(
    stranger: Stranger, tmp_path: Path
) -> None:
    """Audit: hashes computed anew after a cut show that nothing signs, and fail against memory."""
    old, checkpoint = tmp_path / "old", tmp_path / "checkpoint"
    command("export", "--db", stranger.url, "--out", str(old))
    points = [json.loads(line) for line in old.read_text().splitlines()]
    checkpoint.write_text(next(p["signature"] for p in points if p.get("signature")))
    stranger.run(
        "DELETE FROM checkpoints",
        "DELETE FROM postings WHERE seq > 3",
        "DELETE FROM entries WHERE seq > 3",
        "UPDATE service SET entry_seq = 3, entry_hash = (SELECT hash FROM entries WHERE seq = 3)",
    )
    unsigned = "entries 1 to 3 are not signed, nor is any other: nothing tells whether"
    status, said = command("verify", "--db", stranger.url, "--root", ROOT_KEY)
    assert (status, said.removeprefix(unsigned)) == (1, " they were rewritten")
    told = (1, "entry 4 is remembered, but the books end at 3")
    assert command("verify", "--db", stranger.url, "--against", str(old)) == told
    keys = tmp_path / "keys"
    keys.write_text(json.dumps(_well_known()))
    answer = command(
        *("verify", "--db", stranger.url, "--keys", str(keys), "--against", str(checkpoint))
    )
    assert answer == told


@pytest.mark.parametrize(
    ("entries", "seconds", "told"),
    [
        (1000, 600, ""),
        (1001, 0, "entries 9 to 1009 are not signed, but one in 1000 should be"),
        (2, 661, "entries 9 to 10 are not signed, though they took 661 seconds to be written"),
    ],
)
def test_no_more_is_unsigned_than_a_service_leaves_unsigned(
    logged: str, tmp_path: Path, entries: int, seconds: int, told: str
) -> None:
    """Audit: who takes checkpoints away to rewrite what they covered is told by what is missing."""
    file, longer = tmp_path / "log", tmp_path / "longer"
    command("export", "--db", logged, "--out", str(file))
    lines = file.read_text().splitlines()
    head = next(n for n, line in enumerate(lines) if '"checkpoint"' in line and '"seq":8' in line)
    kept, previous = lines[: head + 1], json.loads(lines[head])["hash"]
    for number in range(entries):
        at = 1_800_000_000 + seconds * (number == entries - 1)
        entry = Entry(9 + number, "note", None, "USDC", at, at, (), OPERATOR)
        digest = hash_entry(entry, previous)
        kept.append(write_item(Link(entry.seq, 2, entry_text(entry), previous, digest)))
        previous = digest
    kept.append(write_item(End(8 + entries, previous)))
    longer.write_text("\n".join(kept))
    status, said = command("verify", "--file", str(longer), "--root", ROOT_KEY)
    assert (status, told in said) == (1 if told else 0, True), said


def _well_known() -> dict[str, str]:
    """What the service publishes about its keys, as it was before the change of keys."""
    from x402mw.core.signed import key_id
    from x402mw.core.tokens import KeySet, sign_key_set

    signer = Signer(Settings("x.db", ROOT_SEED))
    key = public_key(signer.seed(1))
    key_set = KeySet(
        NETWORK, 1, 2**40, {key_id(key): key}, frozenset(), signer.settings.min_escrow, 300
    )
    return {"root_key": ROOT_KEY, "key_set": sign_key_set(key_set, ROOT_SEED)}


def test_an_export_that_was_changed_is_told(logged: str, tmp_path: Path) -> None:
    """Audit: a line changed, lost, doubled or cut from an export is found, whoever wrote it."""
    file = tmp_path / "log"
    command("export", "--db", logged, "--out", str(file))
    lines = file.read_text().splitlines(keepends=True)
    for changed, told in (
        (lines[:-1], "the export was cut off after entry 10: it has no end"),
        (lines[:3] + lines[4:], "entry 3 is missing"),
        (lines[:3] + lines[2:], "entry 2 comes twice"),
        ([lines[0], lines[1].replace("deposit", "deposix"), *lines[2:]],
         "entry 1 is not what was written"),
        ([lines[0], "junk\n"], "x402mw: line 2 of the export cannot be read"),
        (lines[1:], "an export is one opening, entries and checkpoints, and one end"),
    ):  # fmt: skip
        file.write_text("".join(changed))
        assert command("verify", "--file", str(file)) == (1, told)


def test_checkpoints_are_append_only(logged: str, tmp_path: Path) -> None:
    """Rule 2: the database refuses to change, delete or replace a checkpoint."""
    stranger = Stranger(logged)
    replace = "INSERT OR REPLACE INTO checkpoints SELECT * FROM checkpoints LIMIT 1"
    for change in (
        "UPDATE checkpoints SET seq = seq + 100",
        "DELETE FROM checkpoints",
        replace if stranger.is_sqlite else "TRUNCATE checkpoints",
    ):
        with pytest.raises(Stranger.REFUSALS, match="append-only"):
            stranger.run(change)


async def test_the_heartbeat_signs_what_is_new(db: str) -> None:
    """Audit: every ten minutes with news there is a checkpoint, and none without."""
    async with market(db) as m:
        await m.escrow.pass_time(100)
        await m.open()
        await m.escrow.pass_time(1200)
        async with reading(m.escrow.ledger) as connection:
            points = schema.checkpoints
            rows = (await connection.execute(select(points).order_by(points.c.seq))).all()
        assert [row.seq for row in rows] == [1, 2]
        assert rows[1].created_at - rows[0].created_at >= 600
        assert await audit(db) == []
