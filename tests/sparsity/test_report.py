"""The report of a model's zeros: counts, sums, table, JSON and plot; and the same for checkpoints on disk."""

import json
import sys
from contextlib import nullcontext

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from peft_variator.sparsity import (
    ModuleSparsity,
    PruningConfig,
    SparsityReport,
    inspect_checkpoint,
    inspection,
    measure_sparsity,
    prune,
)

from .cases import make


def entry(name, zeros, weights=100, **fields):
    return ModuleSparsity(
        name=name, block=name.rpartition(".")[0], modality=fields.pop("modality", "language"), shape=(10, 10),
        weights=weights, zeros=zeros, **fields,
    )  # fmt: skip


@pytest.fixture
def report():
    rows = [
        entry("a.0.up", 50, pattern="2:4", pattern_met=True),
        entry("a.0.down", 10, pattern="2:4", pattern_met=False, negative_zeros=3),
        entry("a.1.up", 30, weights=300, modality="vision", pattern="2:4", pattern_met=True),
    ]
    return SparsityReport(rows, {"made": "by hand"})


def test_blocks_modalities_and_total_are_sums(report):
    blocks = {row.name: (row.weights, row.zeros, row.sparsity, row.pattern_met) for row in report.grouped("block")}
    assert blocks == {"a.0": (200, 60, 0.3, False), "a.1": (300, 30, 0.1, True)}
    modalities = {row.name: (row.weights, row.zeros, row.negative_zeros) for row in report.grouped("modality")}
    assert modalities == {"language": (200, 60, 3), "vision": (300, 30, 0)}
    assert (report.total.weights, report.total.zeros, report.sparsity) == (500, 90, 0.18)
    assert report.grouped("module") == report.modules


def test_other_groupings_are_refused(report):
    with pytest.raises(ValueError, match="by='layer' is unknown. Choose one of module, block, modality"):
        report.grouped("layer")


def printed(table):
    console = Console(width=120)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_the_table_shows_rows_and_total(report):
    text = printed(report.table("module"))
    assert all(part in text for part in ("a.0.up", "50.00%", "2:4 met", "2:4 NOT met", "total", "18.00%", "vision"))
    assert "a.0.up" not in printed(report.table("block"))


def test_the_json_holds_everything_and_reads_back(report, tmp_path):
    report.save_json(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    assert set(data) == {"source", "total", "modules", "blocks", "modalities"}
    assert data["total"]["sparsity"] == 0.18
    assert data["modalities"][1] == {**data["modalities"][1], "name": "vision", "zeros": 30, "sparsity": 0.1}
    assert SparsityReport.load_json(tmp_path / "report.json") == report
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("by", ["module", "block", "modality"])
def test_the_plot_is_written(report, tmp_path, by):
    report.plot(tmp_path / "plot.png", by)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_bars_have_the_numbers_of_their_layers(report, tmp_path, monkeypatch):
    drawn = []
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.setattr(figure_class, "savefig", lambda figure, *_, **__: drawn.append(figure))
    monkeypatch.setattr("peft_variator.sparsity.sparsity_report.replacing", lambda path: nullcontext(path))
    report.plot(tmp_path / "plot.png", "module")
    labels = [label.get_text() for label in drawn[0].axes[0].get_xticklabels()]
    layers = [[part for part in row.name.split(".") if part.isdecimal()] for row in report.modules]
    assert any(layers)
    for label, row, numbers in zip(labels, report.modules, layers, strict=True):
        assert label.split() == [*numbers[-1:], row.name.rpartition(".")[2]]


def test_a_plot_without_matplotlib_says_what_to_install(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'peft-variator\[plots\]'"):
        report.plot(tmp_path / "plot.png")


def test_an_empty_report_is_not_sparse():
    assert SparsityReport([]).sparsity == 0.0


def by_name(report):
    return {row.name: row for row in report.modules}


@pytest.fixture(params=["llava", "blip2", "instructblip", "qwen2_vl", "paligemma", "clip", "gpt2", "t5", "albert"])
def pruned(request, tmp_path):
    model, batches = make(request.param)
    prune(model, PruningConfig(pattern="2:4"), batches, progress=False)
    return model


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"], ids=["whole", "sharded"])
def test_a_checkpoint_on_disk_counts_like_the_model_in_memory(pruned, tmp_path, shard_size, monkeypatch):
    monkeypatch.setattr(inspection, "_SLICE", 100)
    pruned.save_pretrained(tmp_path, max_shard_size=shard_size)
    report = inspect_checkpoint(tmp_path, pattern="2:4")
    assert report.source == {"path": str(tmp_path), "structure": "config.json"}
    expected, found = by_name(measure_sparsity(pruned, pattern="2:4")), by_name(report)
    # A head that shares the embeddings' weight is stored once, as the embeddings.
    missing = [name for name in expected if name not in found]
    assert all(expected[name].modality == "head" for name in missing)
    assert found == {name: expected[name] for name in found}


def test_the_transposed_weights_of_conv1d_are_checked_along_their_inputs(tmp_path):
    model, batches = make("gpt2")
    prune(model, PruningConfig(pattern="2:4"), batches, progress=False)
    model.save_pretrained(tmp_path)
    met = {row.name: row.pattern_met for row in inspect_checkpoint(tmp_path, "2:4").modules}
    assert met.pop("lm_head", False) is False
    assert met
    assert all(met.values())
    assert not inspect_checkpoint(tmp_path, "1:4").total.pattern_met


@pytest.mark.parametrize("as_file", [True, False])
def test_weights_without_a_config_count_by_their_names(tmp_path, as_file):
    tensors = {
        "tower.layers.0.up.weight": torch.tensor([[0.0, 1.0, -0.0, 2.0]]),
        "tower.layers.0.up.bias": torch.zeros(1),
        "tower.layers.1.norm.weight": torch.zeros(4),
        "tower.layers.1.up.weight": torch.ones(2, 4, dtype=torch.bfloat16),
        "tower.layers.1.ids.weight": torch.zeros(2, 2, dtype=torch.int64),
    }
    save_file(tensors, tmp_path / "some.safetensors")
    report = inspect_checkpoint(tmp_path / "some.safetensors" if as_file else tmp_path, "2:4")
    assert report.source["structure"] == "tensor names"
    rows = {
        row.name: (row.block, row.weights, row.zeros, row.negative_zeros, row.pattern_met) for row in report.modules
    }
    assert rows == {
        "tower.layers.0.up": ("tower.layers.0", 4, 2, 1, True),
        "tower.layers.1.up": ("tower.layers.1", 8, 0, 0, False),
    }


def test_layers_come_in_their_order(tmp_path):
    tensors = {f"layers.{index}.weight": torch.ones(1, 2) for index in (10, 2, 1)}
    save_file({**tensors, "head.weight": torch.ones(1, 2)}, tmp_path / "a.safetensors")
    names = [row.name for row in inspect_checkpoint(tmp_path).modules]
    assert names == ["head", "layers.1", "layers.2", "layers.10"]


def test_the_files_that_a_model_is_loaded_from_are_counted(tmp_path):
    """As by `from_pretrained`: the whole file before an index, both before variants and other folders' leftovers."""
    model, _ = make("llama")
    prune(model, PruningConfig(method="magnitude", sparsity=0.5), progress=False)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    make("llama")[0].save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    sparsity = measure_sparsity(model).sparsity
    assert inspect_checkpoint(tmp_path).sparsity == sparsity
    dense = {name: value.contiguous() for name, value in make("llama")[0].state_dict().items()}
    save_file(dense, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = type(model).from_pretrained(tmp_path)
    assert inspect_checkpoint(tmp_path).sparsity == measure_sparsity(loaded).sparsity != sparsity


def test_variants_without_a_plain_checkpoint_are_refused(tmp_path):
    for name in ("model.fp16.safetensors", "model.bf16.safetensors"):
        save_file({"a.weight": torch.ones(1, 2)}, tmp_path / name)
    with pytest.raises(ValueError, match=r"more than one weight of a, in model.bf16.safetensors, model.fp16"):
        inspect_checkpoint(tmp_path)
    assert inspect_checkpoint(tmp_path / "model.fp16.safetensors").total.weights == 2
    for name in ("model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json", "x.safetensors.index.json"):
        (tmp_path / name).write_text('{"weight_map": {"a.weight": "model.fp16.safetensors"}}')
    with pytest.raises(ValueError, match=r"several checkpoints: model.fp16.*x.safetensors.index.json"):
        inspect_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_every_floating_dtype_is_counted(tmp_path, dtype):
    save_file({"a.weight": torch.tensor([[0.0, 1.0, 0.0, -2.0]]).to(dtype)}, tmp_path / "a.safetensors")
    assert inspect_checkpoint(tmp_path, "2:4").modules[0].zeros == 2


def test_a_width_the_pattern_does_not_divide_is_not_met(tmp_path):
    save_file({"a.weight": torch.zeros(2, 6), "b.weight": torch.zeros(2, 8)}, tmp_path / "a.safetensors")
    assert [row.pattern_met for row in inspect_checkpoint(tmp_path, "2:4").modules] == [False, True]


@pytest.mark.parametrize("middle", ["", ".weight"])
def test_values_with_a_bitmask_count_like_dense_weights(tmp_path, middle):
    mask = torch.tensor([[1, 1, 0, 0, 0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 1, 0, 1, 0, 0, 0]], dtype=torch.uint8)
    bits = [[sum(int(bit) << i for i, bit in enumerate(row[s : s + 8])) for s in (0, 8)] for row in mask.tolist()]
    save_file(
        {
            f"layers.0.up{middle}.compressed": torch.ones(int(mask.sum())),
            f"layers.0.up{middle}.bitmask": torch.tensor(bits, dtype=torch.uint8),
            f"layers.0.up{middle}.shape": torch.tensor([2, 10]),
        },
        tmp_path / "a.safetensors",
    )
    (row,) = inspect_checkpoint(tmp_path, "1:2").modules
    assert (row.name, row.weights, row.zeros, row.pattern_met) == ("layers.0.up", 20, 11, False)
    assert row.shape == (2, 10)


def test_negative_zeros_are_counted(tmp_path):
    model, batches = make("llama")
    prune(model, PruningConfig(sparsity=0.5), batches, progress=False)
    assert measure_sparsity(model).total.negative_zeros == 0
    weight = model.model.layers[0].mlp.up_proj.weight.data
    weight *= -1
    model.save_pretrained(tmp_path)
    assert inspect_checkpoint(tmp_path).total.negative_zeros == (weight == 0).sum()


def test_only_slices_are_read(tmp_path, monkeypatch):
    model, _ = make("llama")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(inspection, "_SLICE", 256)
    sizes = []
    count = inspection.count_module
    monkeypatch.setattr(inspection, "count_module", lambda *a, **k: sizes.append(a[3].numel()) or count(*a, **k))
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", None)
    inspect_checkpoint(tmp_path)
    assert max(sizes) <= 256


def test_a_place_without_safetensors_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        inspect_checkpoint(tmp_path / "nowhere")
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no safetensors file. Checkpoints in pickle formats"):
        inspect_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="holds no safetensors file"):
        inspect_checkpoint(tmp_path / "pytorch_model.bin")


def test_a_missing_shard_is_named(tmp_path):
    make("llama")[0].save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"names \\['{shard.name}'\\], which are not there"):
        inspect_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [4, 200, -100])
def test_a_broken_file_is_named(tmp_path, keep):
    make("llama")[0].save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors' is broken or cut off"):
        inspect_checkpoint(tmp_path)


def test_a_file_without_weights_is_refused(tmp_path):
    save_file({"norm.weight": torch.ones(4)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="holds no weight of a linear layer"):
        inspect_checkpoint(tmp_path)
    assert load_file(tmp_path / "a.safetensors")


def test_a_malformed_pattern_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not an n:m pattern"):
        inspect_checkpoint(tmp_path, "4:2")
    with pytest.raises(ValueError, match="is not an n:m pattern"):
        measure_sparsity(torch.nn.Linear(4, 4), "4:2")
