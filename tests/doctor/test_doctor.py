"""`x402mw doctor` against a real provider behind a proxy: each misbehaviour is found by name."""

import base64
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from email.utils import formatdate
from functools import partial
from pathlib import Path
from typing import Any

import anyio.to_thread
import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from typer.testing import CliRunner

from tests.doctor.proxy import Asked, Given, Proxy, proxying
from tests.support.escrow import RunningEscrow, running_escrow
from tests.support.serving import serving
from x402mw import cli
from x402mw.doctor.examination import Diagnosis, Verdict, examine
from x402mw.provider import PaymentMiddleware, PerCall, Provider

pytestmark = [pytest.mark.anyio, pytest.mark.whole]

TERMS, SIGNATURE, WORD = b"payment-required", b"payment-signature", b"payment-response"


async def item(request: Request) -> PlainTextResponse:
    """What is sold."""
    raise AssertionError("the doctor never buys")


@asynccontextmanager
async def shop(tmp_path: Path) -> AsyncIterator[tuple[Proxy, Proxy, RunningEscrow]]:
    """A real provider and a real escrow, each behind a proxy of its own."""
    async with running_escrow(tmp_path, time.time) as escrow, proxying(escrow.url) as bank:
        seller = await escrow.new_agent("seller")
        provider = Provider(
            escrow=bank.url, api_key=seller.api_key, journal=str(tmp_path / "journal.db")
        )
        routes = [Route("/item", item, methods=["GET", "POST"]), Route("/free", item)]
        app = Starlette(routes=routes)
        prices = {"GET /item": PerCall("0.001"), "POST /item": PerCall("0.002")}
        app.add_middleware(PaymentMiddleware, provider=provider, prices=prices)
        async with serving(app) as upstream, proxying(upstream) as proxy:
            yield proxy, bank, escrow


async def look(url: str, **more: Any) -> Diagnosis:
    """Lets the doctor look at a URL."""
    async with httpx.AsyncClient(trust_env=False, verify=False) as http:
        return await examine(url, http, time.time, **more)


def codes(diagnosis: Diagnosis) -> set[str]:
    """What was found; each thing once."""
    found = [one.code for one in diagnosis.findings]
    assert len(found) == len(set(found))
    return set(found)


# What proxies do wrong.


def dropping(*names: bytes) -> dict[str, Any]:
    """Drops fields of answers."""

    def give(_: Asked, given: Given) -> None:
        for name in names:
            given.put(name)

    return {"give": give}


def renaming(_: Asked, given: Given) -> None:
    """Puts a prefix before the terms."""
    given.put(b"x-payment-required", given.header(TERMS))
    given.put(TERMS)


def rewriting(change: Callable[[dict[str, Any]], None], *, body: bool = True) -> dict[str, Any]:
    """Changes the terms in the header, and in the body too unless told otherwise."""

    def give(_: Asked, given: Given) -> None:
        value = given.header(TERMS)
        if value:
            content = json.loads(base64.b64decode(value))
            change(content)
            given.put(TERMS, base64.b64encode(json.dumps(content).encode()))
            if body and given.body.startswith(b"{"):
                said = json.loads(given.body)
                given.body = json.dumps(said | {"accepts": content["accepts"]}).encode()

    return {"give": give}


def cheaper(content: dict[str, Any]) -> None:
    content["accepts"][0]["amount"] = "1"


def twice(content: dict[str, Any]) -> None:
    content["accepts"] *= 2


def elsewhere(content: dict[str, Any]) -> None:
    content["accepts"][0]["extra"]["escrow"] = "http://10.0.0.1:8401"


def endless(content: dict[str, Any]) -> None:
    content["accepts"][0]["extra"]["more"] = "x" * 1400


def malformed(content: dict[str, Any]) -> None:
    content["accepts"][0]["extra"]["route"] = "anything"


def exact(content: dict[str, Any]) -> None:
    content["accepts"][0]["scheme"] = "exact"


def truncating(_: Asked, given: Given) -> None:
    given.put(TERMS, given.header(TERMS)[:200])


def hosting(host: bytes) -> dict[str, Any]:
    """Rewrites the Host header."""

    def ask(asked: Asked) -> None:
        asked.headers = [(b"host", host), *(one for one in asked.headers if one[0] != b"host")]

    return {"ask": ask}


def stripping_prefix(asked: Asked) -> Given | None:
    """Serves the provider under /api only, without telling it."""
    if not asked.target.startswith("/api"):
        return Given(404, [])
    asked.target = asked.target.removeprefix("/api")
    return None


def posting(asked: Asked) -> None:
    asked.method = "POST"


def caching(*, age: bool) -> dict[str, Any]:
    """Keeps the first answer to an unpaid GET for everyone."""
    kept: list[Given] = []

    def ask(asked: Asked) -> Given | None:
        plain = asked.method == "GET" and asked.header(SIGNATURE) is None
        return Given(kept[0].status, kept[0].headers, kept[0].body) if plain and kept else None

    def give(asked: Asked, given: Given) -> None:
        if asked.method == "GET" and not kept:
            kept.append(Given(given.status, list(given.headers), given.body))
        if age:
            given.put(b"age", b"7")

    return {"ask": ask, "give": give}


def zipping(_: Asked, given: Given) -> None:
    given.zip()


def dated(seconds: float) -> dict[str, Any]:
    """Has a clock that is off."""

    def give(_: Asked, given: Given) -> None:
        given.put(b"date", formatdate(time.time() + seconds, usegmt=True).encode())

    return {"give": give}


def redirecting(asked: Asked) -> Given:
    return Given(301, [(b"location", b"https://shop.example.com/item")])


def answering_head(asked: Asked) -> Given | None:
    return Given(200, []) if asked.method == "HEAD" else None


def unsigned(asked: Asked) -> None:
    asked.headers = [one for one in asked.headers if one[0] != SIGNATURE]


def lowering(asked: Asked) -> None:
    lowered = [(n, v.lower() if n == SIGNATURE else v) for n, v in asked.headers]
    asked.headers = lowered


def blocking(asked: Asked) -> Given | None:
    return Given(403, [], b"<h1>no</h1>") if asked.header(SIGNATURE) else None


def limiting(asked: Asked) -> Given | None:
    return Given(431, [], b"too large") if len(asked.header(SIGNATURE) or b"") > 3000 else None


def losing_control(asked: Asked) -> Given | None:
    return Given(404, []) if asked.method == "POST" else None


def own_pages(_: Asked, given: Given) -> None:
    if given.status == 402:
        given.body = b"<h1>Payment required</h1>"
        given.put(b"content-type", b"text/html")


def swelling(_: Asked, given: Given) -> None:
    given.put(b"x-trace", b"x" * 4000)


BAD: dict[str, tuple[dict[str, Any], set[str]]] = {
    "terms dropped": (dropping(TERMS), {"header_stripped"}),
    "terms renamed": ({"give": renaming}, {"header_renamed"}),
    "terms changed": (rewriting(cheaper, body=False), {"header_altered", "terms_mismatch"}),
    "terms changed everywhere": (rewriting(cheaper), {"terms_mismatch"}),
    "terms cut": ({"give": truncating}, {"header_altered"}),
    "two offers": (rewriting(twice), {"duplicate_offers"}),
    "a long offer": (rewriting(endless), {"offer_too_long"}),
    "a bad offer": (rewriting(malformed), {"offer_malformed"}),
    "an escrow in the clear": (rewriting(elsewhere), {"escrow_insecure"}),
    "Host of another port": (hosting(b"127.0.0.1:9"), {"origin_mismatch"}),
    "Host of the inside": (hosting(b"shop.internal"), {"unknown_host"}),
    "GET as POST": ({"ask": posting}, {"method_rewritten"}),
    "a cache": (caching(age=True), {"cached"}),
    "a quiet cache": (caching(age=False), {"cached"}),
    "no word on caching": (dropping(b"cache-control"), {"cacheable"}),
    "compression": ({"give": zipping}, {"compressed"}),
    "a minute behind": (dated(-60), {"clock_off", "clock_escrow"}),
    "five minutes ahead": (dated(300), {"clock_wrong", "clock_escrow"}),
    "no date": (dropping(b"date"), {"no_date"}),
    "a redirect": ({"ask": redirecting}, {"redirect"}),
    "HEAD for free": ({"ask": answering_head}, {"head_not_priced"}),
    "payments dropped": ({"ask": unsigned}, {"signature_stripped"}),
    "payments changed": ({"ask": lowering}, {"signature_altered"}),
    "payments blocked": ({"ask": blocking}, {"signature_blocked"}),
    "long payments blocked": ({"ask": limiting}, {"header_limit"}),
    "words dropped": (dropping(WORD), {"response_stripped"}),
    "control elsewhere": ({"ask": losing_control}, {"control_unreachable"}),
    "pages of its own": ({"give": own_pages}, {"problem_unreadable"}),
    "long headers": ({"give": swelling}, {"header_large"}),
}
WARNED = {"cacheable", "compressed", "no_date", "problem_unreadable", "header_large"}


async def test_each_misbehaviour_of_a_proxy_is_found_and_nothing_else(tmp_path: Path) -> None:
    """What is wrong is found by its name, and only that; a healthy provider gives no finding."""
    async with shop(tmp_path) as (proxy, _, escrow):
        for root in (None, escrow.root_key):
            healthy = await look(f"{proxy.url}/item", escrow_root=root)
            assert (healthy.verdict, healthy.findings) == (Verdict.FINE, [])
        assert healthy.facts["price"] == "at most 0.001 USDC"
        assert healthy.facts["route"] == "GET /item"
        sold = await look(f"{proxy.url}/item", method="POST")
        assert (sold.verdict, sold.findings) == (Verdict.FINE, [])
        for name, (behaviour, expected) in BAD.items():
            proxy.behave(**behaviour)
            diagnosis = await look(f"{proxy.url}/item")
            assert codes(diagnosis) == expected, name
            wanted = Verdict.FINE if expected <= WARNED else Verdict.PROBLEMS
            assert diagnosis.verdict is wanted, name
        proxy.behave(ask=stripping_prefix)
        found = codes(await look(f"{proxy.url}/api/item"))
        assert found == {"path_rewritten", "control_unreachable"}


async def test_what_is_not_ours_is_told_apart(tmp_path: Path) -> None:
    """A free path, a foreign offer, a method that is not sold, nobody at all."""
    async with shop(tmp_path) as (proxy, _, _escrow):
        missing = await look(f"{proxy.url}/nowhere")
        assert (codes(missing), missing.verdict) == ({"not_402"}, Verdict.NOT_OURS)
        refused = await look(f"{proxy.url}/item", method="DELETE")
        assert (codes(refused), refused.verdict) == ({"refuses"}, Verdict.PROBLEMS)
        assert "not sold with this method" in refused.findings[0].seen
        proxy.behave(**rewriting(exact))
        foreign = await look(f"{proxy.url}/item")
        assert (codes(foreign), foreign.verdict) == ({"not_ours"}, Verdict.NOT_OURS)
        url = proxy.url
    nobody = await look(f"{url}/item")
    assert (nobody.findings, nobody.verdict, nobody.verdict.status) == (
        [],
        Verdict.UNREACHABLE,
        2,
    )
    assert "ConnectError" in nobody.cause


async def test_what_is_wrong_with_the_escrow_is_found(tmp_path: Path) -> None:
    """An escrow that is away, another one, with other keys, or at another time."""

    def saying(**changes: Any) -> dict[str, Any]:
        def give(_: Asked, given: Given) -> None:
            said = json.loads(given.body)
            given.body = json.dumps(said | {k: v for k, v in changes.items() if k in said}).encode()

        return {"give": give}

    def away(_: Asked) -> Given:
        return Given(502, [], b"bad gateway")

    bad = {
        "away": ({"ask": away}, {"escrow_unreachable"}),
        "another network": (saying(network="escrow:other"), {"escrow_network"}),
        "another root key": (saying(root_key="A" * 43), {"escrow_keys"}),
        "a minute ahead": (saying(time=int(time.time()) + 60), {"clock_escrow"}),
    }
    async with shop(tmp_path) as (proxy, bank, escrow):
        for name, (behaviour, expected) in bad.items():
            bank.behave(**behaviour)
            assert codes(await look(f"{proxy.url}/item")) == expected, name
        bank.behave()
        other = await look(f"{proxy.url}/item", escrow_root="B" * 43)
        assert codes(other) == {"escrow_keys"}
        seed = bytes(reversed(range(32)))
        (tmp_path / "other").mkdir()
        async with running_escrow(tmp_path / "other", time.time, root_seed=seed) as second:
            assert second.settings.network == escrow.settings.network
            bank.upstream = second.url
            assert codes(await look(f"{proxy.url}/item")) == {"terms_mismatch"}
        bank.upstream = escrow.url


async def test_the_command(tmp_path: Path) -> None:
    """Exit status 0, 1 and 2; a page for people, JSON for programs."""

    async def doctor(*arguments: str) -> tuple[int, str]:
        run = partial(CliRunner().invoke, cli.app, ["doctor", *arguments])
        done = await anyio.to_thread.run_sync(run)
        return done.exit_code, done.output

    async with shop(tmp_path) as (proxy, _, _escrow):
        status, said = await doctor(f"{proxy.url}/item")
        assert (status, "fine" in said, "at most 0.001 USDC" in said) == (0, True, True), said
        proxy.behave(**hosting(b"127.0.0.1:9"))
        status, said = await doctor(f"{proxy.url}/item")
        assert (status, "problem: origin_mismatch" in said) == (1, True), said
        assert "X402MW_ORIGINS" in said
        status, said = await doctor(f"{proxy.url}/item", "--json")
        content = json.loads(said)
        assert (status, content["verdict"]) == (1, "problems")
        assert [one["code"] for one in content["findings"]] == ["origin_mismatch"]
        assert content["findings"][0].keys() == {"code", "severity", "seen", "why", "todo"}
        assert (await doctor(f"{proxy.url}/free/nothing"))[0] == 2
    assert (await doctor(f"{proxy.url}/item", "--json"))[0] == 2
    status, said = await doctor("ftp://example.com/")
    assert (status, "Traceback" in said) == (2, False), said
    status, said = await doctor("--help")
    assert status == 0
    assert "Exit status 0" in said
