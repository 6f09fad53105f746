"""The doctor asks little, waits briefly, follows nobody, and shows nothing but plain text."""

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from tests.support.payments import OFFERS, QUOTE, encode
from x402mw.core.messages import EscrowExtra, PaymentRequirements, validate
from x402mw.doctor import asking
from x402mw.doctor.asking import BODY_BYTES_MAX, Asker, Unreachable
from x402mw.doctor.escrow import check_escrow
from x402mw.doctor.examination import Diagnosis, Verdict, examine
from x402mw.doctor.findings import PROBLEMS, SEEN_CHARACTERS_MAX, WARNINGS, finding
from x402mw.doctor.report import show
from x402mw.doctor.terms import Offered

pytestmark = pytest.mark.anyio

OFFER = OFFERS[QUOTE.id]
NOW = 1_800_000_000.0


class Once(httpx.AsyncByteStream):
    """A body in one piece."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._content


def said(status: int, **headers: str) -> httpx.Response:
    """An answer that is still to be read; a `_` in a name stands for `-`."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, headers=named, stream=Once(b""))


class Server:
    """Answers every request alike, and remembers what was asked."""

    def __init__(self, answer: httpx.Response | None = None) -> None:
        self.answer = answer or said(404)
        self.asked: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(f"{request.method} {request.url}")
        return self.answer

    def client(self) -> httpx.AsyncClient:
        """A client that reaches nobody else."""
        return httpx.AsyncClient(transport=httpx.MockTransport(self))


async def look(server: Server, url: str) -> Diagnosis:
    """Lets the doctor look at a server."""
    async with server.client() as http:
        return await examine(url, http, lambda: NOW)


async def test_a_redirect_is_not_followed() -> None:
    """Wherever an answer points, nothing else is asked."""
    server = Server(said(302, location="https://other.example.com/x"))
    diagnosis = await look(server, "https://api.example.com/x")
    assert server.asked == ["GET https://api.example.com/x"]
    assert [one.code for one in diagnosis.findings] == ["redirect"]
    assert "https://other.example.com" in diagnosis.findings[0].seen


async def test_plain_http_to_another_machine_is_a_problem() -> None:
    """Nobody pays over plain http, and so it is told whatever else is there."""
    diagnosis = await look(Server(), "http://api.example.com/x")
    assert [one.code for one in diagnosis.findings] == ["insecure", "not_402"]


async def test_terms_beyond_all_bounds() -> None:
    """Terms that no buyer would read are told so, and go no further."""
    content = json.dumps({"x402Version": 2, "accepts": [], "error": "x" * 40_000})
    header = encode(json.loads(content)).decode()
    server = Server(said(402, payment_required=header))
    diagnosis = await look(server, "https://api.example.com/x")
    assert "header_too_large" in {one.code for one in diagnosis.findings}
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("provider", "escrow", "code"),
    [
        ("https://api.example.com/x", "http://127.0.0.1:8401", "escrow_local"),
        ("https://api.example.com/x", "http://escrow.example.com", "escrow_insecure"),
        ("https://api.example.com/x", "https://", "escrow_insecure"),
        ("https://api.example.com/x", "file:///etc/passwd", "escrow_insecure"),
        ("http://127.0.0.1:8402/x", "http://10.0.0.1:8401", "escrow_insecure"),
        ("https://api.example.com/x", "https://me:secret@escrow.example.com", "escrow_insecure"),
        ("https://api.example.com/x", "https://escrow.example.com/do?it=now&", "escrow_insecure"),
        ("https://api.example.com/x", "https://escrow.example.com/do#", "escrow_insecure"),
        ("https://api.example.com/x", "https://localhost.:8401", "escrow_local"),
        ("https://api.example.com/x", "https://api.localhost", "escrow_local"),
        ("https://api.example.com/x", "https://[::ffff:127.0.0.1]:8401", "escrow_local"),
        ("https://api.example.com/x", "https://2130706433", "escrow_local"),
        ("https://api.example.com/x", "https://0x7f.1", "escrow_local"),
        ("https://api.example.com/x", "https://0.0.0.0", "escrow_local"),
        ("https://api.example.com/x", "https://169.254.169.254", "escrow_local"),
    ],
)
async def test_the_escrow_is_asked_over_https_or_here_only(
    provider: str, escrow: str, code: str
) -> None:
    """What terms name is asked only if a buyer would ask it too; nothing inside is reached."""
    server = Server()
    requirements = validate(PaymentRequirements, OFFER.accepts)
    extra = validate(EscrowExtra, requirements.extra | {"escrow": escrow})
    offered = Offered(OFFER.accepts, requirements, extra, "")
    async with server.client() as http:
        asker = Asker(http, lambda: NOW)
        found = await check_escrow(asker, httpx.URL(provider), offered, None, None)
    assert [one.code for one in found] == [code]
    assert server.asked == []


@pytest.mark.parametrize(
    "control", ["@10.0.0.1:8080/admin", ".evil.example/x", ":8443/x", "//evil.example/x", "/x?y"]
)
async def test_a_control_path_is_a_path(control: str) -> None:
    """Whatever an offer calls its control path, nobody but the provider's own origin is asked."""
    extra = OFFER.accepts["extra"] | {"control": control}
    content = {"x402Version": 2, "accepts": [OFFER.accepts | {"extra": extra}]}
    server = Server(said(402, payment_required=encode(content).decode()))
    diagnosis = await look(server, "https://api.example.com/quote/x")
    assert server.asked == ["GET https://api.example.com/quote/x"]
    assert diagnosis.findings[-1].code == "offer_malformed"


class Dripping(httpx.AsyncByteStream):
    """A body without an end."""

    def __init__(self, chunk: bytes, pause: float) -> None:
        self._chunk, self._pause = chunk, pause

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(self._pause)
            yield self._chunk


async def test_an_answer_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Endless bodies cost 64 KiB, slow ones the time limit."""
    flood = Server(httpx.Response(200, stream=Dripping(b"x" * 10_000, 0)))
    async with flood.client() as http:
        assert len((await Asker(http, time.time).ask("GET", "http://x/")).body) == BODY_BYTES_MAX
    monkeypatch.setattr(asking, "SECONDS_MAX", 0.1)
    drip = Server(httpx.Response(200, stream=Dripping(b"x", 0.03)))
    async with drip.client() as http:
        with pytest.raises(Unreachable):
            await Asker(http, time.time).ask("GET", "http://x/")


async def test_a_small_body_that_unpacks_to_a_large_one_is_cut() -> None:
    """A bomb of zeros is unpacked to the bound and no further."""
    import gzip

    packed = gzip.compress(bytes(10_000_000))
    answer = httpx.Response(200, headers={"Content-Encoding": "gzip"}, stream=Once(packed))
    async with Server(answer).client() as http:
        assert len((await Asker(http, time.time).ask("GET", "http://x/")).body) == BODY_BYTES_MAX


@pytest.mark.parametrize(
    ("date", "ahead"),
    [
        ("Fri, 15 Jan 2027 08:00:00 GMT", 0.0),
        ("Fri, 15 Jan 2027 08:01:00 GMT", 60.0),
        ("Fri, 15 Jan 2027 07:58:59 GMT", -60.0),
        ("yesterday", None),
        ("", None),
    ],
)
async def test_how_far_a_clock_is_ahead(date: str, ahead: float | None) -> None:
    """A date has whole seconds: a clock that is right is never called wrong."""
    async with Server(said(200, date=date)).client() as http:
        assert (await Asker(http, lambda: NOW).ask("GET", "http://x/")).ahead == ahead


def test_what_a_server_says_is_shown_as_plain_text() -> None:
    """No escape sequence, markup or flood of a stranger reaches the terminal."""
    nasty = "\x1b[2J[red]hello[/red]\u202e" + "x" * 1000
    diagnosis = Diagnosis("https://x/", [finding("not_402", nasty)], {"route": nasty}, nasty)
    page = io.StringIO()
    show(diagnosis, Console(file=page, width=100))
    written = page.getvalue()
    assert "\x1b" not in written
    assert "\u202e" not in written
    assert "[red]hello[/red]" in written
    assert len(diagnosis.findings[0].seen) == SEEN_CHARACTERS_MAX
    assert diagnosis.verdict is Verdict.UNREACHABLE


def test_every_finding_is_documented_and_tested() -> None:
    """The operator's page and these tests know every finding there is."""
    root = Path(__file__).parents[2]
    page = (root / "docs" / "operations.md").read_text()
    here = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    texts: dict[str, Any] = PROBLEMS | WARNINGS
    assert not PROBLEMS.keys() & WARNINGS.keys()
    for code, (why, todo) in texts.items():
        assert f"`{code}`" in page, code
        assert f'"{code}"' in here, code
        assert why.endswith(".")
        assert todo.endswith(".")
