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
h2 { margin-top: 3.5rem; padding-top: .7rem; border-top: 2px solid var(--line) }
h3 { margin: 2.5rem 0 .3rem } h3, code, pre { font-family: ui-monospace, monospace }
h3, td, code { overflow-wrap: anywhere } a { color: var(--link) }
h3 a { color: inherit; text-decoration: none }
pre { background: var(--soft); padding: .7rem; overflow-x: auto; font-size: .9rem }
table { border-collapse: collapse; width: 100%; font-size: .9rem; margin: .5rem 0 1rem }
td, th { border-bottom: 1px solid var(--line); padding: .3rem .7rem .3rem 0; text-align: left;
  vertical-align: top; font-weight: 400 } thead th, caption { font-weight: 600 }
caption { text-align: left; padding: .3rem 0 } tbody th { width: 17rem }
.list tbody th { width: 25rem }
small { opacity: .75; margin-left: .4rem } nav a { margin-right: 1rem }
@media (max-width: 40rem) { table, tbody, tr, td, caption { display: block } thead { display: none }
  tbody th, .list tbody th { display: block; width: auto; padding-bottom: 0 }
  tbody th, td:not(:last-child) { border: 0 } h3 { font-size: 1rem } }
"""
_COMMANDS = """\
In the commands `ESCROW` is the address of this page without its `/docs`, `API_KEY` a key of yours,
and `order-1` what you call this one operation: a fresh name for each, the same to repeat it. Other
names stand for ids that you know."""

_ENDS = ("objects", "problems")


def write(document: Schema) -> str:
    """The page."""
    inline = {name for one in _operations(document) for name in _body_models(one[2])}
    groups: dict[str, list[tuple[str, str, Schema]]] = {}
    for one in _operations(document):
        groups.setdefault(one[2]["tags"][0], []).append(one)
    models = {
        name: model
        for name, model in document["components"]["schemas"].items()
        if name not in inline and name != "Problem"
    }
    anchors = {f"about-{name}": name for name in groups} | dict(zip(_ENDS, _ENDS, strict=True))
    links = " ".join(f'<a href="#{at}">{escape(name)}</a>' for at, name in anchors.items())
    parts = "".join(_group(document, name, group) for name, group in groups.items())
    info = document["info"]
    about = "".join(
        f"<p>{_prose(part)}</p>" for part in (*info["description"].split("\n\n"), _COMMANDS)
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(info['title'])}</title><style>{_STYLE}</style>"
        f"<h1>{escape(info['title'])}</h1>{about}"
        f'<p>The same for machines: <a href="openapi.json">openapi.json</a>.</p>'
        f"<nav>{links}</nav>{parts}{_objects(document, models)}{_problems()}</html>\n"
    )


def _operations(document: Schema) -> list[tuple[str, str, Schema]]:
    """Path, method and description of each; those about the service itself come last."""
    found = [
        (path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    return sorted(found, key=lambda one: "servers" in one[2])


def _body_models(operation: Schema) -> list[str]:
    if "requestBody" not in operation:
        return []
    schema = operation["requestBody"]["content"][MEDIA_JSON]["schema"]
    return [_name(one) for one in _options(schema)]


def _group(document: Schema, name: str, group: list[tuple[str, str, Schema]]) -> str:
    """What a group has, by its summaries; then each operation."""
    rows = "".join(
        f'<tr><th scope="row"><a href="#{escape(operation["operationId"])}">'
        f"<code>{method.upper()} {escape(path)}</code></a><td>{_prose(operation['summary'])}"
        for path, method, operation in group
    )
    listed = f'<table class="list"><tbody>{rows}</table>' if len(group) > 1 else ""
    written = "".join(_operation(document, *one) for one in group)
    return f'<h2 id="about-{escape(name)}">{escape(name)}</h2>{listed}{written}'


def _prose(text: str) -> str:
    """Text with `code` in it."""
    words = escape(text).split("`")
    return "".join(f"<code>{word}</code>" if at % 2 else word for at, word in enumerate(words))


def _operation(document: Schema, path: str, method: str, operation: Schema) -> str:
    name, scopes = escape(operation["operationId"]), operation["x-scopes"]
    needs = f"a key with {' or '.join(f'`{one}`' for one in scopes)}" if scopes else "no key"
    needs += "".join(f", and `{one}`" for one in operation.get("x-scopes-also", ()))
    summary = f"{operation['summary']} Needs {needs}."
    fields = [
        (one["name"], _note(one["in"], one.get("required")), {**one["schema"], **_said(one)})
        for one in operation["parameters"]
    ]
    return (
        f'<h3 id="{name}"><a href="#{name}">{method.upper()} {escape(path)}</a></h3>'
        f"<p>{_prose(summary)}</p>"
        f"{_fields('Parameters', fields)}{_body(document, operation)}"
        f"{_commands(document, path, method, operation)}{_answers(operation)}"
    )


def _said(parameter: Schema) -> Schema:
    return {"description": parameter["description"]} if "description" in parameter else {}


def _body(document: Schema, operation: Schema) -> str:
    models = document["components"]["schemas"]
    return "".join(_model(models[name], "Body: ") for name in _body_models(operation))


def _answers(operation: Schema) -> str:
    answered, refused = [], []
    for status, response in operation["responses"].items():
        ((media, content),) = response["content"].items()
        if media == "application/problem+json":
            codes = content["schema"]["allOf"][1]["properties"]["code"]["enum"]
            refused += [f'<a href="#problem-{code}">{code}</a>' for code in codes]
            continue
        named = media == MEDIA_JSON and "type" not in content["schema"]
        options = map(_form, _options(content["schema"])) if named else [f"<code>{media}</code>"]
        answered.append(f"{status}: {' or '.join(options)}")
    problems = ", ".join(dict.fromkeys(refused))
    return f"<p>Answer {'; '.join(answered)}.<p>Problems: {problems}."


def _options(schema: Schema) -> list[Schema]:
    return list(schema.get("anyOf", [schema]))


def _model(model: Schema, title: str) -> str:
    required = model.get("required", [])
    fields = [
        (name, _note("", name in required), field)
        for name, field in model.get("properties", {}).items()
    ]
    return _fields(title + " ".join(model.get("description", "").split("\n")), fields)


def _note(where: str, required: object) -> str:
    """What is said in small beside a name."""
    return ", ".join(part for part in (where, "" if required else "optional") if part)


def _fields(title: str, fields: list[tuple[str, str, Schema]]) -> str:
    rows = "".join(_row(*field) for field in fields)
    return f"<table><caption>{_prose(title)}</caption><tbody>{rows}</table>" if rows else ""


def _row(name: str, note: str, schema: Schema) -> str:
    noted = f"<small>{note}</small>" if note else ""
    described = " ".join(schema.get("description", "").split())
    said = f". {_prose(described)}" if described else ""
    return f'<tr><th scope="row"><code>{escape(name)}</code>{noted}<td>{_form(schema)}{said}'


def _form(schema: Schema) -> str:
    """What a value may be, in few words, as HTML."""
    if "$ref" in schema:
        name = escape(_name(schema))
        return f'<a href="#object-{name}">{name}</a>'
    if "examples" in schema:
        # People read an example sooner than a pattern; machines have the document.
        kind = schema.get("type", "string or number")
        return f"{kind} like <code>{escape(str(schema['examples'][0]))}</code>"
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(map(_form, options)))
    if "const" in schema:
        return f"<code>{escape(json.dumps(schema['const']))}</code>"
    if "enum" in schema:
        return ", ".join(f"<code>{escape(str(one))}</code>" for one in schema["enum"])
    if schema.get("type") == "array":
        most = f", at most {schema['maxItems']}" if "maxItems" in schema else ""
        return f"list of {_form(schema.get('items', {}))}{most}"
    return escape(", ".join([_sized(schema), *_more(schema)]))


def _sized(schema: Schema) -> str:
    kind = str(schema.get("type", "any"))
    kind = {"null": "null", "object": "object of your own"}.get(kind, kind)
    least, most = schema.get("minimum"), schema.get("maximum")
    unit = ""
    if kind == "string":
        least, most, unit = schema.get("minLength"), schema.get("maxLength"), " characters"
    if most is None:
        return kind if least is None else f"{kind} from {least}"
    return f"{kind} {least} to {most}{unit}" if least is not None else f"{kind} up to {most}{unit}"


def _more(schema: Schema) -> list[str]:
    found = []
    if "pattern" in schema and "description" not in schema:
        found.append(f"like {schema['pattern']}")
    if schema.get("default"):
        found.append(f"default {json.dumps(schema['default'])}")
    return found


def _name(reference: Schema) -> str:
    """The name of the model that a `$ref` leads to."""
    return str(reference["$ref"].rpartition("/")[2])


def _objects(document: Schema, models: Schema) -> str:
    written = "".join(
        f'<h3 id="object-{escape(name)}"><a href="#object-{escape(name)}">{escape(name)}</a></h3>'
        f"{_model(model, '')}"
        for name, model in models.items()
    )
    return f'<h2 id="objects">objects</h2><p>What answers are made of.</p>{written}'


def _resolve(document: Schema, schema: Schema) -> Schema:
    if "$ref" not in schema:
        return schema
    model: Schema = document["components"]["schemas"][_name(schema)]
    return model


# Examples.


def _commands(document: Schema, path: str, method: str, operation: Schema) -> str:
    """One for each form that the body may have."""
    bodies: list[Schema | None] = [None]
    if "requestBody" in operation:
        bodies = [*_options(operation["requestBody"]["content"][MEDIA_JSON]["schema"])]
    commands = (curl(document, path, method, operation, body) for body in bodies)
    return "".join(f"<pre>{escape(command)}</pre>" for command in commands)


def curl(
    document: Schema, path: str, method: str, operation: Schema, body: Schema | None = None
) -> str:
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
        lines.append('  -H "Idempotency-Key: order-1"')
    if body is not None:
        sent = json.dumps(example(document, body))
        lines += ['  -H "Content-Type: application/json"', f"  -d '{sent}'"]
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
        f'<tr id="problem-{code}"><th scope="row"><code>{code}</code>'
        f"<small>{', '.join(map(str, problem.statuses))}</small>"
        f"<td>{_prose(problem.meaning)}<td>{_prose(problem.advice)}"
        for code, problem in sorted(PROBLEMS.items())
    )
    head = "<thead><tr><th>Code and status<th>Meaning<th>What to do now</thead>"
    return f'<h2 id="problems">problems</h2><table>{head}<tbody>{rows}</table>'
