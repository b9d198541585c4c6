"""A hook of MkDocs: the fields of a configuration as a table below its signature, from the words beside each field."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any


_ENTRY = re.compile(r"^::: ([\w.]+)\.(\w+)$", re.MULTILINE)
# References of docstrings to names that the page has no entry of.
_REFERENCE = re.compile(r"\[(<code>[^<]+</code>)\]")
OTHERS = ("peft.", "transformers.")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the table behind the entry of each dataclass whose fields say what they are."""
    return _ENTRY.sub(lambda found: found[0] + _table(getattr(import_module(found[1]), found[2])), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Leave the brackets of such references out."""
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
    rows = [f"| `{name}` | {_cell(words)} |" for name, words in told if name not in inherited]
    return "\n".join(["\n", "| field | meaning |", "| --- | --- |", *rows, ""]) if rows else ""


def _cell(words: str) -> str:
    return " ".join(words.split()).replace("|", "\\|").replace("<", "&lt;")
