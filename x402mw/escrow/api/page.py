"""The OpenAPI document as one page for people: no scripts, nothing from elsewhere."""

import json
from html import escape
from typing import Any
from urllib.parse import quote

from x402mw.escrow.problems import PROBLEMS

Schema = dict[str, Any]
MEDIA_JSON = "application/json"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; --link: light-dark(#06c, #7bf) }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 3rem } h3 { margin: 2.5rem 0 .3rem; font-family: ui-monospace, monospace }
h3, td, code { overflow-wrap: anywhere } a { color: var(--link) }
pre { background: var(--soft); padding: .7rem; overflow-x: auto } p.about { white-space: pre-line }
table { border-collapse: collapse; width: 100%; font-size: .9rem; margin: .5rem 0 }
td, th { border-bottom: 1px solid var(--line); padding: .25rem .5rem; text-align: left;
  vertical-align: top } caption { text-align: left; font-weight: 600; padding: .3rem 0 }
nav a { margin-right: 1rem }
"""


def write(document: Schema) -> str:
    """The page."""
    groups: dict[str, list[str]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            written = _operation(document, path, method, operation)
            groups.setdefault(operation["tags"][0], []).append(written)
    links = "".join(f'<a href="#{escape(name)}">{escape(name)}</a> ' for name in groups)
    parts = "".join(
        f'<h2 id="{escape(name)}">{escape(name)}</h2>{"".join(written)}'
        for name, written in groups.items()
    )
    info = document["info"]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(info['title'])}</title><style>{_STYLE}</style>"
        f'<h1>{escape(info["title"])}</h1><p class="about">{_prose(info["description"])}</p>'
        f'<p><a href="/openapi.json">openapi.json</a> · <a href="#problems">problems</a></p>'
        f"<nav>{links}</nav>{parts}{_problems()}</html>\n"
    )


def _prose(text: str) -> str:
    """Text with `code` in it."""
    words = escape(text).split("`")
    return "".join(f"<code>{word}</code>" if at % 2 else word for at, word in enumerate(words))


def _operation(document: Schema, path: str, method: str, operation: Schema) -> str:
    name, scopes = operation["operationId"], operation["x-scopes"]
    needs = f"a key with {' or '.join(scopes)}" if scopes else "no key"
    fields = [
        (one["name"], one["in"], one.get("required", False), one["schema"])
        for one in operation["parameters"]
    ]
    return (
        f'<h3 id="{escape(name)}">{method.upper()} {escape(path)}</h3>'
        f"<p>{_prose(operation['summary'])} Needs {needs}.</p>"
        f"{_fields(document, 'Parameters', fields)}{_body(document, operation)}"
        f"<pre>{escape(curl(document, path, method, operation))}</pre>"
        f"{_answers(document, operation)}"
    )


def _body(document: Schema, operation: Schema) -> str:
    if "requestBody" not in operation:
        return ""
    schema = operation["requestBody"]["content"][MEDIA_JSON]["schema"]
    return "".join(_model(document, one, "Body") for one in _options(schema))


def _answers(document: Schema, operation: Schema) -> str:
    written, refused = [], []
    for status, response in operation["responses"].items():
        ((media, content),) = response["content"].items()
        if media == MEDIA_JSON:
            written += [
                _model(document, one, f"Answer {status}") for one in _options(content["schema"])
            ]
        elif media == "application/problem+json":
            codes = content["schema"]["allOf"][1]["properties"]["code"]["enum"]
            refused += [f'<a href="#problem-{code}">{code}</a>' for code in codes]
        else:
            written.append(f"<p>Answer {status}: <code>{escape(media)}</code></p>")
    return f"{''.join(written)}<p>Problems: {', '.join(dict.fromkeys(refused))}.</p>"


def _options(schema: Schema) -> list[Schema]:
    return list(schema.get("anyOf", [schema]))


def _model(document: Schema, schema: Schema, title: str) -> str:
    model = _resolve(document, schema)
    required = model.get("required", [])
    fields = [
        (name, "", name in required, field) for name, field in model.get("properties", {}).items()
    ]
    described = model.get("description", "").split("\n")[0]
    return _fields(document, f"{title}: {described}", fields)


def _fields(document: Schema, title: str, fields: list[tuple[str, str, bool, Schema]]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code><td>{where or ''} {'' if required else 'optional'}"
        f"<td>{escape(_form(document, schema))}<td>{_prose(schema.get('description', ''))}"
        for name, where, required, schema in fields
    )
    return f"<table><caption>{_prose(title)}</caption>{rows}</table>" if rows else ""


def _form(document: Schema, schema: Schema) -> str:
    """What a value may be, in few words."""
    if "$ref" in schema:
        model = _resolve(document, schema)
        return f"{model.get('title', '')} {{{', '.join(model.get('properties', {}))}}}"
    if "examples" in schema:
        # People read an example sooner than a pattern; machines have the document.
        return f"{schema.get('type', 'string or number')} like {schema['examples'][0]}"
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(_form(document, one) for one in options))
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if schema.get("type") == "array":
        most = f", up to {schema['maxItems']}" if "maxItems" in schema else ""
        return f"list of {_form(document, schema.get('items', {}))}{most}"
    limits = [
        f"{word} {schema[name]}"
        for name, word in (
            *(("minimum", "from"), ("maximum", "up to"), ("minLength", "at least")),
            *(("maxLength", "up to"), ("pattern", "like")),
        )
        if name in schema
    ]
    if "default" in schema:
        limits.append(f"default {json.dumps(schema['default'])}")
    return " ".join([schema.get("type", "any"), ", ".join(limits)]).strip()


def _resolve(document: Schema, schema: Schema) -> Schema:
    if "$ref" not in schema:
        return schema
    model: Schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return model


# Examples.


def curl(document: Schema, path: str, method: str, operation: Schema) -> str:
    """A command that does it."""
    query = [
        f"{one['name']}={quote(str(example(document, one['schema'])))}"
        for one in operation["parameters"]
        if one["in"] == "query" and one.get("required")
    ]
    base = "" if "servers" in operation else document["servers"][0]["url"]
    for one in operation["parameters"]:
        if one["in"] == "path":
            path = path.replace(f"{{{one['name']}}}", f"${one['name'].upper()}")
    asked = "?" + "&".join(query) if query else ""
    lines = [f'curl -X {method.upper()} "$ESCROW{base}{path}{asked}"']
    if operation["x-scopes"]:
        lines.append('  -H "Authorization: Bearer $API_KEY"')
    if any(one["name"] == "Idempotency-Key" for one in operation["parameters"]):
        lines.append('  -H "Idempotency-Key: $(uuidgen)"')
    if "requestBody" in operation:
        schema = operation["requestBody"]["content"][MEDIA_JSON]["schema"]
        body = json.dumps(example(document, _options(schema)[0]))
        lines += ['  -H "Content-Type: application/json"', f"  -d '{body}'"]
    return " \\\n".join(lines)


def example(document: Schema, schema: Schema) -> Any:
    """A value of this form; of an object only what it needs, or its first field."""
    schema = _resolve(document, schema)
    for name in ("examples", "enum"):
        if name in schema:
            return schema[name][0]
    for name in ("const", "default", "minimum"):
        if schema.get(name) is not None:
            return schema[name]
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return example(document, options[0])
    match schema.get("type"):
        case "object":
            fields = schema.get("properties", {})
            names = schema.get("required") or list(fields)[:1]
            return {name: example(document, fields[name]) for name in names}
        case "array":
            return [example(document, schema.get("items", {}))]
        case "string":
            return "..."
        case "boolean":
            return True
    return 1


def _problems() -> str:
    rows = "".join(
        f'<tr id="problem-{code}"><td>{", ".join(map(str, problem.statuses))}'
        f"<td><code>{code}</code><td>{_prose(problem.meaning)}<td>{_prose(problem.advice)}"
        for code, problem in sorted(PROBLEMS.items())
    )
    head = "<tr><th>Status<th>Code<th>Meaning<th>What to do now"
    return f'<h2 id="problems">problems</h2><table>{head}{rows}</table>'
