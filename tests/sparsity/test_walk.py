"""The walk over blocks gives what running the whole model again for every block gives."""

import copy
import weakref

import pytest
import torch
from torch import nn

from peft_variator.sparsity import PruningConfig, prune
from peft_variator.sparsity.methods.wanda import Wanda
from peft_variator.sparsity.statistics import InputStatistics

from .cases import OTHERS, VISION_LANGUAGE, make, reference_masks, text_batch, wanda_mask, with_own_head


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
    with_own_head(model)
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


def test_key_value_caches_do_not_grow_with_the_replays():
    model, batches = make("llama")
    assert model.config.use_cache
    expected = reference_masks(copy.deepcopy(model), PruningConfig(sparsity=0.5), batches)
    prune(model, PruningConfig(sparsity=0.5), [{**batch, "use_cache": True} for batch in batches], progress=False)
    assert all(torch.equal(model.get_submodule(name).weight != 0, mask) for name, mask in expected.items())


def test_a_tower_that_no_batch_runs_is_named():
    model, _ = make("llava")
    with pytest.raises(ValueError, match=r"No calibration batch runs .*vision_tower.*images too"):
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
