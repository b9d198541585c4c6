"""Towers, projector, Q-Former and head are found from the structure of vision-language models, and can be named."""

import pytest
import torch

from peft_variator.sparsity import PruningConfig, prune
from peft_variator.sparsity.modules import Modalities, block_stacks, find_prunable, find_targets, innermost, is_inside

from .cases import VISION_LANGUAGE, make, with_own_head


EXPECTED = {
    "llava": {
        "model.vision_tower.": "vision",
        "model.language_model.": "language",
        "model.multi_modal_projector.": "projector",
        "lm_head": "head",
    },
    "blip2": {
        "vision_model.": "vision",
        "qformer.": "qformer",
        "language_projection": "projector",
        "language_model.model.": "language",
        "language_model.lm_head": "head",
    },
    "instructblip": {
        "vision_model.": "vision",
        "qformer.": "qformer",
        "language_projection": "projector",
        "language_model.encoder.": "language",
        "language_model.decoder.": "language",
        "language_model.lm_head": "head",
    },
    "qwen2_vl": {
        "model.visual.blocks.": "vision",
        "model.visual.merger.": "projector",
        "model.language_model.": "language",
        "lm_head": "head",
    },
    "paligemma": {
        "model.vision_tower.encoder.": "vision",
        "model.vision_tower.head.": "projector",
        "model.multi_modal_projector.": "projector",
        "model.language_model.": "language",
        "lm_head": "head",
    },
    "clip": {
        "vision_model.encoder.": "vision",
        "text_model.encoder.": "language",
        "visual_projection": "projector",
        "text_projection": "projector",
    },
}


@pytest.mark.parametrize("name", VISION_LANGUAGE)
def test_every_linear_layer_gets_its_modality(name):
    model, _ = make(name)
    used = set()
    for target in find_prunable(model):
        prefixes = [prefix for prefix in EXPECTED[name] if target.name.startswith(prefix)]
        assert len(prefixes) == 1, target.name
        assert target.modality == EXPECTED[name][prefixes[0]], target.name
        used.add(prefixes[0])
    assert used == set(EXPECTED[name])


@pytest.mark.parametrize("name", VISION_LANGUAGE)
def test_projector_qformer_and_head_stay_dense_unless_named(name):
    model = with_own_head(make(name)[0])
    assert {target.modality for target in find_targets(model, PruningConfig(sparsity=0.5))} == {"vision", "language"}
    for modality in set(EXPECTED[name].values()):
        targets = find_targets(model, PruningConfig(sparsity=0.5, modalities=[modality]))
        assert targets
        assert {target.modality for target in targets} == {modality}


@pytest.mark.parametrize("name", VISION_LANGUAGE)
def test_each_modality_gets_its_own_sparsity(name):
    model, batches = make(name)
    config = PruningConfig(modality_sparsity={"vision": 0.4, "language": "2:4", "projector": 0.25})
    report = prune(model, config, batches, progress=False)
    shares = {row.name: row.sparsity for row in report.grouped("modality")}
    assert shares == {
        "vision": pytest.approx(0.4, abs=2e-3),
        "language": 0.5,
        "projector": pytest.approx(0.25, abs=0.01),
    }
    # A few zeros come from the embedding of the padding token, which a head may share.
    zeros = {target.modality for target in find_prunable(model) if (target.module.weight == 0).float().mean() > 0.1}
    assert zeros == {"vision", "language", "projector"}
    assert all(row.pattern_met for row in report.modules if row.modality == "language")


def test_a_modality_that_is_not_named_stays_dense():
    model, batches = make("llava")
    prune(model, PruningConfig(modality_sparsity={"vision": 0.4}), batches, progress=False)
    assert all((t.module.weight == 0).any() == (t.modality == "vision") for t in find_prunable(model))


@pytest.mark.parametrize(("name", "modality"), [("llama", "language"), ("bert", "language"), ("vit", "vision")])
def test_models_with_one_kind_of_input_are_one_modality(name, modality):
    model = with_own_head(make(name)[0])
    assert {target.modality for target in find_targets(model, PruningConfig(sparsity=0.5))} == {modality}


def test_modalities_can_be_named():
    model, _ = make("llava")
    named = {"eyes": ["model.vision_tower", "model.multi_modal_projector"], "last": ["model.language_model.layers.1"]}
    modalities = Modalities(model, named)
    assert modalities.of("model.vision_tower.encoder.layers.0.mlp.fc1") == "eyes"
    assert modalities.of("model.multi_modal_projector.linear_1") == "eyes"
    assert modalities.of("model.language_model.layers.1.mlp.up_proj") == "last"
    assert modalities.of("model.language_model.layers.0.mlp.up_proj") == "language"
    config = PruningConfig(modality_sparsity={"last": 0.5}, modality_modules=named)
    assert {target.block for target in find_targets(model, config)} == {"model.language_model.layers.1"}


def test_modalities_of_any_module_can_be_named():
    model = torch.nn.ModuleDict({"see": torch.nn.Linear(8, 8), "speak": torch.nn.Linear(8, 8)})
    assert {target.modality for target in find_prunable(model)} == {"model"}
    config = PruningConfig(
        method="magnitude",
        modality_sparsity={"vision": 0.5},
        modality_modules={"vision": ["see"], "language": ["speak"]},
    )
    prune(model, config, progress=False)
    assert ((model["see"].weight == 0).sum(), (model["speak"].weight == 0).sum()) == (32, 0)


def test_naming_a_module_that_is_not_there_is_refused():
    model, _ = make("llava")
    with pytest.raises(ValueError, match=r"modality_modules names 'visual' for 'vision'.*\['model', 'lm_head'\]"):
        prune(model, PruningConfig(sparsity=0.5, modality_modules={"vision": ["visual"]}))


def test_asking_for_a_modality_that_is_not_there_is_refused():
    model, _ = make("llama")
    with pytest.raises(ValueError, match=r"no Linear or Conv1D of modality 'vision'; it has \['head', 'language'\]"):
        prune(model, PruningConfig(modality_sparsity={"vision": 0.5}))


def test_stacks_are_the_outermost_lists():
    model, _ = make("t5")  # a T5 block is a list of sub-layers inside the list of blocks
    assert list(block_stacks(model)) == ["encoder.block", "decoder.block"]


def test_names_are_compared_part_by_part():
    assert is_inside("a.b.c", "a.b")
    assert is_inside("a", "")
    assert not is_inside("a.bc", "a.b")
    assert innermost("layers.10.mlp", ["layers.1", "layers.10", "layers"]) == "layers.10"
    assert innermost("head", ["layers"]) is None
