"""A plugin distilled in a loop of one's own over Accelerate, on any number of processes.

    accelerate launch --num_processes 2 examples/training/accelerate_loop.py bert-base-uncased \
        --data texts.tsv --output bert-plugin

The first column of `texts.tsv` is read; no labels are needed. The teacher is the same model at k = 1, so its weights
are in memory once. `peft-variator train` and `DistillationTrainer` do more (exact means over processes, several
ratios, checkpoints); this is the least.
"""

from __future__ import annotations

import tempfile
from itertools import cycle, islice

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import get_peft_model
from tiny import options, read_pairs, save_tiny, tiny_pairs
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer

from peft_variator import VariatorConfig, using_ratio


def main() -> None:
    """Train and save."""
    chosen = options(__doc__.splitlines()[0], "google-bert/bert-base-uncased", "a text a line")
    accelerator = Accelerator(cpu=chosen.tiny)
    set_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        name = save_tiny("encoder", f"{scratch}/model") if chosen.tiny else chosen.model
        texts = [text for text, _ in (tiny_pairs() if chosen.tiny else read_pairs(chosen.data))]
        tokenizer = AutoTokenizer.from_pretrained(name)
        base = AutoModel.from_pretrained(name)
    model = get_peft_model(base, VariatorConfig.from_tokenizer(tokenizer, compression_ratio=chosen.ratio))
    loader = DataLoader(
        texts,
        batch_size=chosen.batch_size,
        shuffle=True,
        collate_fn=lambda batch: (
            tokenizer(batch, padding=True, truncation=True, max_length=128, return_tensors="pt").data
        ),
    )
    optimizer = torch.optim.AdamW((value for value in model.parameters() if value.requires_grad), lr=2e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in islice(cycle(loader), chosen.steps):
        with torch.no_grad(), using_ratio(accelerator.unwrap_model(model), 1):
            wanted = model(**batch).last_hidden_state
        given = model(**batch).last_hidden_state
        real = batch["attention_mask"].bool()
        loss = torch.nn.functional.mse_loss(given[real], wanted[real])
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.print(f"loss: {loss.item():.3g}")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(chosen.output)
    accelerator.end_training()


if __name__ == "__main__":
    main()
