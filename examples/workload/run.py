"""Policies under load: how many answers come in time, and how good they are; an hour simulated, minutes live.

python examples/workload/run.py --data DATA --cache CACHE --output RESULTS.json --png PLOT.png

Each table, live run and simulated case is kept in the results as soon as it is there, and not made again: what was
interrupted goes on with the same command, and one with everything there only draws.

DATA holds `azure_llm_trace/{conv,code}.csv`, CACHE the weights (see real_models/weights.py, which puts them there).
The encoder is all-MiniLM-L6-v2 with the plugin in examples/plugins, its quality what real_models/measure.py found on
STS-B test. The causal model is SmolLM2-135M with its plugin, without a score of each ratio: a smaller one counts as
the better.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle, islice, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from arrivals import KINDS, Trace, lengths_of, make_items, read_trace
from bound import highest_attainment
from torch import nn
from transformers import PreTrainedTokenizerBase

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
LIVE_RUNS = (("k = 1", 0.5), ("slack-fit", 0.9), ("k = 1", 1.2), ("slack-fit", 1.2))
SEEDS = (0, 1)  # of the arrivals of each live run
RESERVE = 0.2  # share of the time to answer that slack-fit leaves: for what is around the model, and for bursts
OVERHEAD_MS = 1.0  # what everything around the model takes in the simulator, for each batch
WARM_CALLS = 3  # the first of a process are slow
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


def least_cost(table: LatencyTable, length: int) -> float:
    """Seconds of a text in the best batch of texts of its length, at the best ratio."""
    points = product(table.ratios, range(1, table.batch_sizes[-1] + 1))
    return min((table.latency(k, batch, length) + OVERHEAD_MS / 1000) / batch for k, batch in points)


def policies(table: LatencyTable, items: Sequence[QueueItem]) -> dict[str, Policy]:
    """What is compared, by name: each ratio in its best batches, and those that choose the ratio."""
    lengths = [item.length for item in items]
    best = {k: best_batch(table, lengths, k) for k in table.ratios}
    batch = max(best.values())
    reserve_ms = 1000 * RESERVE * (items[0].deadline - items[0].arrival)
    steps = {k: (2 << index) * batch for index, k in enumerate(k for k in table.ratios if k > 1)}
    return {f"k = {k}": FixedRatio(k, best[k]) for k in table.ratios} | {
        "threshold": QueueThreshold(steps, batch),
        "slack-fit": SlackFit(table, max_batch=batch, reserve_ms=reserve_ms),
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
    highest = highest_attainment(items, partial(least_cost, table))
    candidates = [(name, policy, table) for name, policy in policies(table, items).items()]
    if two_models is not None:
        named = policies(two_models, items)
        candidates.append(("smaller model", named[f"k = {SMALLER_RATIO}"], two_models))
        candidates.append(("switch to the smaller model", named["slack-fit"], two_models))
    rows = []
    for name, policy, own in candidates:
        result = simulate(policy, items, own, overhead_ms=OVERHEAD_MS)
        row: dict[str, Any] = {"arrivals": kind, "load": load, "policy": name, "attainment": result.attainment}
        row["highest_attainment"] = highest if own is table else None
        row |= {"throughput": result.throughput, "switches_per_minute": result.switches_per_minute}
        rows.append(json.loads(json.dumps(row | asdict(result))))  # as they are read again
    return rows


def live(
    subject: Subject,
    table: LatencyTable,
    lengths: Sequence[int],
    policy_name: str,
    *,
    load: float,
    seconds: float,
    seed: int = 0,
) -> tuple[dict[str, Any], list[BatchRecord]]:
    """The engine and the simulator on the same arrivals, and the batches that ran.

    Texts come when they come, however many wait. What batches took beside the table, and the pauses between them, the
    simulator draws from the batches of this very run.
    """
    items = make_items("poisson", load * capacity(table, lengths), seconds, lengths, subject.slo_ms, seed=seed)
    policy = policies(table, items)[policy_name]
    records: list[BatchRecord] = []
    engine = Engine(
        subject.model, subject.tokenizer, policy, slo_ms=subject.slo_ms, max_queue=10**6, on_batch=records.append
    )
    with engine:
        answers, lag = asyncio.run(replay(engine, items, subject))
    records = records[WARM_CALLS:]
    wrong = [(item.length, answer[0]) for item, answer in zip(items, answers, strict=True) if item.length != answer[0]]
    if wrong:
        raise ValueError(f"A text of {wrong[0][0]} tokens had {wrong[0][1]}: the tokenizer splits the word it is of.")
    recorded = RecordedLatencies(table, records)
    again = simulate(policy, items, table, latency=recorded)
    attainment = 1 - sum(late for *_, late in answers) / len(answers)
    ratios = [ratio for _, ratio, _ in answers]
    found = {
        "policy": policy_name,
        "load": load,
        "seed": seed,
        "seconds": seconds,
        "texts": len(items),
        "attainment": attainment,
        "simulated_attainment": again.attainment,
        "difference": abs(attainment - again.attainment),
        "quality": None if table.quality is None else sum(table.quality[k] for k in ratios) / len(ratios),
        "simulated_quality": again.quality,
        "texts_by_ratio": {k: ratios.count(k) for k in sorted(set(ratios))},
        "simulated_texts_by_ratio": again.texts_by_ratio,
        "batches": len(records),
        "simulated_batches": again.batches,
        "seconds_of_batches_to_table": sum(record.seconds for record in records)
        / sum(table.latency(record.ratio, record.size, record.length) for record in records),
        "pause_ms": 1000 * statistics.fmean(recorded.pauses) if recorded.pauses else None,
        "latest_arrival_ms": 1000 * lag,
    }
    return json.loads(json.dumps(found)), records  # with keys as they are read again


async def replay(
    engine: Engine, items: Sequence[QueueItem], subject: Subject
) -> tuple[list[tuple[int, int, bool]], float]:
    """Ask for the texts of a trace as they come; before them `WARM_CALLS` times for one, each a batch of its own.

    Returns:
        Tokens, ratio and lateness of each text, and the most seconds that one was asked for too late.
    """
    texts = {length: text_of(length, subject.tokenizer) for length in {item.length for item in items}}
    ask = engine.aprefill if subject.causal else engine.aembed

    async def answer(length: int) -> tuple[int, int, bool]:
        result = await ask([texts[length]])
        return result.lengths[0], result.ratios[0], result.late[0]  # and not the cache, which is large

    for item in islice(cycle(items), WARM_CALLS):
        await answer(item.length)
    started, lag, asked = time.monotonic(), 0.0, []
    for item in items:
        await asyncio.sleep(max(0.0, started + item.arrival - time.monotonic()))
        lag = max(lag, time.monotonic() - started - item.arrival)
        asked.append(asyncio.create_task(answer(item.length)))
    return list(await asyncio.gather(*asked)), lag


def text_of(length: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A text of so many tokens, special ones included."""
    return " ".join(["a"] * (length - tokenizer.num_special_tokens_to_add()))


def measure(
    subject: Subject,
    traces: Mapping[str, Trace],
    runs: Sequence[tuple[str, float]],
    live_seconds: float,
    *,
    results: dict[str, Any],
    keep: Callable[[], object],
    rounds: int = 7,
) -> None:
    """What takes a quiet machine: the latency tables of one model, and its live runs.

    The table is calibrated by a first live run, so that a load is a share of what the engine can do, and slack-fit
    knows what its batches take; that of the smaller model as the base's.

    Args:
        subject: the model.
        traces: recorded traces, of which the lengths are taken.
        runs: policy and load of each live run.
        live_seconds: how long texts come in each.
        results: what was measured of it before; what is missing is put there.
        keep: called after each measurement.
        rounds: timed samples of each point of the table.
    """
    if "tables" not in results:
        print(f"{subject.name}: measuring its latencies.", flush=True)
        results |= _tables(subject, rounds) | {"live": []}
        keep()
    table = _table(results["tables"]["table"])
    lengths = subject.drawn(traces["conv"])
    if "calibration" not in results and runs:
        print(f"{subject.name}: calibrating them.", flush=True)
        seed = SEEDS[-1] + 1
        pilot, records = live(subject, table, lengths, "slack-fit", load=0.9, seconds=live_seconds / 2, seed=seed)
        calibrated = table.calibrated(records)
        tables = {"table": calibrated}
        if "two_models" in results["tables"]:
            both = _table(results["tables"]["two_models"])
            factor = calibrated.seconds[1][0][0] / table.seconds[1][0][0]
            scaled = {k: tuple(tuple(factor * value for value in row) for row in both.seconds[k]) for k in both.ratios}
            tables["two_models"] = replace(both, seconds=scaled)
        results |= {
            "calibration": pilot,
            "tables": {name: json.loads(each.to_json()) for name, each in tables.items()},
        }
        table = calibrated
        keep()
    print(f"{subject.name}: the base answers {capacity(table, lengths):.1f} texts/s at most.", flush=True)
    done = {(each["policy"], each["load"], each["seed"]) for each in results["live"]}
    for policy, load, seed in ((*run, seed) for run in runs for seed in SEEDS):
        if (policy, load, seed) not in done:
            found, _ = live(subject, table, lengths, policy, load=load, seconds=live_seconds, seed=seed)
            results["live"].append(found)
            keep()
            in_time = " and ".join(f"{found[name]:.1%}" for name in ("attainment", "simulated_attainment"))
            print(f"{policy} at load {load}, live and simulated: {in_time} in time.", flush=True)


def _tables(subject: Subject, rounds: int) -> dict[str, Any]:
    profile = partial(profile_latency, batch_sizes=subject.batch_sizes, lengths=subject.lengths, rounds=rounds)
    table = profile(subject.model, subject.ratios, quality=subject.quality)
    tables = {"table": table}
    if subject.smaller is not None:
        smaller, quality = subject.smaller
        seconds = {1: table.seconds[1], SMALLER_RATIO: profile(smaller, (1,)).seconds[1]}
        both = None if table.quality is None else {1: table.quality[1], SMALLER_RATIO: quality}
        tables["two_models"] = LatencyTable((1, SMALLER_RATIO), table.batch_sizes, table.lengths, seconds, both)
    return {
        "model": subject.name,
        "slo_ms": subject.slo_ms,
        "share": subject.share,
        "interpolation_error": table.error,
        "tables": {name: json.loads(each.to_json()) for name, each in tables.items()},
    }


def _table(content: Mapping[str, Any]) -> LatencyTable:
    return LatencyTable.from_json(json.dumps(content))


def simulate_all(
    results: dict[str, Any],
    traces: Mapping[str, Trace],
    seconds: float,
    jobs: int,
    *,
    keep: Callable[[], object],
    loads: Sequence[float] = LOADS,
) -> None:
    """All kinds of arrivals, loads and policies, over what was measured of a model.

    Args:
        results: where the tables are; what was not simulated before is put there.
        traces: recorded traces.
        seconds: how long texts come.
        jobs: processes.
        keep: called after each kind of arrivals and load.
        loads: shares of the base's capacity.
    """
    tables = {name: _table(each) for name, each in results["tables"].items()}
    longest = tables["table"].lengths[-1]
    drawn = {kind: lengths_of(traces.get(kind, traces["conv"]), results["share"], 8, longest) for kind in KINDS}
    if results.get("simulated_seconds") != seconds:
        results |= {"simulated_seconds": seconds, "simulated": []}
    rows = results["simulated"]
    run = partial(_simulated, tables, drawn, traces, results["slo_ms"], seconds)
    there = {(row["arrivals"], row["load"]) for row in rows}
    missing = [case for case in product(KINDS, loads) if case not in there]
    with ExitStack() as stack:
        parts: Iterable[list[dict[str, Any]]] = map(run, missing)
        if jobs > 1 and missing:
            parts = stack.enter_context(ProcessPoolExecutor(jobs, get_context("spawn"))).map(run, missing)
        for (kind, load), part in zip(missing, parts, strict=True):
            rows += part
            keep()
            print(f"{results['model']}: {kind} at load {load} simulated.", flush=True)
    own = [row for row in rows if row["policy"] == "slack-fit"]
    results["capacity_texts_per_second"] = {kind: capacity(tables["table"], each) for kind, each in drawn.items()}
    results["decision_us"] = {name: max(row["decision_us"][name] for row in own) for name in ("median", "p99")}
    keep()


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
        "| arrivals | load | policy | in time | at most | quality | mean k | p99 ms | switches/min |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        quality = "" if row["quality"] is None else f"{row['quality']:.2f}"
        highest = "" if row["highest_attainment"] is None else f"{row['highest_attainment']:.1%}"
        mean = sum(int(k) * count for k, count in row["texts_by_ratio"].items()) / row["texts"]
        lines.append(
            f"| {row['arrivals']} | {row['load']} | {row['policy']} | {row['attainment']:.1%} | {highest} | "
            f"{quality} | "
            f"{'' if 'smaller' in row['policy'] else f'{mean:.1f}'} | "
            f"{row['latency_ms']['p99']:.0f} | {row['switches_per_minute']:.0f} |"
        )
    return lines


def live_lines(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Live runs beside their simulations, as Markdown."""
    lines = [
        "| policy | load | seed | texts | in time, live | simulated | quality, live | simulated |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in runs:
        quality = ["" if run[name] is None else f"{run[name]:.2f}" for name in ("quality", "simulated_quality")]
        lines.append(
            f"| {run['policy']} | {run['load']} | {run['seed']} | {run['texts']} | {run['attainment']:.1%} | "
            f"{run['simulated_attainment']:.1%} | {quality[0]} | {quality[1]} |"
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
    ratios = (1, 4, 8, 16, 32)
    quality = {k: spearman(f"plugin-{NAME}-k{k}" if k > 1 else f"base-{NAME}") for k in ratios}
    smaller = (load(SMALLER, cache).model, spearman(f"base-{SMALLER}"))
    model = load_plugin(loaded.model, str(plugin), is_trainable=False).eval()
    return Subject(
        NAME, model, loaded.tokenizer, ratios, (1, 4, 16, 32), (16, 64, 128, 256), 2, slo_ms, quality, smaller
    )


def causal(cache: Path, slo_ms: float) -> Subject:
    """SmolLM2-135M with its plugin."""
    from weights import load

    loaded = load(CAUSAL, cache)
    model = load_plugin(loaded.model, str(EXAMPLES / "plugins" / CAUSAL), is_trainable=False).eval()
    return Subject(CAUSAL, model, loaded.tokenizer, (1, 4, 8, 16), (1, 2), (64, 256), 4, slo_ms, causal=True)


def main() -> None:
    """Measure, run, simulate, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="of the weights; left out: nothing is measured, only simulated")
    parser.add_argument("--output", type=Path, required=True, help="results; what they have is not made again")
    parser.add_argument("--png", type=Path)
    parser.add_argument("--model", choices=["encoder", "causal"], action="append", help="left out: both")
    parser.add_argument("--slo-ms", type=float, default=1000.0, help="of the encoder; the causal model has six times")
    parser.add_argument("--seconds", type=float, default=3600.0, help="simulated seconds of each run; 0: none")
    parser.add_argument("--live-seconds", type=float, default=40.0, help="of each live run; there are ten")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--jobs", type=int, default=2, help="processes that simulate")
    arguments = parser.parse_args()
    traces = {kind: read_trace(arguments.data / "azure_llm_trace" / f"{kind}.csv") for kind in ("conv", "code")}
    results: dict[str, Any] = {}
    if arguments.output.exists():
        results = json.loads(arguments.output.read_text(encoding="utf-8"))
    names = arguments.model or ["encoder", "causal"]

    def keep() -> None:
        write_text(arguments.output, json.dumps(results, indent=1) + "\n")

    if arguments.cache is not None:
        sys.path.insert(0, str(EXAMPLES / "real_models"))
        results |= {"command": shlex.join(sys.argv), "overhead_ms": OVERHEAD_MS, "reserve": RESERVE}
        makers = {"encoder": (encoder, 1, LIVE_RUNS), "causal": (causal, 6, LIVE_RUNS[1:2])}
        with num_threads(arguments.threads):
            results["environment"] = describe_environment(torch.device("cpu"))
            for name in names:
                make, factor, runs = makers[name]
                subject = make(arguments.cache, factor * arguments.slo_ms)
                found = results.setdefault(name, {})
                if found.get("slo_ms", subject.slo_ms) != subject.slo_ms:
                    parser.error(f"{arguments.output} was measured with {found['slo_ms']} ms; name another --output.")
                measure(subject, traces, runs, arguments.live_seconds, results=found, keep=keep)
    elif not all("tables" in results.get(name, {}) for name in names):
        parser.error(f"{arguments.output} has no latencies of {' and '.join(names)}: name --cache to measure them.")
    if arguments.seconds:
        results["simulating_command"] = shlex.join(sys.argv)
        for name in names:
            simulate_all(results[name], traces, arguments.seconds, arguments.jobs, keep=keep)
    for name in names:
        own = results[name]
        print("\n".join(["", own["model"], "", *live_lines(own["live"])]))
        if "simulated" in own:
            print("\n".join(["", *table_lines(own["simulated"])]))
    if arguments.png and "simulated" in results.get("encoder", {}):
        plot(results["encoder"]["simulated"], arguments.png)


if __name__ == "__main__":
    main()
