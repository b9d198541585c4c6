"""Begin a run with the plugin of another one: in networks more, which are fitted, or with copies trained in full.

python examples/real_models/widen.py --data DATA --cache CACHE --model all-mpnet-base-v2 --run RUN --output START \
  --plugin '{"layers_to_transform": null, "correction_pattern": {"layer.0.intermediate": 1280}}'
python examples/real_models/widen.py --data DATA --cache CACHE --model SmolLM2-135M-Instruct --run RUN --output START \
  --plugin '{"correction_rank": null}'
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from recipes import RECIPES, make_dataset, plugin_config
from torch import Tensor
from train import collator
from weights import WEIGHTS, Loaded, load

from peft_variator import VariatorConfig, calibrate, fit_correction
from peft_variator.files import write_text
from peft_variator.profiling import share_weights
from peft_variator.tuners.variator.linear_maps import RowsOfBase


__all__ = ["widen"]


def widen(
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
        examples: how many the networks that are new are calibrated and fitted with.
        seed: of those examples.
        command: how this was asked for.

    Raises:
        ValueError: if a network that was trained has another width now.
    """
    config = VariatorConfig.from_pretrained(str(run / "plugin"))
    record = json.loads((run / "run.json").read_text())
    ratios = record["recipe"]["ratios"]
    before = {key: getattr(config, key) for key in KEPT}
    pattern = before["correction_pattern"] | fields.get("correction_pattern", {})
    old = PeftModel.from_pretrained(share_weights(base.model), str(run / "plugin"))
    model = get_peft_model(base.model, plugin_config(name, base, **before | fields | {"correction_pattern": pattern}))
    trained = in_full(old) if model.peft_config["default"].correction_rank is None else get_peft_model_state_dict(old)
    if get_peft_model_state_dict(model).keys() - trained.keys():
        texts = make_dataset(name, base, data, examples, seed)
        collate, size = collator(WEIGHTS[name].kind, base), RECIPES[name].batch_size
        batches = [collate([texts[i] for i in range(at, min(at + size, examples))]) for at in range(0, examples, size)]
        calibrate(model, batches, ratios)
        fit_correction(model, batches, ratios)
    state = get_peft_model_state_dict(model)
    if changed := [key for key, value in trained.items() if key not in state or state[key].shape != value.shape]:
        raise ValueError(f"{changed[0]} of {run / 'plugin'} does not fit; leave the trained networks as they are.")
    set_peft_model_state_dict(model, state | trained)
    model.save_pretrained(str(output / "plugin"))
    write_text(output / "run.json", json.dumps(record | {"widened": {"command": command}}, indent=2) + "\n")


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
    """Widen the plugin of one run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder a data set")
    parser.add_argument("--cache", type=Path, required=True, help="folder that weights.py filled")
    parser.add_argument("--model", choices=list(RECIPES), required=True)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run that trained the plugin")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, in the form of a run's")
    parser.add_argument("--plugin", type=json.loads, required=True, help="fields of VariatorConfig, as JSON")
    parser.add_argument("--examples", type=int, default=1000, help="examples to fit what is new with")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    base = load(arguments.model, arguments.cache)
    widen(
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
