"""The OpenAPI document: complete, valid, and true of what is served."""

import json
import re
import time
from contextlib import suppress
from decimal import Decimal
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from tests.escrow.market import JOURNAL, market
from tests.escrow.operators import make_key
from x402mw.escrow.access import SCOPES
from x402mw.escrow.api import page
from x402mw.escrow.api.openapi import build
from x402mw.escrow.api.routes import Route
from x402mw.escrow.api.service import ROUTES as SERVICE
from x402mw.escrow.app import ROUTES
from x402mw.escrow.problems import PROBLEMS

pytestmark = pytest.mark.anyio
DOCUMENT = build(SERVICE, ROUTES)
WITH_BODY = [route for route in ROUTES if route.body is not None]


def test_every_route_is_described() -> None:
    """Contract: the document has each route once, under a name of its own."""
    names = [
        operation["operationId"]
        for methods in DOCUMENT["paths"].values()
        for operation in methods.values()
    ]
    assert len(names) == len(set(names)) == len({(r.method, r.path) for r in (*SERVICE, *ROUTES)})


def test_every_named_refusal_exists() -> None:
    """Contract: the table names only codes of the catalogue."""
    assert {code for route in ROUTES for code in route.refusals.split()} <= PROBLEMS.keys()


def references(value: Any) -> set[str]:
    """Every `$ref` below a value."""
    if isinstance(value, dict):
        own = {value["$ref"]} if "$ref" in value else set()
        return own.union(*(references(part) for part in value.values()))
    return set().union(*(references(part) for part in value)) if isinstance(value, list) else set()


def test_every_reference_leads_somewhere() -> None:
    """OpenAPI: each `$ref` names a schema that is there, and no schema is left over."""
    names = {found.rpartition("/")[2] for found in references(DOCUMENT)}
    assert names == DOCUMENT["components"]["schemas"].keys()


def strings_and_lists(schema: Any, where: str) -> list[tuple[str, dict[str, Any]]]:
    """Every schema below one, with where it is."""
    found = []
    if isinstance(schema, dict):
        if isinstance(schema.get("type"), str):
            found.append((where, schema))
        for name, part in schema.items():
            found += strings_and_lists(part, f"{where}.{name}")
    elif isinstance(schema, list):
        for part in schema:
            found += strings_and_lists(part, where)
    return found


ENDLESS = re.compile(r"(?<!\\)[*+]|\{\d+,\}")


def is_bounded(schema: dict[str, Any]) -> bool:
    """Whether values of this form have a greatest size."""
    match schema["type"]:
        case "string":
            form = schema.get("pattern", "*")
            return "enum" in schema or "maxLength" in schema or not ENDLESS.search(form)
        case "array":
            return "maxItems" in schema
        case "integer" | "number":
            return "maximum" in schema
    return True


def test_everything_that_is_sent_has_a_limit() -> None:
    """Limits: every string, list and number of every body and query has a greatest size."""
    sent = [*(route.body for route in WITH_BODY), *(route.query for route in ROUTES)]
    endless = {
        where
        for kind in sent
        for where, schema in strings_and_lists(TypeAdapter(kind).json_schema(), str(kind))
        if "const" not in schema and not is_bounded(schema)
    }
    assert endless == set()


def members(kind: Any) -> tuple[Any, ...]:
    """The models of a union, or the one there is."""
    return getattr(kind, "__args__", (kind,))


@pytest.mark.parametrize("route", WITH_BODY, ids=lambda route: route.path)
def test_no_field_takes_what_is_huge(route: Route) -> None:
    """Limits: what the schema says is also checked: 100000 characters, items or digits are not."""
    huge = ("x" * 100_000, "1" * 100_000, ["x"] * 100_000, 10**50)
    for model in members(route.body):
        for name in model.model_fields:
            for value in huge:
                with pytest.raises(ValidationError) as caught:
                    model.model_validate({name: value})
                assert name in {
                    str(error["loc"][0]) for error in caught.value.errors() if error["loc"]
                }


BOUNDLESS = ("1e100000000", "1e-100000000", "-1e100000000", "7" * 60_000 + ".0")
"""Numbers that are small to send and take minutes to expand."""


def nested(value: Any) -> list[Any]:
    """A value, and bodies' lists and objects around it."""
    named = [{name: value} for name in ("amount", "fraction", "voucher")]
    return [value, [value], *named, [{"agent_id": "ag_" + "0" * 32, "name": "x", **named[0]}]]


@pytest.mark.parametrize("route", WITH_BODY, ids=lambda route: route.path)
def test_no_field_expands_what_is_boundless(route: Route) -> None:
    """Limits: a number with a giant exponent or countless digits costs nothing, wherever it is."""
    for model in members(route.body):
        reference = {"$ref": f"#/components/schemas/{model.__name__}"}
        fits = page.example(DOCUMENT, reference) if model.model_fields else {}
        names = {*model.model_fields, *getattr(model, "OTHER_NAMES", ())}
        for name, number in product(sorted(names), BOUNDLESS):
            for value in (*nested(Decimal(number)), number):
                began = time.thread_time()
                # A text field may hold it as a text.
                with suppress(ValidationError):
                    model.model_validate({**fits, name: value})
                assert time.thread_time() - began < 0.1, (name, number[:20])


def test_no_query_expands_what_is_boundless() -> None:
    """Limits: the same of what a query may hold."""
    for route, number in product(ROUTES, BOUNDLESS):
        for name in route.query.model_fields:
            began = time.thread_time()
            with suppress(ValidationError):
                route.query.model_validate({name: number})
            assert time.thread_time() - began < 0.1, (name, number[:20])


async def test_bodies_are_of_the_models_that_are_described(tmp_path: Path) -> None:
    """Contract: each route reads its body as the model that the table names."""
    async with market(tmp_path) as m:
        everything = await make_key(m, m.buyer, *SCOPES)
        opened = (await m.open())["escrow_id"]
        for route in WITH_BODY:
            path = re.sub(r"\{(\w+)\}", lambda found: NAMES.get(found[1], opened), route.path)
            answer = await m.http.request(
                route.method, path, json={"nonsense": 1}, headers=everything.headers
            )
            said = {error["field"] for error in answer.json().get("errors", ())}
            if answer.json()["code"] in ("not_the_operator", "not_found"):
                continue
            wanted = [missing(model) for model in members(route.body)]
            assert any(said <= fields | {"nonsense"} and fields <= said for fields in wanted), path


NAMES = {
    "journal": JOURNAL,
    "key_id": "key_" + "0" * 32,
    "agent_id": "ag_" + "0" * 32,
    "webhook_id": "wh_" + "0" * 32,
    "event_id": "1",
}


def missing(model: Any) -> set[str]:
    """The fields that an empty body lacks."""
    return {name for name, field in model.model_fields.items() if field.is_required()}


async def test_the_document_and_the_page_are_served(tmp_path: Path) -> None:
    """Contract: /openapi.json and /docs need no key; the page loads nothing and runs nothing."""
    async with market(tmp_path) as m:
        answer = await m.http.get(f"{m.escrow.url}/openapi.json")
        assert answer.headers["content-type"] == "application/json"
        assert answer.json() == json.loads(json.dumps(DOCUMENT))
        answer = await m.http.get(f"{m.escrow.url}/docs")
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert not re.search(r"<script|<link|<img|https?:|@import|url\(", answer.text)


def test_the_page_shows_every_operation_and_problem() -> None:
    """Contract: each operation with a command that does it, and each code with its advice."""
    text = page.write(DOCUMENT)
    for methods in DOCUMENT["paths"].values():
        for operation in methods.values():
            assert f'id="{operation["operationId"]}"' in text
    forms = sum(len(described(members(route.body))) or 1 for route in (*SERVICE, *ROUTES))
    assert text.count("curl -X") == forms
    for code in PROBLEMS:
        assert f'id="problem-{code}"' in text


def described(models: Any) -> list[Any]:
    """Those models that have a field at all."""
    return [model for model in models if model is not None and model.model_fields]


def test_every_link_of_the_page_leads_somewhere() -> None:
    """Contract: anchors are there, once each; every object that an answer is made of is shown."""
    text = page.write(DOCUMENT)
    anchors = re.findall(r' id="([^"]+)"', text)
    assert len(anchors) == len(set(anchors))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(anchors)
    shown = set(re.findall(r"<code>(\w+)</code>", text))
    for name, model in DOCUMENT["components"]["schemas"].items():
        assert name == "Problem" or shown >= model["properties"].keys()


def test_examples_are_what_the_operations_take() -> None:
    """Contract: the body of each example is one that its model reads."""
    for route in WITH_BODY:
        operation = DOCUMENT["paths"][route.path][route.method.lower()]
        if "requestBody" in operation:
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            example = page.example(DOCUMENT, schema)
            members(route.body)[0].model_validate(example)
