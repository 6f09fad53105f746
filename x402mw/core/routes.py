"""Which price a request falls under, by method and path.

The danger is a path that misses every price and still reaches the handler. So three rules hold:

1. Templates mean exactly what they mean to Starlette's router, odd corners included.
2. HEAD is priced as GET; a method without a price beside a priced one never passes.
3. A path that misses every price, while its *normal form* (decoded twice more, slashes and dots
   collapsed, lower case, no trailing slash) hits one, is "not found" rather than free.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar
from urllib.parse import unquote

from x402mw.core.errors import ConfigurationError

Entry = TypeVar("Entry")

TEMPLATE_CHARACTERS_MAX = 1024
PARAMETERS_MAX = 16
LOOSE_MAX = 3
"""Parameters that match across a slash or share a segment: more would let a path stall a match."""
PATH_CHARACTERS_MAX = 8192
"""The longest path that is looked up; shorter where templates have loose parameters."""
MATCH_STEPS_MAX = 600_000
"""The most ways to place loose parameters that one look-up may try: some 3 ms of a CPU."""
_PARAMETER = re.compile(r"{([a-zA-Z_][a-zA-Z0-9_]*)(:[a-zA-Z_][a-zA-Z0-9_]*)?}")
_BLANK = re.compile(r"[\s\x00-\x20\x7f]")
_QUERY = re.compile(r"[?#]")
_MARK = "\ue000"
_METHOD = re.compile(r"[A-Z][A-Z0-9_-]{0,31}", re.ASCII)
_PATTERNS = {
    "str": r"[^/]+",
    "path": r".*",
    "int": r"[0-9]+",
    "float": r"[0-9]+(\.[0-9]+)?",
    "uuid": r"[0-9a-fA-F]{8}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{12}",
}
_SAMPLES = {
    "str": "x",
    "path": "x",
    "int": "1",
    "float": "1.5",
    "uuid": "00000000-0000-4000-8000-000000000000",
}


def compile_template(template: str) -> re.Pattern[str]:
    """Compiles a path template such as `/quote/{symbol}`; raises `ConfigurationError` if bad.

    `{name}` is one segment; `:int`, `:float`, `:uuid` and `:path` as in Starlette's convertors.
    """
    if not template.startswith("/") or len(template) > TEMPLATE_CHARACTERS_MAX:
        raise ConfigurationError(f"a path template starts with a slash: {template[:80]!r}")
    parts, tail = _split(template)
    if len(parts) > PARAMETERS_MAX or _loose(parts) > LOOSE_MAX:
        raise ConfigurationError(f"too many parameters side by side in {template[:80]!r}")
    pattern, names = "^", set()
    for literal, name, kind in parts:
        if kind not in _PATTERNS or name in names:
            raise ConfigurationError(f"unknown or repeated parameter {name!r} in {template!r}")
        names.add(name)
        pattern += re.escape(literal) + f"(?P<{name}>{_PATTERNS[kind]})"
    # The same "$" as Starlette's: it also matches before a final newline, and so must we.
    return re.compile(pattern + re.escape(tail) + "$")


def _loose(parts: list[tuple[str, str, str]]) -> int:
    """Counts the parameters that a regular expression could place in more than one way."""
    shared = [index > 0 and "/" not in literal for index, (literal, _, _) in enumerate(parts)]
    return sum(
        shared[index] or kind == "path" or shared[index + 1 : index + 2] == [True]
        for index, (_, _, kind) in enumerate(parts)
    )


def _longest_path(templates: Iterable[str]) -> int:
    """The longest path that a table of these templates looks up."""
    split = [_split(template)[0] for template in templates]
    heads = [(normal_form(parts[0][0]), _loose(parts)) for parts in split if _loose(parts) > 1]
    # One path begins with one text, so templates that begin otherwise cost it nothing.
    rivals = [[count for other, count in heads if head.startswith(other)] for head, _ in heads]
    longest = PATH_CHARACTERS_MAX
    while any(_steps(counts, longest) > MATCH_STEPS_MAX for counts in rivals):
        longest //= 2
    return longest


def _steps(counts: list[int], length: int) -> int:
    """The ways to place two or three boundaries in a path, over all templates that it may fit."""
    ways = {2: length**2 // 2, 3: length**3 // 6}
    return sum(ways[count] for count in counts)


def sample_path(template: str) -> str:
    """Writes a path that the template matches, for self-tests."""
    parts, tail = _split(template)
    return "".join(literal + _SAMPLES[kind] for literal, _, kind in parts) + tail


def _split(template: str) -> tuple[list[tuple[str, str, str]], str]:
    """Splits a template into (literal before, name, kind) of each parameter, and the tail."""
    parts, start = [], 0
    for match in _PARAMETER.finditer(template):
        kind = (match[2] or ":str")[1:]
        parts.append((template[start : match.start()], match[1], kind))
        start = match.end()
    return parts, template[start:]


def normal_form(path: str) -> str:
    """Folds the spellings of a path that some server or router may treat as the same."""
    for _ in range(2):
        path = unquote(path)
    path = _QUERY.split(path, maxsplit=1)[0].replace("\\", "/").casefold()
    kept: list[str] = []
    for segment in path.split("/"):
        # Parameters (";v=1"), blanks and control characters are dropped by some stacks.
        name = _BLANK.sub("", segment.partition(";")[0])
        if name == "..":
            del kept[-1:]
        elif name not in ("", "."):
            kept.append(name)
    return "/" + "/".join(kept)


def parse_route(text: str) -> tuple[str, str]:
    """Splits `"GET /quote/{symbol}"`; HEAD is GET. Raises `ConfigurationError`."""
    method, blank, template = text.partition(" ")
    if not blank or not _METHOD.fullmatch(method):
        shown = text[:80]
        raise ConfigurationError(f'a route is written like "GET /quote/{{symbol}}", not {shown!r}')
    compile_template(template)
    return priced_method(method), template


def priced_method(method: str) -> str:
    """HEAD runs the same handler as GET, so it has the same price."""
    return "GET" if method == "HEAD" else method


class Miss(Enum):
    """Why a request falls under no entry of the table."""

    UNPRICED = "unpriced"
    METHOD = "method"
    SPELLING = "spelling"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class _Row(Generic[Entry]):
    method: str
    pattern: re.Pattern[str]
    folded: re.Pattern[str]
    entry: Entry


class RouteTable(Generic[Entry]):
    """Finds the entry for a method and a decoded path; the first template that fits wins."""

    def __init__(self, entries: Iterable[tuple[str, str, Entry]]) -> None:
        """Takes (method, template, entry) in the order in which they should be tried."""
        entries = list(entries)
        self._rows = [
            _Row(method, compile_template(template), _fold(template), entry)
            for method, template, entry in entries
        ]
        self._longest = _longest_path(template for _, template, _ in entries)

    def find(self, method: str, path: str) -> Entry | Miss:
        """Returns the entry, or why there is none."""
        if len(path) > self._longest:
            return Miss.LENGTH
        method = priced_method(method)
        path_known = False
        for row in self._rows:
            if row.pattern.match(path):
                if row.method == method:
                    return row.entry
                path_known = True
        if path_known:
            return Miss.METHOD
        return Miss.SPELLING if self._nearly(path) else Miss.UNPRICED

    def covers(self, path: str) -> bool:
        """Tells whether any method of this path, or of a spelling of it, is in the table.

        A path too long to look up counts as in it: whoever asks will refuse rather than let pass.
        """
        if len(path) > self._longest:
            return True
        return any(row.pattern.match(path) for row in self._rows) or self._nearly(path)

    def _nearly(self, path: str) -> bool:
        folded = normal_form(path)
        # With its slash again a folder's own path fits a template that ends in `/{rest:path}`.
        return any(row.folded.match(folded) or row.folded.match(f"{folded}/") for row in self._rows)


def _fold(template: str) -> re.Pattern[str]:
    """The pattern of a template's normal form, its parameters standing for the same as before."""
    parts, tail = _split(template)
    marked = "".join(literal + _MARK for literal, _, _ in parts) + tail
    pattern = re.escape(normal_form(marked))
    for _, _, kind in parts:
        pattern = pattern.replace(_MARK, _PATTERNS[kind], 1)
    return re.compile(f"^{pattern}$")
