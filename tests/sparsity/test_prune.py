"""`prune` as a whole: weights, masks, dtypes, offloading, what is restored, and what is refused."""

import copy
import hashlib
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch.nn.utils.prune import l1_unstructured
from transformers import LlamaConfig, LlamaForCausalLM

from peft_variator.sparsity import Pattern, PruningConfig, measure_sparsity, prune
from peft_variator.sparsity.modules import find_targets
from peft_variator.sparsity.patterns import meets_pattern
from tests.tiny_models import tiny_model

from .cases import GROUPED, make


METHODS = ["magnitude", "wanda", "sparsegpt", "dsnot"]
AMOUNTS = [{"sparsity": 0.5}, {"sparsity": 0.37}, {"pattern": "2:4"}, {"pattern": "1:4"}, {"pattern": "4:8"}]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("amount", AMOUNTS, ids=lambda amount: str(next(iter(amount.values()))))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_every_method_reaches_what_was_asked(name, method, amount):
    model, batches = make(name)
    config = PruningConfig(method=method, error_threshold=0.0, **amount)
    expected = Pattern.parse(amount["pattern"]) if "pattern" in amount else amount["sparsity"]
    targets = find_targets(model, config)
    report = prune(model, config, batches, progress=False)
    for target in targets:
        weight = target.module.weight.data
        matrix = weight.T if target.transposed else weight
        zeros = matrix == 0
        assert not matrix[zeros].signbit().any(), "every zero is +0.0"
        if isinstance(expected, Pattern):
            assert meets_pattern(matrix, expected)
            assert zeros.sum() == expected.sparsity * matrix.numel()
        else:
            assert abs(zeros.sum() - expected * matrix.numel()) <= 0.5
    assert [row.name for row in report.modules] == [target.name for target in targets]
    assert report.sparsity == pytest.approx(expected.sparsity if isinstance(expected, Pattern) else expected, abs=1e-3)
    assert report.total.pattern_met is (True if "pattern" in amount else None)
    assert report.masks == {}


def test_wanda_masks_conv1d_along_its_inputs():
    model, batches = make("gpt2")
    assert model.transformer.h[0].mlp.c_fc.weight.shape == (32, 128)
    prune(model, PruningConfig(pattern="2:4"), batches, progress=False)
    weight = model.transformer.h[0].mlp.c_fc.weight
    assert ((weight != 0).view(8, 4, 128).sum(1) == 2).all()
    assert not ((weight != 0).view(32, 32, 4).sum(2) == 2).all()


@pytest.mark.parametrize("method", ["wanda", "magnitude", "dsnot"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "llava", "t5"])
def test_masks_beside_dense_weights_are_those_of_the_pruned_model(name, method):
    model, batches = make(name)
    before, output = weights(model), model(**batches[0]).logits
    config = {"method": method, "sparsity": 0.5, "error_threshold": 0.0}
    report = prune(model, PruningConfig(**config, keep_dense=True), batches, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(**batches[0]).logits, output), "hooks are gone"
    prune(model, PruningConfig(**config), batches, progress=False)
    assert report.masks
    for module, mask in report.masks.items():
        assert (mask.dtype, mask.device.type, mask.shape) == (
            torch.bool,
            "cpu",
            model.get_submodule(module).weight.shape,
        )
        assert torch.equal(mask, model.get_submodule(module).weight != 0)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert measure_sparsity(make(name)[0]).total.zeros < report.total.zeros


def test_sparsegpt_beside_dense_weights_gives_masks_only():
    model, batches = make("llama")
    before = weights(model)
    report = prune(model, PruningConfig(method="sparsegpt", pattern="2:4", keep_dense=True), batches, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all((mask.view(-1, 4).sum(1) == 2).all() for mask in report.masks.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_models_of_other_dtypes_are_pruned_as_they_are(dtype, method):
    model, batches = make("llama")
    model = model.to(dtype)
    report = prune(model, PruningConfig(method=method, pattern="2:4"), batches, progress=False)
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert report.sparsity == 0.5
    assert report.total.pattern_met
    assert report.total.negative_zeros == 0
    assert torch.isfinite(model(**batches[0]).logits).all()


def test_sparsegpt_hurts_the_model_less_than_magnitude():
    torch.manual_seed(0)
    losses = {}
    for method in ("magnitude", "sparsegpt"):
        model, batches = make("llama")
        dense = model(**batches[0]).logits
        prune(model, PruningConfig(method=method, sparsity=0.6), batches, progress=False)
        losses[method] = (model(**batches[0]).logits - dense).square().mean().item()
    assert losses["sparsegpt"] < losses["magnitude"]


def test_modes_hooks_and_gradients_are_as_before():
    model, batches = make("llama")
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    prune(model, PruningConfig(sparsity=0.5), batches, progress=False)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_an_error_on_the_way_leaves_modes_and_no_hooks():
    model, batches = make("llama")
    model.train()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"weight of 'model.layers.1.mlp.up_proj' holds NaN"):
        prune(model, PruningConfig(method="magnitude", sparsity=0.5, keep_dense=True), batches, progress=False)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_parameters_stay_the_same_objects():
    model, batches = make("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: parameter for name, parameter in model.named_parameters()}
    prune(model, PruningConfig(sparsity=0.5), batches, progress=False)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert (optimizer.param_groups[0]["params"][1] == 0).any()


def test_calibration_may_be_a_generator_of_tensors():
    model, batches = make("llama")
    expected = copy.deepcopy(model)
    prune(expected, PruningConfig(sparsity=0.5), [{"input_ids": b["input_ids"]} for b in batches], progress=False)
    prune(model, PruningConfig(sparsity=0.5), (batch["input_ids"] for batch in batches), progress=False)
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in model.state_dict().items())


def test_magnitude_needs_no_data():
    model, _ = make("llama")
    assert prune(model, PruningConfig(method="magnitude", sparsity=0.5), progress=False).sparsity == 0.5


def test_pruning_again_prunes_on_top():
    model, batches = make("llama")
    prune(model, PruningConfig(sparsity=0.5), batches, progress=False)
    first = {name: value == 0 for name, value in weights(model).items()}
    report = prune(model, PruningConfig(sparsity=0.7), batches, progress=False)
    assert report.sparsity == pytest.approx(0.7, abs=1e-3)
    assert all((value == 0)[first[name]].all() for name, value in weights(model).items())


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("keep_dense", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_models_offloaded_to_the_cpu(method, keep_dense):
    model, batches = make("llama")
    offloaded = copy.deepcopy(model)
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert offloaded.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    config = PruningConfig(method=method, sparsity=0.5, keep_dense=keep_dense)
    expected = prune(model, config, batches, progress=False)
    report = prune(offloaded, config, batches, progress=False)
    assert report.modules == expected.modules
    assert report.masks.keys() == expected.masks.keys()
    assert all(torch.equal(mask, expected.masks[name]) for name, mask in report.masks.items())
    assert torch.equal(offloaded(**batches[0]).logits, model(**batches[0]).logits)
    assert measure_sparsity(offloaded).modules == measure_sparsity(model).modules


def from_disk(folder: Path, offload: Path | None) -> LlamaForCausalLM:
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map.update({"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"})
    return LlamaForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=offload)


@pytest.mark.parametrize("method", METHODS)
def test_models_offloaded_to_disk(tmp_path, method):
    model, batches = make("llama")
    model.save_pretrained(tmp_path / "base")
    before = digests(tmp_path / "base")
    offloaded = from_disk(tmp_path / "base", tmp_path / "offload")
    config = PruningConfig(method=method, pattern="2:4")
    prune(model, config, batches, progress=False)
    report = prune(offloaded, config, batches, progress=False)
    assert report.total.pattern_met
    assert torch.equal(offloaded(**batches[0]).logits, model(**batches[0]).logits)
    assert digests(tmp_path / "base") == before, "the checkpoint is only read"
    offloaded.save_pretrained(tmp_path / "pruned")
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "pruned").state_dict()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in saved.items())


def test_a_disk_offload_without_a_folder_is_refused(tmp_path):
    model, batches = make("llama")
    model.save_pretrained(tmp_path / "base")
    offloaded = from_disk(tmp_path / "base", None)
    with pytest.raises(ValueError, match=r"'model.layers.1.self_attn.q_proj' is offloaded to disk.*offload_folder="):
        prune(offloaded, PruningConfig(sparsity=0.5), batches, progress=False)


def test_gradient_scores_of_offloaded_weights_are_refused():
    model, batches = make("llama")
    cpu_offload(model, execution_device=torch.device("cpu"))
    config = {"method": "magnitude", "sparsity": 0.5, "allocation": "ecoflap"}
    with pytest.raises(ValueError, match="offloaded weights get none. Use 'zeroth'"):
        prune(model, PruningConfig(**config, score_order="first"), batches, progress=False)
    assert prune(model, PruningConfig(**config), batches, progress=False).sparsity == pytest.approx(0.5, abs=5e-4)


@pytest.mark.parametrize(("target_modules", "expected"), [
    (["q_proj"], {"self_attn.q_proj"}),
    (["mlp.up_proj", "layers.0.self_attn.v_proj"], {"mlp.up_proj", "self_attn.v_proj"}),
    (r".*\.(q|k)_proj", {"self_attn.q_proj", "self_attn.k_proj"}),
])  # fmt: skip
def test_targets_are_lists_of_ends_or_a_regex(target_modules, expected):
    model, batches = make("llama")
    report = prune(model, PruningConfig(sparsity=0.5, target_modules=target_modules), batches, progress=False)
    assert {row.name.split(".", 3)[3] for row in report.modules} == expected


@pytest.mark.parametrize("exclude_modules", [["q_proj", "down_proj"], r".*(q_proj|down_proj)"])
def test_excluded_modules_stay_dense(exclude_modules):
    model, batches = make("llama")
    report = prune(model, PruningConfig(sparsity=0.5, exclude_modules=exclude_modules), batches, progress=False)
    assert len(report.modules) == 10
    assert not any("q_proj" in row.name or "down_proj" in row.name for row in report.modules)
    assert (model.model.layers[0].mlp.down_proj.weight != 0).all()


def test_a_name_that_excludes_nothing_is_warned_of():
    model, batches = make("llama")
    config = PruningConfig("magnitude", sparsity=0.5, exclude_modules=["q_proj", "donw_proj", "layers.0"])
    with pytest.warns(UserWarning, match="exclude_modules") as caught:
        prune(model, config, batches, progress=False)
    texts = [str(warning.message) for warning in caught]
    assert [any(name in text for text in texts) for name in ("q_proj'", "donw_proj", "layers.0")] == [
        False,
        True,
        True,
    ]


def test_the_head_is_pruned_when_named():
    model, batches = make("llama")
    report = prune(model, PruningConfig(sparsity=0.5, modalities=["head"]), batches, progress=False)
    assert [row.name for row in report.modules] == ["lm_head"]


REFUSED = [
    ({"sparsity": 0.5, "target_modules": ["nothing"]}, "'nothing' matches no module of the model"),
    ({"sparsity": 0.5, "target_modules": ["q_proj", "act_fn"]}, "'act_fn' matches .*which have no weight to prune"),
    ({"sparsity": 0.5, "target_modules": r".*norm"}, r"'\.\*norm' matches .*names here end in .*'up_proj'"),
    ({"sparsity": 0.5, "target_modules": ["embed_tokens"]}, "Only Linear and Conv1D can be pruned"),
    ({"sparsity": 0.5, "exclude_modules": r".*"}, r"Nothing to prune.*exclude_modules='\.\*'.*\['head', 'language'\]"),
    ({"sparsity": 0.5, "target_modules": ["lm_head"]}, "pruned only when named in modalities"),
    (
        {"pattern": "3:7"},
        r"pattern='3:7' does not divide the width of 'model.layers.0.self_attn.q_proj': its 32 inputs",
    ),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_targets_that_cannot_be_pruned_are_refused(fields, message):
    model, batches = make("llama")
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        prune(model, PruningConfig(**fields), batches, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_empty_weight_is_refused():
    with pytest.warns(UserWarning, match="zero-element"):
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(0, 4))
    with pytest.raises(ValueError, match=r"'1' has an empty weight \(4, 0\)"):
        prune(model, PruningConfig(method="magnitude", sparsity=0.5), progress=False)


def test_quantised_weights_are_refused():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model[0].weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"weight of '0' is stored as torch.int8.*quantise afterwards"):
        prune(model, PruningConfig(method="magnitude", sparsity=0.5), progress=False)


def parametrized(layer):
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", torch.nn.Tanh())


COMPUTED = [
    parametrized,
    torch.nn.utils.parametrizations.weight_norm,
    torch.nn.utils.spectral_norm,
    lambda layer: l1_unstructured(layer, "weight", 0.25),
]


@pytest.mark.parametrize("compute", COMPUTED, ids=["parametrization", "weight_norm", "spectral_norm", "utils.prune"])
def test_a_weight_that_is_computed_is_refused(compute):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    compute(model[1])
    before = weights(model)
    config = PruningConfig(method="magnitude", sparsity=0.5)
    with pytest.raises(ValueError, match=r"weight of '1' is computed .*remove_parametrizations.*=\['1'\]"):
        prune(model, config, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    prune(model, PruningConfig(method="magnitude", sparsity=0.5, exclude_modules=["1"]), progress=False)
    assert (model[0].weight == 0).sum() == 32


@pytest.mark.parametrize("fields", [{"keep_dense": True}, {"allocation": "ecoflap"}, {"method": "magnitude"}])
def test_routers_with_a_forward_of_their_own_are_left_out(fields):
    """What pruning took there could not be restored, and hooks do not fit their outputs and inputs."""
    model, ids = tiny_model("phimoe").eval(), torch.arange(3, 9).unsqueeze(0)
    report = prune(model, PruningConfig(sparsity=0.5, **fields), [{"input_ids": ids, "labels": ids}], progress=False)
    names = {module.name for module in report.modules}
    assert any(name.endswith("q_proj") for name in names)
    assert not any("router" in name for name in names)


@pytest.mark.parametrize("offload", [False, True])
def test_a_head_that_shares_its_weight_with_the_embeddings_is_refused(offload):
    model = LlamaForCausalLM(LlamaConfig(**{**GROUPED, "tie_word_embeddings": True}))
    embeddings = model.model.embed_tokens.weight.detach().clone()
    if offload:
        cpu_offload(model, execution_device="cpu")
    config = PruningConfig(method="magnitude", sparsity=0.5, modalities=["head", "language"])
    with pytest.raises(ValueError, match=r"'lm_head' shares its weight with model.embed_tokens.*tie_word_embeddings"):
        prune(model, config, progress=False)
    if not offload:
        assert torch.equal(model.model.embed_tokens.weight, embeddings)
        assert all((layer.mlp.up_proj.weight != 0).all() for layer in model.model.layers)
    prune(model, PruningConfig(method="magnitude", sparsity=0.5), progress=False)


def test_two_layers_that_share_a_weight_are_refused():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"'0' shares its weight with 1"):
        prune(model, PruningConfig(method="magnitude", sparsity=0.5), progress=False)
    twice = torch.nn.Sequential(*[torch.nn.Linear(8, 8)] * 2)  # one layer that is used twice has one weight
    assert prune(twice, PruningConfig(method="magnitude", sparsity=0.5), progress=False).sparsity == 0.5


def test_models_with_adapters_are_refused():
    model, batches = make("llama")
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="carries PEFT adapters"):
        prune(model, PruningConfig(sparsity=0.5), batches, progress=False)


BAD_DATA = [
    (None, ValueError, "calibration set is missing"),
    ([], ValueError, "calibration set is empty"),
    (iter(()), ValueError, "calibration set is empty"),
    (
        [{"input_ids": torch.zeros(0, 4, dtype=torch.long)}],
        ValueError,
        r"batch 0 is empty: 'input_ids' has shape \(0, 4\)",
    ),
    ([torch.zeros(2, 0)], ValueError, "batch 0 is empty: 'the tensor'"),
    (
        [{"pixel_values": torch.ones(1)}, {"pixel_values": torch.tensor([float("nan")])}],
        ValueError,
        "batch 1 holds NaN",
    ),
    (["text"], TypeError, "batch 0 is a str"),
]


@pytest.mark.parametrize(
    ("method", "data", "error", "message"),
    # magnitude works without data, but not with data that is no good
    [("wanda", *case) for case in BAD_DATA] + [("magnitude", *case) for case in BAD_DATA if case[0] is not None],
)
def test_calibration_data_that_says_nothing_is_refused(method, data, error, message):
    model, _ = make("llama")
    before = weights(model)
    with pytest.raises(error, match=message):
        prune(model, PruningConfig(method=method, sparsity=0.5), data, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_only_padding_is_no_data():
    model, batches = make("llama")
    batch = {**batches[0], "attention_mask": torch.zeros_like(batches[0]["attention_mask"])}
    with pytest.raises(ValueError, match="never reached 'model.layers.0.self_attn.q_proj'"):
        prune(model, PruningConfig(sparsity=0.5), [batch], progress=False)


def test_activations_that_overflow_are_named():
    model, batches = make("llama")
    model.model.embed_tokens.weight.data.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"inputs of 'model.layers.0.self_attn.q_proj'.*NaN or infinite"):
        prune(model, PruningConfig(sparsity=0.5), batches, progress=False)


BAD_CONFIGS = [
    ({"sparsity": 1.0}, r"sparsity=1.0 is outside \[0, 1\)"),
    ({"sparsity": -0.1}, r"sparsity=-0.1 is outside \[0, 1\)"),
    ({"sparsity": float("nan")}, r"sparsity=nan has to be a finite number"),
    ({"sparsity": 50}, r"sparsity=50 is outside"),
    ({"sparsity": True}, "sparsity=True has to be None or a number"),
    ({"modality_sparsity": {"vision": 1.5}}, r"modality_sparsity\['vision'\]=1.5 is outside"),
    ({"modality_sparsity": {"vision": "4:2"}}, "pattern='4:2' is not an n:m pattern"),
    ({"pattern": "2/4"}, "pattern='2/4' is not an n:m pattern"),
    ({}, "exactly one of sparsity, pattern and modality_sparsity, but got none"),
    ({"sparsity": 0.5, "pattern": "2:4"}, r"but got \['sparsity', 'pattern'\]"),
    (
        {"sparsity": 0.5, "method": "wand"},
        "method='wand' is unknown. Choose one of dsnot, magnitude, sparsegpt, wanda",
    ),
    ({"sparsity": 0.5, "allocation": "owl"}, "allocation='owl' is unknown"),
    ({"sparsity": 0.5, "score_order": "second"}, "score_order='second' is unknown"),
    ({"sparsity": 0.5, "initial_method": "sparsegpt"}, "initial_method='sparsegpt' has to be one of"),
    ({"sparsity": 0.5, "allocation": "modality"}, "allocation='modality'.*do not go together"),
    ({"modality_sparsity": {"vision": 0.5}, "allocation": "ecoflap"}, "do not go together"),
    ({"modality_sparsity": {"vision": 0.5}, "modalities": ["vision"]}, "Leave modalities out"),
    ({"pattern": "2:4", "allocation": "ecoflap"}, "needs sparsity, not pattern"),
    ({"sparsity": 0.9, "allocation": "ecoflap"}, "cannot be reached with max_block_sparsity=0.8"),
    ({"sparsity": 0.5, "allocation": "ecoflap", "max_block_sparsity": 1.0}, "max_block_sparsity=1.0 is outside"),
    ({"sparsity": 0.5, "block_size": 0}, "block_size=0 is too small"),
    ({"sparsity": 0.5, "damping": -1}, "damping=-1 is too small"),
    ({"sparsity": 0.5, "max_cycles": -1}, "max_cycles=-1 is too small"),
    ({"sparsity": 0.5, "error_threshold": -1}, "error_threshold=-1 is too small"),
    ({"sparsity": 0.5, "score_batches": 0}, "score_batches=0 is too small"),
    ({"sparsity": 0.5, "perturbation": 0}, "perturbation=0 must be above 0"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_CONFIGS)
def test_configs_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PruningConfig(**fields)


def test_configs_read_like_what_was_meant():
    assert PruningConfig(modality_sparsity={"vision": 0.4}).allocation == "modality"
    assert PruningConfig(sparsity=0).modality_target("language") == 0.0
    assert PruningConfig(pattern="2:4").modality_target("language") == Pattern(2, 4)
    assert PruningConfig(modality_sparsity={"vision": "4:8"}).modality_target("vision") == Pattern(4, 8)
    assert PruningConfig(modality_sparsity={"vision": "4:8"}).modality_target("language") == 0.0
