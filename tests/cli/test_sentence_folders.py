"""Folders of sentence-transformers stay whole through `prune`, `pack`, `unpack` and `merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import BertConfig, BertModel, BertTokenizerFast
from typer.testing import CliRunner

from peft_variator import SparseLoraConfig
from peft_variator.cli.main import app


sentence_transformers = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.models")

TEXTS = ["a b c d e f", "m n o"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline with every kind of module: of no settings, of settings alone, and of weights of its own."""
    path = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(ord("a"), ord("z") + 1))]
    path.joinpath("vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    BertModel(config).save_pretrained(path / "base")
    BertTokenizerFast(str(path / "vocab.txt")).save_pretrained(path / "base")
    transformer = modules.Transformer(str(path / "base"), max_seq_length=16)
    parts = [
        transformer,
        modules.Pooling(32, pooling_mode="max"),
        modules.Dense(32, 8, activation_function=torch.nn.Tanh()),
        modules.Normalize(),
    ]
    model = sentence_transformers.SentenceTransformer(modules=parts, prompts={"query": "a b "}, device="cpu")
    model.save(str(path / "model"))
    return path / "model"


def run(*words: object) -> None:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output


def load(folder: Path) -> Any:
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu")


def embeddings(model: Any) -> torch.Tensor:
    return model.encode(TEXTS, prompt_name="query", convert_to_tensor=True)


def test_a_pipeline_stays_whole(folder: Path, tmp_path: Path) -> None:
    run("prune", folder, "-o", tmp_path / "pruned", "--method", "magnitude", "--pattern", "2:4")
    run("pack", tmp_path / "pruned", "-o", tmp_path / "packed")
    run("unpack", tmp_path / "packed", "-o", tmp_path / "dense")
    torch.manual_seed(1)
    base = BertModel.from_pretrained(tmp_path / "pruned")
    adapted = get_peft_model(base, SparseLoraConfig(target_modules=["query"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    run("merge", tmp_path / "packed", tmp_path / "adapter", "-o", tmp_path / "merged")
    before, pruned = load(folder), load(tmp_path / "pruned")
    expected = embeddings(pruned)
    assert not torch.allclose(expected, embeddings(before))
    assert torch.equal(embeddings(load(tmp_path / "packed")), expected)
    assert torch.equal(embeddings(load(tmp_path / "dense")), expected)
    assert not torch.allclose(embeddings(load(tmp_path / "merged")), expected)
    for name in ("pruned", "packed", "dense", "merged"):
        after = load(tmp_path / name)
        assert [type(module) for module in after] == [type(module) for module in before]
        assert after.max_seq_length == before.max_seq_length
        assert after[1].get_config_dict() == before[1].get_config_dict()
        assert torch.equal(after[2].linear.weight, before[2].linear.weight)
        assert after.prompts == before.prompts
