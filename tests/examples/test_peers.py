"""The peers: each contender is what it says, stages resume, and the page says what was not measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    MPNetConfig,
    MPNetModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    default_data_collator,
)

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
    made = scripts("contenders").untrained(model)
    assert len(made) == 4
    for make in made.values():
        assert make().eval()(input_ids=ids, attention_mask=mask).last_hidden_state.shape == expected.shape


@torch.no_grad()
def test_patch_merging_is_the_base_until_it_merges(scripts):
    """r = 0 changes nothing, patches are counted once, and the class token and equal patches stay what they are."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    model = Dinov2Model(Dinov2Config(initializer_range=0.3, **sizes)).eval()
    module = scripts("patch_merging")
    pixels = torch.randn(2, 3, 32, 32)
    expected = model(pixels).last_hidden_state
    assert module.MergingViT(model, 0.0)(pixels).last_hidden_state.equal(expected)
    merged = module.MergingViT(model, 1 / 4)(pixels)
    assert merged.last_hidden_state.shape == (2, 17 - 3 * 4, 16)
    assert merged.sizes.sum(1).tolist() == [17, 17]
    assert merged.sizes[:, 0].tolist() == [1, 1]
    assert not merged.last_hidden_state[:, 0].allclose(expected[:, 0])
    # Each pair that goes is a mean weighted by sizes: the sum over patches is kept, and the most similar go first.
    states, weights = torch.randn(1, 7, 4), torch.tensor([[1.0, 2, 1, 3, 1, 1, 1]])
    keys = torch.eye(7)[None].clone()
    keys[0, 4] = keys[0, 3]
    found, summed = module.merge_patches(states, keys, weights, 1)
    torch.testing.assert_close((found * summed[..., None]).sum(1), (states * weights[..., None]).sum(1))
    torch.testing.assert_close(found[0, 4], (3 * states[0, 3] + states[0, 4]) / 4)
    assert found[0, 0].equal(states[0, 0])
    assert module.merge_patches(states, keys, weights, 100)[0].shape[1] == 4
    with pytest.raises(ValueError, match="share"):
        module.MergingViT(model, 0.6)


@pytest.fixture(params=["llama", "qwen2"])
def language_model(request):
    torch.manual_seed(0)
    config, cls = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[request.param]
    sizes = {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "num_key_value_heads": 1}
    return cls(config(vocab_size=1200, intermediate_size=400, initializer_range=0.3, **sizes)).eval()


@torch.no_grad()
def test_layers_that_do_least_are_dropped(scripts, language_model):
    """A layer that changes nothing does nothing; without it the model says the same, and generates with its cache."""
    dropping, ids = scripts("layer_dropping"), torch.arange(1000, 1024).view(2, 12)
    idle = language_model.model.layers[2]
    idle.self_attn.o_proj.weight.zero_()
    idle.mlp.down_proj.weight.zero_()
    found = dropping.influence(language_model, ids)
    assert found[2] == pytest.approx(0, abs=1e-6)
    assert all(each > 0.01 for number, each in enumerate(found) if number != 2)
    before, expected = found, language_model(input_ids=ids).logits
    smaller = dropping.keep_layers(language_model, [0, 1, 3, 4])
    torch.testing.assert_close(smaller(input_ids=ids).logits, expected)
    made = smaller.generate(ids, max_new_tokens=3, do_sample=False)
    assert made.equal(language_model.generate(ids, max_new_tokens=3, do_sample=False))
    assert len(smaller(input_ids=ids).past_key_values.layers) == 4
    assert (language_model.config.num_hidden_layers, len(language_model.model.layers)) == (5, 5)
    assert dropping.influence(language_model, ids) == before  # no hook is left


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_prefill_has_its_contenders(scripts, language_model, tmp_path):
    """In each format alone and under the plugin, and with layers dropped to the plugin's FLOPs."""
    run, contenders = scripts("run"), scripts("contenders")
    fields = run.random_plugin(language_model, tmp_path / "plugin")
    assert (fields["correction_dim"], fields["layers_to_transform"]) == (100, [1, 2, 3, 4])
    ids = torch.arange(1000, 1064)[None]
    made = contenders.language_contenders(language_model, tmp_path / "plugin", ids)
    formats = ["base", "bf16", "int8", "int8 in part"]
    plugins = [
        f"{prefix}plugin, k = {k}" for prefix in ("", "bf16 + ", "int8 + ", "int8 in part + ") for k in (4, 8, 16)
    ]
    assert [name for name in made if "left" not in name] == formats + plugins
    expected = language_model(input_ids=ids, logits_to_keep=1).logits
    for name, contender in made.items():
        found = contender().eval()(input_ids=ids, logits_to_keep=1).logits.float()
        assert found.shape == expected.shape
        assert found.equal(expected) == (name == "base"), name
    linear, in_part = torch.nn.Linear, made["int8 in part"]().eval()
    assert isinstance(in_part.lm_head, linear)
    assert {type(layer.mlp.down_proj) for layer in in_part.model.layers} == {linear}
    assert not isinstance(in_part.model.layers[0].mlp.up_proj, linear)
    # As many layers as come closest to the plugin's FLOPs.
    left = [name for name in made if "left" in name]
    assert left
    cost = {name: contenders.flops(made[name](), "causal") for name in [*left, "plugin, k = 4", "base"]}
    one = cost["base"] - contenders.flops(scripts("layer_dropping").keep_layers(language_model, range(4)), "causal")
    assert min(abs(cost[name] - cost["plugin, k = 4"]) for name in left) <= one / 2


@torch.no_grad()
def test_continuations_are_compared_prompt_by_prompt(scripts, language_model, monkeypatch, tmp_path):
    scripts("run")  # puts the folder of the next one on the path
    module, ids = scripts("causal_quality"), torch.randint(0, 1200, (1, 400))
    monkeypatch.setattr(module, "wikitext2", lambda *args: [])
    fields = {"tokenizer": lambda *args, **kwargs: {"input_ids": ids}, "data": tmp_path, "limit": 3, "prompt": 16}
    base = module.continuations(language_model, language_model, **fields)
    assert (base["nll_above_base"], base["kl"], base["prompts"]) == (0, 0, 3)
    other = scripts("layer_dropping").keep_layers(language_model, [0, 1, 3, 4])
    found = module.continuations(other, language_model, **fields)
    assert found["nll"] - base["nll"] == pytest.approx(found["nll_above_base"], abs=1e-5)
    windows = ids[0, :400].view(5, 80)[:3]
    differences = []
    for window in windows:
        each = [model(input_ids=window[None]).logits[0, 15:-1] for model in (other, language_model)]
        losses = [torch.nn.functional.cross_entropy(logits, window[16:]) for logits in each]
        differences.append(losses[0] - losses[1])
    assert found["nll_above_base"] == pytest.approx(torch.stack(differences).mean().item(), abs=1e-5)
    assert found["nll_above_base_error"] == pytest.approx(torch.stack(differences).std().item() / 3**0.5, abs=1e-5)
    assert found["kl"] > 0
    assert module.continuations(other, language_model, **fields | {"limit": 1})["kl_error"] is None


def test_less_nll_is_better_on_the_page(scripts, tmp_path):
    """Whoever wins: ranks, advice and the picture's axis turn round, and random weights have speed alone."""
    page = scripts("page")
    figures = {"base": (1.0, 3.3), "bf16": (2.0, 3.31), "int8": (1.5, 4.0), "plugin, k = 4": (1.2, 3.35)}
    figures |= {"bf16 + plugin, k = 4": (1.9, 3.37), "layers dropped, 3 of 4 left": (1.3, 3.25)}
    rest = {"kl": 0.1, "kl_error": 0.01, "nll_above_base_error": 0.02, "limit": 9, "prompts": 9}
    quality = {
        "contenders": {
            name: {"parts": {"wikitext2-256": rest | {"nll": nll, "nll_above_base": nll - 3.3}}, "flops": 100}
            for name, (_, nll) in figures.items()
        }
    }
    speedups = {
        name: {"low": times, "median": times, "high": times} for name, (times, _) in figures.items() if name != "base"
    }
    environment = {"cpu": "C", "threads": 1, "torch": "2"}
    speed = {"rows": [{"batch": 1, "length": 8, "seconds": 1.0, "speedup": speedups}]}
    speed |= {"environment": environment, "commands": ["run"]}
    lines = page.advice(quality, speed)
    assert "bf16 + plugin, k = 4 is 0.95 times as fast as bf16 alone, +0.060 nats, which gains nothing" in lines[1]
    assert "without training layers dropped, 3 of 4 left (1.30×, -0.050 nats)" in lines[2]
    assert lines[4].count("bf16 (2.00×, +0.010 nats)") == 2
    (line,) = page.equally_fast(quality, speed)
    assert line.endswith("left (1.30×, 3.250): dropping layers is 0.10 nats better.")
    assert "| plugin, k = 4 | 3.350 | +0.050 ± 0.020 | 0.100 ± 0.010 | 100% | 1.20" in page.table(quality, speed)
    (tmp_path / "quality-x.json").write_text(json.dumps(quality))
    (tmp_path / "speed-x.json").write_text(json.dumps(speed))
    facts = {"weights": "random", "plugin": {"correction_dim": 8, "layers_to_transform": [1, 2, 3]}}
    (tmp_path / "speed-a.json").write_text(json.dumps(speed | facts))
    (tmp_path / "peers.md").write_text("<!-- peers -->\n<!-- /peers -->\n")
    page.write_page(tmp_path, tmp_path)
    text = (tmp_path / "peers.md").read_text()
    assert text.index("## x") < text.index("## a")
    assert "9 prompts. ± is the standard error" in text
    assert (
        "Random weights: speed alone. The plugin is as it starts: correction_dim 8, layers_to_transform 1 to 3" in text
    )


def test_pictures_are_ranked_at_equal_cost(scripts):
    page = scripts("page")
    rows = {"base": (90, 100), "plugin, k = 4": (80, 70), "patch merging, 2": (85, 72), "patch merging, 4": (70, 40)}
    quality = {
        "contenders": {
            name: {"parts": {"cifar10": {"accuracy": float(accuracy), "limit": 9, "test": 9}}, "flops": flops}
            for name, (accuracy, flops) in rows.items()
        }
    }
    (line,) = page.equally_fast(quality, {})
    assert "patch merging, 2 (72% of the FLOPs, 85.00 %): merging patches is 5.00 points better" in line
    speedups = {"plugin, k = 4": 2.0, "patch merging, 2": 1.2, "patch merging, 4": 1.9}
    speed = {"rows": [{"speedup": {name: {"median": value} for name, value in speedups.items()}}]}
    (line,) = page.equally_fast(quality, speed)
    assert "patch merging, 4 (1.90×, 70.00 %): the plugin is 10.00 points better" in line
    assert "| plugin, k = 4 | 80.00 | 70% |" in page.table(quality, {})
    assert page.limits(quality).startswith("Not of all rows: CIFAR-10: 9 to test. ")
    assert "16.7 points at most" in page.limits(quality)


def test_advice_holds_a_plugin_against_the_format_under_it(scripts):
    page = scripts("page")
    figures = {"base": (1.0, 82.0), "bf16": (2.5, 82.0), "bf16 + plugin, k = 8": (3.0, 81.5), "int8": (1.5, 80.0)}
    quality = {"contenders": {name: {"parts": {"stsb": {"spearman": score}}} for name, (_, score) in figures.items()}}
    speedups = {name: {"median": times} for name, (times, _) in figures.items() if name != "base"}
    lines = page.advice(quality, {"rows": [{"speedup": speedups}]})
    assert "bf16 + plugin, k = 8 is 1.20 times as fast as bf16 alone, -0.50 points of STS-B;" in lines[1]
    assert "of int8: speed not measured yet" in lines[1]
    speedups["bf16 + plugin, k = 8"]["median"] = 2.0
    assert "which gains nothing" in page.advice(quality, {"rows": [{"speedup": speedups}]})[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_stages_resume_and_the_page_follows(scripts, encoder, tmp_path, monkeypatch):
    run, weights, page = scripts("run"), scripts("weights"), scripts("page")
    contenders = scripts("contenders")
    plugin = get_peft_model(BertModel(encoder.config, add_pooling_layer=False), VariatorConfig(correction_dim=8))
    plugin.save_pretrained(tmp_path / "plugin")
    smaller = weights.Loaded(encoder, "its own")
    made = contenders.contenders(
        weights.Loaded(encoder, "the base's"), lambda: smaller, tmp_path / "plugin", tmp_path / "trained", tmp_path
    )
    measured, tokenizers = [], []

    def measure(model, read_by, *args, **kwargs):
        measured.append(model)
        tokenizers.append(read_by.tokenizer)
        model(input_ids=torch.ones(1, 8, dtype=torch.long), attention_mask=torch.ones(1, 8, dtype=torch.long))
        return {"stsb": {"spearman": 80.0 - len(measured)}}

    monkeypatch.setattr(run, "measure", measure)
    results = tmp_path / "results"
    results.mkdir()
    for _ in range(2):
        quality = run.quality(
            weights.Loaded(encoder, "the base's"), made, tmp_path, results / "quality-x.json", ["stsb"], None
        )
    assert tokenizers == ["the base's"] * (len(measured) - 1) + ["its own"]
    missing = {name for name, entry in quality["contenders"].items() if "missing" in entry}
    narrowed = f"networks of {contenders.as_cheap(encoder)}"
    assert missing == {"2 of 3 layers", "1 of 3 layers", "networks of 10", narrowed, "trained alike: plugin, k = 16"}
    assert len(measured) == len(made) - len(missing)
    # Another plugin: what was measured with the first one is measured anew, and nothing else.
    count, weights_file = len(measured), tmp_path / "plugin" / "adapter_model.safetensors"
    state = load_file(weights_file)
    save_file({key: value + 1 if value.is_floating_point() else value for key, value in state.items()}, weights_file)
    runtime = {name for name in made if name.startswith("ONNX")}
    fields = {"wanted": lambda name: name not in runtime}
    run.quality(weights.Loaded(encoder), made, tmp_path, results / "quality-x.json", ["stsb"], None, **fields)
    assert len(measured) - count == sum("plugin, " in name for name in {*made} - runtime - missing)
    few = {name: made[name] for name in ("base", "int8", "int8 + plugin, k = 4", "2 of 3 layers")}
    speed = run.speed(few, results / "speed-x.json", [(1, 8)], rounds=2)
    assert set(speed["rows"][0]["speedup"]) == {"int8", "int8 + plugin, k = 4"}
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
    width = scripts("contenders").as_cheap(encoder)
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
    made = scripts("contenders").contenders(base, lambda: base, tmp_path, tmp_path, tmp_path)
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
