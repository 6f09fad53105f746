"""Who may do what: every route with every scope, and every id with the keys of strangers."""

import re
from pathlib import Path

import pytest

import x402mw.escrow
from tests.escrow.market import JOURNAL, Market, code_of, market
from tests.escrow.operators import furnish, make_agent, make_key
from tests.support.escrow import Agent
from x402mw.escrow.access import SCOPES
from x402mw.escrow.app import ROUTES

pytestmark = pytest.mark.anyio
IDS = {
    "escrow_id": "esc_" + "0" * 32,
    "journal": "jr_" + "0" * 32,
    "agent_id": "ag_" + "0" * 32,
    "key_id": "key_" + "0" * 32,
    "transfer_id": "tr_" + "0" * 32,
    "handle": "nobody",
}
ESCROW = Path(x402mw.escrow.__file__).parent
DOCS = (ESCROW.parents[1] / "docs" / "escrow.md").read_text()
GUARDED = [route for route in ROUTES if route[2]]


def filled(path: str, names: dict[str, str]) -> str:
    """A path with ids in the places of its parameters; unknown ones name nothing."""
    return re.sub(r"\{(\w+)[^}]*\}", lambda found: names.get(found[1], "x" * 8), path)


async def ask(m: Market, agent: Agent | None, method: str, path: str) -> tuple[int, str]:
    """Status and code of a request with an empty body."""
    headers = agent.headers if agent else {}
    async with m.http.stream(method, path, headers=headers, json={}) as answer:
        # The stream of events has no end.
        if answer.headers["content-type"].startswith("text/event-stream"):
            return answer.status_code, ""
        await answer.aread()
        return answer.status_code, answer.json().get("code", "")


def test_only_registration_and_figures_are_open() -> None:
    """E17: every other route names a scope, and no scope is misspelt."""
    assert {path for _, path, scopes, *_ in ROUTES if not scopes} <= {"/agents", "/stats"}
    assert all(set(scopes.split()) <= set(SCOPES) for _, _, scopes, *_ in ROUTES)


async def test_every_route_with_every_scope(db: str) -> None:
    """Scopes: a key with one scope passes exactly the routes that name it, before all else."""
    async with market(db) as m:
        wrong = []
        for scope in SCOPES:
            for route in GUARDED:
                method, path, scopes, *_ = route
                agent = await make_key(m, m.buyer, scope, *route.also.split())
                status, code = await ask(m, agent, method, filled(path, IDS))
                if path == "/agents/me/revoke" and scope in scopes.split():
                    # Then all the others of the agent's keys are asked for.
                    assert (status, code) == (403, "scope")
                    continue
                refused = (status, code) == (403, "scope")
                if refused == (scope in scopes.split()) or status >= 500:
                    wrong.append((scope, method, path, status, code))
                if path.startswith("/agents/me"):
                    m.buyer = await m.escrow.new_agent()
        assert wrong == []


async def test_every_route_without_a_key(db: str) -> None:
    """Security: without a key, or with one that never was, every guarded route is 401."""
    async with market(db) as m:
        nobody = Agent("", "pf_live_" + "x" * 43)
        for method, path, *_ in GUARDED:
            for agent in (None, nobody):
                assert await ask(m, agent, method, filled(path, IDS)) == (401, "unauthorized")


async def test_a_missing_scope_is_named(db: str) -> None:
    """Contract: 403 `scope` says which scopes would do."""
    async with market(db) as m:
        reader = await make_key(m, m.buyer, "read")
        answer = await m.post(reader, "/escrow", m.wish())
        assert code_of(answer) == (403, "scope")
        assert answer.json()["scopes"] == ["spend"]
        assert "scope spend" in answer.json()["detail"]
        both = await m.post(reader, f"/escrow/{IDS['escrow_id']}/close")
        assert both.json()["scopes"] == ["spend", "provide"]


async def test_who_may_not_look_is_told_nothing(db: str) -> None:
    """Scopes: a webhook tells what `read` shows, so making, rotating and resending one needs it."""
    telling = {
        (route.method, route.path) for route in ROUTES if route.path.startswith("/webhooks")
    } - {("DELETE", "/webhooks/{webhook_id}"), ("GET", "/webhooks")}
    async with market(db) as m:
        blind = await make_key(m, m.buyer, "spend", "provide")
        for method, path in telling:
            assert await ask(m, blind, method, filled(path, IDS)) == (403, "scope")
        answer = await m.post(blind, "/webhooks", {"url": "https://b.example/"})
        assert (code_of(answer), answer.json()["scopes"]) == ((403, "scope"), ["read"])
        document = (await m.http.get(f"{m.escrow.url}/openapi.json")).json()["paths"]
        assert document["/webhooks"]["post"]["x-scopes-also"] == ["read"]


async def test_all_that_is_missing_is_named_as_such(db: str) -> None:
    """Contract: who lacks several scopes, each of them needed, is not told that one would do."""
    async with market(db) as m:
        answer = await m.post(m.buyer, "/agents/me/keys", {"scopes": ["admin", "arbiter"]})
        assert (code_of(answer), answer.json()["scopes"]) == ((403, "scope"), ["admin", "arbiter"])
        assert "admin and arbiter, and all of them" in answer.json()["detail"]


async def test_each_role_needs_its_own_scope(db: str) -> None:
    """Scopes: what either party may do needs `spend` of the buyer, `provide` of the provider."""
    either = [
        path
        for method, path, scopes, *_ in ROUTES
        if method == "POST" and {"spend", "provide"} == set(scopes.split())
    ]
    assert len(either) >= 8
    async with market(db) as m:
        wish = {"to_agent_id": m.provider.agent_id, "amount": "5.00"}
        manual = (await m.post(m.buyer, "/escrow", wish)).json()["escrow_id"]
        session = (await m.open("5.00"))["escrow_id"]
        for agent, own, other in ((m.buyer, "spend", "provide"), (m.provider, "provide", "spend")):
            wrong, right = await make_key(m, agent, other), await make_key(m, agent, own)
            for path in either:
                for name in (manual, session):
                    answer = await m.post(wrong, path.format(escrow_id=name), {}, key=path)
                    assert code_of(answer) == (403, "scope"), path
                    assert answer.json()["scopes"] == [own]
            body = {"content": "x"}
            # The key of the refused request is still unused.
            answer = await m.post(right, f"/escrow/{manual}/dispute/evidence", body, key=either[0])
            assert code_of(answer) == (409, "invalid_state")
        wrong = await make_key(m, m.provider, "spend")
        assert (await m.post(wrong, "/escrow/esc_x/close")).status_code == 404
        assert (await m.post(wrong, f"/escrow/{IDS['escrow_id']}/close")).status_code == 404
        assert await m.balance(m.buyer) == "90.00"


async def test_nothing_of_another_tenant_is_there(db: str) -> None:
    """Security: every route that reads, asked for another tenant's ids by anyone, is 404."""
    async with market(db) as m:
        ours, theirs = await furnish(m, "ours"), await furnish(m, "theirs")
        escrow = (await m.post(theirs.member, "/escrow", m.wish("5.00"))).json()["escrow_id"]
        wish = {"to_agent_id": m.provider.agent_id, "amount": "1.00"}
        transfer = (await m.post(theirs.member, "/transfers", wish)).json()["transfer_id"]
        key = (await m.get(theirs.member, "/agents/me")).json()["keys"][0]["key_id"]
        names = {
            "escrow_id": escrow,
            "transfer_id": transfer,
            "key_id": key,
            "handle": theirs.handle,
            "agent_id": theirs.member.agent_id,
            "journal": JOURNAL,
        }
        everything = await make_agent(m, "ours", *SCOPES)
        for method, path, *_ in GUARDED:
            if "{" in path and method in ("GET", "DELETE"):
                answer = await ask(m, everything, method, filled(path, names))
                assert answer == (404, "not_found"), path
        for path in (
            f"/admin/escrow?agent_id={theirs.member.agent_id}",
            f"/changes?journal={JOURNAL}",
        ):
            assert await ask(m, everything, "GET", path) == (404, "not_found")
        revoke = f"/admin/agents/{theirs.member.agent_id}/revoke"
        assert await ask(m, ours.admin, "POST", revoke) == (404, "not_found")
        for path in ("/escrow", "/transfers"):
            assert (await m.get(everything, path)).json()["items"] == []


async def test_a_tenants_admin_sees_its_own(db: str) -> None:
    """Tenants: an admin key reads the agents and escrows of its tenant, page by page, no others."""
    async with market(db) as m:
        ours = await furnish(m, "ours")
        other = await make_agent(m, "ours")
        await furnish(m, "theirs")
        names = [
            (await m.post(ours.member, "/escrow", m.wish("1.00"))).json()["escrow_id"]
            for _ in range(3)
        ]
        seen, after = [], None
        while True:
            query = {"limit": 2} | ({"after": after} if after else {})
            page = (await m.get(ours.admin, "/admin/agents", **query)).json()
            seen += page["items"]
            if (after := page["next"]) is None:
                break
        everyone = {ours.admin.agent_id, ours.member.agent_id, other.agent_id}
        assert {agent["agent_id"] for agent in seen} == everyone
        assert len(seen) == 3
        assert {agent["balance"] for agent in seen} == {"0.00", "47.00"}
        found = await m.get(ours.admin, "/admin/escrow", agent_id=ours.member.agent_id)
        assert [escrow["escrow_id"] for escrow in found.json()["items"]] == names[::-1]
        one = await m.get(ours.admin, f"/admin/escrow/{names[0]}")
        assert one.json()["from_agent_id"] == ours.member.agent_id
        assert code_of(await m.get(ours.admin, "/admin/escrow")) == (422, "invalid_request")
        assert code_of(await m.get(ours.admin, "/admin/agents", after="x"))[0] == 422


async def test_an_admin_makes_agents_of_its_tenant(db: str) -> None:
    """Tenants: registered with an admin's key an agent is of that tenant, and of its mode."""
    async with market(db) as m:
        ours = await furnish(m, "ours", "test")
        made = (await m.post(ours.admin, "/agents", {"name": "a"})).json()
        assert (made["tenant"], made["mode"]) == ("ours", "test")
        assert made["api_key"].startswith("pf_test_")
        live = await m.post(ours.admin, "/agents", {"name": "a", "mode": "live"})
        assert code_of(live) == (409, "mode_mismatch")
        assert code_of(await m.post(ours.member, "/agents", {"name": "a"})) == (403, "scope")
        stranger = Agent("", "pf_live_unknown")
        assert code_of(await m.post(stranger, "/agents", {"name": "a"})) == (401, "unauthorized")
        revoked = await m.post(ours.admin, f"/admin/agents/{made['agent_id']}/revoke")
        assert revoked.json()["revoked_at"] == 1_800_000_000
        dead = await m.get(Agent("", made["api_key"]), "/agents/me")
        assert code_of(dead) == (401, "unauthorized")


ACCOUNTS = ("access", "agents", "tenants", "referrals", "transfers", "banking", "admin")
SOURCES = [
    *(ESCROW / f"{name}.py" for name in ACCOUNTS),
    *(ESCROW / "api" / f"{name}.py" for name in ("agents", "keys", "transfers", "admin", "shared")),
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ESCROW).as_posix())
def test_every_refusal_is_documented(path: Path) -> None:
    """Contract: each code with which accounts refuse stands in the table of docs/escrow.md."""
    for code in re.findall(r'Refused\(\s*\d{3}, "(\w+)"', path.read_text()):
        assert f"`{code}`" in DOCS.split("**Refusals**")[1].split("## ")[0], code
