"""Architectures that are not in the table: described by the configuration, or refused with candidates."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from peft_variator import VariatorConfig
from tests.tiny_models import BERT, BY_NAME, DECODER, FIRST_WORD, GPT, tiny_model

from .reference import Seen, kept_ends, plugin_output, text_groups, watch


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.grow = nn.Linear(dim, 2 * dim)
        self.shrink = nn.ModuleDict({"dense": nn.Linear(2 * dim, dim)})

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        weights = torch.ones(hidden.shape[:2]) if mask is None else mask.float()
        hidden = self.norm(hidden + (hidden * weights.unsqueeze(-1)).sum(1, keepdim=True))
        return hidden + self.shrink["dense"](torch.relu(self.grow(hidden)))


class Encoder(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(99, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(hidden, attention_mask)
        return hidden


class Classifier(nn.Module):
    """A home-made model whose encoder, not itself, is called with the mask."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = Encoder(dim)
        self.head = nn.Linear(dim, 3)

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(tokens, attention_mask=padding))


NAMED = {"target_modules": ["grow"], "end_module": "shrink.dense", "stack_module": "encoder"}


def with_plugin(model: nn.Module, **fields: Any) -> nn.Module:
    torch.manual_seed(1)
    return get_peft_model(model, VariatorConfig(init_weights=False, **fields)).eval()


def test_start_end_and_stack_are_named() -> None:
    model = with_plugin(Classifier(), **NAMED)
    ids = torch.randint(FIRST_WORD, 99, (2, 11))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    groups = [text_groups(row, kept_ends(row, 1, 1), 4) for row in mask.tolist()]
    with torch.no_grad():
        for seen in watch(model, lambda: model(ids, mask)):
            expected = plugin_output(seen.layer, network(model, seen), seen.inputs, groups, "default")
            real = mask.bool()
            torch.testing.assert_close(seen.outputs[real], expected[real], rtol=0, atol=1e-5)
        padded = model(ids, mask)[0, :6]
        torch.testing.assert_close(padded, model(ids[:1, :6], mask[:1, :6])[0], rtol=0, atol=1e-5)


def network(model: nn.Module, seen: Seen) -> Any:
    block = model.get_base_model().get_submodule(seen.layer.name.rpartition(".")[0])
    return lambda vector: block.shrink["dense"].base_layer(torch.relu(block.grow.base_layer(vector)))


def test_without_a_named_stack_the_model_s_own_arguments_count() -> None:
    model = with_plugin(Encoder(16), target_modules=["grow"], end_module="shrink.dense")
    ids = torch.randint(FIRST_WORD, 99, (1, 11))
    assert [seen.rows for seen in watch(model, lambda: model(ids))] == [5, 5]
    assert [seen.rows for seen in watch(model, lambda: model(ids, torch.ones_like(ids)))] == [5, 5]


def test_ratio_1_disabling_and_unloading() -> None:
    ids = torch.randint(FIRST_WORD, 99, (2, 11))
    expected = Classifier()(ids)
    model = with_plugin(Classifier(), **NAMED)
    assert not torch.allclose(model(ids), expected)
    with model.disable_adapter():
        assert torch.equal(model(ids), expected)
    model.set_compression_ratio(1)
    assert torch.equal(model(ids), expected)
    assert torch.equal(model.unload()(ids), expected)


def test_a_network_that_is_one_module() -> None:
    class Whole(Encoder):
        def __init__(self) -> None:
            super().__init__(16)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in "ab")

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            hidden = self.embedding(input_ids)
            for block in self.blocks:
                hidden = hidden + block(hidden)
            return hidden

    model = with_plugin(Whole(), target_modules=r"blocks\.\d+", stack_module="")
    ids = torch.randint(FIRST_WORD, 99, (1, 11))
    assert [seen.rows for seen in watch(model, lambda: model(ids))] == [5, 5]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"No feed-forward network to compress was found in Classifier.*encoder\.blocks\.\*\.shrink.*Known model"),
        (NAMED | {"end_module": "down"}, r"end_module='down' was not found beside 'encoder\.blocks\.0\.grow'.*shrink"),
        (
            NAMED | {"stack_module": "decoder"},
            r"stack_module='decoder' is no module around 'encoder\.blocks\.0\.grow'",
        ),
        (NAMED | {"target_modules": ["mlp"]}, r"Target modules \{'mlp'\} not found in the base model"),
    ],
    ids=str,
)
def test_what_cannot_be_found_is_refused(fields: dict[str, Any], message: str) -> None:
    model = Classifier()
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, VariatorConfig(**fields))
    ids = torch.randint(FIRST_WORD, 99, (1, 5))
    assert torch.equal(model(ids), Classifier()(ids))


def test_neurons_are_not_copied_where_nothing_tells_the_activation() -> None:
    with pytest.warns(UserWarning, match="bottleneck"):
        model = with_plugin(Classifier(), **NAMED, decompression="neurons")
    assert model(torch.randint(FIRST_WORD, 99, (1, 11))).isfinite().all()


def test_a_network_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="shrink.dense takes vectors of 32 entries and gives vectors of 16"):
        with_plugin(Classifier(), target_modules=["shrink.dense"], stack_module="encoder")


def test_a_start_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks\.0\.grow takes vectors of 16 entries and gives.* 32.*end_module"):
        with_plugin(Classifier(), target_modules=["grow"], stack_module="encoder")


@pytest.mark.parametrize(
    ("target", "end"),
    [
        ("intermediate", "output"),  # adds the residual, which is not merged
        ("intermediate", "intermediate"),
        ("intermediate", "intermediate.dense"),
        ("intermediate.dense", "dense"),
    ],
)
def test_an_end_that_cannot_be_one_is_refused_before_anything_changes(target: str, end: str) -> None:
    base = BERT.build()
    with pytest.raises(ValueError, match=f"end_module='{end}'"):
        get_peft_model(base, VariatorConfig(target_modules=[target], end_module=end))
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())


@pytest.mark.parametrize("end", ["attention", "attention.self.query", "output.LayerNorm"])
def test_an_end_that_the_merged_tokens_do_not_reach_is_named(end: str) -> None:
    model = with_plugin(BERT.build(), target_modules=["intermediate"], end_module=end)
    with pytest.raises(ValueError, match=f"end_module='{end}'.*layer.0.intermediate"):
        model(**BERT.inputs(1, 14))


def test_a_stack_that_tells_no_length_is_refused() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(16, 16))])

        def forward(self, hidden: Tensor) -> Tensor:
            return self.layers[0](hidden.flatten(0, 1)).view(hidden.shape)

    model = with_plugin(Flat(), target_modules=r"layers\.0", stack_module="")
    with pytest.raises(ValueError, match="cannot tell which of the hidden states.*name the module that takes them"):
        model(torch.randn(2, 5, 16))


def test_an_unreadable_mask_is_refused() -> None:
    model = with_plugin(Classifier(), **NAMED)
    with pytest.raises(ValueError, match=r"cannot read an attention mask of type Tensor and shape \(1, 11, 11\)"):
        model.get_base_model().encoder(torch.full((1, 11), 20), torch.ones(1, 11, 11))


OTHERS = {
    "bitnet": (DECODER, r".*layers\.\d+\.mlp", None),
    "bloom": (BY_NAME["bloom"].config, r".*\.h\.\d+\.mlp\.dense_h_to_4h", "dense_4h_to_h"),
    "openai-gpt": (GPT, r".*\.h\.\d+\.mlp", None),
}


@pytest.mark.parametrize("name", OTHERS)
def test_causal_models_of_transformers_that_are_not_in_the_table(name: str) -> None:
    """They are known to be causal by themselves: no used prediction sees a later token."""
    config, targets, end = OTHERS[name]
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **config)).eval()
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model = with_plugin(base, target_modules=targets, end_module=end)
    ids = torch.randint(FIRST_WORD, 99, (2, 14))
    labels = ids.masked_fill(torch.arange(14) < 6, -100)
    with torch.no_grad():
        expected = model(input_ids=ids, labels=labels).logits
        for position in range(1, 14):
            other = ids.clone()
            other[:, position] = 50
            used = slice(5, max(position, 5))
            found = model(input_ids=other, labels=labels).logits
            torch.testing.assert_close(found[:, used], expected[:, used], rtol=0, atol=1e-5)
    assert [seen.rows for seen in watch(model, lambda: model(input_ids=ids, labels=labels))] == [2 * (1 + 1 + 9)] * 2


def test_a_network_that_adds_the_residual_itself_is_refused() -> None:
    base = tiny_model("bloom")
    model = with_plugin(base, target_modules=r".*\.h\.\d+\.mlp")
    with pytest.raises(
        ValueError, match=r"transformer\.h\.0\.mlp takes a second tensor of shape \(1, 14, 32\).*start"
    ):
        model(input_ids=torch.full((1, 14), 20))


class Causal(Encoder):
    """A home-made decoder, of which nothing but the configuration can tell that it is one."""

    def __init__(self) -> None:
        super().__init__(16)
        self.head = nn.Linear(16, 99)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(super().forward(input_ids))


def test_a_home_made_decoder_is_declared_causal() -> None:
    ids = torch.randint(FIRST_WORD, 99, (1, 14))
    labels = ids.masked_fill(torch.arange(14) < 6, -100)
    fields = {"target_modules": ["grow"], "end_module": "shrink.dense", "stack_module": ""}
    model = with_plugin(Causal(), **fields, causal=True)
    assert [seen.rows for seen in watch(model, lambda: model(ids, labels=labels))] == [1 + 1 + 9] * 2
    assert [seen.rows for seen in watch(model, lambda: model(ids[:, :1]))] == [1, 1]
    with pytest.warns(UserWarning, match="nothing to merge"):
        model(ids, labels=ids)
    bidirectional = with_plugin(Causal(), **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [seen.rows for seen in watch(bidirectional, lambda: bidirectional(ids, labels=ids))] == [5, 5]


@pytest.mark.parametrize("target", [r".*\.self_attn", r".*layers\.\d+"])
def test_a_module_that_is_told_positions_is_refused(target: str) -> None:
    """Attention, or a whole block, which is no network of single positions."""
    base = tiny_model("llama")
    model = with_plugin(base, target_modules=target)
    with pytest.raises(ValueError, match=r"takes a second tensor of shape .*, such as .*mask"):
        model(input_ids=torch.randint(FIRST_WORD, 99, (1, 14)))


class OverTorch(nn.Module):
    """torch's own encoder, whose fused operator reads the weights of its maps and calls none of them."""

    def __init__(self, batch_first: bool = True, enable_nested_tensor: bool = True) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=enable_nested_tensor)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        pads = None if attention_mask is None else attention_mask == 0
        return self.encoder(self.embeddings(input_ids), src_key_padding_mask=pads)


OVER_TORCH = {"target_modules": ["linear1"], "end_module": "linear2", "stack_module": "", "init_weights": False}


def test_torch_s_encoder_layers_run_the_plugin() -> None:
    torch.manual_seed(0)
    base = OverTorch().eval()
    ids = torch.randint(0, 50, (6, 6))
    with torch.no_grad():
        expected = base(ids)
    model = get_peft_model(base, VariatorConfig(**OVER_TORCH, decompression="bottleneck")).eval()
    with torch.no_grad():
        merged, alone = model(input_ids=ids), model(input_ids=ids[2:3])
    assert not torch.allclose(merged, expected, atol=1e-2)
    torch.testing.assert_close(merged[2:3], alone)
    torch.testing.assert_close(model(input_ids=ids), merged)
    model.set_compression_ratio(1)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids), expected, rtol=0, atol=1e-5)
        assert torch.equal(model.unload()(ids), expected)


def test_nested_tensors_are_refused_and_padded_ones_are_right() -> None:
    """torch makes nested tensors of padded texts where nothing trains."""
    ids, mask = torch.randint(0, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    config = VariatorConfig(**OVER_TORCH, decompression="bottleneck")
    model = get_peft_model(OverTorch().eval(), config).eval()
    with torch.no_grad(), pytest.raises(ValueError, match="enable_nested_tensor=False"):
        model(input_ids=ids, attention_mask=mask)
    model = get_peft_model(OverTorch(enable_nested_tensor=False).eval(), config).eval()
    with torch.no_grad():
        padded, alone = model(input_ids=ids, attention_mask=mask), model(input_ids=ids[1:, :6])
    torch.testing.assert_close(padded[1:, :6], alone)


def test_torch_s_layers_with_the_length_first_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_first=False"):
        get_peft_model(OverTorch(batch_first=False), VariatorConfig(**OVER_TORCH))
