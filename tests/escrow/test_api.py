"""The escrow's HTTP API over a real socket: what it does, and every refusal."""

from pathlib import Path

import pytest

from tests.escrow.market import JOURNAL, RECEIPT_KEY, SESSION_KEY, code_of, market
from x402mw.core import ids
from x402mw.core.amounts import AMOUNT_MAX, display, to_atomic
from x402mw.core.keys import public_key
from x402mw.core.strict import b64url_decode, b64url_encode

pytestmark = pytest.mark.anyio
NOBODY = "ag_" + "0" * 32
NOTHING = "esc_" + "0" * 32


async def test_the_service_says_who_it_is(db: str) -> None:
    """Contract: /health and the key set name the network; every answer has the ledger's Date."""
    async with market(db) as m:
        health = await m.http.get(f"{m.escrow.url}/health")
        assert health.json() == {"status": "ok", "network": "escrow:main", "time": 1_800_000_000}
        assert health.headers["date"] == "Fri, 15 Jan 2027 08:00:00 GMT"
        keys = await m.key_set()
        assert (keys.network, keys.serial, keys.claim_seconds) == ("escrow:main", 1, 300)
        assert keys.min_escrow == to_atomic("1.00")
        assert keys.not_after == 1_800_000_000 + 86_400


async def test_an_agent_registers_and_sees_itself(tmp_path: Path) -> None:
    """Contract: the API key is shown once; the agent then sees its own balance."""
    async with market(tmp_path) as m:
        answer = await m.post(None, "/agents", {"name": "Ada's bot"})
        assert answer.status_code == 201
        body = answer.json()
        told = {"agent_id", "api_key", "name", "handle", "tenant", "mode", "balance"}
        assert body.keys() == told
        assert body["api_key"].startswith("pf_live_")
        bearer = {"Authorization": f"bearer {body['api_key']}"}
        me = (await m.http.get("/agents/me", headers=bearer)).json()
        (key,) = me.pop("keys")
        assert me == {
            "agent_id": body["agent_id"],
            "name": "Ada's bot",
            "handle": None,
            "tenant": "public",
            "mode": "live",
            "balance": "0.00",
            "referrer": None,
            "created_at": 1_800_000_000,
            "revoked_at": None,
        }
        assert key.keys() == {
            "key_id", "name", "scopes", "created_at", "expires_at", "revoked_at",
        }  # fmt: skip
        assert key["scopes"] == ["provide", "read", "spend"]
        stored = (tmp_path / "escrow.db").read_bytes() + (tmp_path / "escrow.db-wal").read_bytes()
        assert body["api_key"].encode() not in stored


async def test_a_session_lives_from_lock_to_close(db: str) -> None:
    """Rules 2 to 5: lock, token, top up, release, redeem, provider close; the split is exact."""
    async with market(db) as m:
        escrow = await m.open("5.00", memo="for quotes")
        name = escrow["escrow_id"]
        assert await m.balance(m.buyer) == "95.00"
        assert (escrow["status"], escrow["memo"]) == ("locked", "for quotes")
        grown = (await m.post(m.buyer, f"/escrow/{name}/topup", {"amount": "2.50"})).json()
        assert (grown["amount"], grown["remaining"]) == ("7.50", "7.50")
        token = await m.open_token(grown["token"])
        assert (token.deposit, token.released) == (to_atomic("7.50"), 0)
        assert (token.exp, token.claim_until) == (1_800_000_600, 1_800_000_900)
        assert ids.format_id(ids.ESCROW, token.session) == name
        assert (token.pay_to, token.payer) == (m.provider.agent_id, m.buyer.agent_id)
        assert ids.format_id(ids.JOURNAL, token.journal) == JOURNAL
        assert b64url_encode(token.session_key) == SESSION_KEY
        assert b64url_encode(token.receipt_key) == RECEIPT_KEY
        paid = (await m.post(m.buyer, f"/escrow/{name}/release", {"cumulative": "1.00"})).json()
        assert (paid["status"], paid["released"], paid["fee"]) == (
            "partially_released",
            "1.00",
            "0.01",
        )
        close = {"voucher": m.voucher(name, "4.00"), "amount": "3.00"}
        closed = (await m.post(m.provider, f"/escrow/{name}/close", close)).json()
        assert (closed["status"], closed["close_reason"]) == ("settled", "provider_close")
        assert (closed["released"], closed["redeemed"], closed["refunded"]) == (
            "3.00",
            "3.00",
            "4.50",
        )
        assert await m.balance(m.buyer) == "97.00"
        assert await m.balance(m.provider) == "2.97"


async def test_a_renewed_token_tells_the_newest_figures(db: str) -> None:
    """Keys: a token carries deposit and released as they are; claim_until only grows."""
    async with market(db) as m:
        escrow = await m.open()
        name = escrow["escrow_id"]
        await m.post(m.buyer, f"/escrow/{name}/release", {"cumulative": "0.0000019"})
        await m.escrow.pass_time(300)
        answer = (await m.post(m.buyer, f"/escrow/{name}/token")).json()
        token = await m.open_token(answer["token"])
        assert (token.deposit, token.released) == (to_atomic("5.00"), 1)
        assert answer["claim_until"] == token.claim_until == escrow["claim_until"] + 300


async def test_pages_list_the_callers_escrows_newest_first(db: str) -> None:
    """Contract: keyset pages by role and status, each escrow once, the other tenants' never."""
    async with market(db) as m:
        names = [(await m.open("1.00"))["escrow_id"] for _ in range(5)]
        await m.post(m.provider, f"/escrow/{names[1]}/close")
        seen, after = [], None
        while True:
            query = {"role": "buyer", "limit": 2} | ({"after": after} if after else {})
            page = (await m.get(m.buyer, "/escrow", **query)).json()
            seen += [escrow["escrow_id"] for escrow in page["items"]]
            after = page["next"]
            if after is None:
                break
        assert seen == names[::-1]
        refunded = (await m.get(m.provider, "/escrow", status="refunded")).json()["items"]
        assert [escrow["escrow_id"] for escrow in refunded] == [names[1]]
        assert (await m.get(m.buyer, "/escrow", role="provider")).json()["items"] == []
        stranger = await m.escrow.new_agent("stranger")
        assert (await m.get(stranger, "/escrow")).json() == {"items": [], "next": None}


async def test_a_stranger_sees_nothing_and_does_nothing(db: str) -> None:
    """Security: another tenant's escrow looks exactly like one that does not exist."""
    async with market(db) as m:
        name = (await m.open())["escrow_id"]
        stranger = await m.escrow.new_agent("stranger", balance="10.00")
        bodies = {"token": None, "topup": {"amount": "1"}, "release": {"cumulative": "1"}}
        for target in (name, NOTHING):
            answers = [await m.get(stranger, f"/escrow/{target}")]
            for path, body in {**bodies, "close": None}.items():
                answers.append(await m.post(stranger, f"/escrow/{target}/{path}", body))
            assert {code_of(answer) for answer in answers} == {(404, "not_found")}
            assert len({answer.text for answer in answers}) == 1
        item = {"voucher": m.voucher(name, "1"), "amount": "1"}
        body = {"journal": JOURNAL, "serial": 9, "items": [item]}
        assert code_of(await m.post(stranger, "/redeem", body)) == (404, "not_found")
        assert code_of(await m.get(stranger, "/changes", journal=JOURNAL)) == (404, "not_found")
        assert (await m.show(name))["status"] == "locked"


async def test_only_the_buyer_spends(db: str) -> None:
    """Rule 5, column Who: a provider cannot renew, top up or release."""
    async with market(db) as m:
        name = (await m.open())["escrow_id"]
        for path, body in (
            ("token", None),
            ("topup", {"amount": "1"}),
            ("release", {"cumulative": "1"}),
        ):
            answer = await m.post(m.provider, f"/escrow/{name}/{path}", body)
            assert code_of(answer) == (403, "not_the_buyer")


async def test_create_is_refused_for_every_reason_it_has(db: str) -> None:
    """Rule 5, guards of create; and I10: a refusal takes nothing."""
    async with market(db) as m:
        other = await m.escrow.new_agent("other")
        wishes = {
            (422, "below_minimum"): m.wish("0.999999"),
            (422, "self_payment"): m.wish(to_agent_id=m.buyer.agent_id),
            (404, "unknown_agent"): m.wish(to_agent_id=NOBODY),
            (404, "unknown_journal"): m.wish(to_agent_id=other.agent_id),
            (409, "insufficient_funds"): m.wish("100.000001"),
            (422, "invalid_request"): m.wish("1.0000001"),
        }
        for refusal, wish in wishes.items():
            assert code_of(await m.post(m.buyer, "/escrow", wish)) == refusal
        unknown = m.wish(journal="jr_" + "2" * 32)
        assert code_of(await m.post(m.buyer, "/escrow", unknown)) == (404, "unknown_journal")
        for seconds in (1799, 31_536_001, 0, -1):
            wish = m.wish(expires_in_seconds=seconds)
            assert code_of(await m.post(m.buyer, "/escrow", wish)) == (422, "invalid_request")
        assert await m.balance(m.buyer) == "100.00"
        assert (await m.get(m.buyer, "/escrow")).json()["items"] == []


async def test_a_top_up_needs_funds(db: str) -> None:
    """Rule 5: a top-up beyond the balance is refused and changes nothing."""
    async with market(db) as m:
        escrow = await m.open()
        answer = await m.post(m.buyer, f"/escrow/{escrow['escrow_id']}/topup", {"amount": "96"})
        assert code_of(answer) == (409, "insufficient_funds")
        assert answer.json()["balance"] == "95.00"
        assert await m.show(escrow["escrow_id"]) == {
            name: value for name, value in escrow.items() if name != "token"
        }


async def test_a_top_up_beyond_all_money_is_a_refusal(db: str) -> None:
    """M1: L + x beyond 2^63 - 1 is refused with 4xx like any amount, and changes nothing."""
    async with market(db) as m:
        name = (await m.open())["escrow_id"]
        body = {"amount": display(AMOUNT_MAX)}
        answer = await m.post(m.buyer, f"/escrow/{name}/topup", body)
        assert code_of(answer) == (409, "amount_out_of_range")
        assert (await m.show(name))["amount"] == "5.00"


async def test_an_ended_escrow_only_reads(db: str) -> None:
    """Rule 5: terminal states refuse everything with 409 and name the state."""
    async with market(db) as m:
        name = (await m.open())["escrow_id"]
        await m.post(m.provider, f"/escrow/{name}/close")
        before = await m.show(name)
        for agent, path, body in (
            (m.buyer, "token", None),
            (m.buyer, "topup", {"amount": "1"}),
            (m.buyer, "release", {"cumulative": "1"}),
            (m.buyer, "close", None),
            (m.provider, "close", None),
        ):
            answer = await m.post(agent, f"/escrow/{name}/{path}", body)
            assert code_of(answer) == (409, "invalid_state")
            assert answer.json()["state"] == "refunded"
        assert await m.show(name) == before


async def test_a_closing_escrow_takes_vouchers_and_nothing_else(db: str) -> None:
    """Rule 5: after the buyer's close no token, top-up, release; vouchers still count."""
    async with market(db) as m:
        name = (await m.open())["escrow_id"]
        closing = (await m.post(m.buyer, f"/escrow/{name}/close")).json()
        assert (closing["status"], closing["closing_deadline"]) == ("closing", 1_800_000_900)
        for path, body in (
            ("token", None),
            ("topup", {"amount": "1"}),
            ("release", {"cumulative": "1"}),
            ("close", None),
        ):
            answer = await m.post(m.buyer, f"/escrow/{name}/{path}", body)
            assert code_of(answer) == (409, "invalid_state")
        (verdict,) = await m.redeem({"voucher": m.voucher(name, "2"), "amount": "2"})
        assert (verdict["ok"], verdict["redeemed"], verdict["state"]) == (True, "2.00", "closing")


async def test_a_provider_close_checks_its_voucher(db: str) -> None:
    """Rule 5: a close with a bad voucher is refused whole; the buyer may bring none."""
    async with market(db) as m:
        name, other = (await m.open())["escrow_id"], (await m.open())["escrow_id"]
        forged = m.voucher(name, "1", seed=b"x" * 32)
        for agent, body, code in (
            (m.provider, {"voucher": forged, "amount": "1"}, "signature"),
            (m.provider, {"voucher": m.voucher(other, "1"), "amount": "1"}, "malformed"),
            (m.provider, {"voucher": "junk", "amount": "1"}, "malformed"),
            (m.provider, {"amount": "1"}, "voucher_required"),
            (m.provider, {"voucher": forged}, "invalid_request"),
            (m.buyer, {"voucher": m.voucher(name, "1"), "amount": "1"}, "invalid_request"),
            (m.buyer, {"amount": "1"}, "invalid_request"),
        ):
            assert code_of(await m.post(agent, f"/escrow/{name}/close", body)) == (422, code)
        assert (await m.show(name))["status"] == "locked"


async def test_a_journal_has_one_owner_and_one_key(db: str) -> None:
    """Contract: the same registration again is 200, another key or owner is 409."""
    async with market(db) as m:
        other_key = b64url_encode(public_key(b"q" * 32))
        for agent, key, status in (
            (m.provider, RECEIPT_KEY, 200),
            (m.provider, other_key, 409),
            (m.buyer, RECEIPT_KEY, 409),
        ):
            answer = await m.http.put(
                f"/journals/{JOURNAL}", json={"receipt_key": key}, headers=agent.headers
            )
            assert answer.status_code == status


async def test_the_faucet_gives_once(db: str) -> None:
    """Contract: $1 for each new agent, once; loopback has no limit per source."""
    async with market(db) as m:
        for _ in range(12):
            agent = await m.escrow.new_agent()
            answer = await m.post(agent, "/faucet/claim")
            assert answer.json() == {"claimed": "1.00", "balance": "1.00"}
        assert code_of(await m.post(agent, "/faucet/claim")) == (409, "faucet_claimed")
        assert await m.balance(agent) == "1.00"


async def test_one_address_claims_a_few_times_a_day(db: str) -> None:
    """Contract: claims are counted by source address, which a local proxy may pass on."""
    async with market(db, faucet_claims_per_source=2) as m:
        statuses = []
        for host in ("203.0.113.9", "203.0.113.9", "203.0.113.9", "203.0.113.10"):
            agent = await m.escrow.new_agent()
            headers = {**agent.headers, "X-Forwarded-For": host}
            statuses.append((await m.http.post("/faucet/claim", headers=headers)).status_code)
        assert statuses == [200, 200, 429, 200]


async def test_the_faucet_has_a_daily_ceiling(db: str) -> None:
    """Contract: all claims of a UTC day stay under one ceiling; tomorrow it gives again."""
    async with market(db, faucet_daily=to_atomic("2.50")) as m:
        agents = [await m.escrow.new_agent() for _ in range(3)]
        answers = [await m.post(agent, "/faucet/claim") for agent in agents]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert code_of(answers[2]) == (429, "faucet_limit")
        m.escrow.clock.advance(answers[2].json()["retry_after_seconds"])
        assert (await m.post(agents[2], "/faucet/claim")).status_code == 200


@pytest.mark.parametrize("what", ["faucet_amount", "faucet_daily"])
async def test_a_faucet_of_nothing_is_off(db: str, what: str) -> None:
    """Contract: an amount of 0, or a day of 0, turns the faucet off, and nobody is told of one."""
    async with market(db, **{what: to_atomic("0")}) as m:
        refused = await m.post(m.buyer, "/faucet/claim")
        assert code_of(refused) == (409, "no_faucet")
        assert "retry_after_seconds" not in refused.json()
        assert (await m.get(None, "/stats")).json()["faucet"] == {"live": "0.00", "test": "100.00"}


async def test_changes_tell_what_happened_in_order(db: str) -> None:
    """Contract: /changes pages through a journal's sessions in the order of their last change."""
    async with market(db) as m:
        first, second = (await m.open())["escrow_id"], (await m.open())["escrow_id"]
        page = (await m.get(m.provider, "/changes", journal=JOURNAL, limit=1)).json()
        assert [change["escrow_id"] for change in page["changes"]] == [first]
        rest = (await m.get(m.provider, "/changes", journal=JOURNAL, since=page["next"])).json()
        assert [change["escrow_id"] for change in rest["changes"]] == [second]
        await m.redeem({"voucher": m.voucher(first, "1"), "amount": "1"})
        news = (await m.get(m.provider, "/changes", journal=JOURNAL, since=rest["next"])).json()
        assert news["changes"] == [
            {
                "escrow_id": first,
                "state": "partially_released",
                "deposit": "5.00",
                "redeemed": "1.00",
                "released": "1.00",
                "claim_until": 1_800_000_900,
            }
        ]
        end = (await m.get(m.provider, "/changes", journal=JOURNAL, since=news["next"])).json()
        assert (end["changes"], end["next"]) == ([], news["next"])


async def test_a_restored_journal_learns_it(db: str) -> None:
    """Contract: the escrow keeps the highest write serial it was shown and tells it."""
    async with market(db) as m:
        shown = []
        for serial in (5, 9, 3, 9):
            answer = await m.get(m.provider, "/changes", journal=JOURNAL, serial=serial)
            shown.append(answer.json()["serial"])
        body = {"journal": JOURNAL, "serial": 4, "items": []}
        shown.append((await m.post(m.provider, "/redeem", body)).json()["serial"])
        assert shown == [0, 5, 9, 9, 9]


async def test_rotation_keeps_old_tokens_readable(db: str) -> None:
    """Keys: rotating the signing key raises the serial; old keys stay, marked retired."""
    async with market(db) as m:
        old = (await m.open())["token"]
        await m.escrow.ledger.rotate_keys()
        new = (await m.open())["token"]
        keys = await m.key_set()
        assert (keys.serial, len(keys.keys), len(keys.retired)) == (2, 2, 1)
        assert (await m.open_token(old)).retired
        assert not (await m.open_token(new)).retired
        assert b64url_decode(m.escrow.root_key, 32) not in keys.keys.values()
