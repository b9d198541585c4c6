"""A classifier and a plugin trained together with transformers' plain `Trainer`.

    python examples/training/classify.py google-bert/bert-base-uncased --data sst2.tsv --output sst2-plugin

`sst2.tsv` has a text and its label a line, with a tab between them. The base is frozen; the plugin and the classifier
learn, and `modules_to_save` puts the classifier into the adapter's folder.
"""

from __future__ import annotations

import tempfile

from peft import get_peft_model
from tiny import options, read_pairs, save_tiny, tiny_pairs
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from peft_variator import VariatorConfig


def main() -> None:
    """Train and save."""
    chosen = options(__doc__.splitlines()[0], "google-bert/bert-base-uncased", "a text and its label a line")
    with tempfile.TemporaryDirectory() as scratch:
        name = save_tiny("encoder", f"{scratch}/model") if chosen.tiny else chosen.model
        pairs = tiny_pairs() if chosen.tiny else read_pairs(chosen.data)
        labels = sorted({label for _, label in pairs})
        tokenizer = AutoTokenizer.from_pretrained(name)
        base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(labels))
        config = VariatorConfig.from_tokenizer(
            tokenizer, compression_ratio=chosen.ratio, task_type="SEQ_CLS", modules_to_save=["classifier"]
        )
        model = get_peft_model(base, config)
        examples = [
            {**tokenizer(text, truncation=True, max_length=128), "labels": labels.index(label)}
            for text, label in pairs
        ]
        arguments = TrainingArguments(
            scratch,
            max_steps=chosen.steps,
            per_device_train_batch_size=chosen.batch_size,
            learning_rate=1e-3,
            save_strategy="no",
            report_to="none",
        )
        trainer = Trainer(model, arguments, train_dataset=examples, data_collator=DataCollatorWithPadding(tokenizer))
        trainer.train()
        model.save_pretrained(chosen.output)
        tokenizer.save_pretrained(chosen.output)


if __name__ == "__main__":
    main()
