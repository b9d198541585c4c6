"""`peft-variator prune` and `peft-variator inspect` on a tiny model saved to disk."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    CLIPImageProcessorPil,
    CLIPProcessor,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTModel,
)
from typer.testing import CliRunner

from peft_variator.bases import load_base
from peft_variator.cli.main import app
from peft_variator.sparsity import PruningConfig, SparsityReport, measure_sparsity, prune
from peft_variator.sparsity.calibration import read_batches
from tests.cli.saved_plugins import save_base
from tests.sparsity.cases import make
from tests.word_tokenizer import numbered_words, word_tokenizer


WORDS = ["<pad>", "<bos>", "<eos>", *numbered_words(90)]


def tokenizer():
    return word_tokenizer(WORDS, unknown="<pad>", pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


@pytest.fixture
def base(tmp_path):
    """A folder with a tiny Llama and its tokenizer."""
    make("llama")[0].save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def text(tmp_path):
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 90, (600,), generator=generator).tolist()
    (tmp_path / "text.txt").write_text(" ".join(f"w{word}" for word in words))
    return tmp_path / "text.txt"


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def refused(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    assert not isinstance(result.exception, (ValueError, OSError)), "the user sees a message, not a traceback"
    return " ".join(result.output.split())


DATA = ("--samples", 8, "--length", 16, "--batch-size", 4)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "dsnot"])
def test_prune_writes_what_prune_gives(base, text, tmp_path, method):
    out = tmp_path / "made" / "pruned"
    output = run("prune", base, "-o", out, "--method", method, "--pattern", "2:4", "--data", text, *DATA)
    assert "Pruned 14 modules (language)" in output
    assert "7,680 of 15,360 weights are zero (50.00%)" in output
    assert f"Saved to {out}" in output
    assert f"Next: peft-variator inspect {out}" in output
    assert f"peft-variator restore {out} --data {text} --teacher {base}" in output
    expected = LlamaForCausalLM.from_pretrained(base)
    batches = read_batches(text, tokenizer(), samples=8, length=16, batch_size=4, seed=0, labels=False)
    prune(expected, PruningConfig(method=method, pattern="2:4"), batches, progress=False)
    saved = load_file(out / "model.safetensors")
    assert saved
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in saved.items())
    report = SparsityReport.load_json(out / "sparsity_report.json")
    assert report.total.pattern_met
    assert report.source["config"]["method"] == method
    assert report.source["samples"] == 8
    assert PreTrainedTokenizerFast.from_pretrained(out)("w1 w2")["input_ids"] == [4, 5]
    assert sorted(path.name for path in out.parent.iterdir()) == ["pruned"]
    assert load_file(base / "model.safetensors").keys() == saved.keys()


def test_prune_notes_how_many_samples_there_were(base, text, tmp_path):
    (tmp_path / "short.txt").write_text(" ".join(text.read_text().split()[:40]))
    settings = ["--pattern", "2:4", "--samples", 8, "--length", 16]
    told = run("prune", base, "-o", tmp_path / "short", "--data", tmp_path / "short.txt", *settings)
    assert "no more than 2 of the 8 samples that --samples asks for" in told
    assert SparsityReport.load_json(tmp_path / "short" / "sparsity_report.json").source["samples"] == 2
    both = run("prune", base, "-o", tmp_path / "both", "--data", tmp_path / "short.txt", "--data", text, *settings)
    assert "no more than 6 of the 8" in both
    assert "no more than" not in run("prune", base, "-o", tmp_path / "full", "--data", text, *settings)


def test_prune_takes_every_choice(base, text, tmp_path):
    choices = ["--allocation", "ecoflap", "--score-order", "first", "--no-propagate", "--seed", 3]
    choices += ["--target-module", "mlp.up_proj", "--target-module", "q_proj", "--exclude-module", "0.mlp.up_proj"]
    choices += ["--modality", "language", "--dtype", "bfloat16", "--device-map", "cpu", "--sparsity", 0.5]
    choices += ["--method", "sparsegpt", "--block-size", 16, "--damping", 0.5]
    run("prune", base, "-o", tmp_path / "out", "--data", text, *DATA, *choices)
    report = SparsityReport.load_json(tmp_path / "out" / "sparsity_report.json")
    assert {row.name.partition("layers.")[2] for row in report.modules} == {
        "0.self_attn.q_proj",
        "1.self_attn.q_proj",
        "1.mlp.up_proj",
    }
    assert report.sparsity == pytest.approx(0.5, abs=5e-4)
    config = report.source["config"]
    assert not config["propagate"]
    assert (config["method"], config["block_size"], config["damping"]) == ("sparsegpt", 16, 0.5)
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16


def test_prune_calibrates_on_columns_of_tables(base, text, tmp_path):
    """Windows are those of the same text in a plain file, of every file as many."""
    words = text.read_text().split()
    rows = [" ".join(words[start : start + 20]) for start in range(0, len(words), 20)]
    (tmp_path / "lines.txt").write_text("".join(f"{row}\n" for row in rows))
    (tmp_path / "table.csv").write_text("id,body\n" + "".join(f"{index},{row}\n" for index, row in enumerate(rows)))
    settings = ["--pattern", "2:4", *DATA]
    assert "--text-column" in refused("prune", base, "-o", tmp_path / "x", "--data", tmp_path / "table.csv", *settings)
    column = ["--text-column", "body"]
    told = refused("prune", base, "-o", tmp_path / "x", "--data", tmp_path / "lines.txt", *settings, *column)
    assert f"--text-column body chooses a part of a table or a data set, and {tmp_path / 'lines.txt'} is none" in told
    run("prune", base, "-o", tmp_path / "plain", "--data", tmp_path / "lines.txt", *settings)
    for name, files in {"table": ["table.csv"], "both": ["lines.txt", "table.csv"]}.items():
        data = [word for file in files for word in ("--data", tmp_path / file)]
        told = run("prune", base, "-o", tmp_path / name, *data, *settings, *column)
        assert f"{data[-1]} --text-column body --teacher {base}" in told
    plain, table = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "table"))
    assert all(torch.equal(plain[name], table[name]) for name in plain)
    report = SparsityReport.load_json(tmp_path / "both" / "sparsity_report.json")
    assert report.source["data"] == [str(tmp_path / "lines.txt"), str(tmp_path / "table.csv")]


def test_prune_calibrates_on_a_folder_of_images(tmp_path):
    """A model that was saved without its pooler gets none of random numbers."""
    save_base(tmp_path / "vit", "vision")
    (tmp_path / "images").mkdir()
    for index in range(3):
        Image.new("RGB", (20, 20), (40 * index, 90, 200)).save(tmp_path / "images" / f"{index}.png")
    (tmp_path / "images" / "damaged.png").write_bytes(b"no image")
    told = run("prune", tmp_path / "vit", "-o", tmp_path / "out", "--data", tmp_path / "images", "--pattern", "2:4")
    assert "Skipped 1 of 4 images" in told
    assert f"restore {tmp_path / 'out'} --data {tmp_path / 'images'}" in told
    assert (
        load_file(tmp_path / "out" / "model.safetensors").keys()
        == load_file(tmp_path / "vit" / "model.safetensors").keys()
    )
    told = run("pack", tmp_path / "out", "-o", tmp_path / "packed")
    assert f"ViTModel.from_pretrained('{tmp_path / 'packed'}', add_pooling_layer=False)" in told
    ViTModel.from_pretrained(tmp_path / "packed", add_pooling_layer=False)
    with pytest.raises(ValueError, match="add_pooling_layer=False"):
        ViTModel.from_pretrained(tmp_path / "packed")


@pytest.fixture
def clip_base(tmp_path):
    """A folder with a tiny CLIP and its processor, and records with texts and images."""
    make("clip")[0].save_pretrained(tmp_path / "clip")
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, tokenizer()).save_pretrained(tmp_path / "clip")
    records = []
    for index in range(3):
        Image.new("RGB", (20, 20), (40 * index, 90, 200)).save(tmp_path / f"{index}.png")
        records.append({"text": f"w{index} w5 <eos>", "image": f"{index}.png"})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    return tmp_path / "clip"


def test_prune_calibrates_on_images_and_text(clip_base, tmp_path):
    amounts = ["--modality-sparsity", "vision=0.25", "--modality-sparsity", "language=2:4"]
    output = run("prune", clip_base, "-o", tmp_path / "out", "--data", tmp_path / "pairs.jsonl", *amounts)
    assert "modules (language, vision)" in output or "modules (vision, language)" in output
    report = SparsityReport.load_json(tmp_path / "out" / "sparsity_report.json")
    assert {row.name: round(row.sparsity, 3) for row in report.grouped("modality")} == {
        "vision": 0.25,
        "language": 0.5,
    }


def test_prune_without_a_tokenizer_says_so(base, tmp_path):
    for file in base.glob("tokenizer*"):
        file.unlink()
    output = run("prune", base, "-o", tmp_path / "out", "--method", "magnitude", "--sparsity", 0.5)
    assert "no tokenizer or processor, so none was saved" in output
    (tmp_path / "text.txt").write_text("w1")
    arguments = ["--sparsity", 0.5, "--data", tmp_path / "text.txt"]
    assert "has no tokenizer or processor to read --data" in refused("prune", base, "-o", tmp_path / "o", *arguments)


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device"), SystemExit(3)])
@pytest.mark.parametrize("moment", ["prune", "save"])
def test_an_interrupted_prune_leaves_nothing(base, text, tmp_path, monkeypatch, error, moment):
    save = LlamaForCausalLM.save_pretrained

    def interrupted(self, folder, **more):
        save(self, folder, **more)
        raise error

    before = left_in(tmp_path)
    if moment == "save":
        monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", interrupted)
    else:
        monkeypatch.setattr("peft_variator.cli.prune.prune", lambda *a, **k: interrupted(a[0], tmp_path / "base"))
    result = invoke("prune", base, "-o", tmp_path / "out", "--sparsity", 0.5, "--data", text, *DATA)
    assert result.exit_code != 0
    assert left_in(tmp_path) == before


@pytest.mark.slow
def test_a_killed_prune_leaves_no_model_under_the_name(base, text, tmp_path):
    """kill -9 while the files are written: only the temporary folder is left, and the name is free."""
    script = (
        "import sys, time\n"
        "from transformers import LlamaForCausalLM\n"
        "save = LlamaForCausalLM.save_pretrained\n"
        "def slow(self, folder, **more):\n"
        "    save(self, folder, **more)\n"
        f"    open({str(tmp_path / 'saving')!r}, 'w').close()\n"
        "    time.sleep(60)\n"
        "LlamaForCausalLM.save_pretrained = slow\n"
        "from peft_variator.cli.main import app\n"
        "app()\n"
    )
    arguments = ["prune", str(base), "-o", str(tmp_path / "out"), "--method", "magnitude", "--sparsity", "0.5"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "saving").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / "saving").exists()
    assert not (tmp_path / "out").exists()
    assert [name for name in left_in(tmp_path) if name.startswith(".out.partial-")]
    run("prune", base, "-o", tmp_path / "out", "--method", "magnitude", "--sparsity", 0.5)


def test_an_output_that_exists_is_not_touched(base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    arguments = ["--method", "magnitude", "--sparsity", 0.5]
    assert "already exists and is not empty" in refused("prune", base, "-o", tmp_path / "out", *arguments)
    assert left_in(tmp_path / "out") == ["mine.txt"]
    assert "already exists" in refused("prune", base, "-o", base / "config.json", *arguments)
    (tmp_path / "out" / "mine.txt").unlink()
    run("prune", base, "-o", tmp_path / "out", *arguments)


BAD = [
    (["--sparsity", 1.0, "--method", "magnitude"], "sparsity=1.0 is outside [0, 1)"),
    (["--sparsity", 0.5], "needs calibration data: give --data"),
    (["--method", "magnitude"], "exactly one of sparsity, pattern and modality_sparsity"),
    (["--method", "magnitude", "--pattern", "3:7"], "does not divide the width of 'model.layers.0.self_attn.q_proj'"),
    (["--method", "magnitude", "--sparsity", 0.5, "--damping", 0.5], "damping=0.5 is no option of method='magnitude'"),
    (["--method", "magnitude", "--modality-sparsity", "vision"], "give NAME=AMOUNT"),
    (["--method", "magnitude", "--modality-sparsity", "vision=much"], "'much' is no fraction and no n:m pattern"),
    (["--method", "magnitude", "--modality-sparsity", "vision=0.5"], "no Linear or Conv1D of modality 'vision'"),
    (["--method", "magnitude", "--sparsity", 0.5, "--target-module", "act_fn"], "have no weight to prune"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_a_message(base, tmp_path, arguments, message):
    assert message in refused("prune", base, "-o", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there_or_not_of_transformers_is_a_message(base, tmp_path):
    arguments = ["-o", tmp_path / "out", "--method", "magnitude", "--sparsity", 0.5]
    refused("prune", tmp_path / "nowhere", *arguments)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": ["MyModel"]}))
    assert "none of which is a class of transformers" in refused("prune", base, *arguments)


def test_a_checkpoint_without_all_weights_is_refused(base, tmp_path):
    tensors = load_file(base / "model.safetensors")
    packed = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(
        {**tensors, "model.layers.0.mlp.up_proj.compressed": packed}, base / "model.safetensors", {"format": "pt"}
    )
    arguments = ["-o", tmp_path / "out", "--method", "magnitude", "--sparsity", 0.5]
    assert "model.layers.0.mlp.up_proj.weight are missing and would be random" in refused("prune", base, *arguments)


def test_inspect_shows_a_pruned_model(base, tmp_path):
    run("prune", base, "-o", tmp_path / "out", "--method", "magnitude", "--pattern", "2:4")
    output = run("inspect", tmp_path / "out", "--pattern", "2:4", "--by", "modality")
    assert "Sparsity by modality" in output
    assert "2:4 met" in output
    assert "language" in output
    files = ["--json", tmp_path / "zeros.json", "--png", tmp_path / "zeros.png"]
    assert f"Wrote {tmp_path / 'zeros.json'}." in run("inspect", tmp_path / "out", "--by", "module", *files)
    report = SparsityReport.load_json(tmp_path / "zeros.json")
    expected = measure_sparsity(LlamaForCausalLM.from_pretrained(tmp_path / "out")).modules
    assert sorted(report.modules, key=str) == sorted(expected, key=str)
    assert (tmp_path / "zeros.png").read_bytes().startswith(b"\x89PNG")


def test_a_packed_model_is_unpacked_first(base, tmp_path):
    run("prune", base, "-o", tmp_path / "pruned", "--method", "magnitude", "--pattern", "2:4")
    run("pack", tmp_path / "pruned", "-o", tmp_path / "packed")
    output = refused("prune", tmp_path / "packed", "-o", tmp_path / "out", "--method", "magnitude", "--sparsity", 0.6)
    assert f"peft-variator unpack {tmp_path / 'packed'}" in output
    assert not (tmp_path / "out").exists()
    packed = load_base(tmp_path / "packed")
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj.*dequantize"):
        prune(packed, PruningConfig(method="magnitude", sparsity=0.6))
    assert prune(packed.dequantize(), PruningConfig(method="magnitude", sparsity=0.6)).sparsity > 0.59


def test_inspect_fails_where_a_pattern_is_missed(base, tmp_path):
    run("prune", base, "-o", tmp_path / "out", "--method", "magnitude", "--pattern", "2:4")
    missed = invoke("inspect", tmp_path / "out", "--pattern", "2:4", "--fail", "--json", "-")
    assert missed.exit_code == 1  # the head is dense
    assert "lm_head" in missed.stderr
    assert json.loads(missed.stdout)["total"]["pattern_met"] is False
    assert invoke("inspect", tmp_path / "out", "--pattern", "2:4").exit_code == 0
    save_file({"a.weight": torch.tensor([[0.0, 1.0, 0.0, 2.0]])}, tmp_path / "a.safetensors")
    assert invoke("inspect", tmp_path / "a.safetensors", "--pattern", "2:4", "--fail").exit_code == 0
    assert "--pattern" in refused("inspect", tmp_path / "a.safetensors", "--fail")


def test_inspect_says_what_it_cannot_know(tmp_path):
    save_file({"a.weight": torch.tensor([[-0.0, 1.0]])}, tmp_path / "a.safetensors")
    output = run("inspect", tmp_path / "a.safetensors")
    assert "no config.json of a transformers model" in output
    assert "1 zeros are stored as -0.0" in output


def test_inspect_refuses_what_is_no_checkpoint(tmp_path):
    assert "does not exist" in refused("inspect", tmp_path / "nowhere")
    assert "holds no safetensors file" in refused("inspect", tmp_path)


def test_help_names_both_commands():
    output = run("--help")
    assert "prune" in output
    assert "inspect" in output


def test_windows_of_text_do_not_overlap_and_follow_the_seed(text):
    settings = {"samples": 20, "length": 16, "batch_size": 6, "labels": True}
    batches = read_batches(text, tokenizer(), seed=0, **settings)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(6, 16), (6, 16), (6, 16), (2, 16)]
    assert all(torch.equal(batch["labels"], batch["input_ids"]) for batch in batches)
    everything = tokenizer()(text.read_text())["input_ids"]
    windows = {tuple(everything[start : start + 16]) for start in range(0, 600 - 15, 16)}
    rows = [tuple(row) for batch in batches for row in batch["input_ids"].tolist()]
    assert set(rows) <= windows
    assert len(set(rows)) == 20
    other = read_batches(text, tokenizer(), seed=1, **settings)
    assert not torch.equal(other[0]["input_ids"], batches[0]["input_ids"])


def test_windows_of_text_for_a_processor_are_cut_by_its_tokenizer(clip_base, text):
    processor = CLIPProcessor.from_pretrained(clip_base)
    settings = {"samples": 4, "length": 16, "batch_size": 4, "seed": 0, "labels": False}
    (batch,) = read_batches(text, processor, **settings)
    assert torch.equal(batch["input_ids"], read_batches(text, tokenizer(), **settings)[0]["input_ids"])


def test_a_device_that_is_not_there_is_named(base, tmp_path):
    settings = ["--sparsity", "0.5", "--method", "magnitude", "--device", "nosuch:7"]
    assert "'nosuch:7' cannot be used" in refused("prune", base, "-o", tmp_path / "x", *settings)


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("w1 w2 w3")
    with pytest.raises(ValueError, match="The text has 3 tokens, less than one window of length=16"):
        read_batches(tmp_path / "text.txt", tokenizer(), samples=4, length=16, batch_size=2, seed=0, labels=False)


def test_records_of_text_are_cut_and_others_refused(tmp_path):
    (tmp_path / "records.jsonl").write_text('{"text": "w1 w2 w3 w4"}\n{"text": "w5"}\n{"text": "w6"}\n')
    settings = {"samples": 2, "length": 3, "batch_size": 2, "seed": 0, "labels": False}
    batches = read_batches(tmp_path / "records.jsonl", tokenizer(), **settings)
    assert [batch["input_ids"].tolist() for batch in batches] == [[[4, 5, 6]], [[8]]]
    (tmp_path / "records.jsonl").rename(tmp_path / "RECORDS.JSONL")
    again = read_batches(tmp_path / "RECORDS.JSONL", tokenizer(), **settings)
    assert [batch["input_ids"].tolist() for batch in again] == [[[4, 5, 6]], [[8]]]
    (tmp_path / "records.jsonl").write_text('{"question": "w1"}\n')
    with pytest.raises(ValueError, match=r'needs "text", "image" or both, but has \[\'question\'\]'):
        read_batches(tmp_path / "records.jsonl", tokenizer(), **settings)


BAD_LINES = {
    "no json": "{'text': 1}",
    "deep": "[" * 100_000,
    "a list": '["w1"]',
    "a number as text": '{"text": 5}',
    "an image that is not there": '{"text": "w1", "image": "none.png"}',
    "a file that is no image": '{"image": "records.jsonl"}',
    "neither": '{"texts": "w1"}',
    "an image for a tokenizer": '{"image": "white.png"}',
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_record_is_named_by_file_and_line(tmp_path, line):
    Image.new("RGB", (20, 20)).save(tmp_path / "white.png")
    file = tmp_path / "records.jsonl"
    file.write_text(f'{{"text": "w1"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))}, line 3\b"):
        read_batches(file, tokenizer(), samples=8, length=16, batch_size=4, seed=0, labels=False)


def test_calibration_files_that_cannot_be_read_are_named(base, tmp_path):
    arguments = ["prune", base, "-o", tmp_path / "out", "--sparsity", 0.5, "--data", tmp_path / "text.txt"]
    assert str(tmp_path / "text.txt") in refused(*arguments)
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe w1")
    assert str(tmp_path / "text.txt") in refused(*arguments)
    (tmp_path / "text.txt").write_text("")
    assert str(tmp_path / "text.txt") in refused(*arguments)
    (tmp_path / "text.jsonl").write_text("\n")
    assert str(tmp_path / "text.jsonl") in refused(*arguments[:-1], tmp_path / "text.jsonl")


def test_windows_that_the_model_cannot_read_are_refused(tmp_path, text):
    make("bert")[0].save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    positions = BertConfig.from_pretrained(tmp_path / "bert").max_position_embeddings
    arguments = ["prune", tmp_path / "bert", "-o", tmp_path / "out", "--sparsity", 0.5, "--data", text, "--samples", 2]
    output = refused(*arguments, "--length", positions + 1)
    assert f"length={positions + 1}" in output
    assert str(positions) in output
    (tmp_path / "records.jsonl").write_text('{"text": "w1"}\n')
    assert "length=" in refused(*arguments[:-4], "--data", tmp_path / "records.jsonl", "--length", positions + 1)


def test_an_encoder_decoder_is_pruned_on_text(tmp_path, text):
    make("t5")[0].save_pretrained(tmp_path / "t5")
    tokenizer().save_pretrained(tmp_path / "t5")
    out = run("prune", tmp_path / "t5", "-o", tmp_path / "out", "--pattern", "2:4", "--data", text, *DATA)
    assert "50.0" in out
    assert SparsityReport.load_json(tmp_path / "out" / "sparsity_report.json").modules
