"""Inside of sentence-transformers, which calls `forward` by itself, a plugin is really on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

from peft_variator import VariatorConfig, using_ratio


sentence_transformers = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.models")

TEXTS = ["a b c d e f g h i j k l", "m n o p q", "r s t u v w x y z a b c d e f", "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder as sentence-transformers saves one."""
    path = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(ord("a"), ord("z") + 1))]
    path.joinpath("vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(path / "vocab.txt"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    BertModel(config).eval().save_pretrained(path / "base")
    tokenizer.save_pretrained(path / "base")
    transformer = modules.Transformer(str(path / "base"))
    pooling = modules.Pooling(transformer.get_embedding_dimension())
    sentence_transformers.SentenceTransformer(modules=[transformer, pooling]).save(str(path / "model"))
    return path


def load(folder: Path) -> Any:
    return sentence_transformers.SentenceTransformer(str(folder / "model"), device="cpu")


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Path:
    torch.manual_seed(1)
    base = BertModel.from_pretrained(folder / "base")
    config = VariatorConfig(init_weights=False, compression_ratio=8, task_type="FEATURE_EXTRACTION")
    get_peft_model(base, config).save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.fixture(scope="module")
def expected(folder: Path, adapter: Path) -> np.ndarray:
    """Embeddings of the plugin without sentence-transformers."""
    model = PeftModel.from_pretrained(BertModel.from_pretrained(folder / "base"), adapter).eval()
    inputs = BertTokenizerFast.from_pretrained(folder / "base")(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    return ((hidden * mask).sum(1) / mask.sum(1)).numpy()


def assert_plugin(model: Any, expected: np.ndarray, folder: Path) -> None:
    found = model.encode(TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - load(folder).encode(TEXTS))[:3].max() > 1e-3


def test_load_adapter(folder: Path, adapter: Path, expected: np.ndarray) -> None:
    model = load(folder)
    model.load_adapter(str(adapter))
    assert_plugin(model, expected, folder)


def test_get_peft_model_around_it(folder: Path) -> None:
    model = load(folder)
    torch.manual_seed(1)
    adapted = get_peft_model(model, VariatorConfig(init_weights=False, compression_ratio=8))
    assert np.abs(adapted.get_base_model().encode(TEXTS) - load(folder).encode(TEXTS))[:3].max() > 1e-3
    with using_ratio(model, 1):
        np.testing.assert_array_equal(model.encode(TEXTS), load(folder).encode(TEXTS))


def test_a_new_adapter_learns(folder: Path) -> None:
    model = load(folder)
    model.add_adapter(VariatorConfig(init_weights=False, compression_ratio=4))
    features = model.preprocess(TEXTS)
    model.train()(features)["sentence_embedding"].square().mean().backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "variator_" in name]
    assert gradients
    assert all(gradient is not None for gradient in gradients)


def test_ratios_are_chosen_on_the_outer_model(folder: Path, adapter: Path, expected: np.ndarray) -> None:
    model = load(folder)
    model.load_adapter(str(adapter))
    with using_ratio(model, 1):
        np.testing.assert_array_equal(model.encode(TEXTS), load(folder).encode(TEXTS))
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-5)


@pytest.fixture(scope="module")
def whole(folder: Path, adapter: Path) -> Path:
    """The plugin with what stands beside a model of sentence-transformers, as `save` writes it."""
    model = load(folder)
    model.load_adapter(str(adapter))
    model.save(str(folder / "whole"))
    return folder / "whole"


def test_a_saved_model_is_the_plugin_and_loads_by_itself(whole: Path, expected: np.ndarray, folder: Path) -> None:
    assert not (whole / "model.safetensors").exists()
    assert_plugin(sentence_transformers.SentenceTransformer(str(whole), device="cpu"), expected, folder)


def test_saving_again(whole: Path, expected: np.ndarray, folder: Path, tmp_path: Path) -> None:
    sentence_transformers.SentenceTransformer(str(whole), device="cpu").save(str(tmp_path / "again"))
    assert_plugin(sentence_transformers.SentenceTransformer(str(tmp_path / "again"), device="cpu"), expected, folder)


@pytest.mark.slow
def test_a_pool_of_processes(whole: Path, expected: np.ndarray) -> None:
    model = sentence_transformers.SentenceTransformer(str(whole), device="cpu")
    pool = model.start_multi_process_pool(["cpu"])
    try:
        np.testing.assert_allclose(model.encode(TEXTS, pool=pool, chunk_size=2), expected, atol=1e-5)
    finally:
        model.stop_multi_process_pool(pool)


def test_a_cross_encoder(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=31, num_labels=1, initializer_range=0.5, **sizes)
    BertForSequenceClassification(config).eval().save_pretrained(tmp_path / "base")
    BertTokenizerFast.from_pretrained(folder / "base").save_pretrained(tmp_path / "base")
    pairs = [(one, other) for one in TEXTS for other in TEXTS]
    model = sentence_transformers.CrossEncoder(str(tmp_path / "base"), device="cpu")
    alone = model.predict(pairs)
    torch.manual_seed(1)
    model.add_adapter(VariatorConfig(init_weights=False, compression_ratio=8, task_type="SEQ_CLS"))
    found = model.predict(pairs)
    assert np.abs(found - alone).max() > 1e-3
    with using_ratio(model, 1):
        np.testing.assert_array_equal(model.predict(pairs), alone)
    model.save(str(tmp_path / "saved"))
    loaded = sentence_transformers.CrossEncoder(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(loaded.predict(pairs), found, atol=1e-5)


def test_its_trainer_moves_the_plugin_alone(folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    losses = pytest.importorskip("sentence_transformers.losses")
    model = load(folder)
    model.add_adapter(VariatorConfig(init_weights=False, compression_ratio=4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=0.1, save_strategy="no", report_to="none", use_cpu=True
    )
    pairs = datasets.Dataset.from_dict({"anchor": TEXTS[:3], "positive": TEXTS[1:]})
    sentence_transformers.SentenceTransformerTrainer(
        model, arguments, train_dataset=pairs, loss=losses.MultipleNegativesRankingLoss(model)
    ).train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved
    assert all("variator_" in name for name in moved)
