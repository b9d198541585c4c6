"""A hook of MkDocs: links of a page into the rest of the repository become plain words, until it has a home.

`HOME` is the one setting: the address of a folder of the repository on the web, such as `https://…/blob/main`. Empty,
there is none, and none is invented.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


HOME = ""
ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"\[([^\]]+)\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace links out of docs/.

    Raises:
        FileNotFoundError: a link leads nowhere.
    """

    def replace(found: re.Match[str]) -> str:
        words, path = found[1], found[2]
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"A page links to {path!r}, which is not in the repository.")
        return f"[{words}]({HOME}/{path}{found[3] or ''})" if HOME else words

    return _LINK.sub(replace, markdown)
