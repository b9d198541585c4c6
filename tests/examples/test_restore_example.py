"""Restoring a language model: what it is measured on, runs that go on, and what is delivered in the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "restore"


class Words:
    """A tokenizer of one id a letter."""

    def __call__(self, texts, return_tensors=None):
        if isinstance(texts, str):
            return {"input_ids": torch.tensor([[ord(letter) % 64 for letter in texts]])}
        return {"input_ids": [[ord(letter) % 64 for letter in text] for text in texts]}

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids.tolist()))


@pytest.fixture
def subject(scripts, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    found = scripts("language").LanguageModel(tmp_path, steps=4, evaluated=3, work=tmp_path / "work")
    found.dense = LlamaForCausalLM(LlamaConfig(vocab_size=64, eos_token_id=None, **sizes)).eval()
    found.tokenizer, found.length, found.batch_size, found.rank = Words(), 16, 2, 4
    found.training = torch.randint(64, (40, 16))
    found.held_out = {"loss": torch.randint(64, (3, 16)), "loss_tinystories": torch.randint(64, (3, 16))}
    return found


@pytest.mark.slow
def test_a_restored_model_is_packed_merged_by_file_and_loaded(subject, tmp_path):
    found = subject.run("sparsegpt", "sparse-lora-distilled", 0)
    assert found["pattern_met"]
    assert found["sparsity"] == 0.5
    assert len(found["packed"]["generated"].split()) > 20
    assert found["packed"]["bytes"]["merged"] < found["packed"]["bytes"]["pruned"]
    # A run that is called again goes on from what is there, with the same model.
    again = subject.run("sparsegpt", "sparse-lora-distilled", 0)
    assert again["loss"] == found["loss"]
    pruned = subject.run("sparsegpt", "pruned", 0)
    assert found["loss_tinystories"] != pruned["loss_tinystories"]


def test_plain_lora_is_measured_with_zeros_lost_and_put_back(subject):
    found = subject.run("magnitude", "lora", 0)
    assert not found["pattern_met"]
    assert {"loss_with_zeros_put_back", "loss_tinystories_with_zeros_put_back"} <= set(found)


def test_the_page_has_a_column_for_the_other_text(scripts):
    facts = {"sparsity": 0.5, "pattern_met": True, "seed": 0}
    losses = {"dense": 2.0, "pruned": 4.0, "sparse-lora": 2.5}
    records = [{"variant": name, "loss": loss, "loss_tinystories": loss + 1} | facts for name, loss in losses.items()]
    table = scripts("render").table(records, "loss", 2)
    assert "| SparseLoRA, merged | 2.50 | 75% | 3.50 | 50.0% | yes | 1 |" in table
    assert "won back | loss on TinyStories | zeros" in table


def test_an_output_map_tied_to_the_embeddings_is_no_target(scripts):
    """Rounding leaves zeros in it, and it can't be merged into."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=True, **sizes)).eval()
    with torch.no_grad():
        for map in (model.lm_head, model.model.layers[0].mlp.up_proj):
            map.weight[:, ::2] = 0
    adapted = scripts("training").adapt(model, masked=True, rank=4)
    assert adapted.targeted_module_names == ["model.layers.0.mlp.up_proj"]
    adapted.merge_and_unload()
