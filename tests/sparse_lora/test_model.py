import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertForQuestionAnswering,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaForTokenClassification,
    MambaConfig,
    MambaForCausalLM,
    WavLMConfig,
    WavLMModel,
)

from peft_variator import SparseLoraConfig, VariatorConfig
from peft_variator.tuners.sparse_lora import SparseLoraConv2d, SparseLoraLayer, SparseLoraLinear
from peft_variator.tuners.sparse_lora.model import _NEVER_CALLED
from tests.tiny_models import tiny_model

from .cases import CASES, build, outputs, plain_model, plain_weight, prune_, randomize_


def make(name: str, **fields) -> PeftModel:
    """An adapter with random weights on a pruned model."""
    return randomize_(get_peft_model(build(name), SparseLoraConfig(**{**CASES[name].targets, **fields})))


def layers_of(model: nn.Module) -> dict[str, SparseLoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLoraLayer)}


def losses(model: nn.Module, name: str) -> torch.Tensor:
    return outputs(model, CASES[name]).float().square().mean()


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_whole_model_is_the_formula(name: str, recompute: bool) -> None:
    model = make(name, recompute=recompute)
    layers = layers_of(model.get_base_model())

    def effective(module_name: str) -> torch.Tensor | None:
        if module_name not in layers:
            return None
        layer = layers[module_name]
        weight = layer.layout.weight([layer.weight])
        a, b = layer.sparse_low_rank_A["default"], layer.sparse_low_rank_B["default"]
        matrix = plain_weight(weight, weight != 0, [(1.0, a, b)])
        return matrix.t() if layer.layout_name == "conv1d" else matrix.reshape(layer.weight.shape)

    expected = plain_model(build(name), effective)
    torch.testing.assert_close(outputs(model, CASES[name]), outputs(expected, CASES[name]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_training_moves_every_adapter_parameter_and_no_other(name: str) -> None:
    model = make(name).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses(model, name).backward()
    optimizer.step()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) != ("sparse_low_rank_" in key), key


def test_the_patch_embedding_is_adapted() -> None:
    kinds = {type(layer) for layer in layers_of(make("vit")).values()}
    assert kinds == {SparseLoraLinear, SparseLoraConv2d}


@pytest.mark.parametrize("name", CASES)
def test_saved_keys_are_exactly_a_and_b(name: str, tmp_path) -> None:
    model = make(name)
    model.save_pretrained(tmp_path)
    expected = {
        f"base_model.model.{layer_name}.sparse_low_rank_{matrix}"
        for layer_name in layers_of(model.get_base_model())
        for matrix in "AB"
    }
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == expected


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_save_and_load(name: str, low_cpu_mem_usage: bool, tmp_path) -> None:
    model = make(name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        build(name), tmp_path, adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(outputs(loaded, CASES[name]), outputs(model, CASES[name]))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_auto_peft_model(tmp_path) -> None:
    base = build("bert")
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = randomize_(get_peft_model(base, SparseLoraConfig(task_type="SEQ_CLS")))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert torch.equal(outputs(loaded, CASES["bert"]), outputs(model.eval(), CASES["bert"]))


@pytest.mark.parametrize("name", CASES)
def test_transformers_load_adapter(name: str, tmp_path) -> None:
    model = make(name)
    model.save_pretrained(tmp_path)
    loaded = build(name)
    loaded.load_adapter(str(tmp_path), adapter_name="other")
    assert torch.equal(outputs(loaded, CASES[name]), outputs(model, CASES[name]))
    loaded.disable_adapters()
    assert torch.equal(outputs(loaded, CASES[name]), outputs(build(name), CASES[name]))


def test_disabled_is_the_base_bit_for_bit() -> None:
    model = make("bert")
    with model.disable_adapter():
        assert torch.equal(outputs(model, CASES["bert"]), outputs(build("bert"), CASES["bert"]))
    assert not torch.equal(outputs(model, CASES["bert"]), outputs(build("bert"), CASES["bert"]))


def test_deepcopy() -> None:
    model = make("bert")
    clone = copy.deepcopy(model)
    assert torch.equal(outputs(clone, CASES["bert"]), outputs(model, CASES["bert"]))
    randomize_(clone).merge_adapter()
    assert not any(layer.merged for layer in layers_of(model).values())


def test_two_adapters_are_switched_and_active_together() -> None:
    model = make("bert")
    first = outputs(model, CASES["bert"])
    model.add_adapter("second", SparseLoraConfig(r=2, init_lora_weights=False))
    assert torch.equal(outputs(model, CASES["bert"]), first)
    model.set_adapter("second")
    second = outputs(model, CASES["bert"])
    assert not torch.allclose(first, second)
    model.base_model.set_adapter(["default", "second"])
    both = outputs(model, CASES["bert"])
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, CASES["bert"]), both)
    model.unmerge_adapter()
    model.base_model.set_adapter("default")
    torch.testing.assert_close(outputs(model, CASES["bert"]), first)


def test_adapter_names_that_contain_one_another() -> None:
    model = make("bert")
    expected = outputs(model, CASES["bert"])
    model.add_adapter("defaul", SparseLoraConfig(r=2, init_lora_weights=False))
    model.add_adapter("default2", SparseLoraConfig(r=3, init_lora_weights=False))
    assert torch.equal(outputs(model, CASES["bert"]), expected)
    model.delete_adapter("defaul")
    assert torch.equal(outputs(model, CASES["bert"]), expected)
    keys = get_peft_model_state_dict(model, adapter_name="default2")
    assert all(value.shape[0 if key.endswith("A") else 1] == 3 for key, value in keys.items())


def test_rank_and_alpha_patterns() -> None:
    model = get_peft_model(
        build("bert"), SparseLoraConfig(r=4, lora_alpha=8, rank_pattern={"query": 2}, alpha_pattern={"layer.0.*": 6})
    )
    layers = layers_of(model.get_base_model())
    first = layers["bert.encoder.layer.0.attention.self.query"]
    assert (first.rank["default"], first.scaling["default"]) == (2, 3.0)
    last = layers["bert.encoder.layer.1.attention.self.value"]
    assert (last.rank["default"], last.scaling["default"]) == (4, 2.0)


def test_target_exclude_and_layers() -> None:
    model = get_peft_model(
        build("bert"),
        SparseLoraConfig(target_modules=["query", "dense"], exclude_modules=["pooler.dense"], layers_to_transform=[1]),
    )
    names = layers_of(model.get_base_model()).keys()
    assert names == {
        f"bert.encoder.layer.1.{name}"
        for name in ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
    }


def test_modules_to_save_are_trained_and_saved_whole(tmp_path) -> None:
    model = make("bert", modules_to_save=["classifier"])
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key for key in saved if "classifier" in key} == {
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path)
    assert torch.equal(outputs(loaded, CASES["bert"]), outputs(model, CASES["bert"]))


@pytest.mark.parametrize(("bias", "trained"), [("all", {"LayerNorm", "dense"}), ("lora_only", {"dense"})])
def test_biases_are_trained_and_saved(bias: str, trained: set[str], tmp_path) -> None:
    model = make("bert", target_modules=["output.dense"], bias=bias)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "bias" in name]
    assert trained <= {part for name in names for part in name.split(".")}
    assert ("LayerNorm" in " ".join(names)) == (bias == "all")
    losses(model, "bert").backward()
    dense = layers_of(model.get_base_model())["bert.encoder.layer.0.output.dense"]
    assert dense.bias.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    assert any(
        key.endswith("output.dense.base_layer.bias") for key in load_file(tmp_path / "adapter_model.safetensors")
    )


def test_a_dense_model_works_and_warns_once_for_all_modules() -> None:
    with pytest.warns(UserWarning, match="Nothing is masked") as record:
        model = randomize_(get_peft_model(build("bert", pruned=False), SparseLoraConfig()))
    messages = [str(warning.message) for warning in record if "Nothing is masked" in str(warning.message)]
    assert len(messages) == 1
    assert "Nothing is masked in 14 of the 14 modules of adapter 'default'" in messages[0]
    losses(model, "bert").backward()


def test_one_dense_module_among_pruned_ones_is_named() -> None:
    base = build("bert")
    base.bert.pooler.dense.weight.data.fill_(1)
    with pytest.warns(UserWarning, match=re.escape("in 1 of the 14 modules") + ".*: bert.pooler.dense"):
        get_peft_model(base, SparseLoraConfig())


def test_a_second_adapter_warns_for_itself() -> None:
    with pytest.warns(UserWarning, match="adapter 'default'"):
        model = get_peft_model(build("bert", pruned=False), SparseLoraConfig())
    with pytest.warns(UserWarning, match="adapter 'second'"):
        model.add_adapter("second", SparseLoraConfig(target_modules=["query"]))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_gradient_checkpointing_gives_the_same_gradients(name: str, recompute: bool, use_reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = make(name, recompute=recompute)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.train()
        if checkpointing:
            model.enable_input_require_grads() if hasattr(model.get_base_model(), "get_input_embeddings") else None
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        (losses(model, name) + 2 * losses(model, name)).backward()  # two forwards before one backward
        gradients.append({key: value.grad for key, value in model.named_parameters() if value.requires_grad})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-5, atol=1e-8)


def test_linear_layers_with_a_forward_of_their_own_are_left_out() -> None:
    """The router of Llama 4's experts is an nn.Linear that returns a pair."""
    base = tiny_model("llama4").eval()
    ids = torch.arange(3, 9).unsqueeze(0)
    expected = base(ids).logits
    model = get_peft_model(base, SparseLoraConfig(target_modules="all-linear", r=2))
    names = model.base_model.targeted_module_names
    assert any(name.endswith("q_proj") for name in names)
    assert not any(name.endswith("router") for name in names)
    assert torch.equal(model(ids).logits, expected)
    with pytest.raises(TypeError, match="'.*router' of type Llama4Router"):
        get_peft_model(tiny_model("llama4"), SparseLoraConfig(target_modules=["router"], r=2))


def tiny_mamba() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "state_size": 4, "time_step_rank": 4, "num_hidden_layers": 1}
    return prune_(MambaForCausalLM(MambaConfig(**sizes)).eval())


def tiny_wavlm() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    convolutions = {"conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (8, 4), "num_feat_extract_layers": 2}
    return WavLMModel(WavLMConfig(**sizes, **convolutions, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2))


@pytest.mark.parametrize(
    ("base", "dead", "adapted"),
    [
        (tiny_mamba, {"x_proj", "dt_proj", "out_proj"}, {"in_proj"}),
        (tiny_wavlm, {"q_proj", "k_proj", "v_proj", "out_proj"}, {"intermediate_dense", "output_dense"}),
    ],
)
def test_layers_that_are_never_called_are_left_out(base, dead, adapted) -> None:
    with pytest.warns(UserWarning, match=rf"leaves out {len(dead)} linear layers.*out_proj"):
        model = get_peft_model(base(), SparseLoraConfig(r=2))
    names = {name.rpartition(".")[2] for name in model.base_model.targeted_module_names}
    assert names >= adapted
    assert not names & dead
    for name in dead:
        with pytest.raises(ValueError, match=rf"{name}' is a layer of .*exclude_modules=\['.*\.{name}'\]"):
            get_peft_model(base(), SparseLoraConfig(target_modules=[name], r=2))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="SparseLoRA leaves out")
        get_peft_model(base(), SparseLoraConfig(r=2, exclude_modules=sorted(dead)))


def test_layers_that_are_never_called_are_there() -> None:
    folder = Path(transformers.__file__).parent / "models"
    kinds = ["*mamba*", "bamba", "jamba", "falcon_h1", "granitemoehybrid", "nemotron_h"]
    files = [
        path
        for kind in [*kinds, "*detr", "maskformer", "mobilebert", "wavlm", "zamba2"]
        for path in folder.glob(f"{kind}/modeling_*.py")
    ]
    sources = "\n".join(path.read_text(encoding="utf-8") for path in files)
    for parent, names in _NEVER_CALLED.items():
        code = sources.split(f"\nclass {parent}(", 1)[1].split("\nclass ", 1)[0]
        assert all(f"self.{name}.weight" in code for name in names), parent


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_a_whole_model(dtype: torch.dtype) -> None:
    model = make("bert")
    expected = losses(model, "bert")
    expected.backward()
    exact = {key: value.grad.clone() for key, value in model.named_parameters() if value.requires_grad}
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        loss = losses(model, "bert")
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert (parameter.grad - exact[key]).norm() < 0.1 * exact[key].norm() + 1e-4, key


def test_generation_with_a_cache_is_that_of_the_merged_model() -> None:
    model = make("llama")
    tokens = CASES["llama"].inputs["input_ids"]
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(input_ids=tokens, **settings)
    merged = model.merge_and_unload()
    assert torch.equal(generated, merged.generate(input_ids=tokens, **settings))


@pytest.mark.parametrize(
    ("task", "model_class"),
    [
        ("TOKEN_CLS", BertForTokenClassification),
        ("QUESTION_ANS", BertForQuestionAnswering),
        ("TOKEN_CLS", LlamaForTokenClassification),
    ],
)
def test_heads_that_peft_trains_whole_are_no_targets(task, model_class):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    base = model_class(model_class.config_class(vocab_size=40, **small))
    head = next(name for name in ("score", "classifier", "qa_outputs") if hasattr(base, name))
    with pytest.warns(UserWarning, match="Nothing is masked"):
        model = get_peft_model(base, SparseLoraConfig(task_type=task, r=2))
    trained = {name for name, value in model.named_parameters() if value.requires_grad and head in name}
    assert trained == {
        f"base_model.model.{head}.modules_to_save.default.weight",
        f"base_model.model.{head}.modules_to_save.default.bias",
    }
    assert not any(head in name for name in model.base_model.targeted_module_names)


@pytest.mark.parametrize("fields", [{"task_type": "SEQ_CLS"}, {"modules_to_save": ["classifier"]}])
def test_modules_that_peft_saves_whole_are_no_targets(fields):
    """DistilBERT has a pre_classifier, which ends as a classifier does."""
    sizes = {"vocab_size": 40, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24, "pad_token_id": 0}
    base = prune_(DistilBertForSequenceClassification(DistilBertConfig(**sizes)))
    model = get_peft_model(base, SparseLoraConfig(r=2, **fields))
    names = model.base_model.targeted_module_names
    assert any(name.endswith("q_lin") for name in names)
    assert not any(name.endswith("classifier") for name in names)
    assert model.get_base_model().pre_classifier.modules_to_save["default"].weight.requires_grad


@pytest.mark.parametrize("targets", [None, "all-linear", ["up_proj", "q_proj"], r".*\.(up|q)_proj"])
def test_targets_inside_of_another_method_s_modules_are_refused(targets):
    model = build("llama")
    model.add_adapter(VariatorConfig(), "plugin")
    with pytest.raises(ValueError, match=r"target modules lie inside .*mlp\.base_layer\..*SparseLoRA first"):
        model.add_adapter(SparseLoraConfig(target_modules=targets, r=2), "sparse")
    model = build("llama")
    model.add_adapter(VariatorConfig(), "plugin")
    model.add_adapter(SparseLoraConfig(target_modules=["q_proj"], r=2), "sparse")
    model = build("llama")
    model.add_adapter(SparseLoraConfig(target_modules=targets, r=2), "sparse")
    model.add_adapter(VariatorConfig(), "plugin")
    assert outputs(model, CASES["llama"]).isfinite().all()


def over_torch() -> nn.Module:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).eval()
    with torch.no_grad():
        encoder.linear1.weight[:, ::2] = 0
    return encoder


def test_torch_s_fused_operator_does_not_pass_by_the_adapter():
    base, states = over_torch(), torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = base(states)
        model = get_peft_model(base, SparseLoraConfig(target_modules=["linear1"], init_lora_weights=False)).eval()
        adapted = model(states)
        assert not torch.allclose(adapted, expected, atol=1e-3)
        torch.testing.assert_close(model.merge_and_unload()(states), adapted)


def test_the_map_that_torch_s_attention_never_calls_is_refused():
    with pytest.raises(ValueError, match=r"exclude_modules=\['self_attn\.out_proj'\]"):
        get_peft_model(over_torch(), SparseLoraConfig(target_modules=["linear1", "out_proj"]))


def test_the_map_that_torch_s_attention_never_calls_is_not_among_all_linear_layers():
    """SigLIP pools with torch's attention, and calls a map of the same name in its own."""
    model = get_peft_model(prune_(tiny_model("siglip-vision")), SparseLoraConfig(r=2))
    names = model.base_model.targeted_module_names
    assert any(name.endswith("self_attn.out_proj") for name in names)
    assert not any(name.endswith("head.attention.out_proj") for name in names)
