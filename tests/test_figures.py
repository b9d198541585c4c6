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


def peers_of(model: str) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Times as fast as the base, by shape and contender, and the points of STS-B that each loses."""
    results = EXAMPLES / "peers" / "results"
    speeds = [
        {name: spread["median"] for name, spread in row["speedup"].items()}
        for row in record(results / f"speed-{model}.json")["rows"]
    ]
    found = record(results / f"quality-{model}.json")["contenders"]
    measured = {name: entry["parts"] for name, entry in found.items() if "parts" in entry}
    points = {name: parts["stsb"]["spearman"] for name, parts in measured.items() if "stsb" in parts}
    return speeds, {name: points["base"] - each for name, each in points.items()}


def test_the_plugin_in_int8(readme: str) -> None:
    (large, small), lost = peers_of("all-MiniLM-L6-v2")
    both, attention = "int8 + plugin, k = 32", "int8 attention + plugin, k = 32"
    told = f"in int8 with its plugin: {large[both]:.1f} times as fast for {lost[both]:.1f} points of STS-B, or "
    told += f"{large[attention]:.1f} times for none with its attention alone in int8, where int8 alone is "
    assert f"{told}{large['int8']:.1f} times as fast and loses {lost['int8']:.1f};" in readme
    assert abs(lost[attention]) < 0.05
    assert ("Batches of 8 gain little over either, or nothing" in readme) == (small[both] < 1.1 * small["int8"])


def test_the_larger_encoder_in_int8(readme: str) -> None:
    (large, _), lost = peers_of("all-mpnet-base-v2")
    both = "int8 + plugin, k = 32"
    told = f"all-mpnet-base-v2 in int8 with its plugin: {large[both]:.1f} times as fast for {lost[both]:.1f} points, "
    assert f"{told}where int8 alone is {large['int8']:.1f} times as fast and loses {lost['int8']:.1f}." in readme


def test_the_plugins_in_bfloat16(readme: str) -> None:
    told = []
    for model in ("all-MiniLM-L6-v2", "all-mpnet-base-v2"):
        (large, _), lost = peers_of(model)
        told += [large["bf16 + plugin, k = 32"], large["bf16"]]
        assert large["plugin, k = 32"] < large["bf16"] < large["bf16 + plugin, k = 32"]
        assert lost["bf16 + plugin, k = 32"] == pytest.approx(lost["plugin, k = 32"], abs=0.05)
    first, alone, second, its = (f"{each:.1f}" for each in told)
    assert (
        f"the first is {first} times as fast with its plugin and {alone} without, the second {second} and {its}"
        in readme
    )
    assert f"that alone made all-MiniLM-L6-v2 {alone} times as fast" in readme


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
