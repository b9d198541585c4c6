"""The walk over blocks gives what running the whole model again for every block gives."""

import copy
import weakref

import pytest
import torch
from torch import nn

from peft_variator.sparsity import PruningConfig, prune
from peft_variator.sparsity.methods.wanda import Wanda
from peft_variator.sparsity.modules import block_stacks, find_targets
from peft_variator.sparsity.sequential import find_chains
from peft_variator.sparsity.statistics import InputStatistics

from .cases import OTHERS, VISION_LANGUAGE, make, text_batch, wanda_mask


def run_order(model, targets, batch):
    """The blocks of the targets, in the order in which their first module runs."""
    order = []
    hooks = [
        target.module.register_forward_pre_hook(lambda module, args, block=target.block: order.append(block))
        for target in targets
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return list(dict.fromkeys(order))


def reference_masks(model, config, batches):
    """Wanda by full forward passes: one for every block, on the model as it is by then, or on the dense one."""
    dense = copy.deepcopy(model)
    targets = find_targets(model, config)
    masks = {}
    for block in run_order(model, targets, batches[0]):
        members = [target for target in targets if target.block == block]
        source = model if config.propagate else dense
        inputs = {target.name: [] for target in members}
        hooks = [
            source.get_submodule(name).register_forward_pre_hook(
                lambda module, args, rows=rows: rows.append(args[0].reshape(-1, args[0].shape[-1]))
            )
            for name, rows in inputs.items()
        ]
        with torch.no_grad():
            for batch in batches:
                source(**batch)
        for hook in hooks:
            hook.remove()
        for target in members:
            weight = target.module.weight.data
            matrix = weight.T if target.transposed else weight
            mask = wanda_mask(matrix, torch.cat(inputs[target.name]).double().norm(dim=0), target.target)
            masks[target.name] = mask.T if target.transposed else mask
            weight[~masks[target.name]] = 0
    return masks


@pytest.mark.parametrize("propagate", [True, False], ids=["pruned", "dense"])
@pytest.mark.parametrize("name", [*VISION_LANGUAGE, *OTHERS])
def test_masks_equal_those_of_full_forward_passes(name, propagate):
    model, batches = make(name)
    config = PruningConfig(sparsity=0.5, propagate=propagate)
    expected = reference_masks(copy.deepcopy(model), config, batches)
    prune(model, config, batches, progress=False)
    assert expected
    for module, mask in expected.items():
        assert torch.equal(model.get_submodule(module).weight != 0, mask), module


def test_every_modality_can_be_walked():
    model, batches = make("instructblip")
    modalities = ["vision", "qformer", "projector", "language", "head"]
    config = PruningConfig(sparsity=0.5, modalities=modalities)
    expected = reference_masks(copy.deepcopy(model), config, batches)
    report = prune(model, config, batches, progress=False)
    assert {row.modality for row in report.modules} == set(modalities)
    for module, mask in expected.items():
        assert torch.equal(model.get_submodule(module).weight != 0, mask), module


@pytest.mark.parametrize("name", ["llama", "llava", "t5"])
def test_propagation_changes_the_masks(name):
    masks = []
    for propagate in (True, False):
        model, batches = make(name)
        masks.append(prune(model, PruningConfig(sparsity=0.5, propagate=propagate, keep_dense=True), batches).masks)
    assert any(not torch.equal(masks[0][module], masks[1][module]) for module in masks[0])


def chains_of(model, batch):
    blocks = {name: model.get_submodule(name) for stack in block_stacks(model).values() for name in stack}
    return find_chains(model, blocks, batch)


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


def test_a_model_without_stacks_is_walked_module_by_module():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    inputs = torch.randn(12, 8)
    report = prune(model, PruningConfig(sparsity=0.5), [inputs], progress=False)
    with torch.no_grad():
        hidden = model[1](model[0](inputs))
    assert [row.block for row in report.modules] == ["0", "2"]
    assert report.sparsity == 0.5
    kept = model[2].weight != 0
    assert torch.equal(wanda_mask(model[2].weight.masked_fill(~kept, 1e-9), hidden.double().norm(dim=0), 0.5), kept)


class CountedStatistics(InputStatistics):
    """Notes how many of its kind are alive."""

    alive: weakref.WeakSet = weakref.WeakSet()
    most = 0

    def __init__(self, width, device):
        super().__init__(width, device)
        CountedStatistics.alive.add(self)
        CountedStatistics.most = max(CountedStatistics.most, len(CountedStatistics.alive))


@pytest.mark.parametrize("propagate", [True, False])
def test_only_one_block_has_statistics_at_a_time(monkeypatch, propagate):
    monkeypatch.setattr(Wanda, "statistics", CountedStatistics)
    monkeypatch.setattr(CountedStatistics, "most", 0)
    model, batches = make("llava")
    prune(model, PruningConfig(sparsity=0.5, propagate=propagate), batches, progress=False)
    assert CountedStatistics.most == 7  # q, k, v, o, gate, up and down of one Llama block
    assert len(CountedStatistics.alive) == 0


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


def test_key_value_caches_do_not_grow_with_the_replays():
    model, batches = make("llama")
    assert model.config.use_cache
    expected = reference_masks(copy.deepcopy(model), PruningConfig(sparsity=0.5), batches)
    prune(model, PruningConfig(sparsity=0.5), [{**batch, "use_cache": True} for batch in batches], progress=False)
    assert all(torch.equal(model.get_submodule(name).weight != 0, mask) for name, mask in expected.items())


def test_a_tower_that_no_batch_runs_is_named():
    model, _ = make("llava")
    with pytest.raises(ValueError, match=r"No calibration batch runs all blocks.*vision_tower.*images too"):
        prune(model, PruningConfig(sparsity=0.5), [text_batch()], progress=False)


def test_batches_without_images_count_for_the_language_model_only():
    model, batches = make("llava")
    report = prune(model, PruningConfig(sparsity=0.5, keep_dense=True), [text_batch(), *batches], progress=False)
    again = prune(model, PruningConfig(sparsity=0.5, keep_dense=True), batches, progress=False)
    vision = [row.name for row in report.modules if row.modality == "vision"]
    assert all(torch.equal(report.masks[name], again.masks[name]) for name in vision)
    assert any(not torch.equal(report.masks[name], again.masks[name]) for name in report.masks)


def test_a_module_its_block_never_calls_is_named():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, hidden):
            return self.used(hidden)

    model = nn.Module()
    model.layers = nn.ModuleList([Skips()])
    model.forward = lambda hidden: model.layers[0](hidden)
    with pytest.raises(ValueError, match=r"never reached 'layers.0.unused'"):
        prune(model, PruningConfig(sparsity=0.5), [torch.randn(4, 8)], progress=False)
    prune(model, PruningConfig(sparsity=0.5, exclude_modules=["unused"]), [torch.randn(4, 8)], progress=False)
