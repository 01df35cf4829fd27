"""The API reference as one page, rendered from the OpenAPI document. Needs nothing from the network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from ocserve.pages.frame import LINKS, Link, navigation

Json = Mapping[str, Any]

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --mark: #0a7d5a; }
@media (prefers-color-scheme: dark) { :root { --mark: #4fd1a5; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1.5rem; }
nav a { margin-right: 1rem; } h1 ~ nav { columns: 18rem; margin: 1rem 0 2rem; }
h1 ~ nav a { display: block; text-decoration: none; color: inherit; }
nav strong { display: block; margin-top: .6rem; } code { font: .9em ui-monospace, monospace; }
h2 { border-bottom: 1px solid var(--line); margin-top: 3rem; } h3 { margin: 2.2rem 0 .3rem; }
h3 b { color: var(--mark); font-weight: 600; margin-right: .5rem; }
table { border-collapse: collapse; width: 100%; margin: .6rem 0; } caption { text-align: left; font-weight: 600; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0; border-top: 1px solid var(--line); }
td:first-child { white-space: nowrap; } .advisory td, .unsupported td { opacity: .7; }
.wide, pre { overflow-x: auto; } footer { margin-top: 4rem; opacity: .7; }
"""
# The page cannot know under which address it was reached, so the address is a variable.
_EXAMPLES = {
    "cURL": """\
curl "$OCSERVE/v1/chat/completions" -H "Authorization: Bearer $OCSERVE_API_KEY" \\
  -H "Content-Type: application/json" \\
  -d '{"model": "default", "messages": [{"role": "user", "content": "Hello!"}]}'""",
    "Python": """\
import os
from openai import OpenAI

client = OpenAI(base_url=os.environ["OCSERVE"] + "/v1", api_key=os.environ["OCSERVE_API_KEY"])
answer = client.chat.completions.create(model="default", messages=[{"role": "user", "content": "Hello!"}])
print(answer.choices[0].message.content)""",
    "JavaScript": """\
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.OCSERVE + "/v1", apiKey: process.env.OCSERVE_API_KEY });
const answer = await client.chat.completions.create({
  model: "default", messages: [{ role: "user", content: "Hello!" }],
});
console.log(answer.choices[0].message.content);""",
}

_COUNTING = """\
<h2>How tokens are counted</h2>
<p>By the tokenizer in the model's own file, whose ids <code>POST /tokenize</code> gives. <code>prompt_tokens</code> are
those of the conversation as the model's chat template renders it, its control tokens included; what a message says is
always text, so a control token's name in it counts as text. <code>completion_tokens</code> counts every sampled token,
the one that ends the turn included. <code>prompt_tokens_details.cached_tokens</code> is the part of the prompt that was
not computed for this request. With <code>n</code> the prompt counts once and the answers are summed.</p>"""


def page(document: Json, links: Sequence[Link] = LINKS) -> bytes:
    """The page. `links` are the other pages."""
    operations = list(_operations(document))
    tags = list(dict.fromkeys(operation["tags"][0] for _, _, operation in operations))
    info = document["info"]
    sections = "".join(_section(tag, [each for each in operations if each[2]["tags"][0] == tag]) for tag in tags)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(info["title"])}: API reference</title><style>{_STYLE}</style></head><body>
{navigation([link for link in links if link[0] != "docs"])}
<h1>{escape(info["title"])} API reference</h1>
<p>Version {escape(info["version"])}. {_prose(info["description"])}
The same as a document for machines: <a href="openapi.json"><code>/openapi.json</code></a>.</p>
<nav>{"".join(_links(tag, operations) for tag in tags)}</nav>
{_examples()}
{_COUNTING}
{sections}
<footer>A key goes into <code>Authorization: Bearer &lt;key&gt;</code>, <code>x-api-key</code> or
<code>x-goog-api-key</code>. The operator replaces a key with <code>ocserve keys rotate</code>, both being good for a
time if that is wanted, and ends one with <code>ocserve keys revoke</code>; a revoked key is refused from the next
request on.</footer>
</body></html>
""".encode()


def _examples() -> str:
    shown = "".join(f"<h3>{name}</h3><pre><code>{escape(text)}</code></pre>" for name, text in _EXAMPLES.items())
    where = "<code>OCSERVE</code> is this page's address without <code>/docs</code>; any text is a key if none is set."
    return f"<h2>Calling it</h2><p>{where}</p>{shown}"


def _operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def _links(tag: str, operations: list[tuple[str, str, Json]]) -> str:
    links = "".join(
        f'<a href="#{escape(operation["operationId"])}"><code>{method} {escape(path)}</code></a>'
        for method, path, operation in operations
        if operation["tags"][0] == tag
    )
    return f"<strong>{escape(tag)}</strong>{links}"


def _section(tag: str, operations: list[tuple[str, str, Json]]) -> str:
    return f"<h2>{escape(tag)}</h2>" + "".join(_described(*each) for each in operations)


def _described(method: str, path: str, operation: Json) -> str:
    head = f'<h3 id="{escape(operation["operationId"])}"><b>{method}</b><code>{escape(path)}</code></h3>'
    body = operation.get("requestBody")
    table = "" if body is None else _parameters(body["content"]["application/json"]["schema"])
    answered, *refused = operation["responses"]
    kinds = ", ".join(f"<code>{escape(kind)}</code>" for kind in operation["responses"][answered]["content"])
    refusals = ", ".join(refused)
    return f"{head}<p>{_prose(operation['summary'])}</p>{table}<p>{answered}: {kinds}. Refusals: {refusals}.</p>"


def _parameters(schema: Json) -> str:
    rows = "".join(_rows(schema, ""))
    head = "<tr><th>Parameter</th><th>Values</th><th>Class</th><th>Meaning</th></tr>"
    return f'<div class="wide"><table>{head}{rows}</table></div>'


def _rows(schema: Json, prefix: str) -> Iterator[str]:
    """A row for each parameter, and below it those of the objects that it holds."""
    required = schema.get("required", ())
    for name, described in schema.get("properties", {}).items():
        if "x-ocserve-class" not in described:
            continue
        kind, mark = described["x-ocserve-class"], " *" if name in required else ""
        names = [name, *described.get("x-ocserve-spellings", ())]
        cells = (
            ", ".join(f"<code>{escape(prefix + each)}</code>" for each in names) + mark,
            escape(_values(described)),
            kind,
            _prose(described.get("description", "")),
        )
        yield f'<tr class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        if kind != "unsupported":
            yield from _rows(described, f"{prefix}{name}.")
            yield from _rows(described.get("items") or {}, f"{prefix}{name}[].")


def _values(schema: Json) -> str:
    """The values that a schema allows, in a few words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_values(each) for each in schema["anyOf"] if each != {"type": "null"}))
    if "enum" in schema:
        return ", ".join(json.dumps(value, ensure_ascii=False) for value in schema["enum"] if value is not None)
    kind = schema.get("type", "any")
    name = " or ".join(each for each in kind if each != "null") if isinstance(kind, list) else kind
    bounds = [f"{sign} {schema[word]}" for word, sign in _BOUNDS.items() if word in schema]
    if name == "array" and "properties" not in schema.get("items", {}) and schema.get("items"):
        name = f"array of {_values(schema['items'])}"
    return " ".join([name, *([f"({', '.join(bounds)})"] if bounds else [])])


_BOUNDS = {
    "minimum": "≥",
    "exclusiveMinimum": ">",
    "maximum": "≤",
    "minLength": "length ≥",
    "maxLength": "length ≤",
    "minItems": "items ≥",
    "maxItems": "items ≤",
    "maxProperties": "properties ≤",
}


def _prose(text: str) -> str:
    """Text with its `code` marked up."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))
