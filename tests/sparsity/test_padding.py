"""Padding is left out of what pruning sums up, or it is said that it is not."""

import warnings

import pytest
import torch
import transformers as T
from torch import nn

from peft_variator.sparsity import PruningConfig, prune
from peft_variator.sparsity.methods.wanda import Wanda
from peft_variator.sparsity.statistics import InputStatistics
from tests.tiny_models import VOCABULARY

from .cases import make, tokens


def padded(batch, left):
    """The batch with four pads on one side."""
    pads = torch.zeros(len(batch["input_ids"]), 4, dtype=torch.long)
    order = (lambda pad, real: [pad, real]) if left else (lambda pad, real: [real, pad])
    return {
        "input_ids": torch.cat(order(pads + 7, batch["input_ids"]), dim=1),
        "attention_mask": torch.cat(order(pads, batch["attention_mask"]), dim=1),
    }


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("name", ["llama", "bert", "opt"])
def test_padding_does_not_count(name, left):
    model, batches = make("llama" if name == "opt" else name)
    if name == "opt":  # its blocks flatten the batch
        model = make("blip2")[0].language_model
    plain = {key: batches[0][key] for key in ("input_ids", "attention_mask")}
    if name == "bert":
        plain["position_ids"] = torch.arange(10).expand(2, -1)
    with_pads = padded(plain, left)
    if name == "bert":
        with_pads["position_ids"] = torch.arange(14).sub(4 if left else 0).clamp_min(0).expand(2, -1)
    masks = [
        prune(model, PruningConfig(sparsity=0.5, keep_dense=True), [batch], progress=False).masks
        for batch in (plain, with_pads)
    ]
    different = sum((masks[0][module] != masks[1][module]).sum().item() for module in masks[0])
    assert different <= 4  # rounding may decide between two weights of almost equal score
    unmasked = {**with_pads, "attention_mask": torch.ones_like(with_pads["attention_mask"])}
    wrong = prune(model, PruningConfig(sparsity=0.5, keep_dense=True), [unmasked], progress=False).masks
    assert sum((masks[0][module] != wrong[module]).sum().item() for module in wrong) > 40


def inputs_seen(model, config, batches):
    """How many tokens each pruned module counted, and the sums of their squares."""
    seen = {}

    class Noting(InputStatistics):
        def check(self, name):
            super().check(name)
            seen[name] = (self.tokens, self.norm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Wanda, "statistics", Noting)
        prune(model, config, batches, progress=False)
    return seen


def unlike(one, other):
    """The modules of which two runs have not seen the same."""
    assert one.keys() == other.keys()
    return [
        name
        for name, (tokens_seen, norm) in one.items()
        if tokens_seen != other[name][0] or not torch.allclose(norm, other[name][1], rtol=1e-4)
    ]


def differing(build, plain, with_pads):
    config = PruningConfig(sparsity=0.5, keep_dense=True)
    return unlike(inputs_seen(build(), config, [plain]), inputs_seen(build(), config, [with_pads]))


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_masks_that_the_model_makes_ready_for_attention_are_read_from_the_batch(name):
    batch = make(name)[1][0]
    keys = batch.keys() & {"input_ids", "attention_mask", "pixel_values", "token_type_ids"}
    plain = {key: batch[key] for key in keys}
    with_pads = {**plain, **padded(plain, left=False)}
    if name == "paligemma":
        with_pads["token_type_ids"] = torch.zeros_like(with_pads["input_ids"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not differing(lambda: make(name)[0], plain, with_pads)


@pytest.mark.parametrize("decoder_length", [6, 14], ids=["other length", "same length"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoders_padding_does_not_count_in_cross_attention(name, decoder_length):
    plain = {key: make(name)[1][0][key] for key in ("input_ids", "attention_mask")}
    decoder = tokens(decoder_length)
    decoder_mask = torch.ones_like(decoder)
    decoder_mask[:, -2:] = 0  # the decoder's own padding, which is other than the encoder's
    both = {"decoder_input_ids": decoder, "decoder_attention_mask": decoder_mask}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not differing(lambda: make(name)[0], plain | both, padded(plain, left=False) | both)
    config = PruningConfig(sparsity=0.5, keep_dense=True)
    seen = inputs_seen(make(name)[0], config, [padded(plain, left=False) | both])
    cross = "EncDecAttention" if name == "t5" else "encoder_attn"
    assert {
        seen[module][0] for module in seen if cross in module and module.endswith(("k", "v", "k_proj", "v_proj"))
    } == {20}
    assert {seen[module][0] for module in seen if cross in module and module.endswith(("q", "q_proj"))} == {
        2 * (decoder_length - 2)
    }


class Plain(nn.Module):
    """A model that is none of transformers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def build(make_model, seed=0):
    torch.manual_seed(seed)
    return make_model().eval()


def test_the_batchs_mask_counts_in_models_that_are_none_of_transformers():
    plain = {"input_ids": tokens(), "attention_mask": torch.ones(2, 10, dtype=torch.long)}
    assert not differing(lambda: build(Plain), plain, padded(plain, left=False))


def test_sequences_that_lie_time_first():
    config = T.XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=48)
    plain = {"input_ids": tokens(), "attention_mask": torch.ones(2, 10, dtype=torch.long)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not differing(lambda: build(lambda: T.XLNetModel(config)), plain, padded(plain, left=True))


def test_padding_that_cannot_be_told_is_warned_of():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    convolutions = {"conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (8, 4), "num_feat_extract_layers": 2}
    config = T.Wav2Vec2Config(**sizes, **convolutions, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    model = build(lambda: T.Wav2Vec2Model(config))
    mask = torch.ones(2, 400, dtype=torch.long)
    batch = {"input_values": torch.randn(2, 400), "attention_mask": mask}
    pruning = PruningConfig(sparsity=0.5, keep_dense=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        prune(model, pruning, [batch], progress=False)
    mask[1, 200:] = 0
    with pytest.warns(UserWarning, match=r"the inputs of encoder.layers.0.attention.*padding counted"):
        prune(model, pruning, [batch], progress=False)


def test_tokens_routed_to_experts_are_warned_of():
    """Padding is routed as well, and an expert's inputs do not tell which rows are."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    experts = {"num_experts": 2, "expert_capacity": 64, "num_sparse_encoder_layers": 1, "encoder_sparse_step": 1}
    config = T.SwitchTransformersConfig(vocab_size=VOCABULARY, **sizes, **experts, num_sparse_decoder_layers=0)
    model = build(lambda: T.SwitchTransformersForConditionalGeneration(config))
    plain = {"input_ids": tokens(), "attention_mask": torch.ones(2, 10, dtype=torch.long)}
    pruning = PruningConfig(sparsity=0.5, keep_dense=True)
    decoder = {"decoder_input_ids": tokens(6)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        prune(model, pruning, [plain | decoder], progress=False)
    with pytest.warns(UserWarning, match=r"the inputs of .*experts.*padding counted"):
        prune(model, pruning, [padded(plain, left=False) | decoder], progress=False)


def test_a_pooled_token_is_no_padding():
    plain = {"input_ids": tokens(), "attention_mask": torch.ones(2, 10, dtype=torch.long)}
    config = PruningConfig(sparsity=0.5, keep_dense=True, target_modules=["pooler.dense", "query"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = inputs_seen(make("bert")[0], config, [padded(plain, left=False)])
    assert seen["pooler.dense"][0] == 2
