"""``/docs``: the OpenAPI document as one plain page, without scripts and without anything from other machines.

FastAPI's own page loads its scripts from a public network, which servers' users may not have. Knows nothing of routes
beyond the document.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]
_STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
code, pre { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .92em; }
section { border-top: 1px solid #8886; margin-top: 1.5rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .25rem .5rem; }
tr + tr { border-top: 1px solid #8883; } .wide { overflow-x: auto; } :root { color-scheme: light dark; }"""


def docs_page(document: Mapping[str, Any]) -> str:
    """The page of an OpenAPI document."""
    info = document["info"]
    title = html.escape(f"{info['title']} {info['version']}")
    parts = [
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        f"<meta name='viewport' content='width=device-width'><style>{_STYLE}</style></head><body>"
        f"<h1>{title}</h1><p>{_words(info.get('description', ''))}</p>"
        "<p>The same for machines: <a href='openapi.json'>openapi.json</a></p>"
    ]
    for path, item in document["paths"].items():
        for method, operation in item.items():
            parts.append(_operation(document, path, method, operation))
    for name, schema in document["components"]["schemas"].items():
        if "properties" in schema and not name.startswith("Body_"):  # those are forms, and stand with their routes
            words = _words(schema.get("description", ""))
            parts.append(f"<section><h2><code>{html.escape(name)}</code></h2><p>{words}</p>")
            parts += [_table(document, _fields(document, schema)), "</section>"]
    return "".join([*parts, "</body></html>"])


def _operation(document: Mapping[str, Any], path: str, method: str, operation: Mapping[str, Any]) -> str:
    parts = [f"<section><h2><code>{method.upper()} {html.escape(path)}</code></h2>"]
    parts.append(f"<p>{_words(operation.get('description') or operation.get('summary', ''))}</p>")
    if operation.get("security"):
        parts.append("<p>Asks for a key: <code>Authorization: Bearer KEY</code></p>")
    given = [
        (parameter["name"], parameter["schema"], parameter.get("required", False))
        for parameter in operation.get("parameters", ())
    ]
    if given:
        parts.append(_table(document, given))
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        parts += [f"<p>Body: <code>{kind}</code></p>", _table(document, _fields(document, content["schema"]))]
    answers = [
        f"<tr><td><code>{code}</code></td><td>{_words(answer.get('description', ''))}"
        f" {' '.join(f'<code>{kind}</code>' for kind in answer.get('content', {}))}</td></tr>"
        for code, answer in sorted(operation.get("responses", {}).items())
    ]
    return "".join([*parts, "<p>Answers</p><table>", *answers, "</table></section>"])


def _fields(document: Mapping[str, Any], schema: Schema) -> list[tuple[str, Schema, bool]]:
    found = _resolved(document, schema)
    return [(name, field, name in found.get("required", ())) for name, field in found.get("properties", {}).items()]


def _table(document: Mapping[str, Any], fields: list[tuple[str, Schema, bool]]) -> str:
    rows = []
    for name, schema, required in fields:
        default = schema.get("default")
        notes = [schema.get("description", ""), "Required." if required else ""]
        notes.append("" if default is None else f"Default: `{default}`.")
        kinds = html.escape(" | ".join(dict.fromkeys(_kinds(document, schema))) or "any")
        words = _words(" ".join(filter(None, notes)))
        rows.append(f"<tr><td><code>{html.escape(name)}</code></td><td>{kinds}</td><td>{words}</td></tr>")
    return f"<div class='wide'><table><tr><th>Field</th><th>Type</th><th></th></tr>{''.join(rows)}</table></div>"


def _kinds(document: Mapping[str, Any], schema: Schema) -> Iterator[str]:
    """What a value may be, in words; "null" only says that a field may be left out."""
    for one in schema.get("anyOf") or schema.get("oneOf") or ():
        yield from _kinds(document, one)
    if "$ref" in schema:
        found = _resolved(document, schema)
        yield from _kinds(document, found) if "enum" in found else [str(schema["$ref"]).rpartition("/")[2]]
    elif "enum" in schema or "const" in schema:
        yield from (f'"{value}"' for value in schema.get("enum", [schema.get("const")]))
    elif schema.get("type") == "array":
        yield f"list of {' or '.join(_kinds(document, schema.get('items', {}))) or 'anything'}"
    elif schema.get("type") not in (None, "null"):
        low, high = schema.get("minimum"), schema.get("maximum")
        limits = f" {low if low is not None else ''}…{high if high is not None else ''}"
        yield f"{schema['type']}{limits if low is not None or high is not None else ''}"


def _resolved(document: Mapping[str, Any], schema: Schema) -> Schema:
    """A schema behind its reference."""
    if "$ref" not in schema:
        return schema
    found: Schema = document["components"]["schemas"][str(schema["$ref"]).rpartition("/")[2]]
    return found


def _words(text: str) -> str:
    """A description: escaped, with what stands between backticks as code."""
    pieces = html.escape(" ".join(text.split())).split("`")
    return "".join(f"<code>{piece}</code>" if number % 2 else piece for number, piece in enumerate(pieces) if piece)
