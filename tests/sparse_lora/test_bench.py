import importlib
import json
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner


EXAMPLE = Path(__file__).parents[2] / "examples" / "sparse_lora_bench"
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}


@pytest.fixture
def app(monkeypatch) -> typer.Typer:
    monkeypatch.syspath_prepend(EXAMPLE)
    modules = ("bench_train_step", "formulations", "step")
    app = typer.Typer()
    app.command()(importlib.import_module(modules[0]).main)
    yield app
    for name in modules:
        del sys.modules[name]


def test_every_formulation_is_timed_and_only_recompute_keeps_no_weight(app, tmp_path) -> None:
    models = []
    for kind in ("bert", "llama"):
        models.append(tmp_path / kind / "config.json")
        models[-1].parent.mkdir()
        models[-1].write_text(json.dumps({"model_type": kind, **TINY}))
    output = tmp_path / "results.json"
    options = ["--batch", "2", "--length", "5", "--rounds", "2", "--rank", "2", "--output", str(output)]
    result = CliRunner().invoke(app, [part for model in models for part in ("--model", str(model))] + options)
    assert result.exit_code == 0, result.output
    report = json.loads(output.read_text())
    assert report["settings"]["length"] == 5
    assert report["environment"]["threads"] >= 1
    assert [entry["model"] for entry in report["results"]] == [str(model) for model in models]
    for entry in report["results"]:
        rows = entry["formulations"]
        lora, recompute, kept, plain = rows.values()
        assert all(len(row["samples"]) == 2 and row["seconds"]["low"] > 0 for row in rows.values())
        assert recompute["kept_bytes"] <= lora["kept_bytes"]
        # the input of the first query, key and value needs no gradient, so nothing keeps their weight
        assert kept["kept_bytes"] - recompute["kept_bytes"] == 4 * (entry["adapted_weights"] - 3 * 16 * 16)
        assert plain["kept_bytes"] >= kept["kept_bytes"]
        assert lora["times_lora"]["median"] == 1
        # A third product for every weight that is adapted, beside two of LoRA's, and attention in both.
        assert 1.1 < entry["floor_times_lora"] < 1.5
        assert list(entry["flops"]) == [list(rows)[0], list(rows)[-1]]


def test_formulations_start_at_the_same_function(app, tmp_path) -> None:
    import torch
    from formulations import FORMULATIONS, prune_at_random_
    from transformers import BertConfig, BertModel

    from peft_variator.profiling import share_weights

    torch.manual_seed(0)
    base = BertModel(BertConfig(**TINY)).eval()
    weights = prune_at_random_(base, 0.5)
    assert weights == 4 * 16 * 16 + 2 * 16 * 24 + 16 * 16  # attention, feed-forward, pooler
    zeros = sum((value == 0).sum().item() for name, value in base.named_parameters() if value.dim() == 2)
    assert abs(zeros - weights / 2) < weights / 10
    tokens = torch.arange(3, 12).reshape(1, 9)
    expected = base(tokens).last_hidden_state
    for name, build in FORMULATIONS.items():
        model = build(share_weights(base), 2).eval()
        torch.testing.assert_close(model(tokens).last_hidden_state, expected, msg=name)
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert trainable == 2 * (5 * 32 + 2 * 40)


def test_an_unknown_model_is_an_error_that_names_it(app, tmp_path) -> None:
    result = CliRunner().invoke(app, ["--model", str(tmp_path / "nothing.json")])
    assert result.exit_code == 1
    assert "nothing.json" in result.output
