"""A plugin beside what else makes a text encoder faster: same model, same machine, same run.

python examples/peers/run.py quality --data DATA --cache CACHE
python examples/peers/run.py speed --cache CACHE --threads 1
python examples/peers/run.py page

Each stage writes JSON after each contender, and passes over what is there, unless it was made of other weights than
are there now or `--again` is given; `--model` chooses the base.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import logging

from peft_variator import VariatorConfig, calibrate, fold_updates
from peft_variator.files import replacing, write_text
from peft_variator.profiling import count_flops, describe_environment, num_threads, share_weights


HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "real_models"))

from measure import measure  # noqa: E402
from patch_merging import MergingViT  # noqa: E402
from peers import drop_layers, follow, narrow, quantize  # noqa: E402
from peers import with_plugin as add_plugin  # noqa: E402
from recipes import RECIPES, make_dataset  # noqa: E402
from speed import make_inputs, speedups  # noqa: E402
from token_merging import MergingEncoder  # noqa: E402
from train import collator, training_arguments  # noqa: E402
from train import train as train_plugin  # noqa: E402
from weights import WEIGHTS, Loaded, load  # noqa: E402


__all__ = ["Contender", "NotThere", "as_cheap", "contenders", "picture_contenders", "quality", "speed", "train"]

BASES = ("all-MiniLM-L6-v2", "all-mpnet-base-v2", "dinov2-vit-s14")
SMALLER = {"all-MiniLM-L6-v2": "paraphrase-MiniLM-L3", "all-mpnet-base-v2": "all-MiniLM-L6-v2"}
SHARES = (0.05, 0.1, 0.2)
# Of a picture's patches, how many go in each block: whole numbers of the 64 at 112 pixels and of the 256 at 224.
PATCH_SHARES = (1 / 32, 3 / 64, 1 / 16, 5 / 64)
# Of each kind of model: batch × length, or × pixels a side; what is measured; rows at most (none named: all).
SHAPES = {"text": ((32, 128), (8, 128)), "vision": ((8, 224), (8, 112))}
PARTS = {"text": ("stsb", "sst2"), "vision": ("cifar10",)}
LIMITS = {"sst2": 1000, "cifar10": 1000}
KNOWN = ("bert", "mpnet")  # the architectures that are narrowed, shortened and merged
# The plugin of those that are trained alike, and the ratio at which it is compared: its form is the shipped one's.
TRAINED_PLUGIN, RATIO, TRAINED_RATIOS = "trained alike: plugin", 16, (4, 8, 16)
CALIBRATED = 64  # examples
Build = Callable[[], Any]


@dataclass(frozen=True)
class Contender:
    """What is compared: called, it is made.

    Args:
        make: makes the model.
        weights: file with the weights that it has besides the base's, if it has any.
    """

    make: Build
    weights: Path | None = None

    def __call__(self) -> Any:
        return self.make()

    def digest(self) -> str | None:
        """SHA-256 of the weights; `None` where there are none."""
        if self.weights is None or not self.weights.is_file():
            return None
        return hashlib.sha256(self.weights.read_bytes()).hexdigest()


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
    return to_onnx(fold_updates(model.get_base_model()), scratch / f"plugin-{ratio}.onnx", int8)


def ratios(plugin: Path) -> list[int]:
    """The three highest compression ratios that a plugin was trained for."""
    if not (plugin / "adapter_config.json").is_file():
        return [8, 16, 32]
    config = VariatorConfig.from_pretrained(str(plugin))
    return sorted(config.trained_ratios or [config.compression_ratio])[-3:]


def contenders(base: Loaded, smaller: Build, plugin: Path, trained: Path, scratch: Path) -> dict[str, Contender]:
    """What a text encoder is compared with, by name.

    Args:
        base: the model.
        smaller: loads the next-smaller model.
        plugin: folder of a plugin; one that was trained on the base in int8 is looked for beside it.
        trained: folder with the weights of contenders that need training.
        scratch: folder for ONNX files.
    """
    model: Any = base.model
    found = _numbers(model) | _with_plugins(model, plugin)
    under_int8 = plugin.with_name(f"{plugin.name}-int8")
    found[f"int8 + plugin, updates apart, k = {RATIO}"] = Contender(
        lambda: with_plugin(quantize(model), plugin, RATIO, sum_updates=False), _weights(plugin)
    )
    for ratio in ratios(under_int8) if under_int8.is_dir() else ():
        found[f"int8 + plugin trained on it, k = {ratio}"] = Contender(
            partial(lambda k: with_plugin(quantize(model), under_int8, k), ratio), _weights(under_int8)
        )
    for name, make in untrained(model).items():
        file = trained / f"{name}.safetensors"
        found[name] = Contender(partial(_trained, make, file), file)
    if model.config.model_type in KNOWN:
        folder = trained / TRAINED_PLUGIN.split()[-1] / "plugin"
        found[f"{TRAINED_PLUGIN}, k = {RATIO}"] = Contender(
            lambda: with_plugin(share_weights(model), folder, RATIO), _weights(folder)
        )
    for share in SHARES:
        found[f"token merging, {share:.0%} a layer"] = Contender(partial(_merging, model, share))
    for name, int8 in (("ONNX Runtime", False), ("ONNX Runtime, int8", True)):
        found[name] = Contender(partial(to_onnx, model, scratch / "model.onnx", int8=int8))
        for ratio in ratios(plugin):
            make = partial(_plugin_to_onnx, model, plugin, ratio, scratch, int8)
            found[f"{name} + plugin, k = {ratio}"] = Contender(make, _weights(plugin))
    found["next-smaller model"] = Contender(smaller)
    return found


def picture_contenders(model: Any, plugin: Path) -> dict[str, Contender]:
    """What a vision transformer is compared with, by name.

    Args:
        model: the base.
        plugin: folder of a plugin.
    """
    merged = {
        f"patch merging, {share * 64:g} of 64 a layer": Contender(partial(MergingViT, model, share))
        for share in PATCH_SHARES
    }
    return _numbers(model) | _with_plugins(model, plugin) | merged


def _numbers(model: Any) -> dict[str, Contender]:
    return {
        "base": Contender(lambda: model),
        "bf16": Contender(lambda: copy.deepcopy(model).to(torch.bfloat16)),
        "int8": Contender(lambda: quantize(model)),
    }


def _with_plugins(model: Any, plugin: Path) -> dict[str, Contender]:
    """The plugin at each ratio, on the base in each form."""
    forms: dict[str, Build] = {
        "plugin": lambda: share_weights(model),
        "bf16 + plugin": lambda: copy.deepcopy(model).to(torch.bfloat16),
        "int8 + plugin": lambda: quantize(model),
    }
    return {
        f"{name}, k = {ratio}": Contender(
            partial(lambda make, k: with_plugin(make(), plugin, k), make, ratio), _weights(plugin)
        )
        for name, make in forms.items()
        for ratio in ratios(plugin)
    }


def _weights(plugin: Path) -> Path:
    return plugin / "adapter_model.safetensors"


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
            for part in parts:
                rows = limit or LIMITS.get(part)
                done = measure(model, base, kind, data, limit=rows, parts=[part], done=done)
            entry = {"parts": done} | ({"weights_sha256": digest} if digest else {})
            if kind == "vision":
                entry["flops"] = count_flops(model, make_inputs(kind, model, 1, SHAPES[kind][-1][1]))
        record["contenders"] = {each: record["contenders"].get(each) for each in made} | {name: entry}
        record["contenders"] = {each: entry for each, entry in record["contenders"].items() if entry}
        _write(output, record)
        print(name, json.dumps(record["contenders"][name])[:200], flush=True)
    return record


def speed(
    made: Mapping[str, Build], output: Path, shapes: Any, rounds: int, *, kind: str = "text", again: bool = False
) -> dict[str, Any]:
    """Time all contenders in turn, and write after each shape.

    Args:
        made: the contenders, the base first.
        output: the JSON.
        shapes: batch and length, or pixels a side.
        rounds: timed samples of each.
        kind: of the model.
        again: time what has been timed, too.
    """
    record, models, missing = {} if again else _read(output), {}, {}
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
    parser.add_argument("--limit", type=int, help="rows of a part at most; 1000 where not all are used if not given")
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
    if arguments.cache is None or (arguments.stage != "speed" and arguments.data is None):
        parser.error("name --cache, and for train and quality --data")
    name = arguments.model
    plugin = arguments.plugin or HERE.parent / "plugins" / name
    kind = WEIGHTS[name].kind

    def wanted(each: str) -> bool:
        chosen = not arguments.only or each == "base" or any(part in each for part in arguments.only)
        return chosen and not any(part in each for part in arguments.without)

    with num_threads(arguments.threads), tempfile.TemporaryDirectory() as scratch:
        base = load(name, arguments.cache)
        made = (
            picture_contenders(base.model, plugin)
            if kind == "vision"
            else contenders(
                base,
                lambda: load(SMALLER[name], arguments.cache).model,
                plugin,
                arguments.trained / name,
                Path(scratch),
            )
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
            speed(some, output, SHAPES[kind], arguments.rounds, kind=kind, again=arguments.again)


if __name__ == "__main__":
    main()
