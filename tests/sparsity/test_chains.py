"""Which blocks are run again on what the one before gives, and which need the whole model."""

import copy

import pytest
import torch
import transformers as T
from torch import nn

from peft_variator.sparsity import PruningConfig, prune
from peft_variator.sparsity.chains import find_chains
from peft_variator.sparsity.modules import block_stacks

from .cases import GROUPED, IMAGE, QWEN_VL_TOKENS, make, qwen_vl_batch, reference_masks, text_batch, wanda_mask


def chains_of(model, *batches):
    blocks = {name: model.get_submodule(name) for stack in block_stacks(model).values() for name in stack}
    return find_chains(model, blocks, batches)


def test_towers_are_chains_and_blocks_are_linked_by_their_hidden_states():
    model, batches = make("blip2")
    assert [(len(chain.blocks), chain.links[1]) for chain in chains_of(model, batches[0])] == [(2, {0: 0})] * 3


def test_other_outputs_that_travel_on_are_linked_too():
    model, batches = make("t5")  # blocks hand the position bias on
    assert [len(chain.links[1]) for chain in chains_of(model, batches[0])] == [2, 3]


def test_a_block_that_runs_several_times_is_a_chain_of_its_own():
    model, batches = make("albert")
    assert [len(chain.blocks) for chain in chains_of(model, batches[0])] == [1]


class Interrupted(nn.Module):
    """A stack whose hidden states are changed between two of its blocks, as by DeepStack's visual features."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(4))

    def forward(self, hidden):
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden) + (1.0 if index == 1 else 0.0) if index == 1 else layer(hidden)
        return hidden


def test_what_happens_between_blocks_is_not_lost():
    torch.manual_seed(0)
    model, batches = Interrupted(), [torch.randn(6, 8) for _ in range(2)]
    chains = chains_of(model, batches[0])
    assert [chain.blocks for chain in chains] == [["layers.0", "layers.1"], ["layers.2", "layers.3"]]
    hidden = torch.cat(batches)
    report = prune(model, PruningConfig(sparsity=0.5, keep_dense=True), batches, progress=False)
    for index, layer in enumerate(model.layers):
        mask = wanda_mask(layer[0].weight, hidden.double().norm(dim=0), 0.5)
        assert torch.equal(report.masks[f"layers.{index}.0"], mask)
        with torch.no_grad():
            hidden = torch.tanh(nn.functional.linear(hidden, layer[0].weight * mask, layer[0].bias))
        hidden = hidden + 1.0 if index == 1 else hidden


class Pair(nn.Module):
    """A block that hands on hidden states and something else, as T5's blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, hidden, bias):
        return self.up(hidden) + bias, bias


class ScaledPairs(nn.Module):
    """Between the blocks the hidden states are scaled, while the other output goes on as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Pair(), Pair()])

    def forward(self, hidden):
        hidden, bias = self.layers[0](hidden, torch.ones(4))
        return self.layers[1](hidden * 2, bias)[0]


def test_blocks_are_linked_by_their_hidden_states_not_by_what_else_travels():
    assert [chain.blocks for chain in chains_of(ScaledPairs(), torch.randn(3, 4))] == [["layers.0"], ["layers.1"]]


class Block(nn.Module):
    """A block of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, hidden):
        return torch.tanh(self.up(hidden))


class Writes(Block):
    """A block that adds to its input in place."""

    def forward(self, hidden):
        hidden += torch.tanh(self.up(hidden))
        return torch.tanh(hidden)


class WritesState(Block):
    """A block that counts in a list of tensors which all blocks share."""

    def forward(self, hidden, state):
        hidden = torch.tanh(self.up(hidden + state[0]))
        state[0] += 0.3
        return hidden


class Stack(nn.Module):
    """Four blocks; what happens between them is up to those that inherit."""

    kind: type[nn.Module] = Block

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.kind() for _ in range(4))


class AddsImages(Stack):
    """Adds features after the first block, where a batch has some, as DeepStack does."""

    def forward(self, hidden, image=None):
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden)
            if index == 0 and image is not None:
                hidden = hidden + image
        return hidden


class AddsInPlace(Stack):
    """Adds to the hidden states in place between blocks, as Granite Speech does."""

    def forward(self, hidden):
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden)
            if index == 1:
                hidden += 1.0
        return hidden


class ChangesInputs(Stack):
    """Its blocks write into their inputs."""

    kind = Writes

    def forward(self, hidden):
        hidden = hidden * 1.0
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class SharesState(Stack):
    """Its blocks write into what all of them are given, as RWKV's do."""

    kind = WritesState

    def forward(self, hidden):
        state = [torch.zeros(8)]
        for layer in self.layers:
            hidden = layer(hidden, state)
        return hidden


class WritesBetween(Stack):
    """Changes an argument in place between blocks."""

    kind = WritesState

    def forward(self, hidden):
        state = [torch.zeros(8)]
        for layer in self.layers:
            hidden = layer(hidden, [state[0]])
            state[0] += 0.4
        return hidden


class Gated(Block):
    """A block with a second input."""

    def forward(self, hidden, skipped):
        return torch.tanh(self.up(hidden + 2 * skipped))


class Skips(Stack):
    """The last block gets what the first gave, too, as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[3] = Gated()

    def skipped(self, first):
        return first

    def forward(self, hidden):
        first = self.layers[0](hidden)
        return self.layers[3](self.layers[2](self.layers[1](first)), self.skipped(first))


class SkipsComputed(Skips):
    """... after some computation without gradients."""

    def skipped(self, first):
        return torch.sigmoid(first.detach()).round(decimals=1)


class SkipsWritten(Skips):
    """... written into a part of another tensor."""

    def skipped(self, first):
        room = torch.zeros(len(first), 16)
        room[:, :8] = first
        return room[:, :8] * 0.5


STACKS = [AddsInPlace, ChangesInputs, SharesState, WritesBetween, Skips, SkipsComputed, SkipsWritten]


@pytest.mark.parametrize("propagate", [True, False], ids=["pruned", "dense"])
@pytest.mark.parametrize("stack", STACKS)
def test_what_a_replay_would_miss_is_seen(stack, propagate):
    torch.manual_seed(0)
    model, batches = stack().eval(), [torch.randn(24, 8) for _ in range(3)]
    kept = copy.deepcopy(batches)
    config = PruningConfig(sparsity=0.5, propagate=propagate)
    expected = reference_masks(copy.deepcopy(model), config, batches)
    prune(model, config, batches, progress=False)
    for name, mask in expected.items():
        assert torch.equal(model.get_submodule(name).weight != 0, mask), name
    assert all(torch.equal(batch, before) for batch, before in zip(batches, kept, strict=True))


@pytest.mark.parametrize("image_first", [True, False])
def test_a_link_holds_in_every_batch_or_not_at_all(image_first):
    torch.manual_seed(0)
    model = AddsImages().eval()
    batches = [{"hidden": torch.randn(24, 8)}, {"hidden": torch.randn(24, 8), "image": torch.randn(24, 8)}]
    batches = batches[::-1] if image_first else batches
    assert [len(chain.blocks) for chain in chains_of(model, *batches)] == [1, 3]
    expected = reference_masks(copy.deepcopy(model), PruningConfig(sparsity=0.5), batches)
    prune(model, PruningConfig(sparsity=0.5), batches, progress=False)
    assert all(torch.equal(model.get_submodule(name).weight != 0, mask) for name, mask in expected.items())


def test_a_skip_ends_the_chain_only_where_it_arrives():
    batch = torch.randn(4, 8)
    assert [len(chain.blocks) for chain in chains_of(Skips(), batch)] == [3, 1]
    assert [len(chain.blocks) for chain in chains_of(SkipsComputed(), batch)] == [3, 1]
    assert [len(chain.blocks) for chain in chains_of(AddsInPlace(), batch)] == [2, 2]


def test_only_blocks_that_write_get_copies_of_their_arguments():
    assert [chain.writes for chain in chains_of(ChangesInputs(), torch.randn(4, 8))] == [True]
    assert not any(chain.writes for chain in chains_of(Skips(), torch.randn(4, 8)))
    model, batches = make("llama")
    assert not any(chain.writes for chain in chains_of(model, *batches))


def test_what_an_encoder_gives_does_not_cut_the_decoders_chain():
    for name in ("t5", "bart"):
        model, batches = make(name)
        assert [len(chain.blocks) for chain in chains_of(model, *batches)] == [2, 2]


def rwkv():
    config = T.RwkvConfig(vocab_size=IMAGE + 1, hidden_size=32, attention_hidden_size=32, num_hidden_layers=3)
    return T.RwkvForCausalLM(config), [text_batch(), text_batch()]


def qwen3_vl():
    vision = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "patch_size": 4}
    config = T.Qwen3VLConfig(
        text_config={
            **GROUPED,
            "num_hidden_layers": 4,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
        },
        vision_config={
            **vision,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 16,
        },
        **QWEN_VL_TOKENS,
    )
    return T.Qwen3VLForConditionalGeneration(config), [text_batch(), qwen_vl_batch()]


@pytest.mark.parametrize("build", [rwkv, qwen3_vl])
def test_models_that_change_things_between_their_blocks(build):
    torch.manual_seed(0)
    model, batches = build()
    config = PruningConfig(sparsity=0.5, modalities=["language"])
    expected = reference_masks(copy.deepcopy(model.eval()), config, batches)
    prune(model, config, batches, progress=False)
    assert expected
    for name, mask in expected.items():
        differing = (model.get_submodule(name).weight != 0) != mask
        assert not differing.any(), name
