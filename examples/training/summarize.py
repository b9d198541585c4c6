"""A plugin for an encoder–decoder trained with transformers' `Seq2SeqTrainer`, judged by what it generates.

    python examples/training/summarize.py google-t5/t5-small --data articles.tsv --output summaries-plugin

`articles.tsv` has a text and its summary a line, with a tab between them. Only the encoder is compressed: a decoder
generates one token at a time, where there is nothing to merge.
"""

from __future__ import annotations

import tempfile

from peft import get_peft_model
from tiny import options, read_pairs, save_tiny, tiny_pairs
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from peft_variator import VariatorConfig


def main() -> None:
    """Train, generate from held-out texts, and save."""
    chosen = options(__doc__.splitlines()[0], "google-t5/t5-small", "a text and its summary a line")
    with tempfile.TemporaryDirectory() as scratch:
        name = save_tiny("seq2seq", f"{scratch}/model") if chosen.tiny else chosen.model
        pairs = [(text, text[:8]) for text, _ in tiny_pairs()] if chosen.tiny else read_pairs(chosen.data)
        tokenizer = AutoTokenizer.from_pretrained(name)
        config = VariatorConfig.from_tokenizer(tokenizer, compression_ratio=chosen.ratio, task_type="SEQ_2_SEQ_LM")
        model = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(name), config)
        examples = [
            {**tokenizer(text, truncation=True, max_length=512), "labels": tokenizer(text_target=summary)["input_ids"]}
            for text, summary in pairs
        ]
        held_out = max(1, len(examples) // 10)
        arguments = Seq2SeqTrainingArguments(
            scratch,
            max_steps=chosen.steps,
            per_device_train_batch_size=chosen.batch_size,
            learning_rate=1e-3,
            predict_with_generate=True,
            generation_max_length=32,
            save_strategy="no",
            report_to="none",
        )
        trainer = Seq2SeqTrainer(
            model,
            arguments,
            train_dataset=examples[:-held_out],
            eval_dataset=examples[-held_out:],
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
            processing_class=tokenizer,
        )
        trainer.train()
        predictions = trainer.predict(trainer.eval_dataset).predictions
        predictions[predictions < 0] = tokenizer.pad_token_id
        print(tokenizer.batch_decode(predictions, skip_special_tokens=True)[0])
        model.save_pretrained(chosen.output)


if __name__ == "__main__":
    main()
