"""`peft-variator restore` as it is typed."""

from __future__ import annotations

import json
import re
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel, set_seed
from typer.testing import CliRunner

from peft_variator import SparseLoraConfig, attach_masks
from peft_variator.cli.main import app
from peft_variator.sparsity import PruningConfig, inspect_checkpoint, prune
from tests.cli.commands import run_command
from tests.tiny_models import tiny_model
from tests.word_tokenizer import numbered_words, word_tokenizer


TEXT = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
}
MODELS: dict[str, Any] = {
    "encoder": lambda: tiny_model("bert", **TEXT),
    "causal": lambda: tiny_model("llama", **TEXT, num_key_value_heads=1),
}
QUICK = ["--steps", "8", "--batch-size", "4", "--max-length", "32", "--held-out", "5", "--lr", "0.02"]


invoke = partial(run_command, "restore")


def refused(*words: Any) -> str:
    code, _, errors = invoke(*words)
    assert code == 1
    return errors


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    words = ["<pad>", "<unk>", *numbered_words(38)]
    word_tokenizer(words, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    words = [f"w{(3 * index + index // 7) % 38}" for index in range(2400)]
    file.write_text("\n".join(" ".join(words[start : start + 30]) for start in range(0, 2400, 30)))
    return file


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`causal` and `encoder`, dense and pruned."""
    root = tmp_path_factory.mktemp("models")
    for task, build in MODELS.items():
        set_seed(0)
        model = build()
        save(model, root / task)
        prune(model, PruningConfig(method="magnitude", pattern="2:4"), progress=False)
        save(model, root / f"{task}-pruned")
    return root


def facts_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "training.json").read_text())["facts"]


def assert_pattern(folder: Path) -> None:
    rows = [row for row in inspect_checkpoint(folder, "2:4").modules if "_proj" in row.name]
    assert len(rows) == 14
    assert all(row.pattern_met and not row.negative_zeros for row in rows)


@torch.no_grad()
def mean_loss(model: nn.Module, rows: list[list[int]]) -> float:
    """Cross-entropy of every next token, one text at a time: the plain definition."""
    total = count = 0.0
    for row in rows:
        logits = model.eval()(input_ids=torch.tensor([row])).logits[0, :-1]
        total += float(nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum"))
        count += len(row) - 1
    return total / count


def test_a_language_model_is_restored_and_stays_sparse(folders: Path, text: Path, tmp_path: Path) -> None:
    out, pruned = tmp_path / "adapter", folders / "causal-pruned"
    code, printed, errors = invoke(pruned, "--data", text, "--teacher", folders / "causal", "-o", out, *QUICK)
    assert code == 0, errors
    assert "Adapted 14 modules, 50.00% of whose weights are masked, following the dense model" in printed
    assert f"Wrote {out}" in printed
    assert "{'" not in printed + errors, "a raw dictionary of figures"
    commands = re.findall(r"peft-variator ((?:merge|inspect) .*?)(?= peft-variator|$)", printed.partition("Next: ")[2])
    for command in commands:
        done = CliRunner().invoke(app, shlex.split(command))
        assert done.exit_code == 0, done.output
    assert [command.split()[0] for command in commands] == ["merge", "inspect"]
    assert_pattern(Path(f"{out}-merged"))
    facts = facts_of(out)
    assert facts["weights"] == {"task_weight": 0.9, "logits_weight": 0.1, "hidden_weight": 0.0}
    losses = facts["losses"]
    assert losses["restored"]["task"] < losses["pruned"]["task"]
    assert losses["pruned"]["logits"] > 0
    merged = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(pruned), out).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert_pattern(tmp_path / "merged")
    before, after = load_file(pruned / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    masked = [name for name in before if "_proj" in name]
    assert len(masked) == 14
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in masked)
    assert not any(torch.equal(before[name], after[name]) for name in masked)


def test_losses_are_those_of_all_tokens(folders: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    code, _, errors = invoke(
        folders / "causal-pruned", "--data", text, "--teacher", folders / "causal", "-o", out, *QUICK
    )
    assert code == 0, errors
    from peft_variator.cli.examples import load_data

    data = load_data(
        str(folders / "causal"), "causal", [str(text)], column="text", split="train", max_length=32, wanted=32,
        held_out=5, seed=0,
    )  # fmt: skip
    rows = [row["input_ids"] for row in data.held_out]
    losses = facts_of(out)["losses"]
    dense = LlamaForCausalLM.from_pretrained(folders / "causal")
    assert losses["dense"]["task"] == pytest.approx(mean_loss(dense, rows), rel=1e-5)
    student = LlamaForCausalLM.from_pretrained(folders / "causal-pruned")
    assert losses["pruned"]["task"] == pytest.approx(mean_loss(student, rows), rel=1e-5)
    restored = PeftModel.from_pretrained(student, out)
    assert losses["restored"]["task"] == pytest.approx(mean_loss(restored, rows), rel=1e-5)


def test_without_a_teacher_the_text_alone_is_learned(folders: Path, text: Path, tmp_path: Path) -> None:
    code, printed, errors = invoke(folders / "causal-pruned", "--data", text, "-o", tmp_path / "a", *QUICK)
    assert code == 0, errors
    assert "following no dense model" in printed
    assert facts_of(tmp_path / "a")["weights"]["task_weight"] == 1.0
    assert list(facts_of(tmp_path / "a")["losses"]["pruned"]) == ["task"]


def test_an_encoder_follows_hidden_states(folders: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    code, _, errors = invoke(
        folders / "encoder-pruned", "--data", text, "--teacher", folders / "encoder", "-o", out, *QUICK
    )
    assert code == 0, errors
    losses = facts_of(out)["losses"]
    assert losses["restored"]["hidden"] < losses["pruned"]["hidden"]
    assert losses["dense"] == {}
    assert "pooler" not in json.dumps(json.loads((out / "adapter_config.json").read_text())["target_modules"])


def test_stored_masks_make_the_base_its_own_teacher(folders: Path, text: Path, tmp_path: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(folders / "causal")
    masks = prune(base, PruningConfig(method="magnitude", pattern="2:4", keep_dense=True), progress=False).masks
    model = get_peft_model(base, SparseLoraConfig(mask="stored", target_modules=list(masks)))
    attach_masks(model, masks)
    model.save_pretrained(tmp_path / "start")
    words = [folders / "causal", "--adapter", tmp_path / "start", "--data", text, *QUICK]
    code, _, errors = invoke(*words, "-o", tmp_path / "out")
    assert code == 0, errors
    facts = facts_of(tmp_path / "out")
    assert facts["teacher"] == str(folders / "causal")
    assert facts["weights"]["logits_weight"] == 0.1
    assert facts["losses"]["dense"]["task"] != facts["losses"]["pruned"]["task"]
    assert "Leave --teacher out" in refused(*words, "-o", tmp_path / "other", "--teacher", folders / "causal")


def test_the_card_can_be_followed(folders: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, pruned = tmp_path / "adapter", folders / "causal-pruned"
    code, _, errors = invoke(pruned, "--data", text, "-o", out, "--license", "mit", *QUICK)
    assert code == 0, errors
    card = (out / "README.md").read_text()
    assert ModelCard(card).data.base_model is None  # it is a folder
    assert ModelCard(card).data.license == "mit"
    assert f"peft-variator restore {pruned} --data {text} --output {out} --steps 8" in card
    assert "50.00% of their weights are masked" in card
    monkeypatch.chdir(tmp_path)
    exec(card.partition("```python\n")[2].partition("```")[0], {})
    assert_pattern(tmp_path / "restored")


def test_it_goes_on_from_a_checkpoint(folders: Path, text: Path, tmp_path: Path) -> None:
    words = [folders / "causal-pruned", "--data", text, *QUICK]
    assert invoke(*words, "-o", tmp_path / "straight")[0] == 0
    kept = [*words, "--checkpoints", tmp_path / "kept"]
    assert invoke(*kept, "-o", tmp_path / "first")[0] == 0
    for folder in (tmp_path / "kept").glob("checkpoint-*"):
        if int(folder.name.partition("-")[2]) > 4:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    assert invoke(*kept, "-o", tmp_path / "second")[0] == 0
    straight, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("straight", "second"))
    assert all(torch.allclose(straight[name], second[name], atol=1e-6) for name in straight)


def test_a_teacher_of_another_kind_is_refused(folders: Path, text: Path, tmp_path: Path) -> None:
    words = [folders / "encoder-pruned", "--data", text, "-o", tmp_path / "out", "--teacher"]
    assert "model_type is 'llama' there, and 'bert' here" in refused(*words, folders / "causal", "--task", "encoder")
    save(tiny_model("bert", **TEXT | {"hidden_size": 32}), tmp_path / "wide")
    assert "hidden_size is 32 there, and 16 here" in refused(*words, tmp_path / "wide")


BAD: list[tuple[list[str], str]] = [
    (["causal"], "No linear layer of"),
    (["causal-pruned", "--kl-weight", "0.5"], "--kl-weight is 0.5, but there is no dense model to follow"),
    (["causal-pruned", "--kl-weight", "1.5"], "from 0 to 1"),
    (["causal-pruned", "--steps", "0"], "--steps is 0; it has to be at least 1"),
    (["causal-pruned", "--rank", "0"], "must be an integer of at least 1"),
    (["causal-pruned", "--adapter", "some", "--alpha", "8"], "--rank and --alpha are of a new adapter"),
    (["encoder-pruned"], "follows the hidden states of the dense model. Name that with --teacher"),
    (["encoder-pruned", "--kl-weight", "0.1"], "--kl-weight needs predictions"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_input_is_refused(words: list[str], message: str, folders: Path, text: Path, tmp_path: Path) -> None:
    assert message in refused(folders / words[0], "--data", text, "-o", tmp_path / "out", *words[1:])
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_and_another_adapter_are_refused(folders: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert "already exists" in refused(folders / "causal-pruned", "--data", text, "-o", tmp_path / "out")
    get_peft_model(LlamaForCausalLM.from_pretrained(folders / "causal"), LoraConfig()).save_pretrained(
        tmp_path / "lora"
    )
    words = [folders / "causal", "--data", text, "-o", tmp_path / "new", "--adapter", tmp_path / "lora"]
    assert "has the method" in refused(*words)
