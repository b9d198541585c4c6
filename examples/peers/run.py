"""A plugin beside what else makes a model faster: same model, same machine, same run.

python examples/peers/run.py quality --data DATA --cache CACHE
python examples/peers/run.py speed --cache CACHE --threads 1
python examples/peers/run.py page

Each stage writes JSON after each contender, and passes over what is there, unless it was made of other weights than
are there now or `--again` is given; `--model` chooses the base.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from peft_variator import VariatorConfig
from peft_variator.files import replacing, write_text
from peft_variator.profiling import describe_environment, num_threads, share_weights


HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "real_models"))

from contenders import (  # noqa: E402
    RATIO,
    TRAINED_PLUGIN,
    Build,
    Contender,
    NotThere,
    contenders,
    flops,
    language_contenders,
    narrow_by_data,
    picture_contenders,
    plugin_fields,
    untrained,
    with_plugin,
)
from measure import measure  # noqa: E402
from peers import follow  # noqa: E402
from recipes import RECIPES, make_dataset  # noqa: E402
from speed import make_inputs, speedups  # noqa: E402
from texts import wikitext2  # noqa: E402
from train import collator, training_arguments  # noqa: E402
from train import train as train_plugin  # noqa: E402
from weights import WEIGHTS, Loaded, load  # noqa: E402


__all__ = ["quality", "random_base", "random_plugin", "speed", "train"]

# Shapes whose weights are random, so that their speed alone is measured.
RANDOM = {
    "Qwen2.5-0.5B": Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
}
BASES = ("all-MiniLM-L6-v2", "all-mpnet-base-v2", "dinov2-vit-s14", "SmolLM2-135M-Instruct", *RANDOM)
SMALLER = {"all-MiniLM-L6-v2": "paraphrase-MiniLM-L3", "all-mpnet-base-v2": "all-MiniLM-L6-v2"}
# Of each kind of model: batch × length, or × pixels a side; what is measured; rows at most (none named: all).
SHAPES = {"text": ((32, 128), (8, 128)), "vision": ((8, 224), (8, 112)), "causal": ((1, 512), (1, 1024))}
PARTS = {"text": ("stsb", "sst2"), "vision": ("cifar10",), "causal": ("wikitext2-256",)}
LIMITS = {"sst2": 1000, "cifar10": 1000, "wikitext2-256": 32}
TRAINED_RATIOS = (4, 8, 16)  # of the plugin of those that are trained alike
CALIBRATED = 64  # examples
RANKED_BY = (8, 320)  # texts × tokens of WikiText-2 validation by which the layers that are dropped are chosen


def random_base(name: str) -> Loaded:
    """A model of one of the shapes in `RANDOM`."""
    torch.manual_seed(0)
    return Loaded(Qwen2ForCausalLM(RANDOM[name]).eval())


def random_plugin(model: Any, folder: Path) -> dict[str, Any]:
    """Save a plugin as it starts, of the shipped SmolLM2 plugin's form: narrow, low-rank, none in the first quarter.

    Args:
        model: the base, which is not changed.
        folder: of the plugin.

    Returns:
        The fields of its configuration.
    """
    layers = model.config.num_hidden_layers
    fields = {
        "decompression": "neurons",
        "correction_dim": model.config.intermediate_size // 4,
        "correction_rank": 20,
        "compensation_rank": 3,
        "layers_to_transform": list(range(layers // 4, layers)),
        "trained_ratios": [4, 8, 16],
    }
    get_peft_model(share_weights(model), VariatorConfig(**fields)).save_pretrained(str(folder))
    return fields


def ranking_texts(base: Loaded, data: Path | None) -> Tensor:
    """Token ids, shape `RANKED_BY`; random ones where no data are named: which layers go does not change the time."""
    texts, length = RANKED_BY
    if data is None or base.tokenizer is None:
        found: Tensor = make_inputs("causal", base.model, texts, length)["input_ids"]
        return found
    ids = base.tokenizer("\n".join(wikitext2(data, "valid")), verbose=False, return_tensors="pt")["input_ids"][0]
    windows = ids[: len(ids) // length * length].view(-1, length)
    return windows[:: len(windows) // texts][:texts]


def quality(
    base: Loaded,
    made: Mapping[str, Contender],
    data: Path,
    output: Path,
    parts: Sequence[str],
    limit: int | None,
    *,
    kind: str = "text",
    wanted: Callable[[str], bool] = lambda name: True,
    again: bool = False,
) -> dict[str, Any]:
    """Measure what has not been measured, or was with other weights, and write after each contender.

    Args:
        base: the model.
        made: all contenders; figures of any others are dropped.
        data: the data folder.
        output: the JSON.
        parts: what is measured.
        limit: rows of a part at most; `LIMITS` says how many if `None`.
        kind: of the model.
        wanted: whether the contender of that name is measured.
        again: measure what has been, too.
    """
    record = _read(output)
    before = record.get("contenders", {})
    record["contenders"] = {name: before[name] for name in made if name in before}
    for name, contender in made.items():
        entry, digest = before.get(name, {}), contender.digest()
        done = {} if again or (digest and digest != entry.get("weights_sha256")) else entry.get("parts", {})
        if not wanted(name) or all(part in done for part in parts):
            continue
        try:
            model = contender().eval()
        except NotThere as error:
            entry = {"missing": str(error)}
        else:
            read_by = base if contender.tokenizer is None else replace(base, tokenizer=contender.tokenizer())
            for part in parts:
                rows = limit or LIMITS.get(part)
                done = measure(model, read_by, kind, data, limit=rows, parts=[part], done=done)
            entry = {"parts": done} | ({"weights_sha256": digest} if digest else {})
            if kind != "text":
                entry["flops"] = flops(model, kind)
        record["contenders"] = {each: record["contenders"].get(each) for each in made} | {name: entry}
        record["contenders"] = {each: entry for each, entry in record["contenders"].items() if entry}
        _write(output, record)
        print(name, json.dumps(record["contenders"][name])[:200], flush=True)
    return record


def speed(
    made: Mapping[str, Build],
    output: Path,
    shapes: Any,
    rounds: int,
    *,
    kind: str = "text",
    facts: Mapping[str, Any] | None = None,
    again: bool = False,
) -> dict[str, Any]:
    """Time all contenders in turn, and write after each shape.

    Args:
        made: the contenders, the base first.
        output: the JSON.
        shapes: batch and length, or pixels a side.
        rounds: timed samples of each.
        kind: of the model.
        facts: kept in the record.
        again: time what has been timed, too.
    """
    record, models, missing = {} if again else _read(output), {}, {}
    record |= facts or {}
    for name, build in made.items():
        try:
            models[name] = build().eval()
        except NotThere as error:
            missing[name] = str(error)
    record["missing"] = missing
    rows = record.setdefault("rows", [])
    for shape in shapes:
        if any((row["batch"], row["length"]) == tuple(shape) for row in rows):
            continue
        rows += speedups(models, kind, [shape], rounds=rounds, device=torch.device("cpu"))
        _write(output, record)
        print(json.dumps(rows[-1]), flush=True)
    return record


def train(
    name: str, base: Loaded, contender: str, data: Path, output: Path, results: Path, steps: int, learning_rate: float
) -> None:
    """Train one contender to follow the base, and write one JSON; a run that was stopped goes on.

    All see the same text in the same order, in the same batches, by the same loss and schedule, in bfloat16.

    Args:
        name: of the base.
        base: the model.
        contender: one of `untrained`, or `TRAINED_PLUGIN`.
        data: the data folder.
        output: folder of the weights.
        results: folder of the JSON.
        steps: optimizer steps.
        learning_rate: the peak where all weights are trained; a plugin has its recipe's.
    """
    model: Any = base.model
    short = contender.split(": ")[-1]
    record_file = results / f"trained-{name}-{short.replace(' ', '-')}.json"
    if record_file.is_file():
        return
    start, whole = time.perf_counter(), flops(model)
    recipe = replace(RECIPES[name], steps=steps, bf16=True, ratios=TRAINED_RATIOS, plugin=plugin_fields(model))
    if contender == TRAINED_PLUGIN:
        found = train_plugin(name, replace(base, model=share_weights(model)), data, output / short, recipe, 0, "cpu")
        trained, log = found["parameters"]["plugin"], found["log"]
        left = flops(with_plugin(share_weights(model), output / short / "plugin", RATIO))
    else:
        recipe = replace(recipe, learning_rate=learning_rate, ratios=(), plugin={})
        examples, collate = make_dataset(name, base, data, steps * recipe.batch_size, seed=0), collator("text", base)
        student = untrained(model)[contender]()
        if contender.startswith("networks"):
            batches = [collate(examples[at : at + 8]) for at in range(0, CALIBRATED, 8)]  # type: ignore[index]
            student = narrow_by_data(model, student.config.intermediate_size, batches)
        arguments = training_arguments(recipe, output / short, 0, "cpu")
        log = follow(student, model, arguments, examples, collate)  # type: ignore[arg-type]
        trained, left = sum(parameter.numel() for parameter in student.parameters()), flops(student)
        with replacing(output / f"{contender}.safetensors") as temporary:
            save_file(student.state_dict(), str(temporary))
    record = {
        "contender": f"{contender}, k = {RATIO}" if contender == TRAINED_PLUGIN else contender,
        "steps": steps,
        "batch_size": recipe.batch_size,
        "learning_rate": recipe.learning_rate,
        "seed": 0,
        "bf16": True,
        "trained_parameters": trained,
        "flops_share": left / whole,
        "seconds": round(time.perf_counter() - start, 1),  # of the last start only
        "log": log,
    }
    _write(record_file, record)


def _read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return record


def _write(path: Path, record: dict[str, Any]) -> None:
    """Write a record with every command that added to it, and the machine of the last one."""
    commands = record.pop("commands", [])
    command = shlex.join(["python", *sys.argv])
    facts = {"commands": [*(each for each in commands if each != command), command]}
    record["environment"] = describe_environment(torch.device("cpu"))
    write_text(path, json.dumps(facts | record, indent=2) + "\n")
    record |= facts


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("train", "quality", "speed", "page"))
    parser.add_argument("--model", choices=BASES, default=BASES[0])
    parser.add_argument("--data", type=Path, help="folder with a folder a data set")
    parser.add_argument("--cache", type=Path, help="folder that weights.py filled")
    parser.add_argument("--plugin", type=Path, help="folder of a plugin; the shipped one if not given")
    parser.add_argument("--trained", type=Path, default=Path("outputs/peers"), help="folder of what `train` makes")
    parser.add_argument("--only", action="append", help="contenders whose name has this in it, besides the base")
    parser.add_argument("--without", action="append", default=[], help="not contenders whose name has this in it")
    parser.add_argument("--part", action="append", help="parts of the quality; all of the model's kind if not given")
    parser.add_argument("--limit", type=int, help="rows or prompts of a part at most; those of LIMITS if not given")
    parser.add_argument("--again", action="store_true", help="measure what has been measured, too")
    parser.add_argument("--steps", type=int, default=300, help="steps of `train`")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    if arguments.stage == "page":
        from page import write_page

        write_page(arguments.results, HERE.parents[1] / "docs")
        return
    name = arguments.model
    kind = "causal" if name in RANDOM else WEIGHTS[name].kind
    if name in RANDOM and arguments.stage != "speed":
        parser.error(f"{name} has random weights: its speed alone is measured")
    if arguments.stage == "train" and kind != "text":
        parser.error(f"train is for text encoders, and {name} is none")
    if (arguments.cache is None and name not in RANDOM) or (arguments.data is None and arguments.stage != "speed"):
        parser.error("name --cache, and for train and quality --data")
    plugin = arguments.plugin or HERE.parent / "plugins" / name

    def wanted(each: str) -> bool:
        chosen = not arguments.only or each == "base" or any(part in each for part in arguments.only)
        return chosen and not any(part in each for part in arguments.without)

    with num_threads(arguments.threads), tempfile.TemporaryDirectory() as scratch:
        base = random_base(name) if name in RANDOM else load(name, arguments.cache)
        facts: dict[str, Any] = {}
        if name in RANDOM:
            plugin = Path(scratch) / "plugin"
            facts = {"weights": "random", "plugin": random_plugin(base.model, plugin)}
        if kind == "vision":
            made = picture_contenders(base.model, plugin)
        elif kind == "causal":
            made = language_contenders(base.model, plugin, ranking_texts(base, arguments.data))
        else:
            made = contenders(
                base,
                lambda: load(SMALLER[name], arguments.cache),
                plugin,
                arguments.trained / name,
                Path(scratch),
            )
        if arguments.stage == "train":
            output, rate = arguments.trained / name, arguments.learning_rate
            output.mkdir(parents=True, exist_ok=True)
            for each in [*untrained(base.model), TRAINED_PLUGIN]:
                if not arguments.only or any(part in each for part in arguments.only):
                    train(name, base, each, arguments.data, output, arguments.results, arguments.steps, rate)
        elif arguments.stage == "quality":
            output, parts = arguments.results / f"quality-{name}.json", arguments.part or PARTS[kind]
            choice = {"kind": kind, "wanted": wanted, "again": arguments.again}
            quality(base, made, arguments.data, output, parts, arguments.limit, **choice)
        else:
            output, some = arguments.results / f"speed-{name}.json", {n: b for n, b in made.items() if wanted(n)}
            speed(some, output, SHAPES[kind], arguments.rounds, kind=kind, facts=facts, again=arguments.again)


if __name__ == "__main__":
    main()
