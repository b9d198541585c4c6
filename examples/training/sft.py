"""A plugin for a language model trained with TRL's `SFTTrainer`, on completions alone.

    python examples/training/sft.py HuggingFaceTB/SmolLM2-135M-Instruct --data chats.tsv --output chat-plugin

`chats.tsv` has a prompt and its completion a line, with a tab between them. Positions whose prediction is trained are
never merged, so on completions alone (`completion_only_loss`, TRL's default for such data) the prompt is what gets
faster; text without prompts leaves nothing to merge. `--packing` joins texts to rows of one length, `--padding-free`
flattens a batch to one row: groups end where a text ends. TRL recommends both with FlashAttention; other kernels of
transformers keep texts apart by `position_ids`.
"""

from __future__ import annotations

import sys
import tempfile

from datasets import Dataset
from tiny import options, read_pairs, save_tiny, tiny_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from peft_variator import VariatorConfig


def take_switch(name: str) -> bool:
    """Whether a switch is on the command line, which it leaves."""
    if name not in sys.argv:
        return False
    sys.argv.remove(name)
    return True


def main() -> None:
    """Train and save."""
    packing, padding_free = take_switch("--packing"), take_switch("--padding-free")
    chosen = options(__doc__.splitlines()[0], "HuggingFaceTB/SmolLM2-135M-Instruct", "a prompt and its completion")
    with tempfile.TemporaryDirectory() as scratch:
        name = save_tiny("causal", f"{scratch}/model") if chosen.tiny else chosen.model
        pairs = [(text, " w1 w2") for text, _ in tiny_pairs()] if chosen.tiny else read_pairs(chosen.data)
        tokenizer = AutoTokenizer.from_pretrained(name)
        prompts, completions = zip(*pairs, strict=True)
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(name),
            SFTConfig(
                scratch,
                max_steps=chosen.steps,
                per_device_train_batch_size=chosen.batch_size,
                learning_rate=1e-3,
                max_length=None if padding_free and not packing else 64 if chosen.tiny else 1024,
                packing=packing,
                padding_free=padding_free,
                bf16=False if chosen.tiny else None,
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=Dataset.from_dict({"prompt": list(prompts), "completion": list(completions)}),
            processing_class=tokenizer,
            peft_config=VariatorConfig.from_tokenizer(
                tokenizer, compression_ratio=chosen.ratio, task_type="CAUSAL_LM"
            ),
        )
        trainer.train()
        trainer.model.save_pretrained(chosen.output)


if __name__ == "__main__":
    main()
