"""Agents and their keys: handles, scopes that only shrink, rotation and revocation."""

import asyncio
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.escrow.market import Market, code_of, market
from tests.escrow.operators import make_agent, make_key, make_tenant
from tests.support.escrow import Agent, reading
from x402mw.escrow.access import KEYS_MAX, SCOPES

pytestmark = pytest.mark.anyio
KEYS = "/agents/me/keys"
REVOKED = (409, "agent_revoked")


async def keys_of(m: Market, agent: Agent) -> list[str]:
    """The ids of an agent's keys that work."""
    return [key["key_id"] for key in (await m.get(agent, KEYS)).json()["items"]]


async def new_key(m: Market, agent: Agent, **body: object) -> tuple[Agent, str]:
    """One more key, made by another one."""
    answer = await m.post(agent, KEYS, body)
    assert answer.status_code == 201, answer.text
    return Agent(agent.agent_id, answer.json()["api_key"]), answer.json()["key_id"]


async def delete(m: Market, agent: Agent, key_id: str) -> tuple[int, str]:
    """Revokes a key."""
    answer = await m.http.delete(f"{KEYS}/{key_id}", headers=agent.headers)
    return answer.status_code, answer.json().get("code", "")


async def works(m: Market, agent: Agent) -> bool:
    """Whether a key opens anything."""
    return (await m.get(agent, KEYS)).status_code == 200


# Handles.


async def test_a_handle_is_unique_in_its_tenant(db: str) -> None:
    """L18: one tenant has a handle once, another may have it too; it leads to its agent."""
    async with market(db) as m:
        wish = {"name": "a", "handle": "research-agent-42"}
        first = (await m.post(None, "/agents", wish)).json()
        assert code_of(await m.post(None, "/agents", wish)) == (409, "handle_taken")
        test = await m.post(None, "/agents", {**wish, "mode": "test"})
        assert test.json()["handle"] == "research-agent-42"
        found = await m.get(m.buyer, "/handles/research-agent-42")
        assert found.json()["agent_id"] == first["agent_id"]
        assert code_of(await m.get(m.buyer, "/handles/nobody")) == (404, "not_found")


@pytest.mark.parametrize("handle", ["ab", "x" * 41, "Upper", "a_b", "ä-bc", "a b", "", "abc\n", 5])
async def test_a_handle_has_a_form(db: str, handle: object) -> None:
    """Limits: 3 to 40 of a-z, 0-9 and -; nothing else, and nobody is registered."""
    async with market(db) as m:
        answer = await m.post(None, "/agents", {"name": "a", "handle": handle})
        assert code_of(answer) == (422, "invalid_request")


async def test_many_want_one_handle(db: str) -> None:
    """L18: of many that ask for a handle at once exactly one has it."""
    async with market(db) as m:
        wish = {"name": "a", "handle": "wanted"}
        answers = await asyncio.gather(*(m.post(None, "/agents", wish) for _ in range(16)))
        codes = sorted(answer.status_code for answer in answers)
        assert codes == [201] + [409] * 15


# Keys.


async def test_keys_are_shown_without_secrets(db: str) -> None:
    """E22: a secret is shown once, when its key is made; never again, also to a retry."""
    async with market(db) as m:
        answer = await m.post(m.buyer, KEYS, {"name": "ci", "scopes": ["read"]}, key="k")
        secret = answer.json()["api_key"]
        again = await m.post(m.buyer, KEYS, {"name": "ci", "scopes": ["read"]}, key="k")
        assert "idempotent-replayed" not in again.headers
        assert again.json()["api_key"] != secret
        shown = (await m.get(m.buyer, KEYS)).text + (await m.get(m.buyer, "/agents/me")).text
        assert "pf_live_" not in shown
        listed = (await m.get(m.buyer, KEYS)).json()["items"]
        assert sorted((key["name"], key["scopes"]) for key in listed) == [
            ("", ["provide", "read", "spend"]),
            *[("ci", ["read"])] * 2,
        ]


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_scopes_only_shrink(data: st.DataObject) -> None:
    """Scopes: what a key may make is a subset of itself; a key that only reads makes none."""
    from x402mw.escrow.access import MANAGING, Principal, _check_reach
    from x402mw.escrow.errors import Refused

    some = st.sets(st.sampled_from(SCOPES), min_size=1)
    own, wanted = data.draw(some), data.draw(some)
    asker = Principal("ag", "public", "live", frozenset(own), "key")
    try:
        _check_reach(asker, frozenset(wanted))
        allowed = True
    except Refused as refusal:
        allowed = False
        assert refusal.members["scopes"] == sorted(wanted - own)
    assert allowed == (wanted <= own)
    assert frozenset({"read"}).isdisjoint(MANAGING)


async def test_a_key_is_never_wider_than_the_key_that_asks(db: str) -> None:
    """Scopes: a narrow key makes, rotates and revokes only what it may do itself."""
    async with market(db) as m:
        (wide,) = await keys_of(m, m.buyer)
        narrow, _ = await new_key(m, m.buyer, scopes=["spend", "read"])
        answer = await m.post(narrow, KEYS, {"scopes": ["provide"]})
        assert code_of(answer) == (403, "scope")
        assert code_of(await m.post(narrow, f"{KEYS}/{wide}/rotate")) == (403, "scope")
        assert await delete(m, narrow, wide) == (403, "scope")
        admin = await m.post(m.buyer, KEYS, {"scopes": ["admin"]})
        assert code_of(admin) == (403, "scope")
        same, _ = await new_key(m, narrow)
        shown = (await m.get(same, KEYS)).json()["items"]
        assert sorted(key["scopes"] for key in shown)[-1] == ["read", "spend"]


async def test_a_revoked_key_is_dead_at_once(db: str) -> None:
    """L2: after the answer of DELETE no request with that key does anything, others go on."""
    async with market(db) as m:
        other, key_id = await new_key(m, m.buyer)
        assert await works(m, other)
        assert await delete(m, m.buyer, key_id) == (200, "")
        assert not await works(m, other)
        assert await delete(m, m.buyer, key_id) == (200, "")
        assert await works(m, m.buyer)
        m.escrow.clock.advance(-3600)
        assert not await works(m, other), "a clock set back revives nothing"


async def test_the_last_key_that_makes_keys_stays(db: str) -> None:
    """Accounts: an agent cannot lock itself out; it can still rotate that key."""
    async with market(db) as m:
        (only,) = await keys_of(m, m.buyer)
        await new_key(m, m.buyer, scopes=["read"])
        assert await delete(m, m.buyer, only) == (409, "last_key")
        rotated = await m.post(m.buyer, f"{KEYS}/{only}/rotate")
        assert rotated.status_code == 201
        assert not await works(m, m.buyer)
        successor = Agent(m.buyer.agent_id, rotated.json()["api_key"])
        assert rotated.json()["scopes"] == ["provide", "read", "spend"]
        assert await m.balance(successor) == "100.00"


async def test_a_rotated_key_has_its_grace(db: str) -> None:
    """Rotation: the old key works until its grace ends, but manages no keys meanwhile."""
    async with market(db) as m:
        (old,) = await keys_of(m, m.buyer)
        path = f"{KEYS}/{old}/rotate"
        url = {"url": "https://b.example/"}
        hook = (await m.post(m.buyer, "/webhooks", url)).json()["webhook_id"]
        answer = await m.post(m.buyer, path, {"grace_seconds": 100})
        assert answer.json()["replaced_until"] == 1_800_000_100
        new = Agent(m.buyer.agent_id, answer.json()["api_key"])
        await m.escrow.pass_time(99)
        assert await works(m, m.buyer)
        assert await works(m, new)
        assert code_of(await m.post(m.buyer, KEYS)) == (409, "key_ending")
        for lasting in ("/webhooks", f"/webhooks/{hook}/rotate", "/agents/me/revoke"):
            body = url if lasting == "/webhooks" else {}
            assert code_of(await m.post(m.buyer, lasting, body)) == (409, "key_ending")
        assert code_of(await m.post(new, path)) == (409, "key_ending")
        await m.escrow.pass_time(1)
        assert not await works(m, m.buyer)
        assert await works(m, new)
        assert len(await keys_of(m, new)) == 1


@pytest.mark.parametrize("grace", [-1, 86_401, "10", 1.5, None, True])
async def test_a_grace_has_limits(db: str, grace: object) -> None:
    """Limits: at most a day of grace, in whole seconds."""
    async with market(db) as m:
        (old,) = await keys_of(m, m.buyer)
        answer = await m.post(m.buyer, f"{KEYS}/{old}/rotate", {"grace_seconds": grace})
        assert code_of(answer) == (422, "invalid_request")
        assert await works(m, m.buyer)


async def test_an_agent_has_so_many_keys(db: str) -> None:
    """Limits: twenty keys that work; a revoked one makes room."""
    async with market(db) as m:
        made = [await new_key(m, m.buyer) for _ in range(KEYS_MAX - 1)]
        assert code_of(await m.post(m.buyer, KEYS)) == (409, "too_many_keys")
        path = f"{KEYS}/{made[1][1]}/rotate"
        graceful = await m.post(m.buyer, path, {"grace_seconds": 9})
        assert code_of(graceful) == (409, "too_many_keys"), "the old one would work beside it"
        assert (await m.post(m.buyer, path)).status_code == 201
        await delete(m, m.buyer, made[0][1])
        await new_key(m, m.buyer)


async def test_a_key_revoked_meanwhile_makes_none(db: str) -> None:
    """Concurrency: of keys that revoke and rotate each other at once, exactly one wins."""
    async with market(db) as m:
        for _ in range(5):
            one, one_id = await new_key(m, m.buyer)
            two, two_id = await new_key(m, m.buyer)
            answers = await asyncio.gather(
                delete(m, one, two_id),
                delete(m, two, one_id),
                m.post(one, KEYS, {"name": "late"}),
                m.post(two, KEYS, {"name": "late"}),
            )
            assert {answers[0][0], answers[1][0]} == {200, 401}
            alive = [await works(m, agent) for agent in (one, two)]
            assert sorted(alive) == [False, True], "then the other key was dead and revoked none"
            codes = {answer.status_code for answer in answers[2:]}
            assert codes <= {201, 401}


async def test_no_lock_after_an_agent_was_revoked(db: str) -> None:
    """L2: revoked while many lock, no lock is entered after the revocation, and no key works."""
    async with market(db) as m:
        second = await make_key(m, m.buyer, "spend")
        locks = [m.post(agent, "/escrow", m.wish("1.00")) for agent in (m.buyer, second) * 8]
        answers = await asyncio.gather(*locks[:8], m.post(m.buyer, "/agents/me/revoke"), *locks[8:])
        assert answers[8].status_code == 200
        codes = {answer.status_code for answer in answers}
        assert codes <= {200, 201, 401, 409}
        assert not await works(m, m.buyer)
        async with reading(m.escrow.ledger) as connection:
            kinds = await connection.exec_driver_sql("SELECT kind FROM entries ORDER BY seq")
            told = [kind for (kind,) in kinds]
        assert "lock" not in told[told.index("agent_revoked") :]
        refused = await m.post(await m.escrow.new_agent(balance="5.00"), "/transfers", {
            "to_agent_id": m.buyer.agent_id, "amount": "1.00",
        })  # fmt: skip
        assert code_of(refused) == (409, "agent_revoked")


async def test_nobody_locks_for_a_revoked_provider(db: str) -> None:
    """L2: a revoked provider is paid what was locked before, and nothing more is locked for it."""
    async with market(db) as m:
        name = (await m.open("5.00"))["escrow_id"]
        assert (await m.post(m.provider, "/agents/me/revoke")).status_code == 200
        assert code_of(await m.post(m.buyer, "/escrow", m.wish())) == (409, "agent_revoked")
        assert code_of(await m.get(m.provider, "/agents/me")) == (401, "unauthorized")
        collecting = await make_key(m, m.provider, "provide")
        (verdict,) = await m.redeem(
            {"voucher": m.voucher(name, "2.00"), "amount": "2.00"}, agent=collecting
        )
        assert verdict["released"] == "2.00"


@pytest.mark.parametrize("handle", ["operator", "admin", "public", "house", "x402mw", "escrow"])
async def test_nobody_is_called_as_the_operator_is(tmp_path: Path, handle: str) -> None:
    """Accounts: a handle speaks for its agent, never for the escrow."""
    async with market(tmp_path) as m:
        answer = await m.post(None, "/agents", {"name": "a", "handle": handle})
        assert code_of(answer) == (422, "invalid_request")
        assert (await m.get(m.buyer, f"/handles/{handle}")).status_code == 404


@pytest.mark.parametrize(
    "name", [" ", "   ", "\u3164", "\u2800 ", "\u0301", "\ufe0f", "\u115f\u1160"]
)
async def test_a_name_can_be_seen(tmp_path: Path, name: str) -> None:
    """Accounts: a name of blanks and marks only is none; one letter among them is."""
    async with market(tmp_path) as m:
        assert code_of(await m.post(None, "/agents", {"name": name})) == (422, "invalid_request")
        assert (await m.post(None, "/agents", {"name": f"e{name}"})).status_code == 201


async def test_a_key_that_may_less_ends_no_agent(db: str) -> None:
    """Scopes: revoking an agent ends its keys, so it takes every scope that one of them has."""
    async with market(db) as m:
        spender, boss = await make_key(m, m.buyer, "spend"), await make_key(m, m.buyer, "admin")
        for agent, lacking in ((spender, ["admin", "provide", "read"]), (m.buyer, ["admin"])):
            answer = await m.post(agent, "/agents/me/revoke")
            assert code_of(answer) == (403, "scope")
            assert answer.json()["scopes"] == lacking
        assert (await m.get(boss, "/admin/agents")).status_code == 200
        whole = await make_key(m, m.buyer, *SCOPES)
        assert (await m.post(whole, "/agents/me/revoke")).status_code == 200
        assert not await works(m, boss)


async def test_nothing_more_is_locked_with_a_revoked_agent(db: str) -> None:
    """L2: neither a top-up nor a token for a revoked provider, nor a top-up by a revoked buyer."""
    async with market(db) as m:
        hand = {"to_agent_id": m.provider.agent_id, "amount": "5.00"}
        byhand = (await m.post(m.buyer, "/escrow", hand)).json()["escrow_id"]
        session = (await m.open("5.00"))["escrow_id"]
        other = await m.escrow.new_agent(balance="20.00")
        theirs = (await m.post(other, "/escrow", hand)).json()["escrow_id"]
        assert (await m.post(other, "/agents/me/revoke")).status_code == 200
        other = await make_key(m, other, "spend")
        more = {"amount": "1.00"}
        assert code_of(await m.post(other, f"/escrow/{theirs}/topup", more)) == REVOKED
        assert code_of(await m.post(other, "/faucet/claim")) == REVOKED
        assert (await m.post(m.provider, "/agents/me/revoke")).status_code == 200
        for name in (byhand, session):
            assert code_of(await m.post(m.buyer, f"/escrow/{name}/topup", more)) == REVOKED
            assert (await m.show(name))["amount"] == "5.00"
        assert code_of(await m.post(m.buyer, f"/escrow/{session}/token")) == REVOKED
        paid = await m.post(m.buyer, f"/escrow/{byhand}/release", more)
        assert paid.json()["released"] == "1.00", "what was locked before goes on by its terms"


async def test_what_happens_to_accounts_is_entered(db: str) -> None:
    """L7: making, rotating and revoking keys and agents stands in the books, with who did it."""
    async with market(db) as m:
        (old,) = await keys_of(m, m.buyer)
        _, other = await new_key(m, m.buyer)
        await delete(m, m.buyer, other)
        answer = await m.post(m.buyer, f"{KEYS}/{old}/rotate")
        await m.post(Agent("", answer.json()["api_key"]), "/agents/me/revoke")
        await make_tenant(m, "house-of-bots")
        await make_agent(m, "house-of-bots")
        query = "SELECT kind, actor, data FROM entries ORDER BY seq"
        async with reading(m.escrow.ledger) as connection:
            told = (await connection.exec_driver_sql(query)).all()
        mine = [row.kind for row in told if row.actor == m.buyer.agent_id]
        assert mine == ["key_created", "key_revoked", "key_rotated", "agent_revoked"]
        assert [row.kind for row in told].count("agent_created") == 1
        assert [row.actor for row in told if row.kind == "tenant_created"] == ["operator"]
        assert not any("pf_" in (row.data or "") for row in told)
