"""`allocate`: ratios and widths for a share of the FLOPs, from what each module's merging changes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

import peft_variator
from peft_variator import VariatorConfig, allocate, calibrate, using_ratio
from peft_variator.profiling import allocation, count_flops
from peft_variator.profiling.allocation import _error, _output_of
from tests.processes import run_processes
from tests.tiny_models import BY_NAME, tiny_model


SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}


def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=99, hidden_dropout_prob=0.0, **SIZES)).eval()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=99, **SIZES)).eval()


def text(count: int = 2, length: int = 64) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 99, (2, length), generator=generator) for _ in range(count)]
    return [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids]


def share_saved(base: nn.Module, config: VariatorConfig, inputs: dict[str, Any], k: int) -> float:
    total = count_flops(base, inputs)
    model = get_peft_model(base, config)
    model.set_compression_ratio(k)
    saved = 1 - count_flops(model, inputs) / total
    model.unload()
    return saved


@pytest.mark.parametrize("share", [0.15, 0.3])
@pytest.mark.parametrize("build", [bert, llama])
def test_a_row_saves_its_share(build: Any, share: float) -> None:
    base = build()
    names = set(dict(base.named_modules()))
    config = allocate(base, iter(text()), flops_saved=share, length=96)
    assert set(dict(base.named_modules())) == names
    assert set(config.ratio_schedule) == {4}
    assert config.compression_ratio == 4
    inputs: dict[str, Any] = {"input_ids": torch.randint(3, 99, (1, 96))}
    inputs |= {"logits_to_keep": 1} if build is llama else {}
    assert share_saved(base, config, inputs, 4) == pytest.approx(share, abs=0.02)


def test_several_rows_on_the_same_widths() -> None:
    base = bert()
    shares = {2: 0.15, 4: 0.25, 8: 0.32}
    config = allocate(base, text(), flops_saved=shares, length=128, correction_dim=16)
    assert set(config.ratio_schedule) == set(shares)
    for k, share in shares.items():
        assert share_saved(base, config, {"input_ids": torch.randint(3, 99, (1, 128))}, k) == pytest.approx(
            share, abs=0.02
        )


def test_what_merging_harms_most_is_merged_least() -> None:
    """A layer whose network gives next to nothing loses nothing by merging."""
    base = bert()
    for index in (1, 2, 3):
        base.encoder.layer[index].output.dense.weight.data *= 0.01
    config = allocate(base, text(), flops_saved=0.3, candidates=(1, 8), length=64)
    assert config.ratio_schedule[4]["encoder.layer.0.intermediate"] == 1
    assert "encoder.layer.0.intermediate" not in config.correction_pattern


def test_fields_of_the_configuration() -> None:
    fields = {"compression_ratio": 8, "decompression": "bottleneck", "correction_dim": 8, "keep_last_tokens": 2}
    config = allocate(bert(), text(), 0.3, length=64, **fields)
    assert set(config.ratio_schedule) == {8}
    assert (config.compression_ratio, config.decompression, config.keep_last_tokens) == (8, "bottleneck", 2)
    assert not config.correction_pattern


def test_images() -> None:
    torch.manual_seed(0)
    base = ViTModel(ViTConfig(image_size=32, patch_size=4, hidden_dropout_prob=0.0, **SIZES)).eval()
    pixels = {"pixel_values": torch.randn(2, 3, 32, 32)}
    config = allocate(base, [pixels], flops_saved=0.3)
    assert share_saved(base, config, {"pixel_values": pixels["pixel_values"][:1]}, 4) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize(
    ("length", "share", "kept", "candidates"),
    [(24, 0.15, 0.1, (1, 2, 4, 8, 16)), (24, 0.1, 0.25, range(1, 17)), (48, 0.15, 0.1, range(1, 17))],
)
def test_outliers_of_short_texts(length: int, share: float, kept: float, candidates: Any) -> None:
    """Together modules save another share than each of them alone: the first one's probe counts for all."""
    torch.manual_seed(0)
    base = tiny_model("bert", num_hidden_layers=4, intermediate_size=128).eval()
    ids = torch.randint(10, 90, (2, length), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": ids}]
    config = allocate(base, batches, share, keep_outliers=kept, candidates=candidates)
    text, model = {"input_ids": ids[:1]}, get_peft_model(base, config)
    calibrate(model, batches)
    saved = count_flops(model, text)
    assert 1 - saved / count_flops(model.unload(), text) == pytest.approx(share, abs=0.02)


def test_a_share_that_stays_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def saved_by(*arguments: Any) -> dict[int, float]:
        attempts.append(arguments)
        return {2: 0.15, 4: 0.31}

    monkeypatch.setattr(allocation, "_saved_by", saved_by)
    base = bert()
    with (
        as_it_was(base),
        pytest.raises(ValueError, match=r"row 4 saves 0\.310 .* in place of 0\.28.*length=") as error,
    ):
        allocate(base, text(1), {2: 0.15, 4: 0.28}, length=96)
    assert "candidates" not in str(error.value)
    assert 1 < len(attempts) <= 4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"flops_saved": 0.9}, "largest"),
        ({"flops_saved": 0.0}, "flops_saved"),
        ({"flops_saved": 1.5}, "flops_saved"),
        ({"flops_saved": "0.3"}, "flops_saved='0.3' has to be a number between 0 and 1.* of type str"),
        ({"flops_saved": np.float32(0.3)}, r"of type float32\. Convert it with \.item\(\) first"),
        ({"flops_saved": {2: True}}, "of type bool"),
        ({"flops_saved": {}}, "flops_saved"),
        ({"flops_saved": {1: 0.3}}, "row"),
        ({"flops_saved": {"4": 0.3}}, "row"),
        ({"candidates": (1,)}, "candidates"),
        ({"candidates": (0, 2)}, "candidates"),
        ({"candidates": (2.0,)}, "candidates"),
        ({"ratio_schedule": {4: {}}}, "ratio_schedule"),
        ({"ratio_pattern": {"layer.0": 2}}, "ratio_pattern"),
        ({"batches": []}, "batches"),
        ({"flops_saved": {2: 0.2, 8: 0.3}, "compression_ratio": 4}, "none of the rows"),
        ({"correction_dim": 999}, "999"),
        ({"length": 1000}, "length=1000, and the model has 512 positions"),
        ({"flops_saved": 0.01}, "flops_saved=0.01 is met to within 0.02"),
        ({"flops_saved": {2: 0.01, 4: 0.2}}, "flops_saved=0.01 is met to within 0.02"),
        ({"flops_saved": {2: 0.1, 4: 0.2}, "scoring": "concat"}, "scoring='concat' is tied to one ratio"),
        ({"batches": [{"input_ids": torch.ones(2, 3, 8, dtype=torch.long)}]}, r"the shape \(1, 3, 8\)"),
        (
            {"batches": [{"input_ids": torch.ones(2, 8, dtype=torch.long), "attention_mask": torch.zeros(2, 8)}]},
            "alone",
        ),
    ],
)
def test_what_cannot_be_done(arguments: dict[str, Any], named: str) -> None:
    base = bert()
    with as_it_was(base), pytest.raises(ValueError, match=named):
        allocate(base, arguments.pop("batches", text(1)), **{"length": 64, **arguments})


@pytest.mark.parametrize("arguments", [{"length": 64.0}, {"candidates": 4}])
def test_what_is_of_another_type(arguments: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(arguments))):
        allocate(bert(), text(1), 0.2, **arguments)


@contextmanager
def as_it_was(base: nn.Module) -> Iterator[None]:
    """Modules, modes and what is trained of a base that is partly in training mode, and partly frozen."""
    base.train()
    base.encoder.layer[0].eval()
    base.embeddings.requires_grad_(False)

    def state() -> tuple[dict[str, bool], dict[str, bool]]:
        modules = {name: module.training for name, module in base.named_modules()}
        return modules, {name: parameter.requires_grad for name, parameter in base.named_parameters()}

    before = state()
    yield
    assert state() == before


def test_a_first_text_that_is_padding_alone_is_passed_over() -> None:
    batches = text(1)
    batches[0]["attention_mask"][0] = 0
    config = allocate(bert(), batches, 0.2, length=64)
    assert abs(share_saved(bert(), config, text(1)[0], 4) - 0.2) <= 0.02


def _allocate_in_one_process(rank: int, folder: str) -> None:
    config = allocate(bert(), text(2)[rank : rank + 1], {2: 0.1, 4: 0.2}, length=48 + 8 * rank)
    Path(folder, f"{rank}.json").write_text(json.dumps([config.ratio_schedule, config.correction_pattern]))


def test_several_processes_agree(tmp_path: Path) -> None:
    """Each has batches of its own; the first one's length counts."""
    run_processes(_allocate_in_one_process, str(tmp_path))
    config = allocate(bert(), text(2), {2: 0.1, 4: 0.2}, length=48)
    alone = json.loads(json.dumps([config.ratio_schedule, config.correction_pattern]))
    assert [json.loads(Path(tmp_path, f"{rank}.json").read_text()) for rank in (0, 1)] == [alone, alone]


def _allocate_without_batches(rank: int, folder: str) -> None:
    try:
        allocate(bert(), text(2)[: 1 - rank], 0.2, length=48)
    except ValueError as error:
        Path(folder, f"{rank}.txt").write_text(str(error))


def test_a_process_without_batches_does_not_leave_the_others_waiting(tmp_path: Path) -> None:
    run_processes(_allocate_without_batches, str(tmp_path))
    told = [Path(tmp_path, f"{rank}.txt").read_text() for rank in (0, 1)]
    assert all("there are no batches to measure on" in each for each in told)
    assert "process 1" in told[0]


def test_trials_do_not_say_again_what_the_plugin_says_once() -> None:
    case = BY_NAME["mixtral"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config = allocate(case.build(), [case.inputs(2, 12)], 0.025, candidates=(1, 4))
    with pytest.warns(UserWarning, match="take the bottleneck"):
        get_peft_model(case.build(), config)


def test_values_that_are_not_finite_are_told() -> None:
    base, batches = bert(), text(1)
    with torch.no_grad():
        base.embeddings.word_embeddings.weight[batches[0]["input_ids"][0, 5]] = torch.nan
    with pytest.raises(ValueError, match="values that are not finite"):
        allocate(base, batches, 0.2)


def test_the_base_is_left_as_it_was() -> None:
    base = bert()
    with as_it_was(base):
        allocate(base, text(1), 0.2, length=64)


@pytest.mark.parametrize("calls", [2, 4, 9])
def test_the_base_is_left_as_it_was_when_it_is_interrupted(calls: int) -> None:
    base, seen = bert(), []

    def interrupt(module: nn.Module, args: Any) -> None:
        seen.append(module)
        if len(seen) == calls:
            raise KeyboardInterrupt

    handle = base.register_forward_pre_hook(interrupt)
    with as_it_was(base), pytest.raises(KeyboardInterrupt):
        allocate(base, text(3), 0.2, length=64)
    handle.remove()


def test_a_classifier_of_as_many_labels_as_tokens() -> None:
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(vocab_size=99, num_labels=64, **SIZES))
    allocate(base, text(2), 0.2)


def test_padding_of_labels_does_not_count() -> None:
    """A decoder gives something at the places of labels that are -100, and nobody reads it."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 99}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.3)
    batch = text(1, 24)[0]
    labels = torch.randint(3, 99, (2, 6))
    model = get_peft_model(base, VariatorConfig(compression_ratio=4, correction_dim=8)).eval()
    errors = []
    for pads in (0, 30):
        padded = batch | {"labels": torch.cat([labels, torch.full((2, pads), -100)], dim=1)}
        with torch.no_grad():
            with using_ratio(model, 1):
                target = _output_of(model(**padded))
            errors.append(_error(model, [padded], [target]))
    # The last group of a text may hold other tokens, no more.
    assert 0 < errors[0] == pytest.approx(errors[1], rel=0.3)


def test_a_model_that_has_a_plugin() -> None:
    with pytest.raises(ValueError, match="unload"):
        allocate(get_peft_model(bert(), VariatorConfig()), text(1))


def test_exported() -> None:
    assert peft_variator.allocate is allocate
