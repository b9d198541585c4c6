"""Pushing to a Hub and loading from it, in fresh processes that find it by HF_ENDPOINT."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.cli.saved_plugins import save_base

from .server import TOKEN, Hub


FIXTURES = Path(__file__).parents[1] / "fixtures" / "v0_1"

PUSH = """
import sys
import peft_variator
import torch
from huggingface_hub import create_branch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaForCausalLM
from peft_variator import SparseLoraConfig, VariatorConfig

torch.manual_seed(0)
fixtures = sys.argv[1]
sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=40)
BertModel(BertConfig(**sizes)).push_to_hub("someone/base")
base = BertModel.from_pretrained("someone/base")
plugin = get_peft_model(base, VariatorConfig(init_weights=False, compression_ratio=2, trained_ratios=[2, 4]))
plugin.push_to_hub("someone/plugin")
create_branch("someone/plugin", branch="fast")
plugin.peft_config["default"].compression_ratio = 4
plugin.push_to_hub("someone/plugin", revision="fast")

LlamaForCausalLM.from_pretrained(fixtures + "/llama-24-base").push_to_hub("someone/pruned")
pruned = LlamaForCausalLM.from_pretrained("someone/pruned")
sparse = get_peft_model(pruned, SparseLoraConfig(r=2, init_lora_weights=False))
sparse.push_to_hub("someone/sparse")
AutoModelForCausalLM.from_pretrained(fixtures + "/llama-packed").push_to_hub("someone/packed")
ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
with torch.no_grad():
    torch.save([plugin.eval()(ids)[0], sparse.eval()(ids)[0]], sys.argv[2])
"""

LOAD = """
import json, sys
import peft_variator
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BertModel, LlamaForCausalLM

ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
fast_output, sparse_output = torch.load(sys.argv[1])
with torch.no_grad():
    plain = BertModel.from_pretrained("someone/base").eval()(ids)[0]
    plugin = PeftModel.from_pretrained(BertModel.from_pretrained("someone/base"), "someone/plugin").eval()
    slow = plugin(ids)[0]
    assert plugin.peft_config["default"].trained_ratios == [2, 4]
    plugin.load_adapter("someone/plugin", "fast", revision="fast")
    assert plugin.peft_config["fast"].compression_ratio == 4
    again = peft_variator.load_plugin(BertModel.from_pretrained("someone/base"), "someone/plugin").eval()
    torch.testing.assert_close(again(ids)[0], slow)
    assert not torch.allclose(slow, plain)
    by_transformers = BertModel.from_pretrained("someone/base")
    by_transformers.load_adapter("someone/plugin", adapter_kwargs={"revision": "fast"})
    sparse = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("someone/pruned"), "someone/sparse").eval()
    torch.testing.assert_close(sparse(ids)[0], sparse_output)
    for load in (AutoModelForCausalLM.from_pretrained, peft_variator.load_base):
        packed = load("someone/packed")
        assert type(packed.model.layers[0].mlp.up_proj).__name__ == "Sparse24Linear"
        torch.testing.assert_close(packed(ids)[0], LlamaForCausalLM.from_pretrained("someone/pruned")(ids)[0])
print("all loaded")
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as started:
        yield started


def run(hub: Hub, home: Path, *words: str | Path, token: str | None = TOKEN, offline: bool = False) -> str:
    """What a fresh Python process prints; an error that ends it is raised with what it said."""
    done = attempt(hub, home, *words, token=token, offline=offline)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def attempt(
    hub: Hub, home: Path, *words: str | Path, token: str | None = TOKEN, offline: bool = False
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": str(int(offline)),
    }
    if token is not None:
        environment["HF_TOKEN"] = token
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=900, check=False, env=environment
    )


@pytest.fixture(scope="module")
def pushed(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pushed adapters give, in a file."""
    outputs = tmp_path_factory.mktemp("outputs") / "outputs.pt"
    run(hub, tmp_path_factory.mktemp("home"), "-c", PUSH, FIXTURES, outputs)
    return outputs


@pytest.mark.slow
def test_what_is_pushed_has_all_files_and_a_card(hub: Hub, pushed: Path) -> None:
    for repo, base, tag in (("plugin", "base", "variator"), ("sparse", "pruned", "sparse-lora")):
        files = hub.files(f"someone/{repo}")
        assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(files)
        card = ModelCard(files["README.md"].decode())
        assert (card.data.library_name, card.data.base_model) == ("peft", f"someone/{base}")
        assert tag in card.data.tags
        assert "import peft_variator" in card.text
        assert "More Information Needed" not in card.text
    assert "import peft_variator" in hub.files("someone/packed")["README.md"].decode()
    assert json.loads(hub.files("someone/plugin", "fast")["adapter_config.json"])["compression_ratio"] == 4
    assert json.loads(hub.files("someone/plugin")["adapter_config.json"])["compression_ratio"] == 2


@pytest.mark.slow
def test_it_loads_in_a_fresh_process_and_again_offline(hub: Hub, pushed: Path, tmp_path: Path) -> None:
    assert "all loaded" in run(hub, tmp_path, "-c", LOAD, pushed)
    seen = len(hub.requests)
    assert "all loaded" in run(hub, tmp_path, "-c", LOAD, pushed, offline=True)
    assert len(hub.requests) == seen


TRY = """
import sys, traceback
import peft_variator
from peft import PeftModel
from transformers import BertModel

base = BertModel.from_pretrained("someone/base")
try:
    PeftModel.from_pretrained(base, "someone/plugin")
except Exception as error:
    assert not any("variator" in name for name, _ in base.named_modules()), "it left something behind"
    print("refused:", type(error).__name__, error)
else:
    print("loaded")
"""


@pytest.mark.slow
def test_a_download_that_breaks_off_is_gone_on_with(hub: Hub, pushed: Path, tmp_path: Path) -> None:
    hub.faults.cut_after, hub.faults.cuts = 1000, 2
    try:
        assert "loaded" in run(hub, tmp_path, "-c", TRY)
        assert hub.faults.cuts == 0
    finally:
        hub.faults.cuts = 0


@pytest.mark.slow
def test_a_corrupted_file_is_refused_and_named(hub: Hub, pushed: Path, tmp_path: Path) -> None:
    assert "loaded" in run(hub, tmp_path, "-c", TRY)
    (blob,) = {path.resolve() for path in tmp_path.rglob("adapter_model.safetensors")}
    content = blob.read_bytes()
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    told = run(hub, tmp_path, "-c", TRY, offline=True)
    assert "refused: AdapterStateError" in told
    assert str(blob) in told


@pytest.mark.slow
def test_without_the_right_token_or_repository(hub: Hub, pushed: Path, tmp_path: Path) -> None:
    """The command says so before it does anything, and nothing appears under the name of its output."""
    packed = ["-m", "peft_variator", "pack", FIXTURES / "llama-24-base", "-o", tmp_path / "packed"]
    wrong = attempt(hub, tmp_path / "home", *packed, "--push-to-hub", "someone/else", token="hf_wrong")
    assert wrong.returncode == 1
    assert "someone/else" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    assert not (tmp_path / "packed").exists()
    missing = attempt(hub, tmp_path / "home", "-m", "peft_variator", "info", "someone/nothing")
    assert missing.returncode == 1
    assert "someone/nothing" in missing.stderr
    assert "Traceback" not in missing.stderr


@pytest.mark.slow
def test_a_command_pushes_what_it_made_and_info_finds_it(hub: Hub, tmp_path: Path) -> None:
    made = ["-m", "peft_variator", "pack", FIXTURES / "llama-24-base", "-o", tmp_path / "packed", "--license", "mit"]
    told = run(hub, tmp_path / "home", *made, "--push-to-hub", "someone/made")
    assert f"{hub.address}/someone/made" in told
    files = hub.files("someone/made")
    assert set(files) == {path.name for path in (tmp_path / "packed").iterdir()}
    assert all(files[path.name] == path.read_bytes() for path in (tmp_path / "packed").iterdir())
    assert ModelCard(files["README.md"].decode()).data.license == "mit"
    seen = len(hub.requests)
    found = json.loads(run(hub, tmp_path / "other", "-m", "peft_variator", "info", "someone/made", "--json", "-"))
    assert (found["kind"], found["packed_layers"]) == ("packed base", 14)
    assert found["revision"] == hub.repositories["someone/made"].refs["main"]
    assert not list((tmp_path / "other").rglob("*.safetensors"))  # weights are looked at, not downloaded
    assert any("storage" in request for request in hub.requests[seen:])


@pytest.mark.slow
def test_a_push_that_fails_keeps_the_folder_and_says_how_to_go_on(hub: Hub, tmp_path: Path) -> None:
    hub.faults.refuse_commits = True
    try:
        made = ["-m", "peft_variator", "pack", FIXTURES / "llama-24-base", "-o", tmp_path / "packed"]
        done = attempt(hub, tmp_path / "home", *made, "--push-to-hub", "someone/later")
    finally:
        hub.faults.refuse_commits = False
    assert done.returncode == 1
    assert f"hf upload someone/later {tmp_path / 'packed'}" in done.stderr
    assert (tmp_path / "packed" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_name_without_an_owner_is_of_who_pushes(hub: Hub, tmp_path: Path) -> None:
    """The card names the repository as others find it; a base that they can't find is told of."""
    save_base(tmp_path / "model", "encoder")
    (tmp_path / "texts.txt").write_text("w1 w2 w3 w4 w5 " * 100)
    words = ["train", tmp_path / "model", "--data", tmp_path / "texts.txt", "--steps", "1", "--max-length", "16"]
    made = [*words, "-o", tmp_path / "plugin", "--push-to-hub", "made-here"]
    done = attempt(hub, tmp_path / "home", "-m", "peft_variator", *made)
    assert done.returncode == 0, done.stderr
    assert "'someone/made-here'" in hub.files("someone/made-here")["README.md"].decode()
    assert f"a folder of this machine as its base, '{tmp_path / 'model'}'" in done.stderr
