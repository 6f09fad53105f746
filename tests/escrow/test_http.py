"""HTTP as RFC 9110 means it: methods, Allow, HEAD, media types, slashes and queries."""

from pathlib import Path

import pytest

from tests.escrow.market import code_of, market

pytestmark = pytest.mark.anyio

READABLE = [
    None, "application/json", "application/json; charset=utf-8", 'Application/JSON;charset="UTF-8"',
    "application/vnd.api+json",
]  # fmt: skip
UNREADABLE = [
    "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "",
    "application/json; charset=utf-16", "application/xml", "json", "application/jsonp",
]  # fmt: skip


async def test_allow_names_every_method_of_a_path(tmp_path: Path) -> None:
    """RFC 9110 15.5.6: 405 carries Allow with all methods that the path has, HEAD beside GET."""
    async with market(tmp_path) as m:
        for path, methods in (
            ("/agents/me/keys", {"GET", "HEAD", "POST"}),
            ("/escrow", {"GET", "HEAD", "POST"}),
            ("/redeem", {"POST"}),
            ("/journals/x", {"PUT"}),
        ):
            answer = await m.http.request("PATCH", path, headers=m.buyer.headers)
            assert code_of(answer) == (405, "method_not_allowed")
            assert set(answer.headers["allow"].split(", ")) == methods


async def test_head_answers_as_get_without_a_body(tmp_path: Path) -> None:
    """RFC 9110 9.3.2: HEAD has the status and headers of GET, and no body."""
    async with market(tmp_path) as m:
        for path in ("/agents/me", "/escrow", "/escrow/nope", "/nope"):
            got = await m.http.get(path, headers=m.buyer.headers)
            head = await m.http.head(path, headers=m.buyer.headers)
            assert (head.status_code, head.content) == (got.status_code, b"")
            for name in ("content-type", "content-length"):
                assert head.headers[name] == got.headers[name]


async def test_media_types_of_bodies(tmp_path: Path) -> None:
    """RFC 9110 15.5.16: JSON or no type at all is read; any other is 415 and says what would do."""
    async with market(tmp_path) as m:
        body = b'{"name":"x"}'
        for kind in READABLE:
            headers = {} if kind is None else {"Content-Type": kind}
            answer = await m.http.post("/agents", content=body, headers=headers)
            assert answer.status_code == 201, kind
        for kind in UNREADABLE:
            answer = await m.http.post("/agents", content=body, headers={"Content-Type": kind})
            assert code_of(answer) == (415, "unsupported_media_type"), kind
            assert answer.headers["accept"] == "application/json"


async def test_compressed_bodies(tmp_path: Path) -> None:
    """RFC 9110 8.4: a content coding is refused, not misread: a small body could be a huge one."""
    async with market(tmp_path) as m:
        headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
        answer = await m.http.post("/agents", content=b"\x1f\x8b", headers=headers)
        assert code_of(answer) == (415, "unsupported_media_type")
        assert answer.headers["accept-encoding"] == "identity"


async def test_an_empty_body_has_no_type_to_be_wrong(tmp_path: Path) -> None:
    """Contract: where nothing must be said, nothing may be sent, whatever type it has."""
    async with market(tmp_path) as m:
        headers = {**m.buyer.headers, "Content-Type": "text/plain"}
        assert (await m.http.post("/faucet/claim", headers=headers)).status_code == 200


async def test_a_slash_too_many_is_another_path(tmp_path: Path) -> None:
    """Contract: nothing redirects, because a redirect would be built from the Host header."""
    async with market(tmp_path) as m:
        for path in ("/agents/me/", "/escrow/", "//escrow"):
            answer = await m.http.get(path, headers=m.buyer.headers)
            assert code_of(answer) == (404, "not_found")
            assert "slash" in answer.json()["advice"]


async def test_queries_are_read_as_strictly_as_bodies(tmp_path: Path) -> None:
    """Contract: an unknown or repeated parameter is refused on every route, never ignored."""
    async with market(tmp_path) as m:
        for path in ("/agents/me?x=1", "/escrow?limt=5", "/escrow?limit=1&limit=2", "/escrow?a=1"):
            answer = await m.http.get(path, headers=m.buyer.headers)
            assert code_of(answer) == (422, "invalid_request"), path
        answer = await m.http.post("/faucet/claim?x=1", headers=m.buyer.headers)
        assert code_of(answer) == (422, "invalid_request")


async def test_both_bases_serve_the_same(tmp_path: Path) -> None:
    """Contract: `/api` has the same routes as `/api/v1`."""
    async with market(tmp_path) as m:
        answer = await m.http.get(f"{m.escrow.url}/api/agents/me", headers=m.buyer.headers)
        assert answer.json()["agent_id"] == m.buyer.agent_id
