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

from frontier import (
    RESULTS,
    commands_of,
    in_int8,
    measured_values,
    model_of,
    quality_table,
    runs_before,
    speed_table,
    told_of_bits,
    told_of_changes,
)
from huggingface_hub import EvalResult
from peers import saved_config
from safetensors.torch import load_file, save_file
from weights import WEIGHTS

from peft_variator import VariatorConfig
from peft_variator.adapter_card import CardContent, make_card
from peft_variator.cli.shrink import in_half_precision
from peft_variator.files import write_text
from peft_variator.training.model_card import PLUGIN_TAGS


__all__ = ["card", "ship"]

PLUGINS = Path(__file__).parents[1] / "plugins"
TEXT = (
    "MASC, WikiText-2 validation, TinyStories, SQuAD articles that are not measured on, and docstrings of installed "
    "packages"
)
# The Hub's names of what each kind of model does.
PIPELINES = {
    "text": "feature-extraction",
    "causal": "text-generation",
    "vision": "image-feature-extraction",
    "audio": "automatic-speech-recognition",
}
# Of each kind of model: its class, what a step is made of, and what it was trained on.
KINDS = {
    "text": ("AutoModel", "texts", f"{TEXT}; nothing of STS-B, MRPC or SICK"),
    "causal": ("AutoModelForCausalLM", "texts", TEXT),
    "vision": (
        "AutoModel",
        "images",
        "crops of four in five of 500 photographs of ImageNet's classes and, one in four, CIFAR-10's training images "
        "without their labels",
    ),
    "audio": (
        "AutoModelForSpeechSeq2Seq",
        "utterances",
        "joined recordings 5 to 14 of the spoken digits and sentences of MASC that eSpeak NG reads",
    ),
}


def ship(name: str, run: Path, output: Path, results: Path = RESULTS, ratio: int | None = None) -> None:
    """Write the folder of a plugin: config, weights in float16, card.

    Args:
        name: a key of `WEIGHTS`.
        run: folder of the run that trained it. `changed` in its `run.json` holds fields of the configuration that are
            to differ from those that it was trained with, none that a weight depends on.
        output: the folder, whose name starts with the model's and is that of its records in `results`; one that is
            there is replaced when all is written.
        results: folder of what was measured.
        ratio: the compression ratio that it has when it is loaded, one that it was trained for; the run's if `None`.

    Raises:
        ValueError: it was not trained for that ratio, `changed` fits no configuration, or the folder's name is another
            model's.
    """
    if model_of(output.name) != name:
        raise ValueError(f"The folder {output.name!r} has to be named {name!r}, or to start with '{name}-'.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        made = Path(folder) / output.name
        made.mkdir()
        halves = in_half_precision(load_file(run / "plugin" / "adapter_model.safetensors"))
        record = json.loads((run / "run.json").read_text())
        config = saved_config(run / "plugin", record.get("changed", {}))
        config.base_model_name_or_path = WEIGHTS[name].hub_id
        if ratio is not None:
            if ratio not in (config.trained_ratios or []):
                raise ValueError(f"ratio={ratio!r} is none of those it was trained for, {config.trained_ratios}.")
            config.compression_ratio = ratio
        save_file(halves, made / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(made))
        write_text(made / "README.md", card(output.name, record, config, results))
        if output.exists():
            shutil.rmtree(output)
        made.rename(output)


def card(name: str, run: dict[str, Any], config: VariatorConfig, results: Path) -> str:
    """The card of a plugin.

    Args:
        name: name of the plugin's folder.
        run: `run.json` of the run that trained it.
        config: its configuration.
        results: folder of what was measured.
    """
    model = model_of(name)
    assert model is not None  # `ship` checks
    weights, parameters = WEIGHTS[model], run["parameters"]
    base_id, ratios = str(config.base_model_name_or_path), config.trained_ratios or [config.compression_ratio]
    share = 100 * parameters["plugin"] / parameters["base"]
    recipe = run["recipe"]
    class_name, unit, trained_on = KINDS[weights.kind]
    lines = [
        f"# Compression plugin for {model}",
        "A Variator plugin (Xiao et al. 2023, arXiv 2310.15724): it merges neighbouring tokens around "
        f"{config.merged_around.removesuffix(',')}, so that the model runs faster. "
        f"{parameters['plugin']:,} parameters, {share:.1f} % of the base's.",
        _usage(name, base_id, class_name, config.compression_ratio, in_int8(run)),
        "## Measured",
        *(["Base and plugin in int8, beside the base in float32."] if in_int8(run) else []),
        quality_table(name, ratios, results),
        speed_table(name, ratios, results),
        "Measured by `measure.py` and `speed.py` in `examples/real_models`; the JSON beside them in `results/` holds "
        "the commands, the environment and the spread.",
        "## How it was made",
        f"- Weights: {weights.attribution}. SHA-256 of their file: `{run['weights_sha256']}`.",
        f"- Trained for k = {', '.join(map(str, ratios))} by distillation from the base without "
        f"plugin: {recipe['steps']} steps of {recipe['batch_size']} {unit}, one seed, on {trained_on}.",
        *(
            f"- Begun with {each['steps']} steps by `{'`, then `'.join(commands_of(each))}`"
            for each in runs_before(run)
        ),
        f"- Command: `{run['command']}`",
        *(
            [f"- Its copied neurons are {told}, by `{run['shrunk']['command']}`."]
            if (told := told_of_bits(run))
            else []
        ),
        *([f"- {told}"] if (told := told_of_changes(run)) else []),
        f"- Licence: {weights.licence}, that of the weights.",
    ]
    body = "\n\n".join(line for line in lines if line)
    return metadata(name, body, base_id, ratios, results)


def metadata(name: str, body: str, base_id: str, ratios: list[int], results: Path = RESULTS) -> str:
    """A card with its metadata for the Hub.

    Args:
        name: name of the plugin's folder.
        body: what the card says.
        base_id: the base's name on the Hub.
        ratios: the plugin's.
        results: folder of what was measured.
    """
    weights = WEIGHTS[str(model_of(name))]
    task = PIPELINES[weights.kind]
    found = [
        EvalResult(
            task_type=task,
            dataset_type=figure.part,
            dataset_name=figure.title.partition(",")[0],
            metric_type=figure.key,
            metric_name=f"{figure.title} at k = {ratio}",
            metric_value=value,
        )
        for figure, ratio, value in measured_values(name, ratios, results)
    ]
    title, licence = f"Compression plugin for {model_of(name)}", weights.licence.lower()
    return str(make_card(CardContent(body, base_id, PLUGIN_TAGS, task, licence, title, found)))


def _usage(name: str, base_id: str, class_name: str, ratio: int, int8: bool) -> str:
    quantize = "base = torch.ao.quantization.quantize_dynamic(base, {torch.nn.Linear}, dtype=torch.qint8)"
    lines = [
        "import peft_variator",
        *(["import torch"] if int8 else []),
        "from peft import PeftModel",
        f"from transformers import {class_name}",
        "",
        f'base = {class_name}.from_pretrained("{base_id}")',
        *([quantize] if int8 else []),
        f'model = PeftModel.from_pretrained(base, "examples/plugins/{name}")',
        *(["peft_variator.quantize_plugin(model)"] if int8 else []),
        f"model.set_compression_ratio({ratio})",
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def main() -> None:
    """Write the folder of one plugin."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(WEIGHTS), required=True)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run that trained it")
    parser.add_argument("--output", type=Path, help="folder to write; examples/plugins/MODEL if not given")
    parser.add_argument("--ratio", type=int, help="compression ratio when it is loaded; the run's if not given")
    arguments = parser.parse_args()
    output = arguments.output or PLUGINS / arguments.model
    ship(arguments.model, arguments.run, output, ratio=arguments.ratio)
    size = sum(file.stat().st_size for file in output.iterdir()) / 1e6
    print(f"Wrote {output} ({size:.1f} MB).")


if __name__ == "__main__":
    main()
