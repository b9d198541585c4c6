"""Policies under load: how many answers come in time, and how good they are; an hour simulated, minutes live.

python examples/workload/run.py --data DATA --cache CACHE --output RESULTS.json --png PLOT.png

DATA holds `azure_llm_trace/{conv,code}.csv`, CACHE the weights (see real_models/weights.py, which puts them there).
The encoder is all-MiniLM-L6-v2 with the plugin in examples/plugins, its quality what real_models/measure.py found on
STS-B test. The causal model is SmolLM2-135M, whose plugin is not trained: its latencies count, it has no quality, and
a smaller ratio counts as the better.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from arrivals import KINDS, Trace, lengths_of, make_items, read_trace
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase

from peft_variator import VariatorConfig
from peft_variator.files import replacing, write_text
from peft_variator.profiling import describe_environment, num_threads
from peft_variator.runtime import (
    BatchRecord,
    Engine,
    FixedRatio,
    LatencyTable,
    Oracle,
    Policy,
    QueueItem,
    QueueThreshold,
    RecordedLatencies,
    SlackFit,
    profile_latency,
    simulate,
)
from peft_variator.training import load_plugin


EXAMPLES = Path(__file__).resolve().parent.parent
NAME, SMALLER, CAUSAL = "all-MiniLM-L6-v2", "paraphrase-MiniLM-L3", "SmolLM2-135M-Instruct"
LOADS = (0.5, 0.9, 1.2, 1.5)
LIVE_RUNS = (("slack-fit", 0.9), ("slack-fit", 1.2), ("k = 1", 1.2))
RESERVE_MS = 2.0  # what slack-fit leaves for everything around the model
OVERHEAD_MS = 1.0  # what everything around the model takes in the simulator, for each batch
MOST_WAITING = 1000  # calls under way at once in a live run
SMALLER_RATIO = 2  # how the smaller model is called in the table of the two models


@dataclass(frozen=True)
class Subject:
    """A model under load.

    Args:
        name: what it is called.
        model: with its plugin.
        tokenizer: its tokenizer.
        ratios: compression ratios to choose from.
        batch_sizes: of the latency table.
        lengths: of the latency table, in tokens.
        share: a text has 1/`share` of the tokens of a context in the traces.
        slo_ms: milliseconds until an answer is due.
        quality: of each ratio; `None`: not measured.
        smaller: a smaller model to switch to, and its quality; `None`: there is none.
        causal: whether it is asked for a prefill, rather than for embeddings.
    """

    name: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    ratios: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    lengths: tuple[int, ...]
    share: int
    slo_ms: float
    quality: Mapping[int, float] | None = None
    smaller: tuple[nn.Module, float] | None = None
    causal: bool = False

    def drawn(self, trace: Trace) -> list[int]:
        """Tokens of the texts of a trace."""
        return lengths_of(trace, self.share, 8, self.lengths[-1])


def throughput(table: LatencyTable, lengths: Sequence[int], ratio: int, batch: int) -> float:
    """Texts a second that a ratio answers at most, in batches of this size, of lengths as they come."""
    sample = random.Random(0).choices(lengths, k=2000)
    batches = [sample[start : start + batch] for start in range(0, len(sample), batch)]
    seconds = (table.latency(ratio, len(each), max(each)) + OVERHEAD_MS / 1000 for each in batches)
    return len(sample) / sum(seconds)


def best_batch(table: LatencyTable, lengths: Sequence[int], ratio: int = 1) -> int:
    """The batch at which a ratio answers most texts a second: padding may eat what a larger one gains."""
    return max(table.batch_sizes, key=lambda batch: throughput(table, lengths, ratio, batch))


def capacity(table: LatencyTable, lengths: Sequence[int]) -> float:
    """Texts a second that the base answers at most."""
    return throughput(table, lengths, 1, best_batch(table, lengths))


def policies(table: LatencyTable, items: Sequence[QueueItem]) -> dict[str, Policy]:
    """What is compared, by name: each ratio in its best batches, and those that choose the ratio."""
    lengths = [item.length for item in items]
    best = {k: best_batch(table, lengths, k) for k in table.ratios}
    batch = max(best.values())
    steps = {k: (2 << index) * batch for index, k in enumerate(k for k in table.ratios if k > 1)}
    return {f"k = {k}": FixedRatio(k, best[k]) for k in table.ratios} | {
        "threshold": QueueThreshold(steps, batch),
        "slack-fit": SlackFit(table, max_batch=batch, reserve_ms=RESERVE_MS),
        "oracle": Oracle(table, items, batch),
    }


def simulated(
    table: LatencyTable,
    two_models: LatencyTable | None,
    kind: str,
    load: float,
    lengths: Sequence[int],
    trace: Trace,
    *,
    slo_ms: float,
    seconds: float,
) -> list[dict[str, Any]]:
    """One row for each policy.

    Args:
        table: latencies and quality of the model and its plugin.
        two_models: those of the model, at 1, and of a smaller one, at `SMALLER_RATIO`.
        kind: of the arrivals.
        load: share of the base's capacity.
        lengths: tokens of the texts of the trace, or to draw from.
        trace: the trace, where the kind is one.
        slo_ms: milliseconds until an answer is due.
        seconds: how long texts come.
    """
    items = make_items(kind, load * capacity(table, lengths), seconds, lengths, slo_ms, trace)
    candidates = [(name, policy, table) for name, policy in policies(table, items).items()]
    if two_models is not None:
        named = policies(two_models, items)
        candidates.append(("smaller model", named[f"k = {SMALLER_RATIO}"], two_models))
        candidates.append(("switch to the smaller model", named["slack-fit"], two_models))
    rows = []
    for name, policy, own in candidates:
        result = simulate(policy, items, own, overhead_ms=OVERHEAD_MS)
        row: dict[str, Any] = {"arrivals": kind, "load": load, "policy": name, "attainment": result.attainment}
        row |= {"throughput": result.throughput, "switches_per_minute": result.switches_per_minute}
        rows.append(row | asdict(result))
    return rows


def live(
    subject: Subject, table: LatencyTable, lengths: Sequence[int], policy_name: str, *, load: float, seconds: float
) -> dict[str, Any]:
    """The engine and the simulator on the same arrivals.

    What batches took beside the table, the simulator draws from the batches of this very run.
    """
    items = make_items("poisson", load * capacity(table, lengths), seconds, lengths, subject.slo_ms)
    policy = policies(table, items)[policy_name]
    texts = {length: text_of(length, subject.tokenizer) for length in {item.length for item in items}}
    records: list[BatchRecord] = []
    engine = Engine(
        subject.model, subject.tokenizer, policy, slo_ms=subject.slo_ms, max_queue=10**6, on_batch=records.append
    )

    def ask(text: str) -> tuple[int, int, bool]:
        result = engine.prefill([text]) if subject.causal else engine.embed([text])
        return result.lengths[0], result.ratios[0], result.late[0]  # and not the cache, which is large

    with engine, ThreadPoolExecutor(MOST_WAITING) as pool:
        for text in list(texts.values())[:3]:
            ask(text)  # the first calls of a process are slow
        warm = len(records)
        started = time.monotonic()
        calls = []
        for item in items:
            time.sleep(max(0.0, started + item.arrival - time.monotonic()))
            calls.append(pool.submit(ask, texts[item.length]))
        answers = [call.result() for call in calls]
    records = records[warm:]
    wrong = [(item.length, answer[0]) for item, answer in zip(items, answers, strict=True) if item.length != answer[0]]
    if wrong:
        raise ValueError(f"A text of {wrong[0][0]} tokens had {wrong[0][1]}: the tokenizer splits the word it is of.")
    again = simulate(policy, items, table, latency=RecordedLatencies(table, records), overhead_ms=OVERHEAD_MS)
    attainment = 1 - sum(late for *_, late in answers) / len(answers)
    ratios = [ratio for _, ratio, _ in answers]
    return {
        "policy": policy_name,
        "load": load,
        "seconds": seconds,
        "texts": len(items),
        "attainment": attainment,
        "simulated_attainment": again.attainment,
        "difference": abs(attainment - again.attainment),
        "quality": None if table.quality is None else sum(table.quality[k] for k in ratios) / len(ratios),
        "simulated_quality": again.quality,
        "texts_by_ratio": {k: ratios.count(k) for k in sorted(set(ratios))},
        "simulated_texts_by_ratio": again.texts_by_ratio,
        "seconds_of_batches_to_table": sum(record.seconds for record in records)
        / sum(table.latency(record.ratio, record.size, record.length) for record in records),
    }


def text_of(length: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A text of so many tokens, special ones included."""
    return " ".join(["a"] * (length - tokenizer.num_special_tokens_to_add()))


def measure(
    subject: Subject,
    traces: Mapping[str, Trace],
    live_runs: Sequence[tuple[str, float]],
    live_seconds: float,
    rounds: int = 3,
) -> dict[str, Any]:
    """What takes a quiet machine: the latency tables of one model, and its live runs."""
    profile = partial(
        profile_latency, batch_sizes=subject.batch_sizes, lengths=subject.lengths, rounds=rounds, min_seconds=0.02
    )
    table = profile(subject.model, subject.ratios, quality=subject.quality)
    tables = {"table": table}
    if subject.smaller is not None:
        smaller, quality = subject.smaller
        seconds = {1: table.seconds[1], SMALLER_RATIO: profile(smaller, (1,)).seconds[1]}
        both = None if table.quality is None else {1: table.quality[1], SMALLER_RATIO: quality}
        tables["two_models"] = LatencyTable((1, SMALLER_RATIO), table.batch_sizes, table.lengths, seconds, both)
    lengths = subject.drawn(traces["conv"])
    print(f"{subject.name}: the base answers {capacity(table, lengths):.1f} texts/s at most.", flush=True)
    runs = []
    for policy, load in live_runs:
        runs.append(live(subject, table, lengths, policy, load=load, seconds=live_seconds))
        in_time = " and ".join(f"{runs[-1][name]:.1%}" for name in ("attainment", "simulated_attainment"))
        print(f"{policy} at load {load}, live and simulated: {in_time} in time.", flush=True)
    return {
        "model": subject.name,
        "slo_ms": subject.slo_ms,
        "share": subject.share,
        "interpolation_error": table.error,
        "live": runs,
        "tables": {name: json.loads(each.to_json()) for name, each in tables.items()},
    }


def simulate_all(
    measured: Mapping[str, Any], traces: Mapping[str, Trace], seconds: float, jobs: int, loads: Sequence[float] = LOADS
) -> dict[str, Any]:
    """All kinds of arrivals, loads and policies, over what was measured."""
    tables = {name: LatencyTable.from_json(json.dumps(each)) for name, each in measured["tables"].items()}
    longest = tables["table"].lengths[-1]
    drawn = {kind: lengths_of(traces.get(kind, traces["conv"]), measured["share"], 8, longest) for kind in KINDS}
    run = partial(_simulated, tables, drawn, traces, measured["slo_ms"], seconds)
    cases = [(kind, load) for kind in KINDS for load in loads]
    if jobs == 1:
        parts = list(map(run, cases))
    else:
        with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
            parts = list(pool.map(run, cases))
    rows = [row for part in parts for row in part]
    own = [row for row in rows if row["policy"] == "slack-fit"]
    return {
        "capacity_texts_per_second": {kind: capacity(tables["table"], lengths) for kind, lengths in drawn.items()},
        "decision_us": {name: max(row["decision_us"][name] for row in own) for name in ("median", "p99")},
        "simulated_seconds": seconds,
        "simulated": rows,
    }


def _simulated(
    tables: Mapping[str, LatencyTable],
    drawn: Mapping[str, Sequence[int]],
    traces: Mapping[str, Trace],
    slo_ms: float,
    seconds: float,
    case: tuple[str, float],
) -> list[dict[str, Any]]:
    kind, load = case
    return simulated(
        tables["table"],
        tables.get("two_models"),
        kind,
        load,
        drawn[kind],
        traces.get(kind, ()),
        slo_ms=slo_ms,
        seconds=seconds,
    )


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Attainment against mean quality: a row of panels for each kind of arrivals, a marker for each policy."""
    from matplotlib.figure import Figure

    kinds, loads = (list(dict.fromkeys(row[name] for row in rows)) for name in ("arrivals", "load"))
    names = list(dict.fromkeys(row["policy"] for row in rows))
    figure = Figure(figsize=(3 * len(loads), 2.4 * len(kinds) + 0.8), layout="constrained")
    panels = figure.subplots(len(kinds), len(loads), sharex=True, sharey=True, squeeze=False)
    for row in rows:
        axes, index = panels[kinds.index(row["arrivals"])][loads.index(row["load"])], names.index(row["policy"])
        axes.plot(
            100 * row["attainment"],
            row["quality"],
            "osD^vP*Xh<"[index % 10],
            color=f"C{index % 10}",
            label=row["policy"],
            linestyle="none",
            alpha=0.8,
        )
    for axes, load in zip(panels[0], loads, strict=True):
        axes.set_title(f"load {load} of the base's capacity", fontsize=9)
    for line, kind in zip(panels, kinds, strict=True):
        line[0].set_ylabel(f"{kind}\nmean quality (up is better)", fontsize=8)
    for axes in panels[-1]:
        axes.set_xlabel("answers in time, % (right is better)", fontsize=8)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(names), 5), frameon=False, fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def table_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows as Markdown."""
    lines = [
        "| arrivals | load | policy | in time | quality | mean k | p99 ms | switches/min |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        quality = "" if row["quality"] is None else f"{row['quality']:.2f}"
        mean = sum(k * count for k, count in row["texts_by_ratio"].items()) / row["texts"]
        lines.append(
            f"| {row['arrivals']} | {row['load']} | {row['policy']} | {row['attainment']:.1%} | {quality} | "
            f"{'' if 'smaller' in row['policy'] else f'{mean:.1f}'} | "
            f"{row['latency_ms']['p99']:.0f} | {row['switches_per_minute']:.0f} |"
        )
    return lines


def spearman(name: str) -> float:
    """What measure.py found on STS-B test, in percent."""
    results = json.loads((EXAMPLES / "real_models" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return float(results["parts"]["stsb"]["spearman"])


def encoder(cache: Path, slo_ms: float) -> Subject:
    """all-MiniLM-L6-v2 with its plugin, and the smaller model."""
    from weights import load

    loaded = load(NAME, cache)
    plugin = EXAMPLES / "plugins" / NAME
    ratios = (1, 4, 8, 16)
    quality = {k: spearman(f"plugin-{NAME}-k{k}" if k > 1 else f"base-{NAME}") for k in ratios}
    smaller = (load(SMALLER, cache).model, spearman(f"base-{SMALLER}"))
    model = load_plugin(loaded.model, str(plugin), is_trainable=False).eval()
    return Subject(NAME, model, loaded.tokenizer, ratios, (1, 4, 16), (16, 64, 128, 256), 2, slo_ms, quality, smaller)


def causal(cache: Path, slo_ms: float) -> Subject:
    """SmolLM2-135M with an untrained plugin."""
    from weights import load

    loaded = load(CAUSAL, cache)
    torch.manual_seed(0)
    model = get_peft_model(loaded.model, VariatorConfig()).eval()
    return Subject(CAUSAL, model, loaded.tokenizer, (1, 2, 4, 8), (1, 2), (64, 256), 4, slo_ms, causal=True)


def main() -> None:
    """Measure, run, simulate, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="needed unless --measured is given")
    parser.add_argument("--measured", type=Path, help="results of before: only simulate, with their tables")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--model", choices=["encoder", "causal"], action="append", help="left out: both")
    parser.add_argument("--slo-ms", type=float, default=500.0, help="of the encoder; the causal model has six times")
    parser.add_argument("--seconds", type=float, default=3600.0, help="simulated seconds of each run; 0: none")
    parser.add_argument("--live-seconds", type=float, default=30.0, help="of each live run; there are four")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--jobs", type=int, default=2, help="processes that simulate")
    arguments = parser.parse_args()
    traces = {kind: read_trace(arguments.data / "azure_llm_trace" / f"{kind}.csv") for kind in ("conv", "code")}
    names = arguments.model or ["encoder", "causal"]
    if arguments.measured:
        results: dict[str, Any] = json.loads(arguments.measured.read_text(encoding="utf-8"))
        names = [name for name in names if name in results]
    else:
        if arguments.cache is None:
            parser.error("name the folder of the weights with --cache")
        sys.path.insert(0, str(EXAMPLES / "real_models"))
        results = {"command": shlex.join(sys.argv), "overhead_ms": OVERHEAD_MS, "reserve_ms": RESERVE_MS}
        makers = {"encoder": (encoder, 1, LIVE_RUNS), "causal": (causal, 6, LIVE_RUNS[1:2])}
        with num_threads(arguments.threads):
            results["environment"] = describe_environment(torch.device("cpu"))
            for name in names:
                make, factor, runs = makers[name]
                subject = make(arguments.cache, factor * arguments.slo_ms)
                results[name] = measure(subject, traces, runs, arguments.live_seconds)
        write_text(arguments.output, json.dumps(results, indent=1) + "\n")
    if not arguments.seconds:
        return
    results["simulating_command"] = shlex.join(sys.argv)
    for name in names:
        results[name] |= simulate_all(results[name], traces, arguments.seconds, arguments.jobs)
        print("\n".join(["", results[name]["model"], "", *table_lines(results[name]["simulated"])]), flush=True)
    write_text(arguments.output, json.dumps(results, indent=1) + "\n")
    if arguments.png and "encoder" in names:
        plot(results["encoder"]["simulated"], arguments.png)


if __name__ == "__main__":
    main()
