"""What a request is, in the eyes of the provider's own configuration."""

import pytest
from starlette._utils import get_route_path

from tests.support.provider import make_scope
from x402mw.core.errors import ConfigurationError
from x402mw.core.gate import Refused
from x402mw.provider import request
from x402mw.provider.request import Origins, normal_origin


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("https://API.Example.com", "https://api.example.com"),
        ("https://api.example.com/", "https://api.example.com"),
        ("https://api.example.com:443", "https://api.example.com"),
        ("http://api.example.com:80", "http://api.example.com"),
        ("https://api.example.com:8443", "https://api.example.com:8443"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_an_origin_has_one_form(text, origin):
    """Lower case, IDNA, default port left out."""
    assert normal_origin(text) == origin


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "api.example.com",
            "ftp://x",
            "https://",
            "https://x/path",
            "https://x?q",
            "https://x#f",
        ),
        *("https://user@x", "https://x:99999", "https://x:a", "https://[::1", "https://a..b"),
    ],
)
def test_what_is_no_origin(text):
    """An origin is scheme, host and port, and nothing else."""
    with pytest.raises(ConfigurationError):
        normal_origin(text)


def test_one_host_has_one_origin():
    """The same host and port cannot be two origins; the same origin twice is harmless."""
    with pytest.raises(ConfigurationError, match="two origins"):
        Origins(["https://x.example", "http://x.example"])
    assert Origins(["https://x.example", "https://X.example/"]).sample_host == b"x.example"
    assert Origins([]).sample_host == b"localhost"


@pytest.mark.parametrize(
    ("host", "scheme", "origin"),
    [
        (b"x.example", "http", "https://x.example"),
        (b"x.example:443", "http", "https://x.example"),
        (b"y.example:8443", "https", "https://y.example:8443"),
        (b"localhost:8000", "http", "http://localhost:8000"),
        (b"127.0.0.1", "http", "http://127.0.0.1"),
        (b"[::1]:80", "http", "http://[::1]"),
        (b"LOCALHOST:443", "https", "https://localhost"),
    ],
)
def test_a_host_selects(host, scheme, origin):
    """Host selects a configured origin; loopback needs none."""
    origins = Origins(["https://x.example", "https://y.example:8443"])
    assert origins.select(make_scope("GET", "/", host=host, scheme=scheme)) == origin


@pytest.mark.parametrize(
    "host", [b"x.example:80", b"y.example", b"z.example", b"x.example,y", None]
)
def test_a_host_that_is_not_ours(host):
    """Anything else is misdirected."""
    origins = Origins(["https://x.example", "https://y.example:8443"])
    with pytest.raises(Refused) as caught:
        origins.select(make_scope("GET", "/", host=host))
    assert caught.value.status == 421


@pytest.mark.parametrize(
    ("target", "changes", "prefix", "expected"),
    [
        ("/q/BTC?a=1&b", {}, "", "/q/BTC?a=1&b"),
        ("/q/BTC?", {}, "", "/q/BTC"),
        ("/q/%42TC", {}, "/api", "/api/q/%42TC"),
        ("/api/q", {"root_path": "/api"}, "", "/q"),
        ("/api/q", {"root_path": "/api"}, "/v1", "/v1/q"),
        ("/q", {"root_path": "/api"}, "", "/q"),
        ("/apiq", {"root_path": "/api"}, "", "/apiq"),
        ("/api/q", {"root_path": "/api/"}, "", "/api/q"),
        ("/q x", {"raw_path": None}, "", "/q%20x"),
        ("/q?a", {"raw_path": b"/q?a"}, "", "/q?a"),
    ],
)
def test_the_target_is_what_the_buyer_sent(target, changes, prefix, expected):
    """The raw path without the server's root path, behind the prefix, and the query."""
    assert request.target(make_scope("GET", target, **changes), prefix) == expected


@pytest.mark.parametrize(
    ("path", "root", "expected"),
    [
        ("/q", "", "/q"),
        ("/api/q", "/api", "/q"),
        ("/api", "/api", ""),
        ("/apiq", "/api", "/apiq"),
        ("/q", "/api", "/q"),
        ("/api//q", "/api", "//q"),
        ("/api/q", "/api/", "/api/q"),
    ],
)
def test_the_path_is_the_routers(path, root, expected):
    """The path as Starlette's router sees it."""
    scope = make_scope("GET", path, root_path=root)
    assert request.route_path(scope) == get_route_path(scope) == expected


def test_credentials_are_hashed_in_order():
    """Every Authorization and Cookie field counts, with its name, its bounds and its place."""
    fields = [
        [],
        [(b"authorization", b"ab")],
        [(b"authorization", b"a"), (b"authorization", b"b")],
        [(b"cookie", b"ab")],
        [(b"cookie", b"a"), (b"authorization", b"b")],
        [(b"authorization", b"b"), (b"cookie", b"a")],
    ]
    found = {request.credentials(make_scope("GET", "/", one)) for one in fields}
    assert len(found) == len(fields)
    other = make_scope("GET", "/", [(b"x-other", b"1")])
    assert request.credentials(other) == request.credentials(make_scope("GET", "/"))
