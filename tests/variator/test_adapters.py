"""Several plugins beside one base, plugins over a task's LoRA, copies, replicas, and the way back to the base."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_variator import VariatorConfig, set_compression_ratio
from peft_variator.tuners.variator import VariatorLayer
from peft_variator.tuners.variator.forward_context import open_calls, single_blocks
from tests.processes import run_processes
from tests.tiny_models import ALL, BERT, LLAMA, SEQ2SEQ, TASK_HEADS, Case, by_name, outputs_of

from .reference import watch, with_plugin


T5 = SEQ2SEQ[0]
BERT_CLASSES = next(case for case in TASK_HEADS if case.name == "bert-sequence")
SOME = [BERT, LLAMA, T5, *(case for case in ALL if case.name in ("albert", "opt", "vit", "llava"))]


def first_output(model: nn.Module, case: Case, **options: Any) -> Tensor:
    return next(iter(outputs_of(model, case.inputs(**options)).values()))


def hooks_in(model: nn.Module) -> list[Any]:
    """What is put around calls of modules: wrapped forwards, and hooks but for those that transformers adds."""
    kinds = [(*module._forward_hooks.values(), *module._forward_pre_hooks.values()) for module in model.modules()]
    hooks = [hook for hooks in kinds for hook in hooks if not hook.__module__.startswith("transformers.")]
    return hooks + [vars(module)["forward"] for module in model.modules() if "forward" in vars(module)]


# Several plugins


@pytest.mark.parametrize("case", SOME, ids=by_name)
def test_plugins_of_different_ratios_switched_by_set_adapter(case: Case) -> None:
    base = case.build().requires_grad_(False)
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    expected = first_output(base, case)
    model = get_peft_model(base, VariatorConfig(compression_ratio=2, init_weights=False), adapter_name="two").eval()
    model.add_adapter("four", VariatorConfig(compression_ratio=4, init_weights=False))
    model.add_adapter("concat", VariatorConfig(compression_ratio=3, scoring="concat", init_weights=False))
    results = {}
    for name in ("two", "four", "concat", "two"):
        model.set_adapter(name)
        found = first_output(model, case)
        assert torch.equal(results.setdefault(name, found), found)
    assert len({float(result.sum()) for result in results.values()}) == 3
    with model.disable_adapter():
        assert torch.equal(first_output(model, case), expected)
    base = model.unload()
    assert base.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in base.state_dict().items())


def test_the_ratio_of_one_of_several_plugins() -> None:
    model = with_plugin(BERT)
    model.add_adapter("other", VariatorConfig(compression_ratio=2, init_weights=False))
    model.set_compression_ratio(8, "other")
    assert [seen.rows for seen in watch(model, lambda: model(**BERT.inputs(1, 10)))] == [4, 4]
    model.set_adapter("other")
    assert [seen.rows for seen in watch(model, lambda: model(**BERT.inputs(1, 10)))] == [3, 3]
    model.set_compression_ratio(3)
    model.set_adapter("default")
    assert [seen.rows for seen in watch(model, lambda: model(**BERT.inputs(1, 10)))] == [4, 4]


def test_plugins_on_different_layers() -> None:
    model = with_plugin(BERT, layers_to_transform=[0])
    model.add_adapter("last", VariatorConfig(layers_to_transform=[1]))
    assert [seen.rows for seen in watch(model, lambda: model(**BERT.inputs(1, 10)))] == [4, 10]
    model.set_adapter("last")
    assert [seen.rows for seen in watch(model, lambda: model(**BERT.inputs(1, 10)))] == [10, 4]


def test_two_plugins_on_one_layer_cannot_be_active_together() -> None:
    model = with_plugin(BERT)
    model.add_adapter("other", VariatorConfig())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"default.*other"):
        model(**BERT.inputs())


def test_deleting_plugins() -> None:
    model = with_plugin(BERT)
    expected = first_output(model, BERT)
    model.add_adapter("other", VariatorConfig(compression_ratio=2, init_weights=False))
    model.delete_adapter("other")
    assert not any("other" in name for name, _ in model.named_parameters())
    assert torch.equal(first_output(model, BERT), expected)
    with pytest.raises(ValueError, match="other does not exist"):
        model.delete_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(first_output(model.base_model.model, BERT), first_output(BERT.build(), BERT))


@pytest.mark.parametrize(
    ("ratio", "name", "message"),
    [
        (0, None, "compression_ratio=0 has to be an integer of at least 1"),
        (True, None, "compression_ratio=True has to be an integer"),
        (2.0, None, "compression_ratio=2.0 has to be an integer"),
        (2, "none", r"no Variator plugin 'none'\. Its plugins are \['default', 'paper'\]"),
        (3, "paper", r"compression_ratio=3: the plugin 'paper' has scoring='concat'.*serves 4, as.*scoring='token'"),
    ],
)
def test_ratios_that_are_refused(ratio: Any, name: str | None, message: str) -> None:
    model = with_plugin(BERT)
    model.add_adapter("paper", VariatorConfig(scoring="concat"))
    with pytest.raises(ValueError, match=message):
        model.set_compression_ratio(ratio, name)
    model.set_compression_ratio(1, "paper")
    model.set_compression_ratio(4, "paper")


def test_a_refused_ratio_changes_no_layer() -> None:
    pattern = {r"layer\.0\.intermediate": 2, r"layer\.1\.intermediate": 3}
    model = with_plugin(BERT, scoring="concat", ratio_pattern=pattern)
    model.set_compression_ratio(1)
    with pytest.raises(ValueError, match="compression_ratio=2.*serves 4, as it was trained"):
        model.set_compression_ratio(2)
    assert [seen.rows for seen in watch(model, lambda: model(**BERT.inputs(1, 10)))] == [10, 10]


def test_the_trained_ratio_of_concat_is_each_modules_own() -> None:
    model = with_plugin(BERT, scoring="concat", ratio_pattern={r"layer\.0\.intermediate": 2})
    trained = first_output(model, BERT)
    model.set_compression_ratio(1)
    assert not torch.equal(first_output(model, BERT), trained)
    model.set_compression_ratio(4)
    assert torch.equal(first_output(model, BERT), trained)


def test_no_active_plugin_to_change() -> None:
    with pytest.raises(ValueError, match="no active Variator plugin"):
        set_compression_ratio(BERT.build(), 2)


# A task's LoRA in the base


def lora(case: Case, path: Path, inside: bool = True, **fields: Any) -> Path:
    """Save a LoRA that changes the model, on attention and, if `inside`, within the feed-forward networks too."""
    names = {
        "bert": ["query", "intermediate.dense", "output.dense"],
        "llama": ["q_proj", "up_proj"],
        "t5": ["q", "wi"],
    }
    targets = names[case.model_type] if inside else names[case.model_type][:1]
    model = get_peft_model(case.build(), LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **fields))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(path)
    return path


def with_task(case: Case, path: Path, how: str, name: str) -> nn.Module:
    base = case.build()
    if how == "merged":
        return PeftModel.from_pretrained(base, path).merge_and_unload().eval()
    if how == "wrapped":
        return PeftModel.from_pretrained(base, path, adapter_name=name).eval()
    base.load_adapter(str(path), adapter_name=name)
    return base.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["loaded", "merged", "wrapped"])
@pytest.mark.parametrize("name", ["default", "task"])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("case", [BERT, LLAMA, pytest.param(T5, marks=pytest.mark.slow)], ids=by_name)
def test_a_task_s_lora_stays_part_of_the_base(case: Case, inside: bool, name: str, how: str, tmp_path: Path) -> None:
    base = with_task(case, lora(case, tmp_path, inside), how, name)
    expected = first_output(base, case)
    assert not torch.allclose(expected, first_output(case.build(), case), atol=1e-3)
    before = {key: value.clone() for key, value in base.state_dict().items()}

    model = get_peft_model(base, VariatorConfig(compression_ratio=1, init_weights=False)).eval()
    assert torch.equal(first_output(model, case), expected)
    model.set_compression_ratio(4)
    merged = first_output(model, case)
    assert not torch.allclose(merged, expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(first_output(model, case), expected)
    assert torch.equal(first_output(model, case), merged)

    trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".variator_" in key for key in trained)
    assert list(model.peft_config) == ["default"]
    model.save_pretrained(tmp_path / "plugin")
    assert {path.name for path in (tmp_path / "plugin").iterdir()} >= {"adapter_model.safetensors"}
    again = PeftModel.from_pretrained(with_task(case, tmp_path, how, name), tmp_path / "plugin").eval()
    again.set_compression_ratio(4)
    assert torch.equal(first_output(again, case), merged)

    base = model.unload()
    assert torch.equal(first_output(base, case), expected)
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    if how == "loaded":
        assert base.active_adapters() == [name]
        base.delete_adapter(name)
        assert torch.equal(first_output(base, case), first_output(case.build(), case))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["default", "task"])
def test_a_task_s_head_stays_part_of_the_base(name: str, tmp_path: Path) -> None:
    path = lora(BERT_CLASSES, tmp_path, modules_to_save=["classifier"])
    base = with_task(BERT_CLASSES, path, "loaded", name)
    expected = first_output(base, BERT_CLASSES)
    model = get_peft_model(base, VariatorConfig(init_weights=False)).eval()
    model.add_adapter("other", VariatorConfig(compression_ratio=1))
    model.set_adapter("other")
    assert torch.equal(first_output(model, BERT_CLASSES), expected)
    with model.disable_adapter():
        assert torch.equal(first_output(model, BERT_CLASSES), expected)
    assert not any("modules_to_save" in key for key, p in model.named_parameters() if p.requires_grad)
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(first_output(model.unload(), BERT_CLASSES), expected)


@pytest.mark.filterwarnings("ignore")
def test_a_plugin_over_a_lora_learns_and_the_lora_does_not(tmp_path: Path) -> None:
    model = get_peft_model(with_task(LLAMA, lora(LLAMA, tmp_path), "loaded", "default"), VariatorConfig())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        inputs = LLAMA.inputs(2, 16)
        labels = inputs["input_ids"].masked_fill(torch.arange(16) < 12, -100)
        model.train()(**inputs, labels=labels).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        # What the last layer gives the prompt is not used: no later position looks at it.
        if "layers.1.mlp.variator_" not in name:
            assert torch.equal(parameter, before[name]) == (".variator_" not in name), name


@pytest.mark.filterwarnings("ignore")
def test_a_lora_and_a_plugin_loaded_into_one_transformers_model(tmp_path: Path) -> None:
    with_plugin(LLAMA).save_pretrained(tmp_path / "plugin")
    base = with_task(LLAMA, lora(LLAMA, tmp_path), "loaded", "task")
    expected = first_output(base, LLAMA)
    base.load_adapter(str(tmp_path / "plugin"), adapter_name="plugin")
    base.set_adapter(["task", "plugin"])
    merged = first_output(base, LLAMA)
    assert not torch.allclose(merged, expected, atol=1e-3)
    set_compression_ratio(base, 1)
    assert torch.equal(first_output(base, LLAMA), expected)
    base.delete_adapter("plugin")
    base.set_adapter("task")
    assert torch.equal(first_output(base, LLAMA), expected)


# The way back


@pytest.mark.parametrize("case", SOME, ids=by_name)
def test_unloading_leaves_the_base_and_no_hooks(case: Case) -> None:
    base = case.build().requires_grad_(False)
    assert hooks_in(with_plugin(case))
    expected = first_output(base, case)
    classes = [type(module) for module in base.modules()]
    base = with_plugin(case).unload().requires_grad_(False)
    assert hooks_in(base) == []
    assert [type(module) for module in base.modules()] == classes
    assert torch.equal(first_output(base, case), expected)
    assert not hasattr(base, "peft_config")
    again = get_peft_model(base, VariatorConfig()).eval()
    assert torch.equal(first_output(again, case), first_output(get_peft_model(case.build(), VariatorConfig()), case))


@pytest.mark.parametrize("case", [BERT, LLAMA], ids=by_name)
@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_merging_raises_and_says_why(case: Case, method: str) -> None:
    model = with_plugin(case)
    expected = first_output(model, case)
    with pytest.raises(NotImplementedError, match="cannot be merged: it changes how many vectors go through"):
        getattr(model, method)()
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        next(module for module in model.modules() if isinstance(module, VariatorLayer)).unmerge()
    assert torch.equal(first_output(model, case), expected)


@pytest.mark.parametrize("case", [BERT_CLASSES], ids=by_name)
def test_unloading_a_trained_head(case: Case) -> None:
    model = with_plugin(case, modules_to_save=["classifier"])
    assert {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"bert", "classifier"}
    base = model.unload()
    assert torch.equal(first_output(base, case), first_output(case.build(), case))


# Copies, replicas, failures, modes


@pytest.mark.parametrize("case", SOME, ids=by_name)
def test_a_deep_copy_is_independent(case: Case) -> None:
    model = with_plugin(case)
    expected = first_output(model, case)
    copied = copy.deepcopy(model)
    model.set_compression_ratio(1)
    assert torch.equal(first_output(copied, case), expected)
    base = model.unload()
    assert torch.equal(first_output(copied, case), expected)
    assert not torch.equal(first_output(base, case), expected)
    assert hooks_in(copied.unload()) == []


@pytest.mark.parametrize("case", [BERT, LLAMA, T5], ids=by_name)
def test_data_parallel_is_refused(case: Case) -> None:
    """A replica's layers would ask the original for the call they belong to."""
    model = with_plugin(case)
    layer = next(module for module in model.modules() if isinstance(module, VariatorLayer))
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        layer._replicate_for_data_parallel()


@pytest.mark.parametrize("case", [BERT, LLAMA, T5], ids=by_name)
def test_a_failure_in_a_call_leaves_nothing_behind(case: Case) -> None:
    model = with_plugin(case)
    expected = first_output(model, case)
    with pytest.raises(IndexError):
        model(**(case.inputs() | {"input_ids": torch.full((2, 11), 10_000)}))
    layers = [module for module in model.modules() if isinstance(module, VariatorLayer)]
    handle = layers[1].register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**case.inputs(3, 7))
    handle.remove()
    assert open_calls() == ()
    assert torch.equal(first_output(model, case), expected)


@pytest.mark.parametrize("case", [BERT, LLAMA], ids=by_name)
def test_inference_mode_then_training(case: Case) -> None:
    model, inputs = with_plugin(case), case.inputs()
    with torch.inference_mode():
        expected = next(iter(model(**inputs).values())).clone()
    output = next(iter(model.train()(**inputs).values()))
    output.square().mean().backward()
    assert torch.equal(output.detach(), expected)
    assert all(p.grad is not None for name, p in model.named_parameters() if "variator_" in name)


@pytest.mark.parametrize("case", [BERT, LLAMA], ids=by_name)
def test_a_network_called_outside_of_a_model_call_is_an_error(case: Case) -> None:
    model = with_plugin(case)
    model(**case.inputs())
    layer = next(module for module in model.modules() if isinstance(module, VariatorLayer))
    hidden = torch.randn(2, 5, 32)
    with pytest.raises(RuntimeError, match="outside of a call of its model"):
        layer(hidden)
    with single_blocks():
        assert torch.equal(layer(hidden), layer.base_layer(hidden))
    with model.disable_adapter():
        assert torch.equal(layer(hidden), layer.base_layer(hidden))
    model.set_compression_ratio(1)
    assert torch.equal(layer(hidden), layer.base_layer(hidden))


def test_every_parameter_of_the_plugin_learns_and_none_of_the_base() -> None:
    model = get_peft_model(BERT.build(), VariatorConfig())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        model.train()(**BERT.inputs()).last_hidden_state.pow(3).mean().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("variator_" not in name), name


def _train_in_parallel(rank: int, path: str) -> None:
    model = nn.parallel.DistributedDataParallel(with_plugin(BERT).train())
    for step in range(3):
        # Batches of unlike length and padding; in the last one the first process has nothing to merge.
        inputs = BERT.inputs(1, 2 if (step, rank) == (2, 0) else 9 + rank, seed=10 * step + rank)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][:, 9 - step * rank :] = 0
        model.zero_grad()
        model(**inputs).last_hidden_state.square().mean().backward()
    gradients = {name: p.grad for name, p in model.module.named_parameters() if p.requires_grad}
    torch.save(gradients, f"{path}/{rank}.pt")


def test_distributed_data_parallel(tmp_path: Path) -> None:
    run_processes(_train_in_parallel, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first.keys() == second.keys()
    assert any(gradient.any() for gradient in first.values())
    for name, gradient in first.items():
        torch.testing.assert_close(gradient, second[name], rtol=0, atol=0)
