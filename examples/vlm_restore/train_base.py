"""Train the base model of the study; an interrupted run goes on from its last checkpoint.

python examples/vlm_restore/train_base.py --data DATA/easy_vqa
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accuracy import measure_accuracy
from data import Collator, Example, color_questions, load_split, make_tokenizer
from model import make_model
from torch import nn
from tower import Namer, collate_names
from transformers import Trainer, TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from peft_variator.files import write_text
from peft_variator.profiling import describe_environment


WORK = Path("outputs/vlm_restore")
RESULTS = Path(__file__).parent / "results"


def fit(
    model: nn.Module,
    examples: list[Example],
    collate: Callable[..., Any],
    folder: Path,
    epochs: float,
    batch_size: int,
    learning_rate: float,
) -> TrainerState:
    """Train `model` in place, from the last checkpoint in `folder` if there is one."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.05,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        save_steps=100,
        save_total_limit=1,
        logging_steps=25,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=examples, data_collator=collate)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    return trainer.state


def main(
    data: Annotated[Path, typer.Option(help="Folder of easy-VQA.")],
    tower_epochs: Annotated[float, typer.Option(help="Passes of the vision tower alone, learning names.")] = 12,
    color_epochs: Annotated[float, typer.Option(help="Passes of the rest over the questions about colours.")] = 3,
    epochs: Annotated[float, typer.Option(help="Passes of the rest over all questions.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Images in a batch, each with all of its questions.")] = 16,
    learning_rate: Annotated[float, typer.Option()] = 1e-3,
    work: Annotated[Path, typer.Option(help="Where the model goes.")] = WORK,
    results: Annotated[Path, typer.Option(help="Where the JSON file goes.")] = RESULTS,
) -> None:
    """Train the tower, then what reads it; write the model and its accuracy."""
    set_seed(0)
    train, start = load_split(data, "train"), time.process_time()
    tokenizer = make_tokenizer(train)
    model, runs = make_model(tokenizer), work / "base_runs"
    collate, resumed = Collator(tokenizer, augment=True), runs.is_dir()
    tower = model.model.vision_tower
    fitted = {
        "tower": fit(Namer(tower), train, collate_names, runs / "tower", tower_epochs, 4 * batch_size, learning_rate)
    }
    tower.requires_grad_(False)  # as in LLaVA
    # "Is there a red shape?" takes the longest to learn, hundreds of steps on a plateau, and longer among others.
    lessons = {"colors": (color_questions(train), color_epochs), "all": (train, epochs)}
    for name, (examples, passes) in lessons.items():
        fitted[name] = fit(model, examples, collate, runs / name, passes, batch_size, learning_rate)
    cpu_minutes = (time.process_time() - start) / 60
    model.save_pretrained(work / "base")
    tokenizer.save_pretrained(work / "base")
    accuracy = measure_accuracy(model, load_split(data, "test"), tokenizer)
    record = {
        "accuracy": accuracy,
        "parameters": model.num_parameters(),
        "epochs": {"tower": tower_epochs, "colors": color_epochs, "all": epochs},
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "steps": {name: state.global_step for name, state in fitted.items()},
        "cpu_minutes": cpu_minutes,
        "resumed": resumed,
        "log": {name: [line for line in state.log_history if "loss" in line] for name, state in fitted.items()},
        "environment": describe_environment(torch.device("cpu")),
    }
    write_text(results / "base.json", json.dumps(record, indent=2) + "\n")
    print(f"{accuracy:.2%} of the test questions, {cpu_minutes:.1f} CPU minutes. Next: study.py")


if __name__ == "__main__":
    typer.run(main)
