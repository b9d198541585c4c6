"""What matters in training a plugin for all-MiniLM-L6-v2: one thing changed at a time, and quality over the steps.

python examples/real_models/ablations.py --data DATA --cache CACHE
python examples/real_models/ablations.py --render

One JSON a run below results/ablations; runs that are done are skipped. `--float32` trains what is missing in float32,
for processors that do not multiply in bfloat16, and the main run beside it. Spearman's correlation is that of STS-B's
development set, since what is found here goes into recipes whose plugins are tested on the test set.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peers import with_plugin
from recipes import Recipe
from text_quality import similarity
from train import train
from transformers.utils import logging
from weights import load

from peft_variator.files import replacing, write_text
from peft_variator.markdown import make_table, replace_between
from peft_variator.profiling import describe_environment, share_weights


__all__ = ["RUNS", "Run", "draw_steps", "make_tables", "run"]

MODEL = "all-MiniLM-L6-v2"
RESULTS = Path(__file__).parent / "results" / "ablations"
PAGE = Path(__file__).parents[2] / "docs" / "training.md"
PICTURE = "minilm-steps.png"
MAIN = "main"
STEPS = 100
START = Recipe(
    steps=STEPS,
    batch_size=32,
    learning_rate=2e-3,
    ratios=(8, 16),
    bf16=True,
    losses={"train_sampling_strategy": "group_by_length"},
    plugin={"decompression": "neurons", "correction_dim": 384, "compression_ratio": 8, "compensation_rank": 16},
)


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        name: what is other than in the main run.
        seed: of text, order and ratios.
        fields: of the recipe.
        losses: fields of `DistillationConfig`.
        plugin: fields of `VariatorConfig`.
    """

    name: str = MAIN
    seed: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)
    losses: Mapping[str, Any] = field(default_factory=dict)
    plugin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """How the plugin is trained."""
        losses, plugin = START.losses | self.losses, START.plugin | self.plugin
        return replace(START, losses=losses, plugin=plugin, **self.fields)

    @property
    def file(self) -> str:
        """Name of its JSON."""
        words = "".join(letter if letter.isalnum() else "-" for letter in self.name)
        precision = "" if self.recipe.bf16 else "-float32"
        return f"{words}-{self.recipe.steps}-steps{precision}-seed{self.seed}.json"

    def in_float32(self) -> Run:
        """The same without bfloat16."""
        return replace(self, fields={**self.fields, "bf16": False})


RUNS = (
    Run(),
    Run("copies that are not fitted before", losses={"fit_samples": 0}),
    Run("embeddings beside hidden states", losses={"embedding_weight": 1.0}),
    Run("low-rank copies, rank 32", plugin={"correction_rank": 32}),
    Run(fields={"steps": 25}),
    Run(fields={"steps": 200}),
    Run("no compensation", plugin={"compensation_rank": None}),
    Run("every other text a single sentence", fields={"sentences": 0.5}),
    Run("last hidden states alone", losses={"hidden_loss": "last"}),
    Run("learning rate 1e-3", fields={"learning_rate": 1e-3}),
    Run("learning rate 4e-3", fields={"learning_rate": 4e-3}),
    Run("one token in eight kept out", plugin={"keep_outliers": 0.125}),
    Run(fields={"steps": 50}),
    Run(seed=1),
    Run(seed=2),
    Run("embeddings alone", losses={"hidden_weight": 0.0, "embedding_weight": 1.0}),
    Run("k = 16 alone", fields={"ratios": (16,)}),
    Run(fields={"steps": 400}),
)
"""All of them, in the order in which they are run."""


def run(chosen: Run, data: Path, cache: Path, work: Path) -> dict[str, Any]:
    """Train a plugin and measure it at every ratio, and the base.

    Args:
        chosen: the run.
        data: the data folder.
        cache: folder that weights.py filled.
        work: folder for checkpoints; a run that was stopped goes on from them.
    """
    start = time.perf_counter()
    output = work / Path(chosen.file).stem
    figures = train(MODEL, load(MODEL, cache), data, output, chosen.recipe, chosen.seed, "cpu")
    seconds = time.perf_counter() - start
    base = load(MODEL, cache)
    rows = {1: similarity(base.model, base.tokenizer, data, None, split="dev")["spearman"]}
    for ratio in chosen.recipe.ratios:
        model = with_plugin(share_weights(base.model), output / "plugin", ratio)
        rows[ratio] = similarity(model, base.tokenizer, data, None, split="dev")["spearman"]
    return {
        "name": chosen.name,
        "seed": chosen.seed,
        "recipe": asdict(chosen.recipe),
        "spearman": rows,
        "seconds": round(seconds, 1),
        **figures,
        "command": "python examples/real_models/ablations.py --data DATA --cache CACHE"
        + ("" if chosen.recipe.bf16 else " --float32"),
        "environment": describe_environment(torch.device("cpu")),
    }


def _lost(record: Mapping[str, Any]) -> dict[int, float]:
    """Points that a plugin loses, by ratio."""
    base = record["spearman"]["1"]
    return {int(ratio): base - score for ratio, score in record["spearman"].items() if ratio != "1"}


def make_tables(records: list[dict[str, Any]]) -> str:
    """Two tables: points lost by what was changed, and by steps."""
    ratios = START.ratios
    changed: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["recipe"]["steps"] == STEPS:
            changed.setdefault(record["name"] + _precision(record), []).append(record)
    rows = []
    for name, runs in changed.items():
        losses = [_lost(record) for record in runs]
        cells = []
        for ratio in ratios:
            values = [each[ratio] for each in losses if ratio in each]
            spread = f" ± {statistics.stdev(values):.2f} ({len(values)} seeds)" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.2f}{spread}" if values else "–")
        rows.append([name, *cells, f"{runs[0]['parameters']['plugin']:,}"])
    parts = [make_table(["changed", *(f"lost at k = {ratio}" for ratio in ratios), "trained parameters"], rows)]
    by_steps = _by_steps(records)
    if len(by_steps) > 1:
        lost = [
            [f"{record['recipe']['steps']}{_precision(record)}", *(f"{_lost(record)[ratio]:.2f}" for ratio in ratios)]
            for record in by_steps
        ]
        parts += [
            make_table(["steps", *(f"lost at k = {ratio}" for ratio in ratios)], lost),
            f"![Points lost over the steps of training](images/{PICTURE})",
        ]
    processors = dict.fromkeys(
        f"{facts['cpu']}{_precision(record)}, PyTorch {facts['torch']}"
        for record in records
        for facts in (record["environment"],)
    )
    parts.append(
        f"STS-B's development set, Spearman × 100, base {records[0]['spearman']['1']:.2f}; {STEPS} steps of "
        f"{START.batch_size} texts where no others are named, in bfloat16 where float32 is not. "
        f"{'; '.join(processors)}."
    )
    return "\n\n".join(parts)


def _precision(record: Mapping[str, Any]) -> str:
    """What a run's name is followed by."""
    return "" if record["recipe"]["bf16"] else ", in float32"


def _by_steps(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs of the main recipe's first seed; one in float32 where there is none in bfloat16."""
    main = [record for record in records if record["name"] == MAIN and record["seed"] == 0]
    found = {record["recipe"]["steps"]: record for record in sorted(main, key=lambda each: each["recipe"]["bf16"])}
    return [found[steps] for steps in sorted(found)]


def draw_steps(records: list[dict[str, Any]], file: Path) -> None:
    """Points lost over the steps of training, whose axis is logarithmic."""
    from matplotlib.figure import Figure

    by_steps = _by_steps(records)
    steps = [record["recipe"]["steps"] for record in by_steps]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for ratio in START.ratios:
        axes.plot(steps, [_lost(record)[ratio] for record in by_steps], marker="o", label=f"k = {ratio}")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xticks(steps, [str(each) for each in steps])
    axes.set(
        xlabel=f"steps of {START.batch_size} texts", ylabel="points of Spearman's correlation lost (less is better)"
    )
    axes.set_title(
        f"A plugin of {START.plugin['correction_dim']} neurons for {MODEL}\n(STS-B's development set, one seed)"
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def main() -> None:
    """Run what is not there yet, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with a folder a data set")
    parser.add_argument("--cache", type=Path, help="folder that weights.py filled")
    parser.add_argument("--work", type=Path, default=Path("outputs/ablations"), help="where checkpoints are kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON files go")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--float32", action="store_true", help="train what is missing, and the main run, in float32")
    parser.add_argument("--render", action="store_true", help="write tables and plot into the page, and do no more")
    arguments = parser.parse_args()
    if arguments.render:
        records = [
            json.loads(file.read_text())
            for each in RUNS
            for file in (arguments.results / each.file, arguments.results / each.in_float32().file)
            if file.is_file()
        ]
        if not records:
            parser.error(f"{arguments.results} holds no runs: nothing to render.")
        write_text(PAGE, replace_between(PAGE.read_text(), "ablations", make_tables(records)))
        draw_steps(records, PAGE.parent / "images" / PICTURE)
        print(f"{PAGE}: {len(records)} runs")
        return
    if arguments.data is None or arguments.cache is None:
        parser.error("--data and --cache are needed, or --render.")
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    runs = list(RUNS)
    if arguments.float32:
        missing = [each for each in RUNS if each == Run() or not (arguments.results / each.file).is_file()]
        runs = [each.in_float32() for each in missing]
    for number, chosen in enumerate(runs, 1):
        file = arguments.results / chosen.file
        if not file.is_file():
            record = run(chosen, arguments.data, arguments.cache, arguments.work)
            write_text(file, json.dumps(record, indent=2) + "\n")
            lost = ", ".join(
                f"k = {ratio}: {value:.2f}" for ratio, value in _lost(json.loads(file.read_text())).items()
            )
            print(f"{number}/{len(runs)} {file.name}: points lost: {lost} ({record['seconds']:.0f} s)", flush=True)
    print("Next: python examples/real_models/ablations.py --render")


if __name__ == "__main__":
    main()
