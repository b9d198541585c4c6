"""Put the counts of kill.py and mutate.py into docs/packed_bases.md: python examples/packed_faults/render.py."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from peft_variator.files import write_text
from peft_variator.markdown import make_table, replace_between


HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "packed_bases.md"


def source(report: dict[str, Any]) -> str:
    """How and where the counts were made."""
    where = report["environment"]
    return (
        f"`{report['command']}`, seed {report['seed']}. {where['cpu']}, {where['threads']} thread on {where['cores']} "
        f"cores, load average {where['load_average']}, {where['date']}; Python {where['python']}, torch "
        f"{where['torch']}, peft {where['peft']}, transformers {where['transformers']}."
    )


def kills(report: dict[str, Any]) -> str:
    """The table of killed runs."""
    columns = ["killed while running", "target whole", "target absent", "then finished"]
    partial = "target partial, and an error to load"
    rows = [
        [f"`{name}`", str(count["rounds"]), *(str(count.get(column, 0)) for column in (*columns, partial))]
        for name, count in report["counts"].items()
    ]
    return make_table(["", "rounds", *columns, partial], rows)


def mutations(report: dict[str, Any]) -> str:
    """The table of damaged files."""
    columns = ["clear error", "same numbers", "other numbers", "another error"]
    rows = []
    for kind, run in report["counts"].items():
        for read, by_damage in run["outcomes"].items():
            total = sum((Counter(counts) for counts in by_damage.values()), Counter())
            rest = sum(total.values()) - sum(total[column] for column in columns)
            rows.append([f"{kind}, {read}", str(run["files"]), *(str(total[column]) for column in columns), str(rest)])
    return make_table(["", "files", *columns, "crash or hang"], rows)


def main() -> None:
    """Write the page."""
    killed, mutated = (
        json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8")) for name in ("kill", "mutate")
    )
    growth = max(run["largest_growth_mib"] for run in mutated["counts"].values())
    text = f"""\
SIGKILL at random moments of a run, on a tiny Llama in several files. The sources were unchanged every time, nothing
but hidden folders was left beside the target, and every run that was taken up (a random half of those that left
nothing) gave the same files. `save_pretrained` writes into the final folder, so it can leave a part; what it left
never loaded.

{kills(killed)}

{source(killed)}

Damaged files: bits flipped, bytes overwritten in the header, cut off, appended, taken out, and forged lengths and
headers. Each is read in a process of its own, with at most {mutated["memory_limit_mib"]} MiB more of address space and
{mutated["time_limit_seconds"]:.0f} s; the largest growth was {growth} MiB. "Clear error" is a `CheckpointError` that
names the file. Files of this package have checksums. In files of others a changed value is a value like any other, and
two tensors of one shape that change places are, too: these are the other numbers.

{mutations(mutated)}

{source(mutated)}"""
    write_text(PAGE, replace_between(PAGE.read_text(encoding="utf-8"), "faults", text))


if __name__ == "__main__":
    main()
