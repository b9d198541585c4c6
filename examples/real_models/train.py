"""Train the plugin of one real model; a run that was stopped goes on from its last checkpoint.

python examples/real_models/train.py --data DATA --cache CACHE --model all-MiniLM-L6-v2 --output RUN
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peers import quantize
from peft import PeftModel, get_peft_model
from recipes import (
    RECIPES,
    Recipe,
    collate_photographs,
    make_dataset,
    name_for_whole_model,
    plugin_config,
    trained_part,
)
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, default_data_collator
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging
from weights import WEIGHTS, Loaded, load

from peft_variator.files import write_text
from peft_variator.profiling import describe_environment
from peft_variator.training import DistillationConfig, DistillationTrainer


__all__ = ["collator", "train", "training_arguments"]


def train(
    name: str,
    base: Loaded,
    data: Path,
    output: Path,
    recipe: Recipe,
    seed: int,
    device: str,
    *,
    start: Path | None = None,
    int8: bool = False,
) -> dict[str, Any]:
    """Train a fresh plugin, or go on with one; it is saved in `output/plugin`.

    Args:
        name: one of `RECIPES`.
        base: the model.
        data: the data folder.
        output: folder of the run, with its checkpoints.
        recipe: steps, loss and so on.
        seed: of data, order and ratios.
        device: `cpu`, or anything else for the accelerator that there is.
        start: folder of a trained plugin to begin with, whose configuration counts; `None`: a fresh one.
        int8: train on the base in int8, to follow the base as it was: what int8 costs is then made good, too.

    Returns:
        Parameters and the training log.
    """
    torch.manual_seed(seed)
    base_parameters = base.model.num_parameters()
    part: Any = trained_part(name, base)
    # Before there is a plugin: the base itself answers the questions that it is trained on.
    dataset = make_dataset(name, base, data, recipe.steps * recipe.batch_size, seed, recipe)
    inner = quantize(part) if int8 else part
    if start is None:
        student: Any = get_peft_model(inner, plugin_config(name, base, **recipe.plugin))
    else:
        student = PeftModel.from_pretrained(inner, str(start), is_trainable=True)
    trainer = DistillationTrainer(
        student,
        training_arguments(recipe, output, seed, device),
        train_dataset=dataset,
        data_collator=collator(WEIGHTS[name].kind, base),
        teacher_model=part if int8 else None,
    )
    checkpoints = output / "checkpoints"
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None)
    student.save_pretrained(str(output / "plugin"))
    if WEIGHTS[name].kind == "audio":
        name_for_whole_model(output / "plugin")
    trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    return {
        "parameters": {"base": base_parameters, "plugin": trained},
        "log": [line for line in trainer.state.log_history if "loss" in line],
    }


def training_arguments(recipe: Recipe, output: Path, seed: int, device: str) -> DistillationConfig:
    """Arguments of a run; see `train`."""
    # Sentences beside spans: a batch of both would be padding for the most part.
    sampling = {"train_sampling_strategy": "group_by_length"} if recipe.sentences else {}
    return DistillationConfig(
        output_dir=str(output / "checkpoints"),
        ratios=list(recipe.ratios) or None,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        bf16=recipe.bf16,
        logging_steps=min(25, recipe.steps),
        # On two cores a step of the larger models takes seconds, so this is minutes of work at most.
        save_steps=50,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=device == "cpu",
        seed=seed,
        **sampling | recipe.losses,
    )


def collator(kind: str, base: Loaded) -> Any:
    """What makes batches of examples for a kind of model."""
    if kind == "vision":
        return collate_photographs
    if kind == "audio":
        return default_data_collator
    if base.tokenizer.pad_token is None:
        base.tokenizer.pad_token = base.tokenizer.eos_token
    return DataCollatorForSeq2Seq(base.tokenizer) if kind == "causal" else DataCollatorWithPadding(base.tokenizer)


def main() -> None:
    """Train, and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder a data set")
    parser.add_argument("--cache", type=Path, required=True, help="folder that weights.py filled")
    parser.add_argument("--model", choices=list(RECIPES), required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, help="optimizer steps; the recipe's if not given")
    parser.add_argument("--batch-size", type=int, help="examples a step; the recipe's if not given")
    parser.add_argument("--length", type=int, help="tokens of the longest text; the recipe's if not given")
    parser.add_argument("--sentences", type=float, help="share of single sentences; the recipe's if not given")
    parser.add_argument("--questions", type=float, help="share of questions on a passage; the recipe's if not given")
    parser.add_argument("--learning-rate", type=float, help="the peak; the recipe's if not given")
    parser.add_argument("--ratios", type=int, nargs="+", help="compression ratios; the recipe's if not given")
    parser.add_argument("--bf16", action="store_true", help="products of matrices in bfloat16")
    parser.add_argument("--plugin", type=json.loads, default={}, help="fields of VariatorConfig, as JSON")
    parser.add_argument("--start", type=Path, help="folder of a trained plugin to go on with, instead of --plugin")
    parser.add_argument("--int8", action="store_true", help="train on the base in int8, to follow it as it was")
    parser.add_argument("--losses", type=json.loads, default={}, help="fields of DistillationConfig, as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    result = arguments.output / "run.json"
    if result.is_file():
        parser.error(f"{result} is there: that run is done. Name another --output.")
    for name in ("sentences", "questions"):
        share = getattr(arguments, name)
        if share is not None and not 0 <= share <= 1:
            parser.error(f"--{name} is {share}; a share is from 0 to 1.")
    if arguments.questions and WEIGHTS[arguments.model].kind != "causal":
        parser.error(f"--questions are for a chat model, which {arguments.model} is not: leave it out.")
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    recipe = RECIPES[arguments.model]
    recipe = replace(
        recipe,
        steps=arguments.steps or recipe.steps,
        batch_size=arguments.batch_size or recipe.batch_size,
        length=arguments.length or recipe.length,
        sentences=recipe.sentences if arguments.sentences is None else arguments.sentences,
        questions=recipe.questions if arguments.questions is None else arguments.questions,
        learning_rate=arguments.learning_rate or recipe.learning_rate,
        ratios=tuple(arguments.ratios or recipe.ratios),
        bf16=recipe.bf16 or arguments.bf16,
        losses=recipe.losses | arguments.losses,
        plugin=recipe.plugin | arguments.plugin,
    )
    environment = describe_environment(torch.device(arguments.device))
    base = load(arguments.model, arguments.cache)
    start = time.perf_counter()
    figures = train(
        arguments.model,
        base,
        arguments.data,
        arguments.output,
        recipe,
        arguments.seed,
        arguments.device,
        start=arguments.start,
        int8=arguments.int8,
    )
    record = {
        "model": arguments.model,
        "weights_sha256": WEIGHTS[arguments.model].sha256,
        "command": shlex.join(["python", *sys.argv]),
        "recipe": asdict(recipe),
        "seed": arguments.seed,
        "environment": environment,
        # Of the last start only, where a run was stopped and went on.
        "seconds": round(time.perf_counter() - start, 1),
    }
    first = None if arguments.start is None else arguments.start.parent / "run.json"
    if first is not None and first.is_file():
        before = json.loads(first.read_text())
        earlier = {key: before[key] for key in ("before", "resized") if key in before}
        record["before"] = {"command": before["command"], "steps": before["recipe"]["steps"]} | earlier
    write_text(result, json.dumps(record | figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
