"""`peft-variator evaluate` as it is typed, its figures held against a plain computation, and its verdicts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, BertForSequenceClassification, BertModel, LlamaForCausalLM, WhisperModel
from typer.testing import CliRunner

from peft_variator import VariatorConfig
from peft_variator.cli import evaluate as evaluate_module
from peft_variator.cli.evaluate import RatioResult, judge
from peft_variator.cli.main import app
from tests.cli.saved_plugins import save_base, save_plugin
from tests.tiny_models import tiny_model


QUICK = ["--rounds", "2", "--min-seconds", "0", "--threads", "1", "--device", "cpu"]
# Texts of 3 to 30 tokens, those of special tokens included.
TEXTS = [" ".join(f"w{(row * column) % 36}" for column in range(1, row + 2)) for row in range(28)]


def invoke(*words: Any) -> tuple[int, str, str]:
    """Run the command; error messages come out as one line of words."""
    done = CliRunner().invoke(app, ["evaluate", *map(str, words)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, re.sub(r"\s+", " ", done.stderr)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(TEXTS) + "\n")
    return path


def report_of(*words: Any) -> dict[str, Any]:
    status, out, err = invoke(*words, *QUICK, "--json", "-", "--quiet")
    assert status == 0, err
    return json.loads(out)


@torch.no_grad()
def test_an_encoder_s_cosines_are_those_of_its_texts(tmp_path: Path, data: Path) -> None:
    plugin = save_plugin(tmp_path)
    report = report_of(plugin, "--data", data, "--ratio", "2", "--ratio", "4,2")
    assert (report["examples"], report["timed_examples"]) == (len(TEXTS), len(TEXTS))
    assert report["tokens"] == {"min": 3, "median": 16.5, "max": 30}
    base = BertModel.from_pretrained(tmp_path / "model").eval()
    model = PeftModel.from_pretrained(BertModel.from_pretrained(tmp_path / "model"), plugin).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for result, ratio in zip(report["ratios"], (2, 4), strict=True):
        model.set_compression_ratio(ratio)
        tokens, means = [], []
        for text in TEXTS:  # one by one: no padding
            inputs = tokenizer(text, return_tensors="pt")
            states = [each(**inputs).last_hidden_state[0] for each in (model, base)]
            tokens.append(torch.cosine_similarity(*states, dim=-1))
            means.append(torch.cosine_similarity(*[each.mean(0) for each in states], dim=0))
        assert result["ratio"] == ratio
        assert result["quality"]["cosine"] == pytest.approx(float(torch.cat(tokens).mean()), abs=1e-5)
        assert result["quality"]["embedding_cosine"] == pytest.approx(float(torch.stack(means).mean()), abs=1e-5)
        assert 0 < result["flops_saved"] < 1
        assert len(result["seconds"]) == 2


def test_each_line_of_a_text_file_is_told_to_be_one_text(tmp_path: Path, data: Path) -> None:
    """For training such a file is one document."""
    plugin, table = save_plugin(tmp_path), tmp_path / "table.jsonl"
    table.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    told = f"Each line of {data} was one text"
    for names, is_told in (([data, table], True), ([table], False)):
        words = [word for name in names for word in ("--data", name)]
        status, out, err = invoke(plugin, *words, *QUICK, "--ratio", "2")
        assert status == 0, err
        assert (told in " ".join(out.split())) is is_told
    assert "Each line of a plain text file is one text" in " ".join(invoke("--help")[1].split())


def test_texts_are_as_long_as_the_folder_of_a_sentence_transformer_says(tmp_path: Path, data: Path) -> None:
    plugin, folder = save_plugin(tmp_path), tmp_path / "model"
    (folder / "modules.json").write_text(
        json.dumps([{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}])
    )
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12}))
    assert report_of(plugin, "--data", data, "--ratio", "2")["tokens"]["max"] == 12


@torch.no_grad()
def test_a_causal_model_is_judged_by_what_it_predicts(tmp_path: Path, data: Path) -> None:
    plugin = save_plugin(tmp_path, "causal")
    report = report_of(plugin, "--data", data, "--ratio", "1,4", "--max-nll", "0.5")
    exact, merged = report["ratios"]
    assert exact["quality"]["agreement"] == 1
    assert exact["quality"]["nll"] == pytest.approx(report["base_quality"]["nll"])
    assert merged["quality"]["nll"] != exact["quality"]["nll"]
    assert merged["flops_saved"] > exact["flops_saved"]
    assert (report["largest_ratio"], report["pays"]) == (None, False)  # random weights know no word
    # A text's continuation is at least a tenth of it: the mean over these is near that over whole texts.
    base, tokenizer = (
        LlamaForCausalLM.from_pretrained(tmp_path / "model"),
        AutoTokenizer.from_pretrained(tmp_path / "model"),
    )
    losses = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        losses.append(nn.functional.cross_entropy(base(ids).logits[0, :-1], ids[0, 1:], reduction="none"))
    assert report["base_quality"]["nll"] == pytest.approx(float(torch.cat(losses).mean()), rel=0.05)


@torch.no_grad()
def test_a_classifier_s_agreement(tmp_path: Path, data: Path) -> None:
    plugin = save_plugin(tmp_path, "classifier")
    report = report_of(plugin, "--data", data, "--ratio", "8", "--min-agreement", "0")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    model = PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(tmp_path / "model"), plugin).eval()
    model.set_compression_ratio(8)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    same = [
        base(**inputs).logits.argmax() == model(**inputs).logits.argmax()
        for inputs in (tokenizer(text, return_tensors="pt") for text in TEXTS)
    ]
    assert report["ratios"][0]["quality"]["agreement"] == pytest.approx(sum(map(float, same)) / len(same))
    assert report["largest_ratio"] == 8


def test_a_reranker_has_no_agreement(tmp_path: Path, data: Path) -> None:
    """One number is the largest of one, so every two rerankers would agree."""
    save_base(tmp_path / "model", "classifier")
    folder = tmp_path / "model"
    base = BertForSequenceClassification.from_pretrained(folder, num_labels=1, ignore_mismatched_sizes=True)
    base.save_pretrained(folder)
    config = VariatorConfig(init_weights=False, task_type="SEQ_CLS")
    get_peft_model(BertForSequenceClassification.from_pretrained(folder), config).save_pretrained(tmp_path / "plugin")
    status, _, err = invoke(tmp_path / "plugin", "--data", data, *QUICK, "--min-agreement", "0.9")
    assert status == 1
    assert "this BertForSequenceClassification gives a number" in err
    report = report_of(tmp_path / "plugin", "--data", data, "--ratio", "8", "--min-cosine", "0")
    quality = report["ratios"][0]["quality"]
    assert "agreement" not in quality
    assert quality["score_error"] > 0


def test_an_encoder_decoder(tmp_path: Path, data: Path) -> None:
    report = report_of(save_plugin(tmp_path, "seq2seq"), "--data", data, "--ratio", "2", "--min-cosine", "0.999999")
    assert report["ratios"][0]["quality"].keys() == {"encoder_cosine", "decoder_cosine", "agreement", "nll"}
    assert report["ratios"][0]["holds"] is False


def test_images_that_cannot_be_read_are_skipped_and_counted(tmp_path: Path) -> None:
    plugin, images = save_plugin(tmp_path, "vision"), tmp_path / "images"
    images.mkdir()
    for index in range(3):
        Image.new("RGB", (20, 20), (60 * index, 90, 200)).save(images / f"{index}.png")
    (images / "broken.png").write_bytes((images / "0.png").read_bytes()[:40])
    status, out, err = invoke(plugin, "--data", images, *QUICK, "--ratio", "2", "--json", "-")
    assert status == 0, err
    report = json.loads(out)
    assert (report["examples"], report["tokens"]) == (3, None)
    assert report["ratios"][0]["quality"].keys() == {"cosine"}
    assert re.search(r"1 of 4 images .*broken\.png", err)


def test_sound_is_not_read(tmp_path: Path, data: Path) -> None:
    tiny_model("whisper").save_pretrained(tmp_path / "model")
    base = WhisperModel.from_pretrained(tmp_path / "model")
    plugin = tmp_path / "plugin"
    get_peft_model(base, VariatorConfig()).save_pretrained(plugin)
    (plugin / "adapter_config.json").write_text(
        re.sub(r'"auto_mapping": \{[^}]*\}', '"auto_mapping": null', (plugin / "adapter_config.json").read_text())
    )
    status, _, err = invoke(plugin, "--data", data, *QUICK)
    assert (status, "input_features" in err, "time_alternately" in err) == (1, True, True), err


def test_an_untrained_ratio_is_told_without_a_place_in_the_code(tmp_path: Path, data: Path) -> None:
    status, _, err = invoke(save_plugin(tmp_path, trained_ratios=[2]), "--data", data, *QUICK, "--ratio", "3", "-q")
    assert (status, "compression_ratio=3" in err, ".py" in err) == (0, True, False), err


def test_what_is_told(tmp_path: Path, data: Path) -> None:
    plugin = save_plugin(tmp_path, trained_ratios=[2, 4])
    status, out, err = invoke(plugin, "--data", data, *QUICK, "--min-cosine", "-1", "--examples", 20)
    assert status == 0, err
    assert "k = 2" in out
    assert "k = 4" in out
    (verdict,) = (line for line in out.splitlines() if "pay" in line)
    assert "k = 4" in verdict
    assert "20 texts are few" in err
    status, out, err = invoke(plugin, "--data", data, *QUICK, "--examples", 1)
    assert status == 0, err
    assert "Quality on 1 text, time on 1" in re.sub(r"\s+", " ", out)
    assert "One text is little" in err


def test_padding_and_a_busy_machine_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = save_plugin(tmp_path, trained_ratios=[2])
    texts = tmp_path / "texts.csv"
    texts.write_text("text\n" + "".join(" ".join(["w1"] * count) + "\n" for count in (4, 46) * 8))
    words = [plugin, "--data", texts, *QUICK, "--batch-size", "16"]
    monkeypatch.setattr(evaluate_module, "was_busy", lambda environment: False)
    status, out, err = invoke(*words, "--json", tmp_path / "found.json")
    assert status == 0, err
    # 8 texts of 6 tokens and 8 of 48, with [CLS] and [SEP].
    assert json.loads((tmp_path / "found.json").read_text())["padding"] == pytest.approx(1 - (6 + 48) / 96)
    assert "Padding is 44% of the base's tokens" in " ".join(out.split())
    assert "run it again" not in out
    monkeypatch.setattr(evaluate_module, "was_busy", lambda environment: True)
    assert "run it again before you believe it" in invoke(*words)[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--min-cosine", "1.5"], "--min-cosine is 1.5"),
        (["--min-cosine", "nan"], "--min-cosine is nan"),
        (["--min-agreement", "0.9"], "Use --min-cosine"),
        (["--max-nll", "3"], "Use --min-cosine"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--rounds", "1"], "--rounds is 1"),
        (["--min-seconds", "-1"], "--min-seconds is -1.0; it has to be 0 or more"),
        (["--min-seconds", "nan"], "--min-seconds is nan; it has to be 0 or more"),
        (["--ratio", "0"], "compression_ratio=0"),
        (["--device", "abacus"], "'abacus'"),
        (["--base", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_bad_options(tmp_path: Path, data: Path, options: list[str], message: str) -> None:
    status, _, err = invoke(save_plugin(tmp_path), "--data", data, *QUICK, *options)
    assert (status, message in err) == (1, True), err


def test_bad_data_and_adapters(tmp_path: Path, data: Path) -> None:
    plugin = save_plugin(tmp_path)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    for words, message in (
        ((plugin, "--data", empty), "no text"),
        ((plugin, "--data", tmp_path / "none.txt"), "none.txt"),
        ((tmp_path / "model", "--data", data), "adapter_config.json"),
        ((tmp_path / "nothing", "--data", data), "nothing"),
    ):
        status, _, err = invoke(*words, *QUICK)
        assert (status, message in err) == (1, True), err


def result(ratio: int, cosine: float, low: float, bound: float | None) -> RatioResult:
    speed = {"low": low, "median": low + 0.05, "high": low + 0.1}
    return RatioResult(ratio, {"cosine": cosine}, 0.3, [], speed, None if bound is None else cosine >= bound)


@pytest.mark.parametrize(
    ("rows", "bound", "largest", "pays"),
    [
        ([(2, 0.99, 1.2), (4, 0.97, 1.4), (8, 0.93, 1.5)], 0.95, 4, True),
        ([(2, 0.99, 1.2), (4, 0.97, 1.4), (8, 0.93, 1.5)], 0.999, None, False),
        ([(2, 0.99, 0.8), (4, 0.97, 0.9)], 0.95, 4, False),
        # What pays is named, not the largest that keeps the quality and not the fastest that loses it.
        ([(2, 0.99, 1.3), (4, 0.97, 0.98), (8, 0.93, 1.5)], 0.95, 4, True),
        ([(2, 0.99, 1.2), (4, 0.97, 1.4)], None, None, True),
        ([(2, 0.99, 0.8), (4, 0.97, 0.97)], None, None, False),
        ([(2, float("nan"), 1.5)], 0.5, None, False),
    ],
)
def test_verdicts(rows: list[Any], bound: float | None, largest: int | None, pays: bool) -> None:
    results = [result(*row, bound) for row in rows]
    found = judge(results, {} if bound is None else {"cosine": bound})
    assert found[:2] == (largest, pays)
    assert found[2].startswith("It pays" if pays else "It does not pay: ")
    assert "\n" not in found[2]
    if largest is not None:
        assert f"k = {largest}" in found[2]


def test_a_base_that_misses_what_is_asked_is_told() -> None:
    quality = {"cosine": 0.9, "nll": 3.7}
    speed = {"low": 1.2, "median": 1.3, "high": 1.4}
    results = [RatioResult(2, quality, 0.3, [], speed, False)]
    found = judge(results, {"nll": 3.0}, {"nll": 3.6})
    assert found[:2] == (None, False)
    assert "its nll is 3.6000" in found[2]
    assert "its nll" not in judge(results, {"nll": 3.65}, {"nll": 3.6})[2]
    assert "its nll" not in judge(results, {"cosine": 0.99}, {"nll": 3.6})[2]
