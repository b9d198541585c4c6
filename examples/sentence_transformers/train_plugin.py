"""A plugin for an embedding model, trained with sentence-transformers' own trainer on pairs that mean the same.

    python examples/sentence_transformers/train_plugin.py sentence-transformers/all-MiniLM-L6-v2 \
        --pairs pairs.tsv --output minilm-plugin

`pairs.tsv` has two texts a line, with a tab between them. The model is frozen, only the plugin learns: it starts close
to the model, and contrastive pairs of your own domain teach it what matters there. Without pairs, distil instead
(`peft-variator train`), which needs plain text alone.

`--tiny` builds a model of two small layers and trains two steps, without a network: what the tests run.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import MultipleNegativesRankingLoss
from sentence_transformers.models import Pooling, Transformer
from transformers import BertConfig, BertModel, BertTokenizerFast

from peft_variator import VariatorConfig, using_ratio


def train(model: SentenceTransformer, pairs: list[tuple[str, str]], ratio: int, steps: int, scratch: str) -> None:
    """Put a plugin into a model and train it in place.

    Args:
        model: the model; its own weights stay as they are.
        pairs: texts that mean the same.
        ratio: the compression ratio k to train for.
        steps: optimizer steps.
        scratch: folder for the trainer.
    """
    config = VariatorConfig.from_tokenizer(model.tokenizer, compression_ratio=ratio, task_type="FEATURE_EXTRACTION")
    model.add_adapter(config)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=scratch,
        max_steps=steps,
        per_device_train_batch_size=min(32, len(pairs)),
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
    )
    first, second = zip(*pairs, strict=True)
    trainer = SentenceTransformerTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_dict({"anchor": list(first), "positive": list(second)}),
        loss=MultipleNegativesRankingLoss(model),
    )
    trainer.train()


def fidelity(model: SentenceTransformer, texts: list[str]) -> float:
    """The mean cosine of a model's embeddings with its plugin and without, 1 at best."""
    with using_ratio(model, 1):
        base = model.encode(texts, convert_to_tensor=True)
    return float(torch.cosine_similarity(model.encode(texts, convert_to_tensor=True), base).mean())


def tiny_model(folder: Path) -> SentenceTransformer:
    """A model of two small layers with random weights, over letters as words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(words))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    transformer = Transformer(str(folder))
    return SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())], device="cpu")


def main() -> None:
    """Train, compare with the base, save, and load what was saved."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--pairs", type=Path, help="two texts a line, a tab between them")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ratio", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, two steps, no network")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.tiny:
            model, options.steps = tiny_model(Path(scratch)), 2
            pairs = [("a b c d e f g h i j k l", "l k j i h g f e d c b a"), ("m n o p q r s t", "t s r q p o n m")]
        elif options.pairs is None:
            parser.error("--pairs is missing")
        else:
            model = SentenceTransformer(options.model)
            with options.pairs.open(newline="", encoding="utf-8") as file:
                pairs = [(row[0], row[1]) for row in csv.reader(file, delimiter="\t")]
        texts = [text for pair in pairs[:100] for text in pair]
        train(model, pairs, options.ratio, options.steps, scratch)
        model.save(str(options.output))  # the plugin alone, with pooling and tokenizer beside it
        print(f"cosine to the base at k = {options.ratio}: {fidelity(model, texts):.4f}")
        loaded = SentenceTransformer(str(options.output))
        print(f"of the saved one: {fidelity(loaded, texts):.4f}")


if __name__ == "__main__":
    main()
