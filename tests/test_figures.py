"""Figures of the README's first screen, and of the site's home, are those of the records they are taken from.

Of the benchmarks these are the rows of the pages that render.py makes of the JSON.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest


ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def record(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def words_of(page: str) -> str:
    return " ".join((ROOT / page).read_text(encoding="utf-8").split())


@pytest.fixture(scope="module")
def readme() -> str:
    return words_of("README.md")


def test_the_quickstart(readme: str) -> None:
    rows = {row["name"]: row for row in record(EXAMPLES / "quickstart" / "results.json")["rows"]}
    quality = rows["k = 16"]["quality"]
    assert f"a cosine of {quality['cosine']:.2f} to the base's" in readme
    assert ("three of four keep their nearest neighbour" in readme) == (round(4 * quality["agreement"], 1) == 3.0)


def test_real_tasks(readme: str) -> None:
    def lost(variant: str) -> float:
        files = (EXAMPLES / "glue" / "results").glob(f"*-{variant}-seed0.json")
        scores = [
            {row["ratio"]: row["score"] for row in record(file)["rows"]} for file in files if "squad" not in file.name
        ]
        assert len(scores) == 6
        return statistics.mean(row[1] - row[4] for row in scores)

    told = f"without its labels, {lost('neurons'):.1f} points at k = 4 on average over six tasks, where the paper's"
    assert f"{told} bottleneck loses {lost('no-task-loss'):.1f}" in readme


def rows_of(page: str, *first: str) -> list[list[str]]:
    """Cells of the rows of a page's tables that begin with these."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (ROOT / page).read_text("utf-8").splitlines()]
    return [row for row in rows if row[: len(first)] == [*first]]


def test_the_plugin_in_int8(readme: str) -> None:
    results, both = EXAMPLES / "peers" / "results", "int8 + plugin, k = 32"
    large, small = (row["speedup"] for row in record(results / "speed-all-MiniLM-L6-v2.json")["rows"][:2])
    told = f"{large[both]['median']:.1f} times, where int8 alone is {large['int8']['median']:.1f}"
    assert told in readme
    gain = small[both]["median"] / small["int8"]["median"]
    assert ("batches of 8 gain nothing over int8" in readme) == (gain < 1.02)
    quality = record(results / "quality-all-MiniLM-L6-v2.json")["contenders"]
    lost = quality["int8"]["parts"]["stsb"]["spearman"] - quality[both]["parts"]["stsb"]["spearman"]
    assert f"for another {lost:.1f} points of STS-B" in readme


def test_the_plugin_in_bfloat16(readme: str) -> None:
    results = EXAMPLES / "peers" / "results"
    speeds = record(results / "speed-all-MiniLM-L6-v2.json")["rows"][0]["speedup"]
    found = record(results / "quality-all-MiniLM-L6-v2.json")["contenders"]
    alone, both, plugin = (speeds[name]["median"] for name in ("bf16", "bf16 + plugin, k = 32", "plugin, k = 32"))
    assert f"in bfloat16: {both:.1f} times, where bfloat16 alone is {alone:.1f}, for the same loss" in readme
    assert plugin < alone < both
    names = ("bf16 + plugin, k = 32", "plugin, k = 32")
    of_bf16, of_float32 = (found[name]["parts"]["stsb"]["spearman"] for name in names)
    assert of_bf16 == pytest.approx(of_float32, abs=0.05)


def test_the_larger_encoder_in_bfloat16(readme: str) -> None:
    results = EXAMPLES / "peers" / "results"
    speeds = record(results / "speed-all-mpnet-base-v2.json")["rows"][0]["speedup"]
    both, alone = (speeds[name]["median"] for name in ("bf16 + plugin, k = 32", "bf16"))
    assert f"in bfloat16: {both:.1f} times with its plugin, where bfloat16 alone is {alone:.1f}" in readme
    found = record(results / "quality-all-mpnet-base-v2.json")["contenders"]
    alone, both = (found[name]["parts"]["stsb"]["spearman"] for name in ("int8", "int8 + plugin, k = 32"))
    assert alone - both > 10


def test_the_benchmark(readme: str) -> None:
    page = "docs/benchmark.md"
    bert = rows_of(page, "bert-base", "8×128", "4")[0][5]
    prompt = rows_of(page, "qwen2.5-0.5b", "1×2048", "4")[0][5]
    models = ("bert-base", "minilm-l6", "qwen2.5-0.5b", "t5-base-encoder", "vit-base")
    rows = [row for model in models for row in rows_of(page, model) if row[2] == "4" and len(row) == 12]
    # Rows of padded batches have more cells.
    shares = [float(row[6]) for row in rows if re.fullmatch(r"\d\.\d\d", row[6])]
    assert len(shares) == 7
    speeds = [f"{float(cell.partition('×')[0]):.1f} times" for cell in (bert, prompt)]
    assert f"BERT-base {speeds[0]} as fast, a prompt of 2048 tokens" in readme
    assert f"Qwen2.5-0.5B's shape {speeds[1]}: {min(shares):.2f} to {max(shares):.2f} of what" in readme


def test_what_plugins_weigh(readme: str) -> None:
    sizes = [path.stat().st_size / 1e6 for path in (EXAMPLES / "plugins").glob("*/adapter_model.safetensors")]
    assert f"those that are shipped: {min(sizes):.1f} to {max(sizes):.1f} MB" in readme


def test_the_pruned_vision_language_model(readme: str) -> None:
    results = EXAMPLES / "vlm_restore" / "results"
    runs = [record(path) for path in results.glob("study-wanda*.json")]
    runs = [run for run in runs if run["amounts"] == {"vision": "2:4", "language": "2:4"}]

    def accuracy(restoration: str) -> float:
        return statistics.fmean(100 * run["accuracy"] for run in runs if run["restoration"] == restoration)

    base = 100 * record(results / "base.json")["accuracy"]
    claim = f"pruned 2:4 from {base:.1f} % to {accuracy('none'):.1f} %, is back at {accuracy('sparse-lora'):.1f} %"
    assert claim in readme


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_what_bfloat16_gives(page: str) -> None:
    rows = record(EXAMPLES / "peers" / "results" / "speed-all-MiniLM-L6-v2.json")["rows"]
    (speedup,) = [row["speedup"]["bf16"]["median"] for row in rows if (row["batch"], row["length"]) == (32, 128)]
    assert f"made all-MiniLM-L6-v2 {speedup:.1f} times as fast and lost nothing" in words_of(page)


def test_packed_bases(readme: str) -> None:
    (_, llama) = rows_of("docs/packed_bases.md", "packed bfloat16")[:2]
    memory, prompt, token = (cell.rpartition(", ")[2].rstrip("×") for cell in llama[5:8])
    assert f"{memory} of the memory of a dense Llama-3.2-1B shape" in readme
    assert f"a token in {token} of its time, a prompt of 256 tokens in {prompt} times as much" in readme
