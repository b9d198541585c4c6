"""A plugin beside what else makes a text encoder faster: same model, same machine, same run.

python examples/peers/run.py quality --data DATA --cache CACHE
python examples/peers/run.py speed --cache CACHE --threads 1
python examples/peers/run.py page

Each stage writes JSON after each contender, and passes over what is there; `--model` chooses the base.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import logging

from peft_variator import VariatorConfig, calibrate
from peft_variator.files import replacing, write_text
from peft_variator.profiling import count_flops, describe_environment, num_threads, share_weights


HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "real_models"))

from measure import measure  # noqa: E402
from peers import drop_layers, follow, narrow, quantize  # noqa: E402
from peers import with_plugin as add_plugin  # noqa: E402
from recipes import RECIPES, make_dataset  # noqa: E402
from speed import make_inputs, speedups  # noqa: E402
from token_merging import MergingEncoder  # noqa: E402
from train import collator, training_arguments  # noqa: E402
from train import train as train_plugin  # noqa: E402
from weights import Loaded, load  # noqa: E402


__all__ = ["NotThere", "as_cheap", "contenders", "quality", "speed", "train"]

BASES = ("all-MiniLM-L6-v2", "all-mpnet-base-v2")
SMALLER = {"all-MiniLM-L6-v2": "paraphrase-MiniLM-L3", "all-mpnet-base-v2": "all-MiniLM-L6-v2"}
RATIOS = (4, 8, 16)
SHARES = (0.05, 0.1, 0.2)
SHAPES = ((32, 128), (8, 128))
KNOWN = ("bert", "mpnet")  # the architectures that are narrowed, shortened and merged
# The plugin of those that are trained alike, and the ratio at which it is compared: its form is the shipped one's.
TRAINED_PLUGIN, RATIO = "trained alike: plugin", 16
CALIBRATED = 64  # examples
Build = Callable[[], Any]


class NotThere(RuntimeError):
    """A contender cannot be made here; the message says why."""


class OnnxModel:
    """An ONNX file in ONNX Runtime, called as the model that it was made from.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def eval(self) -> OnnxModel:
        """Itself."""
        return self

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> SimpleNamespace:
        (found,) = self.session.run(None, {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()})
        return SimpleNamespace(last_hidden_state=torch.from_numpy(found))


class _FirstOutput(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return output


def to_onnx(model: nn.Module, path: Path, int8: bool) -> OnnxModel:
    """Export a model, quantised by ONNX Runtime if asked for, and load it.

    Raises:
        NotThere: the packages of the extra `onnx` are missing.
    """
    try:
        from onnxruntime.quantization import quantize_dynamic
    except ImportError as error:
        raise NotThere("pip install 'peft-variator[onnx]' first") from error
    if not path.is_file():
        ids = torch.randint(5, model.config.vocab_size, (2, 16))
        shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
        with replacing(path) as temporary, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's, on names that it chose itself
            torch.onnx.export(
                _FirstOutput(model),
                (ids, torch.ones_like(ids)),
                str(temporary),
                input_names=["input_ids", "attention_mask"],
                output_names=["last_hidden_state"],
                dynamic_shapes=(shape, shape),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    if int8:
        quantized = path.with_suffix(".int8.onnx")
        if not quantized.is_file():
            with replacing(quantized) as temporary:
                quantize_dynamic(str(path), str(temporary))
        path = quantized
    return OnnxModel(path)


def with_plugin(base: nn.Module, folder: Path, ratio: int, *, sum_updates: bool = True) -> PeftModel:
    """A base, as it is or quantised, with a plugin that is quantised alike, its low-rank updates summed into W or not.

    Raises:
        NotThere: there is no such plugin.
    """
    if not (folder / "adapter_config.json").is_file():
        raise NotThere(f"no plugin in {folder}")
    return add_plugin(base, folder, ratio, sum_updates=sum_updates)


def _plugin_to_onnx(base: nn.Module, folder: Path, ratio: int, scratch: Path, int8: bool) -> OnnxModel:
    model: Any = with_plugin(share_weights(base), folder, ratio)
    return to_onnx(model.get_base_model(), scratch / f"plugin-{ratio}.onnx", int8)


def contenders(base: Loaded, smaller: Build, plugin: Path, trained: Path, scratch: Path) -> dict[str, Build]:
    """What is compared, by name; each is made when it is asked for.

    Args:
        base: the model.
        smaller: loads the next-smaller model.
        plugin: folder of a plugin; one that was trained on the base in int8 is looked for beside it.
        trained: folder with the weights of contenders that need training.
        scratch: folder for ONNX files.
    """
    model: Any = base.model
    under_int8 = plugin.with_name(f"{plugin.name}-int8")
    found: dict[str, Build] = {
        "base": lambda: model,
        "bf16": lambda: copy.deepcopy(model).to(torch.bfloat16),
        "int8": lambda: quantize(model),
    }
    for ratio in RATIOS:
        found[f"plugin, k = {ratio}"] = partial(lambda k: with_plugin(share_weights(model), plugin, k), ratio)
    for ratio in RATIOS:
        found[f"bf16 + plugin, k = {ratio}"] = partial(
            lambda k: with_plugin(copy.deepcopy(model).to(torch.bfloat16), plugin, k), ratio
        )
    for ratio in RATIOS:
        found[f"int8 + plugin, k = {ratio}"] = partial(lambda k: with_plugin(quantize(model), plugin, k), ratio)
        found[f"int8 + plugin, updates apart, k = {ratio}"] = partial(
            lambda k: with_plugin(quantize(model), plugin, k, sum_updates=False), ratio
        )
        if under_int8.is_dir():
            found[f"int8 + plugin trained on it, k = {ratio}"] = partial(
                lambda k: with_plugin(quantize(model), under_int8, k), ratio
            )
    for name, make in untrained(model).items():
        found[name] = partial(_trained, make, trained / f"{name}.safetensors")
    if model.config.model_type in KNOWN:
        folder = trained / TRAINED_PLUGIN.split()[-1] / "plugin"
        found[f"{TRAINED_PLUGIN}, k = {RATIO}"] = lambda: with_plugin(share_weights(model), folder, RATIO)
    for share in SHARES:
        found[f"token merging, {share:.0%} a layer"] = partial(_merging, model, share)
    found["ONNX Runtime"] = lambda: to_onnx(model, scratch / "model.onnx", int8=False)
    found["ONNX Runtime, int8"] = lambda: to_onnx(model, scratch / "model.onnx", int8=True)
    for ratio in RATIOS:
        for name, int8 in (("ONNX Runtime", False), ("ONNX Runtime, int8", True)):
            found[f"{name} + plugin, k = {ratio}"] = partial(_plugin_to_onnx, model, plugin, ratio, scratch, int8)
    found["next-smaller model"] = smaller
    return found


def untrained(model: Any) -> dict[str, Build]:
    """Contenders whose weights are all trained to follow the base, as they start; the plugin's FLOPs come last."""
    if model.config.model_type not in KNOWN:
        return {}
    layers, inner = model.config.num_hidden_layers, model.config.intermediate_size
    return {
        f"{kept} of {layers} layers": partial(drop_layers, model, kept) for kept in (layers * 2 // 3, layers // 2)
    } | {f"networks of {width}": partial(narrow, model, width) for width in (inner // 3, as_cheap(model))}


def plugin_fields(model: Any) -> dict[str, Any]:
    """The form of a plugin that is shipped for `model`: a third of the neurons, and LoRA of rank 16."""
    width = model.config.intermediate_size // 3
    return {
        "decompression": "neurons",
        "correction_dim": width,
        "compensation_rank": 16,
        "compression_ratio": RATIO,
    }


def flops(model: nn.Module) -> int:
    """Of a text of 128 tokens."""
    return count_flops(model, make_inputs("text", model, 1, 128))


@cache
def as_cheap(model: Any) -> int:
    """The inner width at which narrowed networks take the FLOPs that a plugin leaves at k = 16."""
    config, inner = VariatorConfig(**plugin_fields(model)), model.config.intermediate_size
    whole = flops(model)
    saved = whole - flops(get_peft_model(share_weights(model), config).eval())
    return inner - round(saved * (inner - 1) / (whole - flops(narrow(model, 1))))


@torch.no_grad()
def narrow_by_data(model: Any, width: int, batches: Sequence[dict[str, Tensor]]) -> Any:
    """Narrowed networks of the neurons that a plugin of that width copies; the others leave their mean activation."""
    config = VariatorConfig(**plugin_fields(model) | {"correction_dim": width, "compensation_rank": None})
    plugin: Any = get_peft_model(copy.deepcopy(model), config).eval()
    calibrate(plugin, batches)
    neurons = [buffer for name, buffer in plugin.named_buffers() if "variator_neurons" in name]
    means = [torch.zeros(model.config.intermediate_size) for _ in model.encoder.layer]
    real = torch.zeros(0, dtype=torch.bool)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)

    def add(number: int, module: nn.Module, args: Any, output: Tensor) -> None:
        means[number] += output[real].sum(0) / tokens

    hooks = [layer.intermediate.register_forward_hook(partial(add, n)) for n, layer in enumerate(model.encoder.layer)]
    for batch in batches:
        real = batch["attention_mask"].bool()
        model(**batch)
    for hook in hooks:
        hook.remove()
    return narrow(model, width, neurons, means)


def _trained(make: Build, file: Path) -> Any:
    if not file.is_file():
        raise NotThere(f"not trained yet: {file.name}, by `run.py train`")
    model = make()
    model.load_state_dict(load_file(file))
    return model


def _merging(model: Any, share: float) -> MergingEncoder:
    if model.config.model_type not in KNOWN:
        raise NotThere(f"token merging is written for {' and '.join(KNOWN)} alone")
    return MergingEncoder(model, share)


def quality(
    base: Loaded, made: Mapping[str, Build], data: Path, output: Path, parts: list[str], limit: int | None
) -> dict[str, Any]:
    """Measure what has not been measured, and write after each contender."""
    record = _read(output)
    for name, build in made.items():
        entry = record.setdefault("contenders", {}).get(name, {})
        if all(part in entry.get("parts", {}) for part in parts):
            continue
        try:
            model = build().eval()
        except NotThere as error:
            record["contenders"][name] = {"missing": str(error)}
        else:
            done = entry.get("parts")
            facts = measure(model, base, "text", data, limit=limit, parts=parts, done=done)
            record["contenders"][name] = {"parts": facts}
        _write(output, record)
        print(name, json.dumps(record["contenders"][name])[:200], flush=True)
    return record


def speed(made: Mapping[str, Build], output: Path, shapes: Any, rounds: int) -> dict[str, Any]:
    """Time all contenders in turn, and write after each shape."""
    record, models = _read(output), {}
    for name, build in made.items():
        try:
            models[name] = build().eval()
        except NotThere as error:
            record.setdefault("missing", {})[name] = str(error)
    rows = record.setdefault("rows", [])
    for shape in shapes:
        if any((row["batch"], row["length"]) == tuple(shape) for row in rows):
            continue
        rows += speedups(models, "text", [shape], rounds=rounds, device=torch.device("cpu"))
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
    recipe = replace(RECIPES[name], steps=steps, bf16=True, ratios=RATIOS, plugin=plugin_fields(model))
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
    parser.add_argument("--part", action="append", help="parts of the quality: stsb, sst2; both if not given")
    parser.add_argument("--limit", type=int, help="rows of a part at most")
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
    if arguments.cache is None or (arguments.stage != "speed" and arguments.data is None):
        parser.error("name --cache, and for train and quality --data")
    name = arguments.model
    plugin = arguments.plugin or HERE.parent / "plugins" / name
    with num_threads(arguments.threads), tempfile.TemporaryDirectory() as scratch:
        base = load(name, arguments.cache)
        made = contenders(
            base,
            lambda: load(SMALLER[name], arguments.cache).model,
            plugin,
            arguments.trained / name,
            Path(scratch),
        )
        wanted = {
            each: build
            for each, build in made.items()
            if not arguments.only or each == "base" or any(part in each for part in arguments.only)
        }
        if arguments.stage == "train":
            output, rate = arguments.trained / name, arguments.learning_rate
            output.mkdir(parents=True, exist_ok=True)
            for each in [*untrained(base.model), TRAINED_PLUGIN]:
                if not arguments.only or any(part in each for part in arguments.only):
                    train(name, base, each, arguments.data, output, arguments.results, arguments.steps, rate)
        elif arguments.stage == "quality":
            output = arguments.results / f"quality-{name}.json"
            quality(base, wanted, arguments.data, output, arguments.part or ["stsb", "sst2"], arguments.limit)
        else:
            speed(wanted, arguments.results / f"speed-{name}.json", SHAPES, arguments.rounds)


if __name__ == "__main__":
    main()
