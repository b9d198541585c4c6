"""Write the lists of architectures into README.md and docs/variator.md: `python docs/architectures.py`."""

from __future__ import annotations

from pathlib import Path

from peft_variator.markdown import replace_between
from peft_variator.tuners.variator.architectures import ARCHITECTURES, REFUSED


ROOT = Path(__file__).parents[1]
WIDTH = 119


def known() -> str:
    """The architectures that take a plugin, by kind."""
    return "\n".join(_item(f"- **{kind.capitalize()}**: ", list(rows)) for kind, rows in ARCHITECTURES.items())


def refused() -> str:
    """The architectures that take none, by reason."""
    reasons = dict.fromkeys(REFUSED.values())
    return "\n".join(
        _item("- ", [name for name, why in REFUSED.items() if why == reason], f": {reason}") for reason in reasons
    )


def _item(start: str, names: list[str], end: str = "") -> str:
    """A list item of names, in lines that are not too long."""
    words = f"{start}{', '.join(f'`{name}`' for name in sorted(names))}{end}.".split(" ")
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + 1 + len(word) > WIDTH:
            lines.append(" ")
        lines[-1] += f" {word}"
    return "\n".join(lines)


def pages() -> dict[Path, str]:
    """The pages with their lists, as the tables have them."""
    variator, readme = ROOT / "docs" / "variator.md", ROOT / "README.md"
    page = replace_between(variator.read_text(encoding="utf-8"), "architectures", known())
    return {
        variator: replace_between(page, "refused", refused()),
        readme: replace_between(readme.read_text(encoding="utf-8"), "architectures", known()),
    }


def main() -> None:
    """Write the pages."""
    for path, page in pages().items():
        path.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
