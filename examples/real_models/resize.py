"""Begin a run with the plugin of another one: in networks more, with copies in full, or with fewer neurons.

Networks that are new are calibrated and fitted. Of those that get narrower the neurons stay that matter most, and make
good for the others as well as they can.

python examples/real_models/resize.py --data DATA --cache CACHE --model all-mpnet-base-v2 --run RUN --output START \
  --plugin '{"layers_to_transform": null, "correction_pattern": {"layer.0.intermediate": 1280}}'
python examples/real_models/resize.py --data DATA --cache CACHE --model SmolLM2-135M-Instruct --run RUN \
  --output START --plugin '{"correction_rank": null}'
python examples/real_models/resize.py --data DATA --cache CACHE --model all-mpnet-base-v2 --run RUN --output START \
  --plugin '{"correction_dim": 448}'
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from recipes import RECIPES, make_dataset, plugin_config
from torch import Tensor
from train import collator
from weights import WEIGHTS, Loaded, load

from peft_variator import VariatorConfig, calibrate, fit_correction
from peft_variator.files import write_text
from peft_variator.profiling import share_weights
from peft_variator.tuners.variator.decompression import neuron_outputs
from peft_variator.tuners.variator.layer import VariatorLayer, plugin_layers
from peft_variator.tuners.variator.linear_maps import RowsOfBase
from peft_variator.tuners.variator.merging import Groups
from peft_variator.tuners.variator.neuron_selection import run_batches_at


__all__ = ["narrow", "resize"]

RIDGE = 1e-3
"""That the neurons which stay are refitted with, as a share of their mean square."""


def resize(
    name: str,
    base: Loaded,
    data: Path,
    run: Path,
    output: Path,
    fields: dict[str, Any],
    examples: int,
    seed: int,
    command: str = "",
) -> None:
    """Write `output/plugin`, from which `train.py --start` goes on, and `output/run.json`, which says what was done.

    Args:
        name: one of `RECIPES`.
        base: the model.
        data: the data folder.
        run: folder of the run that trained the plugin.
        output: folder to write.
        fields: fields of `VariatorConfig` that differ from that plugin's.
        examples: how many what changes is calibrated and fitted with.
        seed: of those examples.
        command: how this was asked for.

    Raises:
        ValueError: if a network that was trained gets more neurons, or fewer while its copies have a rank.
    """
    config = VariatorConfig.from_pretrained(str(run / "plugin"))
    record = json.loads((run / "run.json").read_text())
    ratios = record["recipe"]["ratios"]
    before = {key: getattr(config, key) for key in KEPT}
    pattern = before["correction_pattern"] | fields.get("correction_pattern", {})
    old = PeftModel.from_pretrained(share_weights(base.model), str(run / "plugin"))
    model = get_peft_model(base.model, plugin_config(name, base, **before | fields | {"correction_pattern": pattern}))
    trained = in_full(old) if model.peft_config["default"].correction_rank is None else get_peft_model_state_dict(old)
    state = get_peft_model_state_dict(model)
    is_narrower = {
        key.removesuffix(INDEX): state[key].shape < value.shape
        for key, value in trained.items()
        if key.endswith(INDEX) and key in state and state[key].shape != value.shape
    }
    if state.keys() - trained.keys() or is_narrower:
        texts = make_dataset(name, base, data, examples, seed)
        collate, size = collator(WEIGHTS[name].kind, base), RECIPES[name].batch_size
        batches = [collate([texts[i] for i in range(at, min(at + size, examples))]) for at in range(0, examples, size)]
    if all(is_narrower.values()) and is_narrower and config.correction_rank is None:
        trained = narrow(old, trained, {start: state[start + INDEX].numel() for start in is_narrower}, batches, ratios)
    if changed := [key for key, value in trained.items() if key not in state or state[key].shape != value.shape]:
        raise ValueError(
            f"{changed[0]} of {run / 'plugin'} does not fit. A network that was trained can get fewer neurons where "
            "its copies are whole, and else stays as it is."
        )
    if state.keys() - trained.keys():
        calibrate(model, batches, ratios)
        fit_correction(model, batches, ratios)
        state = get_peft_model_state_dict(model)
    set_peft_model_state_dict(model, state | trained)
    model.save_pretrained(str(output / "plugin"))
    write_text(output / "run.json", json.dumps(record | {"resized": {"command": command}}, indent=2) + "\n")


def in_full(model: PeftModel) -> dict[str, Tensor]:
    """The state of a plugin whose copies are whole, though they were stored as updates of the base's rows."""
    state: dict[str, Tensor] = get_peft_model_state_dict(model)
    for path, module in model.named_modules():
        if isinstance(module, RowsOfBase):
            name = path.removesuffix(".default")
            bias = {} if module.bias is None else {f"{name}.bias": module.bias.detach()}
            state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")} | bias
            state[f"{name}.weight"] = module.weight.detach()
    return state


def narrow(
    model: PeftModel,
    state: dict[str, Tensor],
    widths: Mapping[str, int],
    batches: Sequence[Mapping[str, Any]],
    ratios: Sequence[int],
) -> dict[str, Tensor]:
    """The state of a trained plugin whose networks have fewer neurons.

    Those stay that have the largest E[‖v_j‖²·(a_j(x) − a_j(m))²] over tokens x that share a row with others, m being
    their mean, with w, u and v as they were trained, and the v of those that stay are fitted by least squares to what
    all of them wrote.

    Args:
        model: the trained plugin on its base.
        state: its state.
        widths: how many neurons stay, by what the names of a layer's tensors begin with.
        batches: arguments of the model's call.
        ratios: those that the plugin is for, each of which sees its share of the batches.
    """
    squares: dict[str, Tensor] = {}

    def observe(layer: VariatorLayer, hidden_states: Tensor, groups: Groups, plugin: str) -> None:
        parts = layer.modules_of(plugin)
        rows = layer.compress(hidden_states, groups, plugin).flatten(0, -2)
        of_rows = neuron_outputs(parts, rows)
        differences = neuron_outputs(parts, hidden_states.flatten(0, -2)) - groups.spread(of_rows)
        differences = torch.where(groups.is_merged, differences, 0).double()
        squares[layer.name] = squares.get(layer.name, 0) + differences.t() @ differences

    for number, ratio in enumerate(ratios):
        run_batches_at(model, batches[number :: len(ratios)], [ratio], observe)
    found = dict(state)
    for layer in plugin_layers(model):
        start = next((start for start in widths if start.endswith(f"{layer.name}.")), None)
        if start is None:
            continue
        square, out = squares[layer.name], f"{start}variator_neuron_out.weight"
        weight = state[out].double()
        stay = (square.diagonal() * weight.square().sum(0)).topk(widths[start]).indices.sort().values
        kept = square[stay][:, stay]
        kept = kept + RIDGE * kept.diagonal().mean() * torch.eye(len(stay), dtype=kept.dtype)
        gone = torch.ones(square.shape[0], dtype=torch.bool).index_fill(0, stay, value=False)
        delta = torch.linalg.solve(kept, square[stay][:, gone] @ weight.t()[gone])
        for key in [key for key in state if key.startswith(start)]:
            if key == out:
                found[key] = (weight[:, stay] + delta.t()).to(state[key]).contiguous()
            elif "variator_neuron" in key:
                found[key] = state[key][stay]
    return found


INDEX = "variator_neurons.index"
"""End of the name of the tensor that says which neurons a network's plugin has copies of."""

#: What a plugin keeps of the one that it goes on with, unless it is told otherwise.
KEPT = (
    "decompression",
    "correction_dim",
    "correction_pattern",
    "compression_ratio",
    "correction_rank",
    "compensation_rank",
    "layers_to_transform",
)


def main() -> None:
    """Resize the plugin of one run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder a data set")
    parser.add_argument("--cache", type=Path, required=True, help="folder that weights.py filled")
    parser.add_argument("--model", choices=list(RECIPES), required=True)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run that trained the plugin")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, in the form of a run's")
    parser.add_argument("--plugin", type=json.loads, required=True, help="fields of VariatorConfig, as JSON")
    parser.add_argument("--examples", type=int, default=1000, help="examples to fit what changes with")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    base = load(arguments.model, arguments.cache)
    resize(
        arguments.model,
        base,
        arguments.data,
        arguments.run,
        arguments.output,
        arguments.plugin,
        arguments.examples,
        arguments.seed,
        shlex.join(["python", *sys.argv]),
    )
    print(f"Wrote {arguments.output}. Next: train.py --start {arguments.output / 'plugin'}")


if __name__ == "__main__":
    main()
