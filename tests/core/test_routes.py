"""Routes: what Starlette would run, the price table finds."""

import re
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.routing import compile_path

from x402mw.core import routes
from x402mw.core.errors import ConfigurationError
from x402mw.core.routes import Miss, RouteTable

KINDS = ["", ":str", ":int", ":float", ":uuid", ":path"]
SEGMENTS = st.one_of(
    st.text("abcXYZ09._-~+*()[]^$|?\\ é:{}", min_size=0, max_size=6),
    st.builds(
        lambda before, name, kind, after: f"{before}{{{name}{kind}}}{after}",
        st.sampled_from(["", "v", "a-", "("]),
        st.from_regex(r"[a-z_][a-zA-Z0-9_]{0,4}", fullmatch=True),
        st.sampled_from(KINDS),
        st.sampled_from(["", ".json", "-z", ")"]),
    ),
)
TEMPLATES = st.lists(SEGMENTS, min_size=1, max_size=5).map(lambda parts: "/" + "/".join(parts))
PATHS = ["/", "/v1", "/a.json", "/v12.5.json", "/x\n", "/\n", "//", "/a/b/c.json", "/X/", "/(1)"]


@given(TEMPLATES, st.lists(st.text("abXYv019./-\n(){}", max_size=12), max_size=8))
def test_templates_mean_what_they_mean_to_starlette(template: str, paths: list[str]) -> None:
    """Our pattern of a template is Starlette's own, character by character."""
    try:
        ours = routes.compile_template(template)
    except ConfigurationError:
        return
    theirs, _, _ = compile_path(template)
    assert ours.pattern == theirs.pattern
    assert ours.flags == theirs.flags
    for path in [*PATHS, *paths, routes.sample_path(template)]:
        assert bool(ours.match(path)) == bool(theirs.match(path))


@pytest.mark.parametrize(
    "template",
    ["", "x", "{a}", "/{a:no}", "/{a}/{a}", "/" + "x" * 1024, "/{a}{b}{c}{d}",
     "/{a:path}/{b:path}/{c:path}/{d:path}", "".join(f"/{{p{n}}}" for n in range(17))],
)  # fmt: skip
def test_bad_templates_are_refused(template: str) -> None:
    """A template that could not work, or could stall, is found when it is read."""
    with pytest.raises(ConfigurationError):
        routes.compile_template(template)


@given(TEMPLATES)
def test_a_sample_matches_its_template(template: str) -> None:
    """The path of the self-test reaches the route."""
    try:
        pattern = routes.compile_template(template)
    except ConfigurationError:
        return
    assert pattern.match(routes.sample_path(template))


def test_a_hostile_template_cannot_stall_a_match() -> None:
    """The loosest template that is allowed still fails fast on a long path."""
    pattern = routes.compile_template("/{a}a{b}a{c}/x")
    assert not pattern.match("/" + "a" * 400 + "/y")


@pytest.mark.parametrize(
    "text", ["", "GET", "GET ", " /x", "get /x", "G T /x", "GET  /x", "GET x", "GET\t/x", "É /x"]
)
def test_bad_routes_are_refused(text: str) -> None:
    """A route is a method in capitals, a blank and a template."""
    with pytest.raises(ConfigurationError):
        routes.parse_route(text)


def test_a_route_is_split() -> None:
    """HEAD is GET, other methods are themselves."""
    assert routes.parse_route("HEAD /x") == ("GET", "/x")
    assert routes.parse_route("POST /{y:path}") == ("POST", "/{y:path}")


TABLE = RouteTable(
    [
        ("GET", "/quote/{symbol}", "quote"),
        ("GET", "/Reports/{day}.pdf", "report"),
        ("POST", "/summarize", "summarize"),
        ("GET", "/files/{rest:path}", "files"),
        ("GET", "/quote/{other}", "never"),
    ]
)
SPELLINGS = [
    "/summarize/", "/summarize//", "//summarize", "/./summarize", "/x/../summarize", "/SUMMARIZE",
    "/Summarize", "/summarize/.", "/summarize/x/..", "/%73ummarize", "/%2573ummarize",
    "/summarize%2f", "/summarize%2F", "/summarize%252f", "\\summarize", "/\\summarize",
    "/summarize\\", "/summarize;v=1", "/summarize;", "/;/summarize", "/summarize ", "/summarize%20",
    "/summarize\t", "/summarize\r\n", "/summarize\x00", "/summarize%00", "/sum\x00marize",
    "/summarize\u00a0", "/..;/summarize", "/a/..;x/summarize", "/%2e/summarize",
    "/%2e%2e/summarize", "/x/%2e%2e/summarize", "/%252e%252e/summarize", "/x/..%2fsummarize",
    "/x/..%252fsummarize", "/x/..\\summarize", "/x/..%5csummarize", "///summarize///",
    "/quote//BTC", "/quote/./BTC", "/quote/x/../BTC", "/Quote/BTC", "/QUOTE/BTC", "/quote/BTC/",
    "/quote/BTC//", "//quote/BTC", "/quote\\BTC", "/quote%2fBTC", "/quote%252fBTC", "/quote/BTC/.",
    "/quote/BTC/x/..", "/quote;a/BTC", "/quote;/BTC", "/quote /BTC", "/ quote/BTC",
    "/qu%6fte/BTC", "/qu%256fte/BTC", "/%71uote/BTC", "/x/../quote/BTC", "/../quote/BTC",
    "/../../quote/BTC", "/quote/BTC/?", "/quote/BTC?",
    "/summarize?x", "/summarize#x", "/reports/mon.pdf", "/REPORTS/mon.pdf", "/Reports/mon.PDF",
    "/reports/mon.pdf/", "//Reports/mon.pdf", "/Reports//mon.pdf", "/Reports/mon%2epdf",
    "/Reports/mon.pdf;x", "/Report\u017f/mon.pdf", "/Files/a", "/FILES/", "/files//../files/a/",
    "//files/a", "/./files/a", "/%66iles/a", "/files%2fa", "/files%2Fa/b", "/files\\a", "/Files",
    "/files", "/files;x/a", "/fi\x00les/a", "/Files/a/b/../c", "/FiLeS/%2e%2e/files/x",
    "/quote%2f%42TC", "/quo\tte/BTC", "/quote\x0b/BTC", "/quote/BTC\\", "/quote/BTC%2f",
]  # fmt: skip
METHODS = {"summarize": "POST"}


@pytest.mark.parametrize("path", SPELLINGS)
def test_no_spelling_of_a_priced_path_is_free(path: str) -> None:
    """A spelling that some router may accept finds the price or is "not found"; never free."""
    for method in ("GET", "POST", "HEAD"):
        assert TABLE.find(method, path) is not Miss.UNPRICED
    assert TABLE.covers(path)


@given(st.sampled_from(["/summarize", "/quote/btc", "/files/a/b"]), st.data())
def test_escaping_any_letters_stays_priced(path: str, data: st.DataObject) -> None:
    """Any letters escaped, up to three times over, still find a price."""
    written = path
    for _ in range(data.draw(st.integers(1, 3))):
        chosen = data.draw(st.sets(st.integers(0, len(written) - 1), max_size=4))
        written = "".join(
            f"%{ord(letter):02x}" if index in chosen or letter == "%" else letter
            for index, letter in enumerate(written)
        )
    decoded_by_the_server = unquote(written)
    assert TABLE.find("GET", decoded_by_the_server) is not Miss.UNPRICED


@pytest.mark.parametrize(
    ("method", "path", "found"),
    [
        ("GET", "/quote/BTC", "quote"),
        ("HEAD", "/quote/BTC", "quote"),
        ("GET", "/quote/é%2f", "quote"),
        ("POST", "/quote/BTC", Miss.METHOD),
        ("OPTIONS", "/quote/BTC", Miss.METHOD),
        ("get", "/quote/BTC", Miss.METHOD),
        ("POST", "/summarize", "summarize"),
        ("POST", "/summarize\n", "summarize"),
        ("GET", "/Reports/a.b.pdf", "report"),
        ("GET", "/files/", "files"),
        ("GET", "/files/a/b", "files"),
        ("GET", "/", Miss.UNPRICED),
        ("GET", "/quote", Miss.UNPRICED),
        ("GET", "/quotes/BTC", Miss.UNPRICED),
        ("GET", "/quote/a/b", Miss.UNPRICED),
        ("GET", "/summarized", Miss.UNPRICED),
    ],
)
def test_the_table_finds_what_the_router_runs(method: str, path: str, found: object) -> None:
    """The first template that fits wins; HEAD is GET; other paths are left alone."""
    assert TABLE.find(method, path) == found
    assert TABLE.covers(path) == (found is not Miss.UNPRICED)


def test_odd_literals_are_folded_too() -> None:
    """A template whose own text is not in normal form still guards its spellings."""
    table = RouteTable([("GET", "/A//b;c/{x}/", "odd")])
    assert table.find("GET", "/A//b;c/1/") == "odd"
    assert table.find("GET", "/a/b/1") is Miss.SPELLING


@given(st.text(max_size=30))
def test_any_path_has_a_normal_form(path: str) -> None:
    """Folding never fails, and never leaves dots, doubled or trailing slashes."""
    folded = routes.normal_form("/" + path)
    assert folded.startswith("/")
    assert "//" not in folded
    assert not re.search(r"/\.\.?(/|$)", folded)


@pytest.mark.parametrize(
    ("template", "longest"),
    [
        ("/item", 8192),
        ("/files/{rest:path}", 8192),
        ("/pair/{base}-{quote}", 1024),
        ("/a/{x:path}/b/{y:path}", 1024),
        ("/{a}-{b}-{c}", 128),
    ],
)
def test_long_paths_are_not_looked_up(template: str, longest: int) -> None:
    """A path that could stall a match is refused by its length, not matched and not passed."""
    table = RouteTable([("GET", template, "sold")])
    assert table.find("GET", "/" + "-" * (longest - 1)) is not Miss.LENGTH
    too_long = "/" + "-" * longest
    assert table.find("GET", too_long) is Miss.LENGTH
    assert table.covers(too_long)


@pytest.mark.parametrize(
    ("template", "count", "longest"),
    [
        ("/files{n}/{{rest:path}}", 100, 8192),
        ("/{n}pair/{{base}}-{{quote}}", 10, 1024),
        ("/pair/{{base}}-{{quote}}/{n}", 10, 256),
        ("/{{a:path}}x{{b:path}}x{n}", 100, 64),
        ("/{{a:path}}x{{b:path}}y{{c:path}}z{n}", 20, 32),
    ],
)
def test_many_loose_templates_shorten_the_path(template: str, count: int, longest: int) -> None:
    """What one look-up may cost is bounded for the whole table, not for each template alone."""
    table = RouteTable([("GET", template.format(n=number), "sold") for number in range(count)])
    assert table.find("GET", "/" + "x" * (longest - 1)) is not Miss.LENGTH
    assert table.find("GET", "/" + "x" * longest) is Miss.LENGTH
