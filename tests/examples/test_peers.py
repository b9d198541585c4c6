"""The peers: each contender is what it says, stages resume, and the page says what was not measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import BertConfig, BertModel

from peft_variator import VariatorConfig


EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "peers"


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 30}
    return BertModel(BertConfig(vocab_size=1200, initializer_range=0.3, **sizes), add_pooling_layer=False).eval()


@torch.no_grad()
def test_token_merging_merges_real_tokens_alone(scripts, encoder):
    merging = scripts("token_merging").MergingBert
    ids, mask = torch.arange(24).view(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, 7:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected, real = encoder(**inputs).last_hidden_state, mask.bool()
    torch.testing.assert_close(merging(encoder, 0.0)(**inputs).last_hidden_state[real], expected[real])
    merged = merging(encoder, 0.2)(**inputs).last_hidden_state
    assert len(merged[1].unique(dim=0)) < 12
    # What a text gets does not hang on how much padding it has.
    alone = merging(encoder, 0.2)(input_ids=ids[:1, :7], attention_mask=mask[:1, :7]).last_hidden_state
    torch.testing.assert_close(merged[:1, :7], alone)
    with pytest.raises(ValueError, match="share"):
        merging(encoder, 0.6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_stages_resume_and_the_page_follows(scripts, encoder, tmp_path, monkeypatch):
    run, weights, page = scripts("run"), scripts("weights"), scripts("page")
    plugin = get_peft_model(BertModel(encoder.config, add_pooling_layer=False), VariatorConfig(correction_dim=8))
    plugin.save_pretrained(tmp_path / "plugin")
    made = run.contenders(
        weights.Loaded(encoder), lambda: encoder, tmp_path / "plugin", tmp_path / "trained", tmp_path
    )
    measured = []

    def measure(model, *args, **kwargs):
        measured.append(model)
        model(input_ids=torch.ones(1, 8, dtype=torch.long), attention_mask=torch.ones(1, 8, dtype=torch.long))
        return {"stsb": {"spearman": 80.0 - len(measured)}}

    monkeypatch.setattr(run, "measure", measure)
    results = tmp_path / "results"
    results.mkdir()
    for _ in range(2):
        quality = run.quality(weights.Loaded(encoder), made, tmp_path, results / "quality-x.json", ["stsb"], None)
    missing = {name for name, entry in quality["contenders"].items() if "missing" in entry}
    assert missing == {"2 of 3 layers", "1 of 3 layers", "networks of 10"}
    assert len(measured) == len(made) - len(missing)
    few = {name: made[name] for name in ("base", "int8", "int8 + plugin, k = 8", "2 of 3 layers")}
    speed = run.speed(few, results / "speed-x.json", [(1, 8)], rounds=2)
    assert set(speed["rows"][0]["speedup"]) == {"int8", "int8 + plugin, k = 8"}
    assert set(speed["missing"]) == {"2 of 3 layers"}
    (tmp_path / "peers.md").write_text("<!-- peers -->\n<!-- /peers -->\n")
    page.write_page(results, tmp_path)
    text = (tmp_path / "peers.md").read_text()
    assert "| base | 79.00 | – | 1 |" in text
    assert (tmp_path / "images" / "peers-x.svg").stat().st_size > 1000
    assert len(page.advice(json.loads((results / "quality-x.json").read_text()), {})) == 5
