"""A hook of MkDocs: the fields of a configuration as a table between its docstring and its methods."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from html import escape
from importlib import import_module
from typing import Any


_ENTRY = re.compile(r"^::: (([\w.]+)\.(\w+))$", re.MULTILINE)
_METHODS = '<div class="doc doc-children">'
# References of docstrings to names that the page has no entry of.
_REFERENCE = re.compile(r"\[(<code>[^<]+</code>)\]")
OTHERS = ("peft.", "transformers.")


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """Put the table of each dataclass whose fields say what they are where its methods begin.

    Raises:
        ValueError: the page does not show such a class.
    """
    for name, module, attribute in _ENTRY.findall(page.markdown):
        table = _table(getattr(import_module(module), attribute))
        if table:
            heading = html.find(f'id="{name}"')
            place = html.find(_METHODS, heading)
            if -1 in (heading, place):
                raise ValueError(f"The page has no entry of {name} that its fields could stand in.")
            html = html[:place] + table + html[place:]
    return _REFERENCE.sub(r"\1", html)


def _table(owner: Any) -> str:
    """Name and meaning of the fields of its own, those of PEFT's and transformers' classes left out; or nothing."""
    if not (isinstance(owner, type) and is_dataclass(owner)):
        return ""
    inherited = {
        field.name
        for base in owner.__mro__
        if is_dataclass(base) and base.__module__.startswith(OTHERS)
        for field in fields(base)
    }
    told = [(field.name, field.metadata["help"]) for field in fields(owner) if field.metadata.get("help")]
    rows = [
        f"<tr><td><code>{name}</code></td><td>{_cell(words)}</td></tr>"
        for name, words in told
        if name not in inherited
    ]
    head = "<thead><tr><th>field</th><th>meaning</th></tr></thead>"
    return f"<table>{head}<tbody>{''.join(rows)}</tbody></table>" if rows else ""


def _cell(words: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(" ".join(words.split()), quote=False))
