"""Train the base model of the study; an interrupted run goes on from its last checkpoint.

python examples/vlm_restore/train_base.py --data DATA/easy_vqa
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from accuracy import measure_accuracy
from data import Collator, load_split, make_tokenizer
from model import make_model
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from peft_variator.files import write_text
from peft_variator.profiling import describe_environment


WORK = Path("outputs/vlm_restore")
RESULTS = Path(__file__).parent / "results"


def main(
    data: Annotated[Path, typer.Option(help="Folder of easy-VQA.")],
    epochs: Annotated[float, typer.Option(help="Passes over the training images.")] = 12,
    batch_size: Annotated[int, typer.Option(help="Images in a batch, each with all of its questions.")] = 32,
    learning_rate: Annotated[float, typer.Option()] = 1e-3,
    work: Annotated[Path, typer.Option(help="Where the model goes.")] = WORK,
    results: Annotated[Path, typer.Option(help="Where the JSON file goes.")] = RESULTS,
) -> None:
    """Train, and write the model and its accuracy."""
    set_seed(0)
    train, start = load_split(data, "train"), time.process_time()
    tokenizer = make_tokenizer(train)
    arguments = TrainingArguments(
        output_dir=str(work / "base_runs"),
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
    collator = Collator(tokenizer, augment=True)
    trainer = Trainer(make_model(tokenizer), arguments, train_dataset=train, data_collator=collator)
    last = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    cpu_minutes = (time.process_time() - start) / 60
    trainer.model.save_pretrained(work / "base")
    tokenizer.save_pretrained(work / "base")
    accuracy = measure_accuracy(trainer.model, load_split(data, "test"), tokenizer)
    record = {
        "accuracy": accuracy,
        "parameters": trainer.model.num_parameters(),
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "steps": trainer.state.global_step,
        "cpu_minutes": cpu_minutes,
        "resumed": last is not None,
        "log": [line for line in trainer.state.log_history if "loss" in line],
        "environment": describe_environment(trainer.args.device),
    }
    write_text(results / "base.json", json.dumps(record, indent=2) + "\n")
    print(f"{accuracy:.2%} of the test questions, {cpu_minutes:.1f} CPU minutes. Next: study.py")


if __name__ == "__main__":
    typer.run(main)
