"""Webhooks over real sockets: signed, in order, at least once, and only where they may go."""

import asyncio
import json
import re
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from tests.escrow.market import Market, code_of, joined, market
from tests.support.escrow import Agent, MovingClock, escrow_process, reading
from tests.support.receiver import Delivery, Receiver, receiving
from tests.support.serving import serving
from x402mw.escrow import schema
from x402mw.escrow.events import posting, queue, turns
from x402mw.escrow.events.posting import Poster, is_public
from x402mw_client.webhooks import Event, Seen, WebhookRefused, verify

pytestmark = pytest.mark.anyio
PAGE = (Path(__file__).parents[2] / "docs" / "events.md").read_text()


@pytest.fixture
def anyio_backend() -> str:
    """What the escrow runs on."""
    return "asyncio"


@asynccontextmanager
async def hooked(db: str, **wish: Any) -> AsyncIterator[tuple[Market, Receiver, dict[str, Any]]]:
    """A market whose buyer has a webhook."""
    async with receiving() as receiver, market(db, local_webhooks=True) as m:
        yield m, receiver, await subscribe(m, receiver, **wish)


async def subscribe(m: Market, receiver: Receiver, **wish: Any) -> dict[str, Any]:
    """Makes a webhook of the buyer."""
    answer = await m.post(m.buyer, "/webhooks", {"url": receiver.url, **wish})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def read(hook: dict[str, Any], delivery: Delivery, now: float) -> Event:
    """A delivery as its receiver verifies it."""
    return verify(hook["secret"], delivery.headers, delivery.body, now)


async def deliveries(m: Market, hook: dict[str, Any]) -> list[dict[str, Any]]:
    """What the owner sees of its deliveries, newest first."""
    answer = await m.get(m.buyer, f"/webhooks/{hook['webhook_id']}/deliveries")
    return list(answer.json()["items"])


async def until(check: Callable[[], Any], seconds: float = 20) -> None:
    """Waits until something holds."""
    async with asyncio.timeout(seconds):
        while not await check():  # noqa: ASYNC110 (it asks another program)
            await asyncio.sleep(0.02)


async def test_what_happens_is_told_and_verifies(db: str) -> None:
    """Events: a session's life arrives signed, in order, each event once, with what it moved."""
    async with hooked(db) as (m, receiver, hook):
        name = (await m.open("10"))["escrow_id"]
        for total in ("9.50", "10.00"):
            await m.redeem({"voucher": m.voucher(name, total), "amount": total})
        await m.post(m.provider, f"/escrow/{name}/pause", {"reason": "no money"})
        await m.post(m.buyer, f"/escrow/{name}/resume")
        await m.post(m.buyer, f"/escrow/{name}/close")
        await m.escrow.pass_time(1000)
        got = await receiver.wait_for(9)
        events = [read(hook, each, int(each.headers["x402mw-timestamp"])) for each in got[:9]]
    assert [(event.type, event.amount) for event in events] == [
        ("locked", 10_000_000),
        ("released", 9_500_000),
        ("low_balance", 0),
        ("released", 500_000),
        ("exhausted", 0),
        ("paused", 0),
        ("resumed", 0),
        ("closing", 0),
        ("closed", 0),
    ]
    assert events[5].data == {"reason": "no money"}
    assert {event.escrow_id for event in events} == {name}
    assert len({event.id for event in events}) == 9


async def test_only_parties_and_only_what_they_asked_for(db: str) -> None:
    """Events: others' escrows are never told; a webhook may choose events and one escrow."""
    async with hooked(db, events=["released"]) as (m, receiver, hook):
        name = (await m.open())["escrow_id"]
        other = await m.escrow.new_agent("other")
        async with receiving() as theirs:
            wish = {"url": theirs.url}
            assert (await m.post(other, "/webhooks", wish)).status_code == 201
            assert code_of(await m.post(other, "/webhooks", {**wish, "escrow_id": name})) == (
                404,
                "not_found",
            )
            await m.redeem({"voucher": m.voucher(name, "1"), "amount": "1"})
            await receiver.wait_for(1)
            assert theirs.got == []
        assert [read(hook, each, m.escrow.clock()).type for each in receiver.got] == ["released"]


async def test_an_escrow_that_fails_holds_back_only_itself(db: str) -> None:
    """Order: events of one escrow wait for each other, those of another do not."""
    async with hooked(db) as (m, receiver, hook):
        failing = True
        names = [(await m.open())["escrow_id"] for _ in range(2)]
        await receiver.wait_for(2)
        receiver.got.clear()
        receiver.behave = lambda got: "fail" if failing and bad in got.body else "ok"
        bad = names[0].encode()
        for total in ("1", "2"):
            for name in names:
                await m.redeem({"voucher": m.voucher(name, total), "amount": total})
        await receiver.wait_for(3)
        told = [read(hook, each, m.escrow.clock()) for each in receiver.got]
        assert [event.escrow_id for event in told].count(names[1]) == 2
        failing = False
        await m.escrow.pass_time(60)
        await receiver.wait_for(5)
        mine = [json.loads(each.body) for each in receiver.got if bad in each.body]
        assert [event["amount"] for event in mine] == ["1.00", "1.00", "1.00"]
        assert mine[0]["id"] == mine[1]["id"] != mine[2]["id"]


BAD_MANNERS = ["fail", "junk", "cut", "hang", "to http://127.0.0.1:1/", "endless"]


@pytest.mark.parametrize("manner", BAD_MANNERS)
async def test_a_bad_receiver_is_asked_again(
    db: str, manner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Failures: whatever a receiver does, the event comes again later; a redirect leads nowhere."""
    monkeypatch.setattr(posting, "SECONDS_MAX", 0.3)
    async with hooked(db) as (m, receiver, hook):
        receiver.behave = lambda _: manner if len(receiver.got) == 1 else "ok"
        await m.open()
        await receiver.wait_for(1)

        async def noted() -> bool:
            return (await deliveries(m, hook))[0]["attempts"] == 1

        await until(noted)
        (shown,) = await deliveries(m, hook)
        if manner == "endless":
            # The answer was good, and nobody waits for the rest of it.
            assert shown["state"] == "delivered"
            return
        assert (shown["state"], shown["next_at"] > m.escrow.clock()) == ("waiting", True)
        assert ("redirects" in shown["outcome"]) == manner.startswith("to")
        await m.escrow.pass_time(10)
        first, second = (await receiver.wait_for(2))[:2]
        assert first.body == second.body
        assert read(hook, second, m.escrow.clock()).type == "locked"


async def test_who_never_answers_is_given_up(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Failures: after three days an event is dead, listed, and the next of its escrow goes on."""
    monkeypatch.setattr(queue, "GIVE_UP_SECONDS", 100)
    async with hooked(db) as (m, receiver, hook):
        receiver.behave = lambda got: "fail" if b'"locked"' in got.body else "ok"
        name = (await m.open())["escrow_id"]
        await m.post(m.buyer, f"/escrow/{name}/topup", {"amount": "1"})

        async def dead() -> bool:
            await m.escrow.pass_time(50)
            return [each["state"] for each in await deliveries(m, hook)] == ["delivered", "dead"]

        await until(dead)
        shown = (await m.get(m.buyer, "/webhooks")).json()["items"]
        assert shown[0]["status"] in ("failing", "active")
        assert "secret" not in shown[0]
        receiver.behave = lambda _: "ok"
        count = len(receiver.got)
        dead_one = (await deliveries(m, hook))[1]["event_id"]
        path = f"/webhooks/{hook['webhook_id']}/deliveries/{dead_one}/redeliver"
        assert (await m.post(m.buyer, path)).status_code == 200
        await receiver.wait_for(count + 1)


async def test_slow_receivers_of_some_keep_nobody_else_waiting(
    db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fairness: of each agent few are on their way at once, of all its webhooks in turn."""
    monkeypatch.setattr(turns, "AT_ONCE", 9)
    async with receiving() as slow, hooked(db) as (m, receiver, _):
        slow.behave = lambda _: "hang"
        for each in (*[m.provider] * 19, m.buyer, m.buyer):
            made = await m.post(each, "/webhooks", {"url": slow.url})
            assert made.status_code == 201
        async with receiving() as other:
            await m.post(m.provider, "/webhooks", {"url": other.url})
            names = [(await m.open("1"))["escrow_id"] for _ in range(3)]
            await slow.wait_for(5)
            # Not the 57 that hang, nor the one after the other: 4 of each agent, 10 seconds long.
            await receiver.wait_for(1)
            await asyncio.sleep(0.3)
            assert 5 <= len(slow.got) <= 8
            third = await m.escrow.new_agent("third")
            await m.escrow.deposit(third.agent_id, "10")
            async with receiving() as theirs:
                await m.post(third, "/webhooks", {"url": theirs.url})
                wish = {"to_agent_id": m.provider.agent_id, "amount": "1.00"}
                assert (await m.post(third, "/escrow", wish)).status_code == 201
                (told,) = await theirs.wait_for(1)
                assert json.loads(told.body)["escrow_id"] not in names


async def test_webhooks_of_others_cost_a_commit_nothing(db: str) -> None:
    """Speed: what no webhook wants is only read, also while a delivery hangs; the lease is kept."""
    async with hooked(db, events=["locked"]) as (m, receiver, _):
        receiver.behave = lambda _: "hang"
        await m.open()
        await receiver.wait_for(1)
        await asyncio.sleep(0.2)
        rounds, aside = 0, m.escrow.ledger.write_aside

        async def counted(work: Any) -> Any:
            nonlocal rounds
            rounds += 1
            return await aside(work)

        m.escrow.ledger.write_aside = counted
        wish = {"to_agent_id": m.provider.agent_id, "amount": "0.01"}
        for _ in range(20):
            assert (await m.post(m.buyer, "/transfers", wish)).status_code == 201
        await asyncio.sleep(0.1)
        assert rounds == 0
        async with reading(m.escrow.ledger) as connection:
            was = (await connection.execute(select(schema.deliverer))).one()
        await m.escrow.pass_time(queue.RENEW_SECONDS)
        await asyncio.sleep(1.2)
        async with reading(m.escrow.ledger) as connection:
            row = (await connection.execute(select(schema.deliverer))).one()
        assert row.held_until == was.held_until + queue.RENEW_SECONDS
        assert row.cursor > was.cursor
        m.escrow.ledger.write_aside = aside


async def test_the_first_webhook_is_told_nothing_from_before(db: str) -> None:
    """Events: while there is no webhook nobody reads the log for one, and the first begins now."""
    async with receiving() as receiver, market(db, local_webhooks=True) as m:
        for _ in range(3):
            await m.open("1")
        await subscribe(m, receiver)
        async with reading(m.escrow.ledger) as connection:
            cursor = (await connection.execute(select(schema.deliverer.c.cursor))).scalar_one()
            head = (await connection.execute(select(schema.service.c.entry_seq))).scalar_one()
        assert cursor >= head - 1
        name = (await m.open("1"))["escrow_id"]
        await receiver.wait_for(1)
        await asyncio.sleep(0.2)
        assert [json.loads(each.body)["escrow_id"] for each in receiver.got] == [name]


async def test_two_secrets_while_one_is_replaced(db: str) -> None:
    """Security: for a day deliveries carry both signatures, then the new one only."""
    async with hooked(db) as (m, receiver, hook):
        path = f"/webhooks/{hook['webhook_id']}"
        new = (await m.post(m.buyer, f"{path}/rotate")).json()["secret"]
        assert new != hook["secret"]
        await m.open()
        delivery = (await receiver.wait_for(1))[0]
        now = m.escrow.clock()
        for secret in (new, hook["secret"], [new, hook["secret"]]):
            assert verify(secret, delivery.headers, delivery.body, now).type == "locked"
        ended = schema.webhooks.update().values(old_until=int(now))
        await m.escrow.ledger.write_aside(lambda db: db.execute(ended))
        await m.open()
        later = (await receiver.wait_for(2))[1]
        assert verify(new, later.headers, later.body, now).type == "locked"
        with pytest.raises(WebhookRefused, match="not signed"):
            verify(hook["secret"], later.headers, later.body, now)


@pytest.mark.parametrize("how", ["revoked", "rotated", "handed on"])
async def test_a_webhook_ends_with_the_key_that_made_it(db: str, how: str) -> None:
    """Security: who had a key that leaked is told nothing more; a key's successor has its own."""
    async with hooked(db) as (m, receiver, mine), receiving() as theirs:
        made = (await m.post(m.buyer, "/agents/me/keys", {"scopes": ["spend", "read"]})).json()
        leaked = Agent(m.buyer.agent_id, made["api_key"])
        hook = (await m.post(leaked, "/webhooks", {"url": theirs.url})).json()
        assert hook["key_id"] == made["key_id"] != mine["key_id"]
        await m.open("1")
        await theirs.wait_for(1)
        path = f"/agents/me/keys/{made['key_id']}"
        if how == "revoked":
            answer = await m.http.delete(path, headers=m.buyer.headers)
        else:
            grace = {"grace_seconds": 60 if how == "handed on" else 0}
            answer = await m.post(m.buyer, f"{path}/rotate", grace)
        assert answer.is_success
        await m.open("1")
        await receiver.wait_for(2)
        await asyncio.sleep(0.3)
        left = {each["webhook_id"]: each for each in (await shown(m))}
        if how == "handed on":
            await theirs.wait_for(2)
            assert left[hook["webhook_id"]]["key_id"] == answer.json()["key_id"]
        else:
            assert len(theirs.got) == 1
            assert list(left) == [mine["webhook_id"]]


async def shown(m: Market) -> list[dict[str, Any]]:
    """The buyer's webhooks."""
    return list((await m.get(m.buyer, "/webhooks")).json()["items"])


async def test_a_webhook_ends_with_its_agent(db: str) -> None:
    """Security: of an agent that was revoked its end is told, what comes after is not."""
    async with hooked(db) as (m, receiver, hook):
        wish = {"to_agent_id": m.provider.agent_id, "amount": "2.00"}
        name = (await m.post(m.buyer, "/escrow", wish)).json()["escrow_id"]
        await m.open("1")
        assert (await m.post(m.buyer, "/agents/me/revoke")).status_code == 200
        assert (await m.post(m.provider, f"/escrow/{name}/pause")).status_code == 200
        await receiver.wait_for(5)
        await asyncio.sleep(0.3)
        told = [json.loads(each.body) for each in receiver.got]
        assert {(event["type"], event["kind"]) for event in told} == {
            *(("locked", "lock"), ("revoked", "agent_revoked")),
            *(("revoked", "revoke"), ("closing", "revoke")),
        }
        query = select(schema.webhooks.c.webhook_id)
        async with reading(m.escrow.ledger) as connection:
            assert (await connection.execute(query)).scalars().all() == [hook["webhook_id"]]
        now = m.escrow.ledger.now()
        await m.escrow.ledger.write_aside(lambda db: queue.prune(db, now))
        async with reading(m.escrow.ledger) as connection:
            assert (await connection.execute(query)).first() is None


async def test_what_waits_behind_another_is_not_sent_before_it(db: str) -> None:
    """Order: sending an event again never overtakes an earlier one of its escrow."""
    async with hooked(db) as (m, receiver, hook):
        receiver.behave = lambda _: "fail"
        name = (await m.open("1"))["escrow_id"]
        await receiver.wait_for(1)
        for action in ("pause", "resume"):
            await m.post(m.buyer, f"/escrow/{name}/{action}")

        async def made() -> bool:
            return len(await deliveries(m, hook)) == 3

        await until(made)
        path = f"/webhooks/{hook['webhook_id']}/deliveries"
        later, _, first = [each["event_id"] for each in await deliveries(m, hook)]
        answer = await m.post(m.buyer, f"{path}/{later}/redeliver")
        assert code_of(answer) == (409, "waits_its_turn")
        receiver.behave = lambda _: "ok"
        receiver.got.clear()
        assert (await m.post(m.buyer, f"{path}/{first}/redeliver")).status_code == 200
        told = [json.loads(each.body)["type"] for each in await receiver.wait_for(3)]
        assert told == ["locked", "paused", "resumed"]


async def test_a_webhook_belongs_to_its_agent(db: str) -> None:
    """Security: another agent sees, changes and deletes nothing of a webhook; its end is an end."""
    async with hooked(db) as (m, receiver, hook):
        path = f"/webhooks/{hook['webhook_id']}"
        assert (await m.get(m.provider, "/webhooks")).json() == {"items": []}
        for answer in (
            await m.get(m.provider, f"{path}/deliveries"),
            await m.post(m.provider, f"{path}/rotate"),
            await m.post(m.provider, f"{path}/deliveries/1/redeliver"),
            await m.post(m.buyer, f"{path}/deliveries/x/redeliver"),
            await m.http.delete(path, headers=m.provider.headers),
        ):
            assert code_of(answer) == (404, "not_found")
        assert (await m.http.delete(path, headers=m.buyer.headers)).status_code == 200
        await m.open()
        await asyncio.sleep(0.3)
        assert receiver.got == []


async def test_deliveries_come_by_the_page(db: str) -> None:
    """Lists: pages of any size are together the whole list, events of one entry kept in order."""
    async with hooked(db) as (m, receiver, hook):
        for _ in range(3):
            name = (await m.open("10"))["escrow_id"]
            item = {"voucher": m.voucher(name, "10"), "amount": "10", "final": True}
            await m.redeem(item)
        await receiver.wait_for(9)
        whole = await deliveries(m, hook)
        ids = [each["event_id"] for each in whole]
        numbers = [tuple(map(int, (each + ".0").split(".")[:2])) for each in ids]
        assert len(ids) == len(set(ids)) >= 9
        assert numbers == sorted(numbers, reverse=True)
        path = f"/webhooks/{hook['webhook_id']}/deliveries"
        for size in (1, 2, 5, len(ids), 500):
            found, more = list[str](), dict[str, str]()
            while True:
                page = (await m.get(m.buyer, path, limit=str(size), **more)).json()
                assert 0 < len(page["items"]) <= size
                found += [each["event_id"] for each in page["items"]]
                if page["next"] is None:
                    break
                more = {"after": page["next"]}
            assert found == ids
        assert (await m.get(m.buyer, path, after="0")).json() == {"items": [], "next": None}
        junk = ({"after": "x"}, {"after": "1.2.3"}, {"limit": "0"}, {"limit": "501"}, {"to": "1"})
        for query in junk:
            answer = await m.get(m.buyer, path, **query)
            assert code_of(answer) == (422, "invalid_request")


async def test_one_of_several_processes_delivers(db: str) -> None:
    """Events: two services on one database deliver each event once, by a lease."""
    from tests.support.escrow import running_escrow

    clock = MovingClock()
    async with receiving() as receiver, market(db, local_webhooks=True) as m:
        assert isinstance(m.escrow.clock, MovingClock)
        clock.now = m.escrow.clock.now
        async with running_escrow(db, clock, local_webhooks=True):
            await subscribe(m, receiver)
            for _ in range(10):
                await m.open()
            await receiver.wait_for(10)
            await asyncio.sleep(1.2)
    assert len({each.headers["x402mw-event-id"] for each in receiver.got}) == 10
    assert len(receiver.got) == 10


async def test_a_killed_service_loses_no_event(tmp_path: Path) -> None:
    """Failures: SIGKILL between commit and delivery: after the restart every event is told."""
    async with receiving() as receiver:
        receiver.behave = lambda _: "hang"
        with escrow_process(tmp_path, "--local-webhooks") as process:
            async with joined(process) as m:
                hook = await subscribe(m, receiver)
                names = [(await m.open())["escrow_id"] for _ in range(5)]
                process.kill()
                receiver.behave = lambda _: "ok"
                count = len(receiver.got)
                process.start()
                receiver.got = receiver.got[count:]
                await receiver.wait_for(5, seconds=40)
                seen = Seen()
                told = [json.loads(each.body) for each in receiver.got]
                fresh = [event for event in told if seen.add(event["id"])]
                assert sorted(event["escrow_id"] for event in fresh) == sorted(names)
                assert hook["secret"].startswith("whsec_")


# Where webhooks may go.

NOT_PUBLIC = [
    *("127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1"),
    *("169.254.169.254", "100.64.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1", "203.0.113.1"),
    *("224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "fe80::1", "fe80::1%1", "fc00::1", "fd12::1", "fec0::1", "ff02::1"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1"),
    *("2001:0:7f00:1::", "100::1", "::ffff:169.254.169.254"),
    *("::7f00:1", "::8.8.8.8", "::ffff:0:7f00:1", "3fff::1", "5f00::1", "192.88.99.1"),
    *("192.0.0.8", "192.0.0.9", "192.0.0.170", "::ffff:192.88.99.1"),
    *("4000::1", "e000::1", "fe00::1", "200::1", "1fff::1", "2001:20::1", "2001:1::1"),
]


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_no_address_within_is_public(address: str) -> None:
    """SSRF: private, local, multicast, reserved and wrapped addresses are no targets."""
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8"]
)
def test_the_open_internet_is_public(address: str) -> None:
    """SSRF: the rule still lets ordinary receivers in."""
    assert is_public(address)


WITHIN = [
    *("https://127.0.0.1/", "https://localhost/", "https://[::1]/", "https://2130706433/"),
    *("https://0x7f.1/", "https://127.1/", "https://169.254.169.254/latest/meta-data/"),
    *("https://[::ffff:127.0.0.1]/", "http://127.0.0.1/"),
]


@pytest.mark.parametrize("url", WITHIN)
async def test_nothing_within_is_connected_to(url: str) -> None:
    """SSRF: however an address is spelt, it is checked as what it is when connecting."""
    poster = Poster(local=False)
    outcome = await poster.post(url, {}, b"{}")
    await poster.close()
    assert (outcome.delivered, outcome.text) in (
        (False, "the address is not public"),
        (False, "the name does not resolve"),
    )


@pytest.mark.parametrize("url", ["https://a..b/", "https://b\u00fc.example/", "https://a b/"])
async def test_a_url_that_cannot_work_is_no_failure_here(url: str) -> None:
    """Webhooks from before such URLs were refused: the outcome says so, and nothing is raised."""
    poster = Poster(local=False)
    outcome = await poster.post(url, {}, b"{}")
    await poster.close()
    assert (outcome.delivered, outcome.text) in (
        (False, "there can be no such host"),
        (False, "the name does not resolve"),
    )


async def test_a_name_that_changes_its_mind_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """SSRF: a name is resolved once and just that is connected to; one bad address is enough."""
    asked, connected = [], []

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        bad = ["8.8.8.8", "127.0.0.1"] if host == "mixed.example" else ["8.8.8.8"]
        bad = ["10.0.0.1"] if len(asked) > 1 and host == "rebinds.example" else bad
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in bad]

    async def connect(_self: Any, host: str, *_: Any, **__: Any) -> Any:
        connected.append(host)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(posting.httpcore.AnyIOBackend, "connect_tcp", connect)
    poster = Poster(local=False)
    for host, told in (
        ("mixed.example", "the address is not public"),
        ("rebinds.example", "the connection failed"),
    ):
        asked.clear()
        assert (await poster.post(f"https://{host}/", {}, b"")).text == told
        assert asked == [host]
    await poster.close()
    assert connected == ["8.8.8.8"]


@pytest.mark.parametrize(
    "url",
    [
        *("http://example.com/", "ftp://example.com/", "https://u:p@example.com/", "https:///x"),
        *("https://example.com/#x", "https://example.com:99999/", "https://[/", "junk", ""),
        *("https://a b.example/", "https://a..b/", "https://.example/", f"https://{'a' * 64}.b/"),
        *("https://b\u00fccher.example/", "https://b.example/\u00fc", "https://b.example/a b"),
        *(f"https://{'a.' * 127}b/", "https://-a.example/", "https://[fe80::1%251]/"),
        *("https://[v1.a]/", "https://a%20b/", "https://a\\b/"),
    ],
)
async def test_what_is_no_target_is_refused_when_made(db: str, url: str) -> None:
    """SSRF: only https, with a host, without a user; on a service that was not told otherwise."""
    async with market(db) as m:
        answer = await m.post(m.buyer, "/webhooks", {"url": url})
        assert code_of(answer) == (422, "invalid_request")
        async with reading(m.escrow.ledger) as connection:
            assert (await connection.execute(select(schema.webhooks))).first() is None


async def test_the_receiver_of_the_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page's receiver takes what the escrow sends, once, and refuses what it does not."""
    (code,) = re.findall(r"<!-- test: receiver -->\n+```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/events.md", "exec"), names)
    async with (
        serving(names["app"]) as url,
        market(tmp_path, clock=time.time, local_webhooks=True) as m,
        httpx.AsyncClient(timeout=20) as http,
    ):
        hook = (await m.post(m.buyer, "/webhooks", {"url": f"{url}/hook"})).json()
        monkeypatch.setenv("WEBHOOK_SECRET", hook["secret"])
        name = (await m.open("10"))["escrow_id"]

        async def delivered() -> bool:
            return [each["state"] for each in await deliveries(m, hook)] == ["delivered"]

        await until(delivered)
        assert (await http.post(f"{url}/hook", content=b"{}")).status_code == 400
        (told,) = await deliveries(m, hook)
        again = f"/webhooks/{hook['webhook_id']}/deliveries/{told['event_id']}/redeliver"
        assert (await m.post(m.buyer, again)).status_code == 200
        await until(delivered)
    assert capsys.readouterr().out == f"locked {name} 10000000\n"


def test_waits_grow_and_differ() -> None:
    """Failures: retries come less and less often, at most hourly, and not all at once."""
    waits = [[queue.wait_seconds(attempts) for _ in range(50)] for attempts in range(1, 40)]
    assert all(max(wait) <= 3600 and min(wait) > 0 for wait in waits)
    assert min(waits[-1]) > max(waits[2])
    assert len(set(waits[-1])) > 10
