"""`peft-variator train` as it is typed."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, PreTrainedModel, Siglip2ImageProcessor, ViTImageProcessor, set_seed

from peft_variator import VariatorConfig, shrink_plugin
from peft_variator.cli.examples import load_data
from peft_variator.profiling import count_flops
from peft_variator.profiling.benchmark import count_added_parameters
from peft_variator.tuners.variator.layer import plugin_layers
from tests.cli.commands import run_command
from tests.tiny_models import tiny_model
from tests.word_tokenizer import BERT_SPECIAL, numbered_words, word_tokenizer


WIDTHS = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 512}
TEXT = {**WIDTHS, "vocab_size": 40, "max_position_embeddings": 64, "initializer_range": 0.4}
MODELS: dict[str, Any] = {
    "encoder": lambda: tiny_model("bert", **TEXT),
    "causal": lambda: tiny_model("llama", **TEXT, num_key_value_heads=1),
    "seq2seq": lambda: tiny_model("t5", d_model=16, d_ff=512, num_heads=2, vocab_size=40),
    "vision": lambda: tiny_model("vit", **WIDTHS, image_size=16, initializer_range=0.4),
}
SMALL = ["--bottleneck-dim", "4"]
QUICK = ["--steps", "6", "--batch-size", "4", "--max-length", "32", "--held-out", "5"]


invoke = partial(run_command, "train")


def save_model(folder: Path, task: str) -> PreTrainedModel:
    set_seed(0)
    model = MODELS[task]()
    model.save_pretrained(folder)
    if task == "vision":
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
        return model
    template = "[CLS] $A [SEP]" if task == "encoder" else "$A [SEP]"
    # The causal model has no padding token, like GPT-2's.
    pad = {} if task == "causal" else {"pad_token": "[PAD]"}
    words = [*BERT_SPECIAL, *numbered_words(36)]
    word_tokenizer(words, template, eos_token="[SEP]", cls_token="[CLS]", sep_token="[SEP]", **pad).save_pretrained(
        folder
    )
    return model


def save_data(folder: Path, task: str) -> Path:
    generator = torch.Generator().manual_seed(0)
    if task == "vision":
        folder.mkdir()
        for index, colour in enumerate(torch.randint(0, 255, (20, 3), generator=generator).tolist()):
            Image.new("RGB", (20, 20), tuple(colour)).save(folder / f"{index}.png")
        return folder
    words = torch.randint(0, 36, (150, 10), generator=generator).tolist()
    folder.write_text("\n".join(" ".join(f"w{word}" for word in line) for line in words))
    return folder


@pytest.mark.parametrize("task", MODELS)
def test_every_task(tmp_path: Path, task: str) -> None:
    base, data, output = save_model(tmp_path / "model", task), save_data(tmp_path / "data", task), tmp_path / "out"
    status, out, err = invoke(
        tmp_path / "model", "--data", data, "--output", output, "--ratios", "2,4", *QUICK, *SMALL
    )
    assert status == 0, err
    assert {path.name for path in output.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
    }
    record = json.loads((output / "training.json").read_text())["facts"]
    assert [each["ratio"] for each in record["ratios"]] == [2, 4]
    flops = [each["flops_plugin"] for each in record["ratios"]]
    assert record["ratios"][0]["flops_base"] > flops[0] > flops[1]
    assert "cosine" in " ".join(record["ratios"][0]["after"])
    assert f"--data {data}" in record["command"]
    card = (output / "README.md").read_text()
    for said in ("import peft_variator", str(tmp_path / "model"), record["command"], "0.", "FLOPs saved"):
        assert said in card
    for said in ("k", "FLOPs saved", f"Wrote {output}", "peft-variator bench", "--adapter"):
        assert said in out
    loaded = PeftModel.from_pretrained(base, output)
    assert loaded.peft_config["default"].compression_ratio == 2
    assert loaded.peft_config["default"].keep_token_ids == {"encoder": [2, 3], "vision": []}.get(task, [2, 3])


def test_training_makes_it_better(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "encoder")
    data = save_data(tmp_path / "data.txt", "encoder")
    status, _, err = invoke(
        tmp_path / "model", "--data", data, "-o", tmp_path / "out", *QUICK, "--steps", 60, "--lr", "1e-2"
    )
    assert status == 0, err
    (row,) = json.loads((tmp_path / "out" / "training.json").read_text())["facts"]["ratios"]
    assert row["ratio"] == 4
    assert row["after"]["cosine"] > row["before"]["cosine"]
    assert row["after"]["relative_error"] < row["before"]["relative_error"]


def test_a_second_stage_starts_from_the_first(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "encoder")
    data = save_data(tmp_path / "data.txt", "encoder")
    first, second = tmp_path / "first", tmp_path / "second"
    common = [tmp_path / "model", "--data", data, *QUICK, "--ratio", 4]
    assert invoke(*common, "-o", first, "--bottleneck-dim", 8, "--lr", "1e-2")[0] == 0
    status, _, err = invoke(*common, "-o", second, "--adapter", first, "--lr", "1e-9", "--ratio", 8)
    assert status == 0, err
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert old.keys() == new.keys()
    torch.testing.assert_close(new, old, rtol=0, atol=1e-6)
    rows = [json.loads((folder / "training.json").read_text())["facts"]["ratios"] for folder in (first, second)]
    assert [row["ratio"] for row in rows[1]] == [4, 8]
    assert rows[1][0]["before"] == pytest.approx(rows[0][0]["after"], rel=1e-4)
    # Without --ratio the plugin keeps its own.
    third = tmp_path / "third"
    assert invoke(*common[:-2], "-o", third, "--adapter", second)[0] == 0
    config = json.loads((third / "adapter_config.json").read_text())
    assert config["compression_ratio"] == 4
    assert config["trained_ratios"] == [4, 8]


@pytest.mark.parametrize("scoring", ["token", "concat"])
def test_a_second_stage_of_a_plugin_with_a_ratio_pattern(tmp_path: Path, scoring: str) -> None:
    """It is trained, counted and saved as its pattern says; with --ratio every module has that one, if it can."""
    model = save_model(tmp_path / "model", "encoder")
    data, first = save_data(tmp_path / "data.txt", "encoder"), tmp_path / "first"
    config = VariatorConfig(compression_ratio=4, ratio_pattern={r"layer\.0": 2}, scoring=scoring, bottleneck_dim=8)
    get_peft_model(model, config).save_pretrained(first)
    found = []
    for name, ratio in (("as it is", []), ("with --ratio", ["--ratio", 4])):
        output = tmp_path / name
        status, _, err = invoke(tmp_path / "model", "--data", data, *QUICK, "--adapter", first, *ratio, "-o", output)
        assert status == 0, err
        base = type(model).from_pretrained(tmp_path / "model")
        plugin = PeftModel.from_pretrained(base, str(output)).eval()
        (row,) = json.loads((output / "training.json").read_text())["facts"]["ratios"]
        found.append(([layer.rule_at("default", None).ratio for layer in plugin_layers(plugin)], row["flops_plugin"]))
    (as_it_is, flops), (with_ratio, fewer) = found
    assert as_it_is == [2, 4]
    if scoring == "token":
        assert with_ratio == [4, 4]
        assert fewer < flops
    else:
        assert with_ratio == [2, 4]
        assert fewer == flops


def test_a_shrunk_plugin_counts_all_of_its_parameters(tmp_path: Path) -> None:
    """As `info` does, though only biases of it are trained; and so does `bench`."""
    save_model(tmp_path / "model", "encoder")
    data = save_data(tmp_path / "data.txt", "encoder")
    model = get_peft_model(
        AutoModel.from_pretrained(tmp_path / "model"), VariatorConfig(decompression="neurons", correction_dim=8)
    )
    shrink_plugin(model)
    model.save_pretrained(tmp_path / "shrunk")
    words = ("--data", data, "-o", tmp_path / "out", "--adapter", tmp_path / "shrunk", *QUICK)
    status, out, err = invoke(tmp_path / "model", *words)
    assert status == 0, err
    assert run_command("info", tmp_path / "out", "--json", tmp_path / "info.json")[0] == 0
    counted = json.loads((tmp_path / "info.json").read_text())["parameters"]
    assert f"the plugin ({counted:,} parameters" in out
    assert f"Parameters added: {counted:,}" in (tmp_path / "out" / "README.md").read_text()
    assert count_added_parameters(model) == counted


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "encoder")
    data = save_data(tmp_path / "data.txt", "encoder")
    common = [tmp_path / "model", "--data", data, *QUICK]
    assert invoke(*common, "-o", tmp_path / "whole", "--checkpoints", tmp_path / "checkpoints")[0] == 0
    for step in (4, 5, 6):
        (tmp_path / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json").unlink()
        for path in (tmp_path / "checkpoints" / f"checkpoint-{step}").iterdir():
            path.unlink()
        (tmp_path / "checkpoints" / f"checkpoint-{step}").rmdir()
    assert invoke(*common, "-o", tmp_path / "resumed", "--checkpoints", tmp_path / "checkpoints")[0] == 0
    logs = [json.loads((tmp_path / name / "training.json").read_text())["log"] for name in ("whole", "resumed")]
    losses = [[line["loss"] for line in log if "loss" in line] for log in logs]
    assert losses[0] == losses[1]
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "resumed"))
    torch.testing.assert_close(whole, resumed, rtol=0, atol=0)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, `data.txt`, and the `checkpoints` of a whole run with the result `whole`."""
    root = tmp_path_factory.mktemp("stopped")
    save_model(root / "model", "encoder")
    data = save_data(root / "data.txt", "encoder")
    words = [root / "model", "--data", data, *QUICK, *SMALL, "--checkpoints", root / "checkpoints"]
    assert invoke(*words, "-o", root / "whole")[0] == 0
    return root


NEWEST, BEFORE = "checkpoint-6", "checkpoint-5"
DAMAGES = ["trainer_state.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth"]


@pytest.mark.parametrize(
    ("file", "how"),
    [
        pytest.param(file, how, marks=[pytest.mark.slow] * ((number % 2 == 0) != (how == "missing")))
        for number, file in enumerate(DAMAGES)
        for how in ("missing", "cut off")
    ],
)
def test_a_broken_checkpoint_is_passed_over(stopped: Path, tmp_path: Path, file: str, how: str) -> None:
    kept = tmp_path / "checkpoints"
    shutil.copytree(stopped / "checkpoints", kept)
    path = kept / NEWEST / file
    content = path.read_bytes()
    path.unlink()
    if how == "cut off":
        path.write_bytes(content[: len(content) // 2])
    words = [stopped / "model", "--data", stopped / "data.txt", *QUICK, *SMALL, "--checkpoints", kept]
    status, _, err = invoke(*words, "-o", tmp_path / "out")
    assert status == 0, err
    assert NEWEST in err
    assert Path(file).stem in err
    assert f"Going on from {BEFORE}" in err
    whole, resumed = (
        load_file(folder / "adapter_model.safetensors") for folder in (stopped / "whole", tmp_path / "out")
    )
    torch.testing.assert_close(whole, resumed, rtol=0, atol=0)


def test_without_a_whole_checkpoint_it_starts_again(stopped: Path, tmp_path: Path) -> None:
    kept = tmp_path / "checkpoints"
    shutil.copytree(stopped / "checkpoints", kept, ignore=shutil.ignore_patterns("scheduler.pt"))
    words = [stopped / "model", "--data", stopped / "data.txt", *QUICK, *SMALL, "--checkpoints", kept]
    status, _, err = invoke(*words, "-o", tmp_path / "out")
    assert status == 0, err
    assert "from the beginning" in err
    whole, again = (
        load_file(folder / "adapter_model.safetensors") for folder in (stopped / "whole", tmp_path / "out")
    )
    torch.testing.assert_close(whole, again, rtol=0, atol=0)


def test_checkpoints_do_not_go_into_the_output(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "encoder")
    for kept in (tmp_path / "out", tmp_path / "out" / "kept"):
        status, _, err = invoke(tmp_path / "model", "--data", "data", "-o", tmp_path / "out", "--checkpoints", kept)
        assert (status, "--checkpoints" in err) == (1, True)


def test_tables_are_read_by_column(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "encoder")
    lines = save_data(tmp_path / "data.txt", "encoder").read_text().splitlines()
    table, records = tmp_path / "table.csv", tmp_path / "records.jsonl"
    table.write_text("\n".join(["id,body", *(f"{number},{line}" for number, line in enumerate(lines))]))
    records.write_text("\n".join(json.dumps({"body": line}) for line in lines))
    words = [tmp_path / "model", "--data", table, "--data", records, *QUICK, *SMALL, "-o", tmp_path / "out"]
    status, _, err = invoke(*words)
    assert status == 1
    assert str(table) in err
    assert "id, body" in err
    assert "--text-column" in err
    assert not (tmp_path / "out").exists()
    status, out, err = invoke(*words, "--text-column", "body")
    assert status == 0, err
    assert "--text-column body" in out.partition("Next:")[2]


@pytest.mark.parametrize(
    ("task", "option"), [("encoder", "--split"), ("encoder", "--text-column"), ("vision", "--split")]
)
def test_a_part_of_data_that_has_no_such_parts_is_refused(tmp_path: Path, task: str, option: str) -> None:
    save_model(tmp_path / "model", task)
    data = save_data(tmp_path / ("images" if task == "vision" else "data.txt"), task)
    status, _, err = invoke(tmp_path / "model", "--data", data, option, "other", *QUICK, "-o", tmp_path / "out")
    assert status == 1
    assert f"{option} other chooses a part of" in err
    assert f"{data} is none. Leave it out." in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("task", ["encoder", "causal", "seq2seq"])
@pytest.mark.parametrize("kind", ["rows", "files"])
def test_examples_hold_one_document_and_every_file_is_held_out_from(tmp_path: Path, task: Any, kind: str) -> None:
    save_model(tmp_path / "model", task)
    files = []
    for word in range(0, 30, 10):
        files.append(tmp_path / f"{word}.{'jsonl' if kind == 'rows' else 'txt'}")
        if kind == "rows":
            rows = [json.dumps({"text": f"w{number} " * 50}) for number in range(word, word + 10)]
            files[-1].write_text("\n".join(rows))
        else:
            files[-1].write_text((f"w{word} " * 25 + "\n") * 20)
    data = load_data(
        str(tmp_path / "model"), task, [str(file) for file in files], column="text", split="train", max_length=20,
        wanted=10_000, held_out=6, seed=0,
    )  # fmt: skip
    words = [
        {token for token in [*row["input_ids"], *row.get("labels", [])] if token > 3}
        for row in [*data.train, *data.held_out]
    ]
    assert all(len(each) == 1 for each in words)
    assert len(set().union(*words)) == (30 if kind == "rows" else 3)
    assert {(next(iter(each)) - 4) // 10 for each in words[-6:]} == {0, 1, 2}


@pytest.mark.parametrize(("task", "share"), [("encoder", 0.5), ("causal", 0.0)])
def test_an_encoder_is_shown_single_sentences_beside_spans(tmp_path: Path, task: Any, share: float) -> None:
    save_model(tmp_path / "model", task)
    lines = [[number % 36, number // 36, *[number % 7] * (4 + number % 5)] for number in range(1200)]
    (tmp_path / "text.txt").write_text("\n".join(" ".join(f"w{word}" for word in line) for line in lines))
    data = load_data(
        str(tmp_path / "model"), task, [str(tmp_path / "text.txt")], column="text", split="train", max_length=66,
        wanted=10_000, held_out=6, seed=0,
    )  # fmt: skip
    whole = {tuple(word + len(BERT_SPECIAL) for word in line) for line in lines}
    ends = slice(1, -1) if task == "encoder" else slice(None, -1)
    rows = [tuple(row["input_ids"][ends]) for row in [*data.train, *data.held_out]]
    assert sum(row in whole for row in rows) / len(rows) == pytest.approx(share, abs=0.1)
    if task == "encoder":
        beginnings = {tuple(line[:2]) for line in whole}
        assert sum(row[:2] in beginnings for row in rows) / len(rows) > 0.9, "spans begin with a sentence, too"


def test_unreadable_images_are_skipped_and_counted(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "vision")
    data = save_data(tmp_path / "data", "vision")
    (data / "7.png").write_bytes((data / "7.png").read_bytes()[:-30])
    status, _, err = invoke(tmp_path / "model", "--data", data, "-o", tmp_path / "out", *QUICK, *SMALL)
    assert status == 0, err
    assert "Skipped 1 of 20 images" in err
    assert str(data / "7.png") in err


def test_models_of_videos_are_refused(tmp_path: Path) -> None:
    tiny_model("videomae").save_pretrained(tmp_path / "model")
    data = save_data(tmp_path / "data", "vision")
    status, _, err = invoke(tmp_path / "model", "--data", data, "--output", tmp_path / "out", *SMALL, *QUICK)
    assert (status, "(architecture 'videomae') takes videos" in err) == (1, True), err


def test_images_of_several_shapes_are_trained_on(tmp_path: Path) -> None:
    tiny_model("siglip2-vision").save_pretrained(tmp_path / "model")
    Siglip2ImageProcessor(patch_size=4, max_num_patches=36).save_pretrained(tmp_path / "model")
    data = save_data(tmp_path / "data", "vision")
    status, _, err = invoke(tmp_path / "model", "--data", data, "--output", tmp_path / "out", *SMALL, *QUICK)
    assert status == 0, err


def test_the_end_of_a_prompt_is_kept(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "causal")
    data, words = save_data(tmp_path / "data", "causal"), ["--keep-last-tokens", "5", *SMALL, *QUICK]
    status, _, err = invoke(tmp_path / "model", "--data", data, "-o", tmp_path / "out", *words)
    assert status == 0, err
    assert PeftConfig.from_pretrained(str(tmp_path / "out")).keep_last_tokens == 5


def test_whole_layers_of_a_vision_model(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "vision")
    data = save_data(tmp_path / "data", "vision")
    status, _, err = invoke(
        tmp_path / "model", "--data", data, "-o", tmp_path / "out", "--layer-spans", "0-1", *SMALL, *QUICK
    )
    assert status == 0, err
    config = PeftConfig.from_pretrained(str(tmp_path / "out"))
    assert (config.layer_spans, config.decompression) == ([[0, 1]], "bottleneck")
    assert "before layers 0 to 1, attention included, of the base" in (tmp_path / "out" / "README.md").read_text()


def test_an_image_processor_that_is_missing_is_named(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "vision")
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    data = save_data(tmp_path / "data", "vision")
    status, _, err = invoke(tmp_path / "model", "--data", data, "-o", tmp_path / "out", *QUICK, *SMALL)
    assert (status, "has no image processor that can be read. Save that of the model in its folder" in err) == (
        1,
        True,
    )


def test_a_plugin_that_does_not_pay_says_so(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "encoder")
    data = save_data(tmp_path / "data.txt", "encoder")
    words = [tmp_path / "model", "--data", data, *QUICK, "--ratio", "2,8", "--decompression", "bottleneck"]
    status, _, err = invoke(*words, "--bottleneck-dim", 600, "-o", tmp_path / "wide")
    assert status == 0, err
    assert "does not pay at k = 2" in err
    assert "does not pay at k = 2" in (tmp_path / "wide" / "README.md").read_text()
    status, _, err = invoke(*words, *SMALL, "-o", tmp_path / "small")
    assert status == 0, err
    assert "does not pay" not in err + (tmp_path / "small" / "README.md").read_text()


def test_checkpoints_of_another_run_are_not_taken_up(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "encoder")
    data, kept = save_data(tmp_path / "data.txt", "encoder"), tmp_path / "checkpoints"
    common = [tmp_path / "model", "--data", data, *QUICK]
    assert invoke(*common, "-o", tmp_path / "first", "--checkpoints", kept)[0] == 0
    status, _, err = invoke(*common, "-o", tmp_path / "second", "--checkpoints", kept, "--ratio", 2)
    assert status == 1
    assert "holds checkpoints of a run with ratio=None, and this one has [2]" in err
    (kept / "run.json").unlink()
    status, _, err = invoke(*common, "-o", tmp_path / "second", "--checkpoints", kept)
    assert (status, "holds checkpoints of an unknown run" in err) == (1, True)
    # Settings of a run that made no checkpoint bind nobody.
    assert invoke(*common, "-o", tmp_path / "third", "--checkpoints", tmp_path / "new", "--adapter", "none")[0] == 1
    assert invoke(*common, "-o", tmp_path / "third", "--checkpoints", tmp_path / "new")[0] == 0


def test_ratios_that_data_chose_are_not_chosen_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "model", "encoder")
    data, kept = save_data(tmp_path / "data.txt", "encoder"), tmp_path / "checkpoints"
    words = [tmp_path / "model", "--data", data, *QUICK, "--checkpoints", kept, "--ratio", "2,8"]
    words += ["--flops-saved", "0.1,0.15"]
    assert invoke(*words, "-o", tmp_path / "whole")[0] == 0
    for step in (4, 5, 6):
        shutil.rmtree(kept / f"checkpoint-{step}")
    monkeypatch.setattr("peft_variator.cli.train.allocate", None)
    status, _, err = invoke(*words, "-o", tmp_path / "resumed")
    assert status == 0, err
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "resumed"))
    torch.testing.assert_close(whole, resumed, rtol=0, atol=0)
    configs = [PeftConfig.from_pretrained(tmp_path / name) for name in ("whole", "resumed")]
    assert configs[0].ratio_schedule == configs[1].ratio_schedule
    assert configs[0].correction_pattern == configs[1].correction_pattern


@pytest.mark.parametrize("what", ["text", "adapter", "weights"])
def test_data_that_has_changed_since_is_refused(tmp_path: Path, what: str) -> None:
    save_model(tmp_path / "model", "encoder")
    data, kept = save_data(tmp_path / "data.txt", "encoder"), tmp_path / "checkpoints"
    common = [tmp_path / "model", "--data", data, *QUICK]
    assert invoke(*common, *SMALL, "-o", tmp_path / "before")[0] == 0
    words = [*common, "--checkpoints", kept, "--adapter", tmp_path / "before"]
    assert invoke(*words, "-o", tmp_path / "first")[0] == 0
    if what == "text":
        data.write_text(data.read_text() + "w1 w2 w3\n")
    elif what == "adapter":
        (tmp_path / "before" / "adapter_config.json").write_text("{}")
    else:  # trained anew, they are as large as they were
        weights = tmp_path / "before" / "adapter_model.safetensors"
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    status, _, err = invoke(*words, "-o", tmp_path / "second")
    changed = data if what == "text" else tmp_path / "before"
    assert (status, f"{changed} is not what it was when the checkpoints" in err) == (1, True), err
    settings = json.loads((kept / "run.json").read_text())
    del settings["digests"]  # as it was written before: nothing is known of the data
    (kept / "run.json").write_text(json.dumps(settings))
    if what == "text":
        status, _, err = invoke(*words, "-o", tmp_path / "second")
        assert status == 0, err


def test_a_seed_that_cannot_be_is_named(tmp_path: Path) -> None:
    status, _, err = invoke("model", "--data", "data.txt", "-o", tmp_path / "out", "--seed", "-1")
    assert (status, "Invalid value for '--seed'" in err) == (2, True), err


def test_a_model_without_all_of_its_weights_is_not_followed(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "encoder")
    data = save_data(tmp_path / "data.txt", "encoder")
    state = {name: value for name, value in model.state_dict().items() if "layer.1.intermediate" not in name}
    save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    status, _, err = invoke(tmp_path / "model", "--data", data, "-o", tmp_path / "out", *QUICK)
    assert status == 1
    assert "does not hold all weights of a BertModel: encoder.layer.1.intermediate.dense.bias, " in err


def test_a_pooler_may_be_missing(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "encoder")
    data = save_data(tmp_path / "data.txt", "encoder")
    state = {name: value for name, value in model.state_dict().items() if "pooler" not in name}
    save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    status, _, err = invoke(tmp_path / "model", "--data", data, "-o", tmp_path / "out", *QUICK, *SMALL)
    assert status == 0, err


def test_a_model_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    """transformers makes one without files, to which every word is unknown, or fails in another library's name."""
    data = save_data(tmp_path / "data.txt", "encoder")
    for base in (tiny_model("bert", **TEXT), tiny_model("llama", **TEXT)):
        folder = tmp_path / base.config.model_type
        base.save_pretrained(folder)
        status, _, err = invoke(folder, "--data", data, "-o", tmp_path / "out", *QUICK)
        assert status == 1
        assert f"'{folder}' has no tokenizer" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ratios", "2;4"], "--ratio is '2;4'; give whole numbers, with commas"),
        (["--ratio", "1"], "The ratio 1 compresses nothing"),
        (["--steps", "0"], "--steps is 0; it has to be at least 1"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--max-length", "65"], "--max-length is 65, but"),
        (["--max-length", "5"], "--max-length is 5, of which special tokens leave 3: too few to merge anything in"),
        (["--lr", "-1"], "--lr is -1.0; it has to be above 0"),
        (["--lr", "nan"], "--lr is nan; it has to be above 0"),
        (["--adapter", "x", "--bottleneck-dim", "4"], "--bottleneck-dim is that of the plugin in --adapter"),
        (["--flops-saved", "1.5"], "a share lies between 0 and 1"),
        (["--flops-saved", "x"], "--flops-saved is 'x'"),
        (["--flops-saved", "0.3,0.4"], "2 shares for 1 ratios"),
        (["--flops-saved", "0.97"], "flops_saved=0.97 cannot be reached"),
        (["--layer-spans", "0;1"], "--layer-spans is '0;1'; give first and last layers"),
        (["--layer-spans", "1-0"], "layer_spans=[[1, 0]] has to hold pairs"),
        (["--layer-spans", "0-1"], "no layers that take hidden states alone were found"),
        (["--adapter", "x", "--layer-spans", "0-1"], "--layer-spans is that of the plugin in --adapter"),
        (["--adapter", "x", "--flops-saved", "0.3"], "--flops-saved is that of the plugin in --adapter"),
        (["--decompression", "bottleneck", "--correction-rank", "4"], "correction_rank=4"),
        (["--compensation-rank", "0"], "compensation_rank=0"),
        (["--keep-last-tokens", "-1"], "keep_last_tokens"),
        (["--adapter", "x", "--keep-last-tokens", "8"], "--keep-last-tokens is that of the plugin in --adapter"),
        (["--data", "missing.txt"], "There is no file 'missing.txt'"),
        (["--output", f"{__file__}/out"], f"'{__file__}' is a file. Name another output."),
        (["--checkpoints", f"{__file__}/kept"], f"'{__file__}' is a file. Name another output."),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, words: list[str], message: str) -> None:
    save_model(tmp_path / "model", "encoder")
    data = save_data(tmp_path / "data.txt", "encoder")
    status, _, err = invoke(tmp_path / "model", "--data", data, "-o", tmp_path / "out", *QUICK, *words)
    assert status == 1
    assert message in err
    assert not (tmp_path / "out").exists()


def test_ratios_and_widths_for_a_share_of_the_flops(tmp_path: Path) -> None:
    base, data, output = (
        save_model(tmp_path / "model", "encoder"),
        save_data(tmp_path / "data", "encoder"),
        tmp_path / "out",
    )
    words = ["--ratio", "2,8", "--flops-saved", "0.1,0.15", "--correction-rank", "2", "--compensation-rank", "2"]
    status, _, err = invoke(tmp_path / "model", "--data", data, "-o", output, *QUICK, *words)
    assert status == 0, err
    model = PeftModel.from_pretrained(base, output).eval()
    config = model.peft_config["default"]
    assert set(config.ratio_schedule) == {2, 8}
    assert (config.correction_rank, config.compensation_rank) == (2, 2)
    inputs = {"input_ids": torch.full((1, 32), 7)}  # a text of --max-length; shorter ones save less
    flops = {}
    for k in (1, 2, 8):
        model.set_compression_ratio(k)
        flops[k] = count_flops(model, inputs)
    assert [1 - flops[k] / flops[1] for k in (2, 8)] == pytest.approx([0.1, 0.15], abs=0.02)


def test_outputs_and_models_that_do_not_do(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    status, _, err = invoke("model", "--data", "data", "-o", tmp_path / "full")
    assert (status, "already exists and is not empty" in err) == (1, True)
    status, _, err = invoke("bert-base", "--data", "data", "-o", tmp_path / "out")
    assert (status, "bert-base is a configuration without trained weights" in err) == (1, True)
    (tmp_path / "many" / "one").mkdir(parents=True)
    (tmp_path / "many" / "one" / "config.json").write_text("{}")
    status, _, err = invoke(tmp_path / "many", "--data", "data", "-o", tmp_path / "out")
    assert (status, "config.json can't be read: it is missing. Name the folder of a model, 'one'." in err) == (1, True)
    status, _, err = invoke(tmp_path / "nothing", "--data", "data", "-o", tmp_path / "out")
    assert (status, f"There is no folder '{tmp_path / 'nothing'}'" in err) == (1, True)
    save_model(tmp_path / "model", "encoder")
    (tmp_path / "short.txt").write_text("w1 w2")
    status, _, err = invoke(tmp_path / "model", "--data", tmp_path / "short.txt", "-o", tmp_path / "out", *QUICK)
    assert (status, "gives 1 example; at least 2 are needed" in err) == (1, True)


def test_an_adapter_of_another_method_is_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "encoder")
    data = save_data(tmp_path / "data.txt", "encoder")
    get_peft_model(model, LoraConfig(target_modules=["query"])).save_pretrained(tmp_path / "lora")
    status, _, err = invoke(
        tmp_path / "model", "--data", data, "-o", tmp_path / "out", "--adapter", tmp_path / "lora", *QUICK
    )
    assert status == 1
    assert "lora has the method LORA, not a Variator plugin" in err


def test_one_step_trains_and_several_files_are_read(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "encoder")
    data = [save_data(tmp_path / f"{name}.txt", "encoder") for name in "ab"]
    words = [tmp_path / "model", "--data", data[0], "--data", data[1], *QUICK, *SMALL, "--steps", 1]
    status, _, err = invoke(*words, "-o", tmp_path / "out", "--quiet")
    assert status == 0, err
    assert "held-out examples only" in err
    assert "%|" not in err
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    (row,) = record["facts"]["ratios"]
    assert row["before"] != row["after"]
    assert record["facts"]["data"] == f"{data[0]}, {data[1]}"
    # As many as were asked for, although a step takes only four.
    assert record["facts"]["held_out"] == 5
