"""The Python of README and docs runs: block after block of a page, in a folder where a Hub id is a tiny local model.

A page's blocks share their names, as a reader would type them one after the other; what a page takes for granted comes
from `given`. `NOT_RUN` names pages and blocks that do not run here, and why.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertForSequenceClassification, BertModel, LlamaForCausalLM, PreTrainedModel

from peft_variator import PruningConfig, SparseLoraConfig, VariatorConfig, prune
from peft_variator.bases import pack_checkpoint
from tests.tiny_models import BY_NAME, tiny_model
from tests.word_tokenizer import BERT_SPECIAL, BERT_TOKENS, numbered_words, word_tokenizer


ROOT = Path(__file__).resolve().parents[1]
SIZES = {"intermediate_size": 64, "vocab_size": 64}
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
TEXTS = [" ".join(f"w{(7 * line + word) % 50}" for word in range(9 + line)) for line in range(12)]

NOT_RUN = {
    "docs/export.md": "exporting takes long: tests/variator/test_export.py and test_compile.py do it",
    "docs/metrics.md": "tests/metrics loads them",
    "docs/serving.md": "profiling takes long: tests/runtime profiles, embeds and simulates",
    "docs/sharing.md": "it needs a Hub: tests/hub pushes and loads",
    "allocate(base": "a tiny model cannot save these shares: tests/profiling/test_allocation.py allocates",
    "register_layout(": "a class of the reader's own",
    'target_modules=["ff_in"]': "a model of the reader's own",
}


def given(page: str) -> dict[str, Any]:
    """What a page takes for granted before its first block."""
    names: dict[str, Any] = {"get_peft_model": get_peft_model, "VariatorConfig": VariatorConfig, "texts": TEXTS}
    torch.manual_seed(0)
    ids = torch.randint(4, 54, (4, 16))
    names["inputs"] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    names["batches"] = names["dataloader"] = [names["inputs"]]
    if page in ("docs/pruning.md", "docs/sparse_lora.md"):
        names["model"] = tiny_model("llama", **SIZES).eval()
        names["pruned_model"] = LlamaForCausalLM.from_pretrained("BASE_DIR")
    if page == "docs/make_it_faster.md":
        names["input_features"] = BY_NAME["whisper"].inputs(1)["input_features"]
        names["pixel_values"] = BY_NAME["dinov2"].inputs(1)["pixel_values"]
    if page == "docs/training.md":
        names["path"] = names["fine_tuned_path"] = ENCODER
        names["data"] = [{"input_ids": row} for row in ids]
        names["dense"] = BertForSequenceClassification.from_pretrained("cross-encoder/ms-marco-MiniLM-L6-v2")
    return names


SHIPPED = [
    ("llama", "HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct"),
    ("whisper", "openai/whisper-tiny.en", "whisper-tiny.en"),
    ("dinov2", "facebook/dinov2-small", "dinov2-vit-s14"),
]
"""Case of the tiny model that stands for a model of the pages, its name there, and its plugin's folder."""
# As the pages name tokens and layers.
SHIPPED_SIZES: dict[str, dict[str, int]] = {"llama": {"vocab_size": 64}, "dinov2": {"num_hidden_layers": 12}}


def ship(base: PreTrainedModel, plugin: str) -> None:
    config = VariatorConfig(correction_dim=8, trained_ratios=[4, 8, 16, 32])
    get_peft_model(base, config).save_pretrained(f"examples/plugins/{plugin}")


def save_tokenizer(folder: str) -> None:
    words = [*BERT_SPECIAL, *numbered_words(60)]
    templates = ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]")
    word_tokenizer(words, *templates, **BERT_TOKENS, model_max_length=64).save_pretrained(folder)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model under every name that the pages use."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.models")
    root = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        torch.manual_seed(0)
        tiny_model("bert", **SIZES).save_pretrained("plain")
        save_tokenizer("plain")
        transformer = modules.Transformer("plain")
        pooling = modules.Pooling(transformer.get_embedding_dimension())
        sentence_transformers.SentenceTransformer(modules=[transformer, pooling]).save(ENCODER)
        model = sentence_transformers.SentenceTransformer(ENCODER, device="cpu")
        model.add_adapter(VariatorConfig(correction_dim=8, task_type="FEATURE_EXTRACTION"))
        model.save("my-plugin")
        ship(BertModel.from_pretrained(ENCODER), "all-MiniLM-L6-v2")
        for base, name, plugin in SHIPPED:
            model = tiny_model(base, **SHIPPED_SIZES.get(base, {}))
            model.save_pretrained(name)
            ship(model, plugin)
        save_tokenizer("HuggingFaceTB/SmolLM2-135M-Instruct")
        get_peft_model(BertModel.from_pretrained(ENCODER), LoraConfig(target_modules=["query"])).save_pretrained(
            "me/my-task-lora"
        )
        classifier = tiny_model("bert-sequence", **SIZES, num_labels=1)
        classifier.save_pretrained("cross-encoder/ms-marco-MiniLM-L6-v2")
        save_tokenizer("cross-encoder/ms-marco-MiniLM-L6-v2")
        base = tiny_model("llama", **SIZES)
        prune(base, PruningConfig(method="magnitude", pattern="2:4"), progress=False)
        base.save_pretrained("BASE_DIR")
        pack_checkpoint("BASE_DIR", "PACKED_DIR")
        pack_checkpoint("BASE_DIR", "organisation/a-2of4-model")
        get_peft_model(base, SparseLoraConfig(r=4)).save_pretrained("ADAPTER_DIR")
    return root


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


PAGES = [
    str(path.relative_to(ROOT))
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if "```python" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(page: str, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page in NOT_RUN:
        pytest.skip(NOT_RUN[page])
    monkeypatch.chdir(hub)
    names = given(page)
    for number, block in enumerate(blocks_of(page)):
        if any(sign in block for sign in NOT_RUN):
            continue
        code = block.replace("max_steps=1000", "max_steps=2, use_cpu=True, report_to='none'")
        exec(compile(code, f"{page}, block {number}", "exec"), names)


def test_what_is_not_run_is_there() -> None:
    everything = "".join(block for page in PAGES for block in blocks_of(page))
    assert all(sign in PAGES or sign in everything for sign in NOT_RUN)
