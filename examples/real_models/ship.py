"""Make the folder of a plugin that is shipped: weights in half precision, and a card with what was measured.

python examples/real_models/ship.py --model all-MiniLM-L6-v2 --run RUN
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from weights import WEIGHTS

from peft_variator import VariatorConfig
from peft_variator.adapter_card import CardContent, make_card
from peft_variator.files import write_text
from peft_variator.markdown import make_table
from peft_variator.training.model_card import PLUGIN_TAGS


__all__ = ["card", "ship"]

RESULTS = Path(__file__).parent / "results"
PLUGINS = Path(__file__).parents[1] / "plugins"
QUIET = 0.1  # share of the processors that others may use without a word
# What a card shows of each part of a measurement: the figure's name, its title, digits.
FIGURES = {
    "stsb": ("spearman", "STS-B test, Spearman × 100", 2),
    "sst2": ("accuracy", "SST-2 probe, %", 2),
    "mrpc": ("accuracy", "MRPC probe, %", 2),
    "qqp": ("accuracy", "QQP probe, %", 2),
    "squad": ("first", "SQuAD retrieval, first hit %", 2),
    "cifar10": ("accuracy", "CIFAR-10 probe, %", 2),
    "photographs": ("cosine", "photographs, cosine", 4),
    "digits": ("word_error_rate", "spoken digits, word errors %", 2),
    "sentences": ("word_error_rate", "sentences, word errors %", 2),
}


def ship(name: str, run: Path, output: Path, results: Path = RESULTS) -> None:
    """Write the folder of a plugin: config, weights in float16, card.

    Args:
        name: a key of `WEIGHTS`.
        run: folder of the run that trained it.
        output: the folder; one that is there is replaced when all is written.
        results: folder of what was measured.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        made = Path(folder) / output.name
        made.mkdir()
        tensors = load_file(run / "plugin" / "adapter_model.safetensors")
        halves = {key: v.half() if v.is_floating_point() else v for key, v in tensors.items()}
        save_file(halves, made / "adapter_model.safetensors", metadata={"format": "pt"})
        config = VariatorConfig.from_pretrained(str(run / "plugin"))
        config.base_model_name_or_path = f"sentence-transformers/{name}" if WEIGHTS[name].kind == "text" else name
        config.save_pretrained(str(made))
        write_text(made / "README.md", card(name, json.loads((run / "run.json").read_text()), config, results))
        if output.exists():
            shutil.rmtree(output)
        made.rename(output)


def card(name: str, run: dict[str, Any], config: VariatorConfig, results: Path) -> str:
    """The card of a plugin.

    Args:
        name: a key of `WEIGHTS`.
        run: `run.json` of the run that trained it.
        config: its configuration.
        results: folder of what was measured.
    """
    weights, parameters = WEIGHTS[name], run["parameters"]
    base_id, ratios = str(config.base_model_name_or_path), config.trained_ratios or [config.compression_ratio]
    share = 100 * parameters["plugin"] / parameters["base"]
    recipe = run["recipe"]
    lines = [
        f"# Compression plugin for {name}",
        "A Variator plugin (Xiao et al. 2023, arXiv 2310.15724): it merges neighbouring tokens around each "
        "feed-forward network, so that the model runs faster. "
        f"{parameters['plugin']:,} parameters, {share:.1f} % of the base's.",
        "```python\nimport peft_variator\nfrom peft import PeftModel\nfrom transformers import AutoModel\n\n"
        f'base = AutoModel.from_pretrained("{base_id}")\n'
        f'model = PeftModel.from_pretrained(base, "examples/plugins/{name}")\n'
        f"model.set_compression_ratio({max(ratios)})\n```",
        "## Measured",
        _quality(name, ratios, results),
        _speed(name, ratios, results),
        "Measured by `measure.py` and `speed.py` in `examples/real_models`; the JSON beside them in `results/` holds "
        "the commands, the environment and the spread.",
        "## How it was made",
        f"- Weights: {weights.attribution}. SHA-256 of their file: `{run['weights_sha256']}`.",
        f"- Trained for k = {', '.join(map(str, ratios))} by distillation from the base without "
        f"plugin: {recipe['steps']} steps of {recipe['batch_size']} texts, one seed, on MASC, WikiText-2 validation, "
        "TinyStories, SQuAD articles that are not measured on, and docstrings of installed packages; nothing of "
        "STS-B, MRPC or SICK.",
        f"- Command: `{run['command']}`",
        f"- Licence: {weights.licence}, that of the weights.",
    ]
    body = "\n\n".join(line for line in lines if line)
    content = CardContent(body, base_id, PLUGIN_TAGS, license=weights.licence.lower(), name=f"plugin for {name}")
    return str(make_card(content))


def _quality(name: str, ratios: list[int], results: Path) -> str:
    columns = {"base": results / f"base-{name}.json"}
    columns |= {f"k = {k}": results / f"plugin-{name}-k{k}.json" for k in ratios}
    parts = {title: json.loads(file.read_text())["parts"] for title, file in columns.items() if file.is_file()}
    rows = []
    for part, (figure, title, digits) in FIGURES.items():
        if all(part in found for found in parts.values()) and parts:
            rows.append([title, *(f"{found[part][figure]:.{digits}f}" for found in parts.values())])
    return make_table(["", *parts], rows) if rows else ""


def _speed(name: str, ratios: list[int], results: Path) -> str:
    files = {k: results / f"speed-{name}-k{k}.json" for k in ratios}
    records = {k: json.loads(file.read_text()) for k, file in files.items() if file.is_file()}
    if not records:
        return ""
    first = next(iter(records.values()))
    rows = []
    for index, row in enumerate(first["rows"]):
        cells = [record["rows"][index]["speedup"]["plugin"] for record in records.values()]
        shown = [f"{each['median']:.2f} [{each['low']:.2f}–{each['high']:.2f}]" for each in cells]
        rows.append([f"{row['batch']}×{row['length']}", *shown])
    environment = first["environment"]
    busy = any(record["environment"]["cpu_in_use"] > QUIET for record in records.values())
    return (
        f"Times as fast as the base, median and quartiles, {environment['cpu']}, {environment['threads']} thread(s), "
        f"PyTorch {environment['torch']}, float32"
        + (", on a machine that others were using:\n\n" if busy else ":\n\n")
        + make_table(["batch × length", *(f"k = {k}" for k in records)], rows)
    )


def main() -> None:
    """Write the folder of one plugin."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(WEIGHTS), required=True)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run that trained it")
    parser.add_argument("--output", type=Path, help="folder to write; examples/plugins/MODEL if not given")
    arguments = parser.parse_args()
    output = arguments.output or PLUGINS / arguments.model
    ship(arguments.model, arguments.run, output)
    size = sum(file.stat().st_size for file in output.iterdir()) / 1e6
    print(f"Wrote {output} ({size:.1f} MB).")


if __name__ == "__main__":
    main()
