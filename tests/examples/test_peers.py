"""The peers: each contender is what it says, stages resume, and the page says what was not measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import BertConfig, BertModel, MPNetConfig, MPNetModel, default_data_collator

from peft_variator import VariatorConfig


EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "peers"


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 30}
    return BertModel(BertConfig(vocab_size=1200, initializer_range=0.3, **sizes), add_pooling_layer=False).eval()


@torch.no_grad()
def test_token_merging_merges_real_tokens_alone(scripts, encoder):
    merging = scripts("token_merging").MergingEncoder
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


@torch.no_grad()
def test_mpnet_has_its_contenders(scripts):
    """Merged at any distance, narrowed and shortened; padding changes nothing."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 30}
    model = MPNetModel(MPNetConfig(vocab_size=1200, initializer_range=0.3, **sizes), add_pooling_layer=False).eval()
    ids, mask = torch.arange(24).view(2, 12) + 4, torch.ones(2, 12, dtype=torch.long)
    ids[0, 7:], mask[0, 7:] = model.config.pad_token_id, 0
    real, expected = mask.bool(), model(input_ids=ids, attention_mask=mask).last_hidden_state
    merging = scripts("token_merging").MergingEncoder
    found = merging(model, 0.0)(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
    merged = merging(model, 0.2)(input_ids=ids, attention_mask=mask).last_hidden_state
    assert len(merged[1].unique(dim=0)) < 12
    alone = merging(model, 0.2)(input_ids=ids[:1, :7], attention_mask=mask[:1, :7]).last_hidden_state
    torch.testing.assert_close(merged[:1, :7], alone)
    made = scripts("run").untrained(model)
    assert len(made) == 4
    for make in made.values():
        assert make().eval()(input_ids=ids, attention_mask=mask).last_hidden_state.shape == expected.shape


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
    narrowed = f"networks of {run.as_cheap(encoder)}"
    assert missing == {"2 of 3 layers", "1 of 3 layers", "networks of 10", narrowed, "trained alike: plugin, k = 16"}
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_contenders_are_trained_alike(scripts, encoder, tmp_path, monkeypatch):
    run, weights = scripts("run"), scripts("weights")
    encoder.requires_grad_(False)  # as the plugins that share its weights leave it
    rows = [{"input_ids": torch.randint(1000, 1200, (24,)), "attention_mask": torch.ones(24)} for _ in range(64)]
    for module in ("run", "train"):
        monkeypatch.setattr(scripts(module), "make_dataset", lambda *args, **kwargs: rows)
        monkeypatch.setattr(scripts(module), "collator", lambda *args: default_data_collator)
    monkeypatch.setattr(scripts("train"), "plugin_config", lambda name, base, **fields: VariatorConfig(**fields))
    recipe = scripts("recipes").Recipe(steps=2, batch_size=2)
    monkeypatch.setitem(run.RECIPES, "all-MiniLM-L6-v2", recipe)
    width = run.as_cheap(encoder)
    base, before = weights.Loaded(encoder), {name: value.clone() for name, value in encoder.state_dict().items()}
    results = tmp_path / "results"
    results.mkdir()
    names = ["2 of 3 layers", f"networks of {width}", run.TRAINED_PLUGIN]
    for _ in range(2):
        for name in names:
            run.train("all-MiniLM-L6-v2", base, name, tmp_path, tmp_path, results, 2, 2e-4)
    records = {file.stem: json.loads(file.read_text()) for file in results.iterdir()}
    assert len(records) == 3
    shares = {record["contender"]: record["flops_share"] for record in records.values()}
    assert shares[f"networks of {width}"] == pytest.approx(shares["trained alike: plugin, k = 16"], abs=0.02)
    assert all(record["log"][-1]["learning_rate"] >= 0 for record in records.values())
    assert all(encoder.state_dict()[name].equal(value) for name, value in before.items())
    made = run.contenders(base, lambda: encoder, tmp_path, tmp_path, tmp_path)
    ids = rows[0]["input_ids"][None]
    expected = encoder(ids).last_hidden_state
    for name in shares:
        assert not made[name]().eval()(input_ids=ids).last_hidden_state.allclose(expected)
    assert (encoder.config.num_hidden_layers, encoder.config.intermediate_size) == (3, 30)


def test_the_page_ranks_what_was_trained_alike_whoever_wins(scripts, tmp_path):
    page = scripts("page")
    facts = {"steps": 3, "batch_size": 2, "learning_rate": 2e-4, "trained_parameters": 1_000_000, "flops_share": 0.5}
    files = []
    for name in ("plugin", "4 of 6 layers", "networks of 9"):
        files.append(tmp_path / f"trained-x-{name}.json")
        files[-1].write_text(json.dumps(facts | {"contender": name}))
    parts = {"base": 82.0, "plugin": 80.0, "4 of 6 layers": 81.5}
    quality = {"contenders": {name: {"parts": {"stsb": {"spearman": value}}} for name, value in parts.items()}}
    text = page.trained_alike(quality, {}, files)
    assert text.index("4 of 6 layers -0.50 at 50%") < text.index("plugin -2.00 at 50%")
    assert "| networks of 9 | 50.0% | 1.0 M | 0.0002 | 3 | not measured yet | not measured yet |" in text
    assert page.trained_alike(quality, {}, []) == ""
