"""Calls that are too small for a plugin to pay run the base model, bit for bit."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peft_variator import (
    DistillationConfig,
    DistillationTrainer,
    VariatorConfig,
    calibrate,
    fold_updates,
    set_min_tokens,
    using_ratio,
)
from peft_variator.runtime import LatencyTable
from tests.tiny_models import BERT, BY_NAME, LLAMA, Case, by_name, outputs_of

from .reference import with_plugin


VIT, WHISPER, T5 = BY_NAME["vit"], BY_NAME["whisper"], BY_NAME["t5"]


def first(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return next(iter(outputs_of(model, inputs).values()))


def compensated(case: Case, **fields: Any) -> PeftModel:
    """With updates of the attention's maps too, which are reached before any network."""
    torch.manual_seed(0)
    config = VariatorConfig(compression_ratio=4, compensation_rank=2, init_weights=False, **fields)
    return get_peft_model(case.build(), config).eval()


def checkpointed(run: Any, reentrant: bool, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(partial(run, **kwargs), *args, use_reentrant=reentrant)


def tokens_of(model: PeftModel, inputs: dict[str, Tensor]) -> int:
    """How many tokens the networks of the base get, counted there."""
    seen: list[int] = []
    layer = next(m for m in model.modules() if hasattr(m, "observer"))
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    first(model, inputs)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("case", [BERT, LLAMA, T5, VIT, WHISPER], ids=by_name)
def test_fewer_tokens_than_that_are_the_base_models(case: Case) -> None:
    model, inputs = compensated(case), case.inputs(2, 11)
    merged, tokens = first(model, inputs), tokens_of(model, inputs)
    with model.disable_adapter():
        base = first(model, inputs)
    assert not torch.equal(merged, base)
    assert model.min_tokens == 0
    model.set_min_tokens(tokens + 1)
    assert model.min_tokens == tokens + 1
    assert torch.equal(first(model, inputs), base)
    model.set_min_tokens(tokens)
    assert torch.equal(first(model, inputs), merged)
    model.set_min_tokens(0)
    assert torch.equal(first(model, inputs), merged)


def test_padding_and_all_texts_of_a_batch_count() -> None:
    model = with_plugin(BERT)
    set_min_tokens(model, 22)
    small, large = BERT.inputs(1, 11), BERT.inputs(2, 11)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[:, 5:] = 0
    padded = large | {"attention_mask": mask}
    with model.disable_adapter():
        bases = [first(model, inputs) for inputs in (small, large, padded)]
    found = [first(model, inputs) for inputs in (small, large, padded)]
    assert torch.equal(found[0], bases[0])
    assert not torch.equal(found[1], bases[1])
    assert not torch.equal(found[2][mask.bool()], bases[2][mask.bool()])


def test_tokens_that_are_flattened_count_too() -> None:
    model = with_plugin(LLAMA)
    ids = LLAMA.inputs(1, 12)["input_ids"]
    flat = {"input_ids": ids, "position_ids": torch.tensor([[*range(7), *range(5)]])}
    with model.disable_adapter():
        base = first(model, flat)
    model.set_min_tokens(13)
    assert torch.equal(first(model, flat), base)
    model.set_min_tokens(12)
    assert not torch.equal(first(model, flat), base)


def test_a_ratio_that_a_block_chooses_is_kept() -> None:
    model, inputs = with_plugin(BERT), BERT.inputs(1, 11)
    with using_ratio(model, 4):
        expected = first(model, inputs)
    model.set_min_tokens(1000)
    with using_ratio(model, 4):
        assert torch.equal(first(model, inputs), expected)
    assert not torch.equal(first(model, inputs), expected)


def test_training_merges_calls_of_any_size() -> None:
    model, inputs = with_plugin(BERT), BERT.inputs(1, 11)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected = first(model.train(), inputs)
    model.set_min_tokens(1000)
    assert torch.equal(first(model, inputs), expected)
    assert not torch.equal(first(model.eval(), inputs), expected)


def test_gradients_reach_the_base_through_a_small_call() -> None:
    model, inputs = with_plugin(BERT), BERT.inputs(1, 11)
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    gradients = []
    for needed in (1000, 0):
        model.set_min_tokens(needed)
        leaf = embeddings.clone().requires_grad_()
        with model.disable_adapter() if not needed else torch.enable_grad():
            output = model(inputs_embeds=leaf, attention_mask=inputs.get("attention_mask"))
        next(iter(output.values())).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_each_plugin_has_its_own_and_a_new_one_has_none() -> None:
    model, inputs = with_plugin(BERT), BERT.inputs(1, 11)
    model.add_adapter("other", VariatorConfig(compression_ratio=4))
    model.set_min_tokens(1000)
    assert model.min_tokens == 1000
    model.set_adapter("other")
    assert model.min_tokens == 0
    with model.disable_adapter():
        base = first(model, inputs)
    assert not torch.equal(first(model, inputs), base)
    model.set_min_tokens(50, adapter_name="other")
    model.delete_adapter("other")
    model.add_adapter("other", VariatorConfig(compression_ratio=4))
    model.set_adapter("other")
    assert model.min_tokens == 0


def test_copies_keep_it_and_files_do_not(tmp_path: Any) -> None:
    model, inputs = with_plugin(BERT), BERT.inputs(1, 11)
    merged = first(model, inputs)
    model.set_min_tokens(1000)
    assert torch.equal(first(copy.deepcopy(model), inputs), first(model, inputs))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(BERT.build(), str(tmp_path))
    assert loaded.min_tokens == 0
    torch.testing.assert_close(first(loaded, inputs), merged, rtol=0, atol=1e-5)


def test_decoding_goes_on_from_a_prompt_that_was_not_merged() -> None:
    model, inputs = with_plugin(LLAMA), LLAMA.inputs(1, 11)
    fields = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with model.disable_adapter():
        base = model.generate(**inputs, **fields)
    model.set_min_tokens(12)
    assert torch.equal(model.generate(**inputs, **fields), base)


@pytest.mark.parametrize("wrong", [-1, 1.5, "8", None, True])
def test_what_is_no_number_of_tokens(wrong: Any) -> None:
    with pytest.raises(ValueError, match=f"min_tokens.*{wrong!r}"):
        with_plugin(BERT).set_min_tokens(wrong)


def test_models_without_a_plugin_and_with_folded_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="no active Variator plugin"):
        set_min_tokens(BERT.build(), 8)
    model = compensated(BERT)
    with pytest.raises(ValueError, match="'other'"):
        model.set_min_tokens(8, adapter_name="other")
    inputs = BERT.inputs(1, 11)
    merged = first(model, inputs)
    model.set_min_tokens(1000)
    folded = fold_updates(model.get_base_model())
    torch.testing.assert_close(first(folded, inputs), merged, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="fold_updates made"):
        set_min_tokens(folded, 8)


def test_an_exported_program_merges_calls_of_any_size() -> None:
    model, inputs = with_plugin(BERT), BERT.inputs(2, 11)
    merged = first(model, inputs)
    model.set_min_tokens(1000)
    program = torch.export.export(model.get_base_model(), (), dict(inputs), strict=False)
    found = next(iter(program.module()(**inputs).values()))
    torch.testing.assert_close(found, merged, rtol=0, atol=1e-5)


def test_a_traced_program_merges_like_an_exported_one() -> None:
    base = with_plugin(BERT).requires_grad_(False).get_base_model()
    base.config.return_dict = False
    ids = BERT.inputs(2, 11)["input_ids"]
    merged = base(ids)[0]
    set_min_tokens(base, 1000)
    traced = torch.jit.trace(base, (ids,), check_trace=False)
    torch.testing.assert_close(traced(ids)[0], merged, rtol=0, atol=1e-5)
    assert not torch.allclose(base(ids)[0], merged, rtol=0, atol=1e-4)


def test_calibration_sees_calls_of_any_size() -> None:
    batches = [BERT.inputs(2, 11, seed=seed) for seed in range(3)]
    chosen = []
    for needed in (0, 1000):
        torch.manual_seed(0)
        model = get_peft_model(BERT.build(), VariatorConfig(compression_ratio=4, correction_dim=4))
        model.set_min_tokens(needed)
        calibrate(model, batches)
        chosen.append([value.tolist() for name, value in model.named_buffers() if "variator_neurons" in name])
    assert chosen[0]
    assert chosen[0] == chosen[1]


def test_the_trainer_trains_and_measures_calls_of_any_size(tmp_path: Any) -> None:
    found = []
    for needed in (0, 1000):
        torch.manual_seed(0)
        model = get_peft_model(BERT.build(), VariatorConfig(compression_ratio=4))
        model.set_min_tokens(needed)
        config = DistillationConfig(str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to="none")
        data = [{"input_ids": ids} for ids in BERT.inputs(6, 11)["input_ids"]]
        trainer = DistillationTrainer(model, config, train_dataset=data, eval_dataset=data)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        found.append((before, trainer.evaluate()["eval_loss"]))
    assert found[0] == pytest.approx(found[1])
    assert found[0][0] > 0


@pytest.mark.parametrize("way", ["small", "ratio 1"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_that_checkpoint_by_themselves_find_a_call_that_was_not_merged(way: str, reentrant: bool) -> None:
    model, inputs = with_plugin(BERT), BERT.inputs(1, 11)
    for layer in model.get_base_model().encoder.layer:
        layer.forward = partial(checkpointed, layer.forward, reentrant)
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    model.set_min_tokens(1000 if way == "small" else 0)
    with using_ratio(model, 1) if way == "ratio 1" else nullcontext():
        output = model(inputs_embeds=embeddings).last_hidden_state
    output.sum().backward()
    assert embeddings.grad is not None


def test_a_small_call_may_ask_for_the_loss_of_routers() -> None:
    case = BY_NAME["mixtral"]
    model, inputs = with_plugin(case), case.inputs(1, 11)
    inputs = inputs | {"attention_mask": torch.ones(1, 11, dtype=torch.long), "output_router_logits": True}
    with pytest.raises(ValueError, match="output_router_logits"):
        first(model, inputs)
    model.set_min_tokens(12)
    first(model, inputs)


@pytest.mark.slow
def test_compiled_in_two_graphs() -> None:
    model = compensated(BERT)
    model.set_min_tokens(20)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (4, 9, 10, 11, 5, 7):
        inputs = BERT.inputs(2, length, seed=length)
        torch.testing.assert_close(first(compiled, inputs), first(model, inputs), rtol=0, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


# A number that was measured


def table_of(seconds: dict[int, tuple[tuple[float, ...], ...]]) -> LatencyTable:
    return LatencyTable((1, 4, 8), (1, 8), (16, 128), seconds)


def test_a_table_tells_from_where_on_no_call_is_slower() -> None:
    base = ((1.0, 4.0), (4.0, 32.0))
    table = table_of({1: base, 4: ((1.1, 4.2), (3.0, 20.0)), 8: ((1.2, 3.0), (3.0, 16.0))})
    assert table.min_tokens(4) == 1024  # 8 × 16 is faster, and 1 × 128, of as many tokens, slower
    assert table.min_tokens(8) == 128
    assert table_of({1: base, 4: base, 8: base}).min_tokens(4) == 16


def test_a_table_that_knows_no_such_number() -> None:
    base = ((1.0, 4.0), (4.0, 32.0))
    table = table_of({1: base, 4: ((0.9, 3.0), (3.0, 33.0)), 8: base})
    with pytest.raises(ValueError, match="ratio=4 takes longer than the base at 1024 tokens"):
        table.min_tokens(4)
    for wrong in (1, 2):
        with pytest.raises(ValueError, match=rf"ratio={wrong}: ask for one of \[4, 8\]"):
            table.min_tokens(wrong)
