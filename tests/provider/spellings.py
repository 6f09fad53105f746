"""Every way we know to write the path of a request, made from its plain spelling.

A spelling is a raw request target: ASCII without blanks, as it stands in a request line. Each kind
below is a trick that some server, proxy or router of the world takes for the plain path.
"""

import random
from collections.abc import Callable, Iterator
from itertools import chain
from urllib.parse import unquote

import httptools

SEED = 402
AUTHORITIES = ["http://api.example.com", "https://api.example.com", "HTTP://API.EXAMPLE.COM:443"]
AUTHORITIES += ["//api.example.com", "///api.example.com", "/http://api.example.com", "http:/"]
AUTHORITIES += ["http://evil.example", "api.example.com:443", "http://a@api.example.com", "http:"]
OVERLONG_SLASHES = ["%c0%af", "%e0%80%af", "%f0%80%80%af", "%c0%2f", "%ef%bc%8f", "%e2%88%95"]
OVERLONG_SLASHES += ["%u002f", "%%32%66", "%25%32%66", "%e2%81%84", "%1c", "%c1%9c"]
SLASHES = ["//", "///", "%2f", "%2F", "%252f", "%25252f", "%5c", "%5C", "%255c", "\\", "\\\\"]
SLASHES += [
    "/%2f",
    "%2f/",
    "/%5c",
    "/;/",
    "/.;/",
    "/%20/",
    "/%09/",
    "/%00/",
    "/%0a/",
    "/%e2%80%8b/",
]
DOTS = ["/./", "/x/../", "/x/%2e%2e/", "/%2e/", "/%2E/", "/%252e/", "/.%2e/", "/x/.%2e/", "/.../"]
DOTS += ["/x/..;/", "/x/%2e%2e;a=b/", "/../", "/../../", "/x/..%2f", "/x%2f..%2f", "/.%00/"]
DOTS += ["/x/..%5c", "/x/%252e%252e/", "/./././", "/x/y/../../", "/%c0%ae/", "/x/%c0%ae%c0%ae/"]
TAILS = ["/", "//", "/.", "/..", "/./", "/x/..", "%2f", "%5c", "\\", "%2f%2f", "/%2e", "/%2e%2e"]
TAILS += ["?", "??", "?x", "?x=1", "?/../x", "?%2f", "%3f", "%3fx=1", "%253f", "&x", "?#", "?;"]
TAILS += ["#", "#x", "#/../x", "%23", "%23x", "%2523", ";", ";v=1", ";/", ";/../x", "%3b", "%3bv=1"]
TAILS += [
    "%00",
    "%00.json",
    "%0a",
    "%0d",
    "%0d%0a",
    "%0a/",
    "%09",
    "%0b",
    "%0c",
    "%20",
    "%20/",
    "%a0",
]
TAILS += ["%c2%a0", "%e2%80%8b", "%ef%bb%bf", "%e2%80%a8", "%c2%85", "%7f", "%ff", "%", "%2", "%zz"]
TAILS += [".", "..", ".json", ".html", "~", "*", "+", ",", ":", "@", "=", "!", "'", '"', "<x>", "|"]
TAILS += [
    "/index",
    "/index.html",
    "/*",
    "/%2a",
    "()",
    "{}",
    "[]",
    "^",
    "`",
    "$",
    "%1f",
    "%01",
    "%80",
]
TAILS += [
    "%u0000",
    "%2500",
    "%250a",
    "%252f",
    "%e0%a4%a",
    "/" * 40,
    "%2f" * 40,
    "/." * 30,
    "x" * 300,
]
HEADS = [
    "/",
    "//",
    "/.",
    "/./",
    "/../",
    "/x/../",
    "%2f",
    "/%2f",
    "%5c",
    "\\",
    "/\\",
    "/;/",
    "/;x=1",
]
HEADS += ["/%00", "/%20", "/%09", "/%0a", "/%e2%80%8b", "/%ef%bb%bf", "?", "?/", "#", "*", ".", "%"]
BLANKS = ["%00", "%01", "%08", "%09", "%0a", "%0d", "%1f", "%20", "+", "%7f", "%c2%a0", "%e2%80%8b"]
BLANKS += [
    "%c2%ad",
    "%e2%80%8d",
    "%ef%bb%bf",
    ";",
    ";x",
    "%3b",
    "%0d%0a",
    "%cc%81",
    "%e2%80%ae",
    "%ff",
]
LOOKALIKES = {"k": ["%e2%84%aa"], "s": ["%c5%bf"], "i": ["%c4%b1", "%c4%b0", "%e1%bb%8b"]}
LOOKALIKES |= {"o": ["%d0%be", "%c3%b6", "%ce%bf"], "e": ["%d0%b5", "%c3%a9"], "a": ["%d0%b0"]}
PARAMETERS = [
    "",
    ".",
    "..",
    "%2e%2e",
    "a%2fb",
    "%2f",
    "..%2fquote%2fBTC",
    "a;b",
    "%00",
    "%25",
    "%ff",
]
PARAMETERS += [
    "a%5cb",
    "%0a",
    "x%0ay",
    "%f0%9f%92%a9",
    "a b".replace(" ", "%20"),
    "{x}",
    "*",
    "9" * 400,
]
PARAMETERS += ["%c3%9f", "%ef%bc%8e%ef%bc%8e", "a,b", "a:b", "@", "-1", "1e5", "%252f", "x" * 2000]


def percent(text: str, times: int = 1) -> str:
    """Percent-encodes every character, so many times."""
    for _ in range(times):
        text = "".join(f"%{byte:02x}" for byte in text.encode())
    return text


def _encoded(path: str) -> Iterator[str]:
    for index, letter in enumerate(path):
        code = f"%{ord(letter):02x}"
        forms = [code, code.upper(), code.replace("%", "%25"), code.replace("%", "%2525")]
        forms += [
            f"%u{ord(letter):04x}",
            f"%{0xC0 | ord(letter) >> 6:02x}%{0x80 | ord(letter) & 63:02x}",
        ]
        forms.append(percent(chr(0xFEE0 + ord(letter))))
        forms += LOOKALIKES.get(letter.lower(), [])
        yield from (path[:index] + form + path[index + 1 :] for form in forms)
    yield from (percent(path, times) for times in (1, 2, 3))
    yield from ("/" + percent(path[1:], times) for times in (1, 2, 3))
    yield "/".join(percent(part) for part in path.split("/"))


def _cased(path: str) -> Iterator[str]:
    yield from (path.upper(), path.lower(), path.title(), path.swapcase())
    for index, letter in enumerate(path):
        yield path[:index] + letter.swapcase() + path[index + 1 :]


def _slashed(path: str) -> Iterator[str]:
    for index, letter in enumerate(path):
        if letter == "/":
            for other in SLASHES + OVERLONG_SLASHES + DOTS:
                yield path[:index] + other + path[index + 1 :]
    yield from (path.replace("/", other) for other in SLASHES + OVERLONG_SLASHES)
    yield from (path.replace("/", "/./"), path.replace("/", "/x/../"), path.removeprefix("/"))


def _blanked(path: str) -> Iterator[str]:
    parts = path.split("/")
    for number, part in enumerate(parts[1:], 1):
        for blank in BLANKS:
            for bent in (blank + part, part + blank, part[:1] + blank + part[1:]):
                yield "/".join([*parts[:number], bent, *parts[number + 1 :]])


def _edges(path: str) -> Iterator[str]:
    yield from (path + tail for tail in TAILS)
    yield from (head + path for head in HEADS)
    yield from (authority + path for authority in AUTHORITIES)
    # A mount takes these for its own: "$" matches before the newline, and its prefix grows a slash.
    yield from (f"/{path}{tail}" for tail in ("%0a", "%0a%0a", "%0d%0a", "%0a/", "/%0a"))
    yield from (path + path, path * 300, "/x" * 200 + "/.." * 200 + path, "*", "", "/", "?", "#")


def _parameters(path: str) -> Iterator[str]:
    folder = path.rpartition("/")[0]
    yield from (f"{folder}/{value}" for value in PARAMETERS)


KINDS: list[Callable[[str], Iterator[str]]] = [
    _encoded, _cased, _slashed, _blanked, _edges, _parameters,
]  # fmt: skip


def spellings(path: str, *, least: int = 520) -> list[str]:
    """All spellings of a path, each once, and so many that join two tricks; always the same."""
    found = dict.fromkeys(chain.from_iterable(kind(path) for kind in KINDS))
    draw = random.Random(SEED)
    short = [one for one in found if 0 < len(one) < 100]
    for _ in range(least):
        if len(found) > least:
            break
        bent = list(draw.choice(KINDS)(draw.choice(short)))
        found.update(dict.fromkeys(draw.choices(bent, k=3) if bent else ()))
    return [one for one in found if one != path]


def decodings(target: str) -> list[str]:
    """What servers make of a target's path: decoded once, not at all, twice, or as a URL."""
    path = target.partition("?")[0]
    found = [unquote(path), path, unquote(unquote(path)), unquote(path, "latin-1")]
    try:
        parsed = httptools.parse_url(target.encode()).path
    except httptools.HttpParserInvalidURLError:
        parsed = None
    if parsed is not None:
        found.append(unquote(parsed.decode("ascii")))
    return list(dict.fromkeys(found))
