"""Events: which entries are which, an escrow's history, and the stream without gap or double."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.escrow.market import Market, code_of, joined, market
from tests.support.escrow import Agent, escrow_process, running_escrow
from x402mw.core.amounts import Atomic
from x402mw.escrow.books import Entry
from x402mw.escrow.events import feed
from x402mw.escrow.events.derive import NAMES, tell
from x402mw.escrow.rules.values import Transfer, agent_account

pytestmark = pytest.mark.anyio

BUYER, PROVIDER, NAME = "ag_b", "ag_p", "esc_1"
HOME, AWAY, HELD = agent_account(BUYER), agent_account(PROVIDER), f"escrow:{NAME}"
LOCK, PAY = Transfer(HOME, HELD, Atomic(10)), Transfer(HELD, AWAY, Atomic(9))
FEE, BACK = Transfer(HELD, "house:fees", Atomic(1)), Transfer(HELD, HOME, Atomic(5))
HANDED = Transfer(AWAY, HOME, Atomic(3))


@pytest.fixture
def anyio_backend() -> str:
    """What the escrow runs on."""
    return "asyncio"


DERIVED: list[tuple[str, tuple[Transfer, ...], dict[str, Any], dict[str, str]]] = [
    ("lock", (LOCK,), {}, {"locked": "0.00001"}),
    ("top_up", (LOCK,), {}, {"topped_up": "0.00001"}),
    ("redeem", (PAY, FEE), {}, {"released": "0.00001"}),
    ("release", (PAY, FEE), {"low_balance": True}, {"released": "0.00001", "low_balance": "0.00"}),
    ("redeem", (PAY,), {"exhausted": True}, {"released": "0.000009", "exhausted": "0.00"}),
    ("refund", (BACK,), {}, {"refunded": "0.000005"}),
    ("pause", (), {}, {"paused": "0.00"}),
    ("resume", (), {}, {"resumed": "0.00"}),
    ("buyer_close", (), {}, {"closing": "0.00"}),
    ("buyer_close", (BACK,), {"ended": "buyer_close"}, {"closed": "0.000005"}),
    ("provider_close", (PAY, BACK), {"ended": "provider_close"},
     {"released": "0.000009", "closed": "0.000005"}),
    ("deadline", (BACK,), {"ended": "expired_refund"},
     {"expired": "0.000005", "closed": "0.000005"}),
    ("revoke", (), {}, {"revoked": "0.00", "closing": "0.00"}),
    ("dispute", (), {}, {"disputed": "0.00"}),
    ("resolve", (PAY, FEE, BACK), {},
     {"resolved": "0.000015", "released": "0.00001", "refunded": "0.000005"}),
    ("undecided", (BACK,), {}, {"resolved": "0.000005", "refunded": "0.000005"}),
    ("evidence", (), {}, {}),
    ("deliver", (), {"part": 0}, {"delivered": "0.00"}),
    ("reject", (), {"part": 0}, {"rejected": "0.00"}),
    ("extend", (), {}, {"extended": "0.00"}),
    ("return", (HANDED,), {}, {"returned": "0.000003"}),
    ("approve", (PAY, FEE), {}, {"released": "0.00001"}),
    ("condition", (PAY,), {"ended": "released"}, {"released": "0.000009", "closed": "0.00"}),
    ("review_end", (PAY, FEE), {}, {"released": "0.00001"}),
    ("settle", (PAY, BACK), {"ended": "released"}, {"released": "0.000009", "closed": "0.000005"}),
    ("give_back", (BACK,), {}, {"refunded": "0.000005"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "moves", "data", "told"), DERIVED)
def test_an_entry_is_these_events(
    kind: str, moves: tuple[Transfer, ...], data: dict[str, Any], told: dict[str, str]
) -> None:
    """Events: names and amounts follow from the entry alone; ids are its number and a part."""
    entry = Entry(7, kind, NAME, "USDC", 1, 2, moves, BUYER, json.dumps(data) if data else None, 3)
    events = tell(entry, BUYER, PROVIDER)
    bodies = [json.loads(event.body) for event in events]
    assert {body["type"]: body["amount"] for body in bodies} == told
    assert [event.id for event in events] == ["7", "7.1", "7.2"][: len(events)]
    assert all(event.parties == (BUYER, PROVIDER) for event in events)
    assert all(event.name in NAMES for event in events)


def test_what_is_no_escrows_is_told_to_its_agent_only() -> None:
    """Events: a revoked key is told to its agent; deposits and notes of others to nobody."""
    revoked = Entry(1, "key_revoked", None, "USDC", 1, 1, (), BUYER, '{"key_id":"k"}')
    (told,) = tell(revoked, None, None)
    assert (told.name, told.parties, told.escrow_id) == ("revoked", (BUYER,), "")
    deposit = Entry(1, "deposit", None, "USDC", 1, 1, (Transfer("world", HOME, Atomic(1)),))
    assert tell(deposit, None, None) == []


# History.


async def history(m: Market, name: str, **query: Any) -> dict[str, Any]:
    """One page, as the buyer sees it."""
    answer = await m.get(m.buyer, f"/escrow/{name}/history", **query)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def test_a_history_is_read_backwards_in_pages(db: str) -> None:
    """History: every entry about the escrow, newest first, in pages, others' never among them."""
    async with market(db) as m:
        name, other = [(await m.open())["escrow_id"] for _ in range(2)]
        for total in ("1", "2", "3"):
            for each in (name, other):
                await m.redeem({"voucher": m.voucher(each, total), "amount": total})
        await m.post(m.buyer, f"/escrow/{name}/close")
        whole = (await history(m, name))["items"]
        pages, after = [], {}
        while True:
            page = await history(m, name, limit=2, **after)
            pages += page["items"]
            if page["next"] is None:
                break
            after = {"after": page["next"]}
        strange = await history(m, name, after=int(whole[0]["id"]) - 1)
    assert pages == whole
    assert [item["kind"] for item in whole] == ["buyer_close", *["redeem"] * 3, "lock"]
    assert [item["released"] for item in whole] == ["0.00", "1.00", "1.00", "1.00", "0.00"]
    assert whole[-1]["locked"] == "5.00"
    assert whole[1]["fee"] == "0.01"
    assert strange == {"items": [], "next": None}


async def test_a_history_is_for_parties(db: str) -> None:
    """Security: to others the history does not exist, nor can they pause."""
    async with market(db) as m:
        name = (await m.open())["escrow_id"]
        other = await m.escrow.new_agent("other")
        for answer in (
            await m.get(other, f"/escrow/{name}/history"),
            await m.post(other, f"/escrow/{name}/pause"),
        ):
            assert code_of(answer) == (404, "not_found")


async def test_a_pause_is_said_and_moves_nothing(db: str) -> None:
    """Pause: either party says so with a reason; the session works on; an ended one has none."""
    async with market(db) as m:
        name = (await m.open())["escrow_id"]
        before = await m.show(name)
        answer = await m.post(m.provider, f"/escrow/{name}/pause", {"reason": "no cover"})
        assert (answer.status_code, answer.json()["remaining"]) == (200, "5.00")
        assert (await m.show(name)) == before
        (item, _) = (await history(m, name))["items"]
        assert (item["kind"], item["actor"]) == ("pause", m.provider.agent_id)
        assert item["data"] == {"reason": "no cover"}
        await m.redeem({"escrow_id": name, "amount": "0", "final": True})
        assert code_of(await m.post(m.buyer, f"/escrow/{name}/resume")) == (409, "invalid_state")


async def test_each_party_is_told_what_the_other_does(db: str) -> None:
    """Manual escrows: deliveries with their review, rejections, why money went, what came back."""
    async with market(db) as m:
        wish = {"to_agent_id": m.provider.agent_id, "amount": "9.00", "review_seconds": 100}
        parts = [{"name": name, "amount": "3.00"} for name in ("one", "two", "three")]
        made = await m.post(m.buyer, "/escrow", {**wish, "milestones": parts})
        path = f"/escrow/{made.json()['escrow_id']}"
        late = (await m.post(m.buyer, f"{path}/extend", {"seconds": 3600})).json()["expires_at"]
        verdicts = {"one": "approve", "two": "reject"}
        for name in ("one", "two", "three"):
            delivery = {"milestone": name, "proof": "here"}
            assert (await m.post(m.provider, f"{path}/deliver", delivery)).status_code == 200
            if name in verdicts:
                body = {"milestone": name, "reason": "no"}
                await m.post(m.buyer, f"{path}/{verdicts[name]}", body)
        until = int(m.escrow.clock()) + 100
        await m.post(m.provider, f"{path}/return", {"amount": "1"})
        returned = (await m.get(m.buyer, f"{path}/history")).json()["items"][0]
        assert (returned["kind"], returned["returned"]) == ("return", "1.00")
        assert {returned[name] for name in ("locked", "released", "fee", "refunded")} == {"0.00"}
        await m.escrow.pass_time(200)
        async with listening(m, m.buyer, "0") as stream:
            found = [event["data"] for event in await take(stream, 9)]
    told = [(event["type"], event["kind"], event["amount"]) for event in found]
    assert told == [
        ("locked", "lock", "9.00"),
        ("extended", "extend", "0.00"),
        ("delivered", "deliver", "0.00"),
        ("released", "approve", "3.00"),
        ("delivered", "deliver", "0.00"),
        ("rejected", "reject", "0.00"),
        ("delivered", "deliver", "0.00"),
        ("returned", "return", "1.00"),
        ("released", "review_end", "3.00"),
    ]
    assert found[1]["data"] == {"expires_at": late}
    one = {"part": 1, "milestone": "one", "parts": [[1, "paid", None]]}
    assert found[3]["data"] == {**one, "reason": "no"}
    two = {"part": 2, "milestone": "two", "parts": [[2, "rejected", None]]}
    assert found[5]["data"] == {**two, "reason": "no"}
    three = {"part": 3, "milestone": "three"}
    delivered = {"review_until": until, "parts": [[3, "delivered", until]], "proof": "here"}
    assert found[6]["data"] == {**three, **delivered}
    assert found[8]["data"] == {**three, "parts": [[3, "paid", None]]}


# The stream.


@asynccontextmanager
async def listening(
    m: Market, agent: Agent, since: str | None = None, **query: Any
) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """A stream of events, each as its id, name and body; `{}` for a comment."""
    headers = dict(agent.headers) | ({"Last-Event-ID": since} if since is not None else {})
    async with m.http.stream("GET", "/events", headers=headers, params=query) as answer:
        assert answer.status_code == 200, await answer.aread()
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield _events(answer.aiter_lines())


async def _events(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    fields: dict[str, Any] = {}
    async for line in lines:
        if line.startswith(":"):
            yield {}
        elif line:
            name, _, text = line.partition(": ")
            fields[name] = json.loads(text) if name == "data" else text
        else:
            if "data" in fields:
                yield fields
            fields = {}


async def take(stream: AsyncIterator[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The next events, comments left out."""
    found: list[dict[str, Any]] = []
    async with asyncio.timeout(20):
        while len(found) < count:
            event = await anext(stream)
            found += [event] if event else []
    return found


async def test_a_stream_tells_what_happens_from_now_on(db: str) -> None:
    """Stream: what happens is told to both parties as it happens, and nothing from before."""
    async with market(db) as m:
        await m.open()
        async with listening(m, m.buyer) as mine, listening(m, m.provider) as theirs:
            await anext(mine), await anext(theirs)
            name = (await m.open())["escrow_id"]
            for stream in (mine, theirs):
                (event,) = await take(stream, 1)
                assert (event["event"], event["data"]["escrow_id"]) == ("locked", name)
                assert event["id"] == event["data"]["id"]


async def test_a_stream_goes_on_without_gap_or_double(db: str) -> None:
    """Stream: from each Last-Event-ID on, just the rest is told, live events behind it."""
    async with market(db) as m:
        name = (await m.open("10"))["escrow_id"]
        for total in ("5", "10"):
            await m.redeem({"voucher": m.voucher(name, total), "amount": total})
        async with listening(m, m.buyer, "0") as stream:
            whole = await take(stream, 5)
        ids = [event["id"] for event in whole]
        assert [event["event"] for event in whole] == [
            *("locked", "released", "released", "low_balance", "exhausted"),
        ]
        for place, last in enumerate(ids):
            async with listening(m, m.buyer, last) as stream:
                other = (await m.open("1"))["escrow_id"]
                found = await take(stream, len(ids) - place)
            # The events of this loop's own openings come last, in order.
            rest = [event["id"] for event in found if event["data"]["escrow_id"] == name]
            assert rest == ids[place + 1 :]
            if place == 0:
                assert found[-1]["data"]["escrow_id"] == other


async def test_a_slow_reader_misses_nothing(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stream: who reads slower than things happen gets the rest from the log."""
    monkeypatch.setattr(feed, "KEPT_MAX", 2)
    async with market(db) as m, listening(m, m.buyer) as stream:
        await anext(stream)
        names = [(await m.open("1"))["escrow_id"] for _ in range(20)]
        found = await take(stream, 20)
    assert [event["data"]["escrow_id"] for event in found] == names


async def test_who_reads_others_past_is_kept_alive_and_asked_again(
    db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stream: each part of the log with nothing to tell is a comment, and a dead key ends there."""
    monkeypatch.setattr(feed, "ENTRIES_AT_ONCE", 3)
    async with market(db) as m:
        for _ in range(5):
            await m.open("1")
        stranger = await m.escrow.new_agent("stranger")
        async with listening(m, stranger, "0") as stream, asyncio.timeout(10):
            assert [await anext(stream) for _ in range(3)] == [{}] * 3
        monkeypatch.setattr(feed, "KEEP_ALIVE_SECONDS", 0)
        monkeypatch.setattr(feed, "REST_SECONDS_MAX", 0.5)
        monkeypatch.setattr(feed, "RESTS", 1000)
        async with listening(m, stranger, "0") as stream, asyncio.timeout(10):
            await anext(stream)
            assert (await m.post(stranger, "/agents/me/revoke")).status_code == 200
            assert [event async for event in stream if event] == []


async def test_the_log_is_read_for_one_stream_at_a_time() -> None:
    """Stream: however many catch up, one looks into the log, and then all of them rest."""

    class Slow:
        running = most = 0

        async def read(self, _work: Any) -> list[Any]:
            self.running += 1
            self.most = max(self.most, self.running)
            await asyncio.sleep(0.01)
            self.running -= 1
            return []

    slow: Any = Slow()
    streams = feed.Feed(slow)
    streams._at = 4 * feed.ENTRIES_AT_ONCE
    streams._live.set()
    readers = [streams.enter(f"ag_{number % 3}", None) for number in range(6)]

    async def count(reader: feed.Reader) -> int:
        return len([told async for told in streams._catch_up(reader, (1, 0))])

    began = asyncio.get_running_loop().time()
    assert await asyncio.gather(*map(count, readers)) == [4] * 6
    assert slow.most == 1
    assert asyncio.get_running_loop().time() - began >= 24 * 0.01 * (1 + feed.RESTS)


async def test_a_stream_of_one_escrow(db: str) -> None:
    """Stream: with escrow_id only that escrow is told; others' are not found."""
    async with market(db) as m:
        name, other = [(await m.open())["escrow_id"] for _ in range(2)]
        stranger = await m.escrow.new_agent("stranger")
        async with listening(m, m.buyer, "0", escrow_id=name) as stream:
            await m.post(m.buyer, f"/escrow/{other}/close")
            await m.post(m.buyer, f"/escrow/{name}/close")
            found = await take(stream, 2)
            assert [event["event"] for event in found] == ["locked", "closing"]
        answer = await m.get(stranger, "/events", escrow_id=name)
        assert code_of(answer) == (404, "not_found")
        for last in ("x", "-1", "1.x", "9" * 30, "99999"):
            headers = {**m.buyer.headers, "Last-Event-ID": last}
            answer = await m.http.get("/events", headers=headers)
            assert code_of(answer) == (422, "invalid_request")


async def test_streams_are_limited_and_given_back(db: str) -> None:
    """Stream: an agent has so many streams at once, and may open others when some have ended."""
    async with market(db) as m:
        for _ in range(2):
            opened = [listening(m, m.buyer) for _ in range(feed.STREAMS_PER_AGENT)]
            streams = [await each.__aenter__() for each in opened]
            for stream in streams:
                await anext(stream)
            assert code_of(await m.get(m.buyer, "/events")) == (429, "too_many_streams")
            async with listening(m, m.provider):
                pass
            for each in opened:
                await each.__aexit__(None, None, None)
            async with asyncio.timeout(10):
                while m.escrow.app.state.feed._count:  # noqa: ASYNC110 (its end is not told)
                    await asyncio.sleep(0.01)


async def test_a_quiet_stream_stays_alive(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stream: comments come while nothing happens; a revoked key ends the stream."""
    monkeypatch.setattr(feed, "KEEP_ALIVE_SECONDS", 0.1)
    async with AsyncExitStack() as stack:
        m = await stack.enter_async_context(market(db))
        made = (await m.post(m.buyer, "/agents/me/keys", {"scopes": ["read"]})).json()
        reader = Agent(m.buyer.agent_id, made["api_key"])
        stream = await stack.enter_async_context(listening(m, reader))
        async with asyncio.timeout(10):
            assert [await anext(stream) for _ in range(3)] == [{}] * 3
        path = f"/agents/me/keys/{made['key_id']}"
        assert (await m.http.delete(path, headers=m.buyer.headers)).status_code == 200
        async with asyncio.timeout(10):
            rest = [event async for event in stream]
        assert [event["event"] for event in rest if event] in ([], ["revoked"])


@pytest.mark.parametrize("how", ["revoked", "expired"])
async def test_a_busy_stream_ends_with_its_key(
    db: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Security: a key that died reads no further, however much happens."""
    if how == "expired":
        monkeypatch.setattr(feed, "KEEP_ALIVE_SECONDS", 0.2)
    async with market(db) as m:
        name = (await m.open())["escrow_id"]
        made = (await m.post(m.buyer, "/agents/me/keys", {"scopes": ["read"]})).json()
        path = f"/agents/me/keys/{made['key_id']}"
        reader = Agent(m.buyer.agent_id, made["api_key"])
        async with listening(m, reader, escrow_id=name) as stream:
            await anext(stream)
            if how == "revoked":
                await m.http.delete(path, headers=m.buyer.headers)
            else:
                await m.post(m.buyer, f"{path}/rotate", {"grace_seconds": 5})
                m.escrow.clock.now += 10
            rest = asyncio.create_task(_rest(stream))
            async with asyncio.timeout(10):
                while not rest.done():
                    await m.post(m.provider, f"/escrow/{name}/pause")


async def test_streams_that_open_at_once_are_counted(db: str) -> None:
    """Stream: of many at once so many begin and the others are refused, before any answer."""
    async with market(db) as m:
        places = m.escrow.app.state.feed

        async def one() -> int:
            async with m.http.stream("GET", "/events", headers=m.buyer.headers) as answer:
                if answer.status_code == 200:
                    await asyncio.sleep(1)
                return answer.status_code

        found = await asyncio.gather(*(one() for _ in range(20)))
        assert sorted(found) == [200] * feed.STREAMS_PER_AGENT + [429] * 12
        asked = await m.http.request("HEAD", "/events", headers=m.buyer.headers)
        assert asked.status_code == 200
        async with asyncio.timeout(10):
            while places._count:  # noqa: ASYNC110 (its end is not told)
                await asyncio.sleep(0.01)


async def test_who_has_most_streams_makes_room(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stream: few agents cannot keep all places; the refusal says whose limit it was."""
    monkeypatch.setattr(feed, "STREAMS_MAX", 3)
    async with market(db) as m, AsyncExitStack() as stack:
        mine = [await stack.enter_async_context(listening(m, m.buyer)) for _ in range(3)]
        for stream in mine:
            await anext(stream)
        async with listening(m, m.provider) as theirs:
            await anext(theirs)
            async with asyncio.timeout(10):
                assert [event async for event in mine[2] if event] == []
            answer = await m.get(m.provider, "/events")
            assert code_of(answer) == (429, "too_many_streams")
            assert "this service" in answer.json()["detail"]
            name = (await m.open())["escrow_id"]
            for stream in (*mine[:2], theirs):
                assert (await take(stream, 1))[0]["data"]["escrow_id"] == name


async def test_another_process_hears_of_it(db: str) -> None:
    """Stream: what one service commits is told by another on the same database."""
    async with market(db) as m, running_escrow(db, m.escrow.clock) as second:
        here = m.http.base_url
        m.http.base_url = f"{second.url}/api/v1/"
        async with listening(m, m.buyer) as stream:
            await anext(stream)
            m.http.base_url = here
            name = (await m.open())["escrow_id"]
            (event,) = await take(stream, 1)
        assert event["data"]["escrow_id"] == name


async def test_a_service_ends_with_streams_open(tmp_path: Path) -> None:
    """Stream: SIGTERM ends open streams at once, and the service well."""
    with escrow_process(tmp_path) as process:
        async with joined(process) as m, listening(m, m.buyer) as stream:
            await anext(stream)
            ended = asyncio.to_thread(process.terminate)
            async with asyncio.timeout(8):
                status, rest = await asyncio.gather(ended, _rest(stream))
    assert (status, [event for event in rest if event]) == (0, [])


async def _rest(stream: AsyncIterator[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event async for event in stream]
