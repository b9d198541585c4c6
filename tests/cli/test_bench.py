"""`peft-variator bench` as it is typed."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, BertModel

from peft_variator import VariatorConfig
from peft_variator.bases import pack_checkpoint
from peft_variator.cli import bench as bench_module
from peft_variator.profiling import BenchmarkReport
from peft_variator.sparsity import PruningConfig, prune
from tests.cli.commands import run_command
from tests.cli.saved_plugins import save_plugin
from tests.tiny_models import tiny_model


TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 40,
}
T5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 512, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
CONFIGS = {
    "encoder": {"model_type": "bert", **TEXT},
    "causal": {"model_type": "llama", **TEXT, "num_key_value_heads": 1},
    "seq2seq": T5,
    "vision": {"model_type": "vit", **TEXT, "image_size": 16, "patch_size": 4},
}
QUICK = [
    "--ratio",
    "4",
    "--batch-size",
    "2",
    "--rounds",
    "2",
    "--min-seconds",
    "0",
    "--threads",
    "1",
    "--device",
    "cpu",
]


invoke = partial(run_command, "bench")


@pytest.fixture
def config(tmp_path):
    def write(name):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(CONFIGS[name]))
        return str(path)

    return write


def test_a_folder_with_a_configuration_alone(config, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(Path(config("causal")).read_text())
    status, out, err = invoke(folder, *QUICK, "--length", 13, "--json", tmp_path / "out.json")
    assert status == 0, err
    assert "k = 4" in out
    assert BenchmarkReport.load(tmp_path / "out.json").settings["random_weights"] is True


@pytest.mark.parametrize("task", CONFIGS)
def test_every_task(config, tmp_path, task):
    length = [] if task == "vision" else ["--length", 13]
    status, out, err = invoke(config(task), *QUICK, *length, "--json", tmp_path / "out.json")
    assert status == 0, err
    report = BenchmarkReport.load(tmp_path / "out.json")
    assert report.settings["task"] == task
    assert [plugin.name for plugin in report.plugins] == ["k = 4"]
    assert report.plugins[0].flops < report.base.flops
    assert f"k = 4 {report.flops_saved(report.plugins[0]):.1%}" in out


def test_what_is_printed_and_written(config, tmp_path):
    model, files = config("encoder"), [tmp_path / "out.json", tmp_path / "out.png"]
    options = [*QUICK, "--length", 13, "--lengths", "uneven", "--dtype", "bfloat16", "--seed", 3, "--with-disabled"]
    status, out, err = invoke(model, *options, "--json", files[0], "--png", files[1])
    assert status == 0, err
    report = BenchmarkReport.load(files[0])
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert [plugin.name for plugin in report.plugins] == ["k = 4", "plugin off"]
    assert report.settings["dtype"] == "bfloat16"
    assert report.command == (
        f"peft-variator bench {model} --ratio 4 --batch-size 2 --length 13 --lengths uneven --dtype bfloat16 "
        "--device cpu --rounds 2 --min-seconds 0.0 --threads 1 --with-disabled --seed 3"
    )
    for expected in ("uneven lengths, bfloat16", f"Wrote {files[0]}. Wrote {files[1]}. ", f"Again: {report.command}"):
        assert expected in out
    assert "peft-variator train" not in out  # a configuration has no weights that a plugin could follow


def test_the_printed_command_gives_the_same_settings(config, tmp_path):
    options = [*QUICK, "--length", 13, "--lengths", "uneven", "--seed", 3]
    assert invoke(config("encoder"), *options, "--json", tmp_path / "first.json")[0] == 0
    first = BenchmarkReport.load(tmp_path / "first.json")
    words = first.command.split()
    assert words[:2] == ["peft-variator", "bench"]
    assert invoke(*words[2:], "--json", tmp_path / "second.json")[0] == 0
    second = BenchmarkReport.load(tmp_path / "second.json")
    assert second.settings == first.settings
    assert second.command == first.command
    assert second.base.flops == first.base.flops


@pytest.mark.parametrize(("used", "warned"), [(0.4, True), (0.05, False)])
def test_a_busy_machine_is_told(config, monkeypatch, used, warned):
    run_benchmark = bench_module.run_benchmark

    def run(*args, **kwargs):
        report = run_benchmark(*args, **kwargs)
        report.environment.update(cpu_in_use=used)
        return report

    monkeypatch.setattr(bench_module, "run_benchmark", run)
    status, _, err = invoke(config("encoder"), *QUICK)
    assert status == 0
    assert ("Other programs kept 40% of the cores busy when the run began" in err) is warned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratios", "2;4"], "--ratio is '2;4'; give whole numbers, with commas between them"),
        (["--ratios", ""], "--ratio is ''; give whole numbers"),
        (["--ratios", "0"], "compression_ratio=0 has to be an integer of at least 1"),
        (["--rounds", "1"], "rounds is 1; quartiles need at least 2"),
        (["--batch", "0"], "batch is 0; it must be at least 1"),
        (["--device", "abacus"], "The device 'abacus' cannot be used"),
        (["--device", "meta"], "The device 'meta' computes nothing that could be timed"),
        (["--min-seconds", "nan"], "min_seconds is nan; it must be a number of seconds"),
        (["--length", "600"], "length is 600; the model has 512 positions"),
        (["--json", "."], "--json: '.' is a folder. Name a file in it."),
        (["--json", f"{__file__}/out"], f"'{__file__}/out' can't be written: '{__file__}' is a file"),
        (["--png", "out.jpg"], "--png is 'out.jpg'; the name has to end in .png"),
    ],
)
def test_bad_options(config, options, message):
    status, out, err = invoke(config("encoder"), *QUICK, "--length", 4, *options)
    assert status == 1
    assert message in err
    assert "Traceback" not in out + err


@pytest.mark.parametrize("options", [["--rounds", "1"], ["--min-seconds", "-1"]])
def test_no_model_is_built_for_samples_that_can_t_be_taken(config, monkeypatch, options):
    built = []
    monkeypatch.setattr(bench_module, "run_benchmark", lambda *args, **kwargs: built.append(args))
    assert invoke(config("encoder"), *QUICK, *options)[0] == 1
    assert not built


def test_images_have_no_length(config):
    status, _, err = invoke(config("vision"), *QUICK, "--length", 4)
    assert status == 1
    assert "takes images, whose number of patches follows from the model's image size" in err


def test_a_model_that_is_not_there(tmp_path):
    status, _, err = invoke(tmp_path / "nothing", *QUICK)
    assert status == 1
    assert f"Error: There is no folder '{tmp_path / 'nothing'}'" in err


def test_a_base_that_is_not_there_can_be_named_as_the_model(tmp_path):
    plugin = save_plugin(tmp_path, layers=1)
    (tmp_path / "model").rename(tmp_path / "moved")
    status, _, err = invoke("--adapter", plugin, "--rounds", "2")
    assert status == 1
    told = " ".join(err.split())
    assert f"can be named as MODEL: peft-variator bench FOLDER --adapter {plugin}" in told
    assert invoke(tmp_path / "moved", "--adapter", plugin, "--rounds", "2", "--ratio", "2", "--length", "8")[0] == 0


@pytest.mark.parametrize("architecture", ["whisper", "wav2vec2"])
def test_sound(tmp_path, architecture, monkeypatch):
    monkeypatch.setattr("peft_variator.profiling.inputs.SAMPLES", 4000)
    base = tiny_model(architecture)
    base.save_pretrained(tmp_path / "model")
    base = type(base).from_pretrained(tmp_path / "model")
    get_peft_model(base, VariatorConfig(init_weights=False)).save_pretrained(tmp_path / "plugin")
    plugin = ["--adapter", tmp_path / "plugin"]
    status, out, err = invoke(*plugin, *QUICK, "--json", tmp_path / "out.json")
    assert status == 0, err
    report = BenchmarkReport.load(tmp_path / "out.json")
    assert "2 recordings" in out
    assert "evaluate" not in out  # which reads no sound
    assert report.plugins[0].flops < report.base.flops
    for options in (["--length", 4], ["--task", "vision"]):
        status, _, err = invoke(*plugin, *QUICK, *options)
        assert (status, "takes sound" in err) == (1, True), err


def test_a_ratio_that_is_named_twice_is_measured_once(config):
    status, out, err = invoke(config("encoder"), *QUICK[2:], "--ratios", "2,4,2")
    assert status == 0, err
    assert re.findall(r"k = \d", out) == ["k = 2", "k = 4"]
    assert "--ratio 2,4 " in out


def test_a_picture_without_matplotlib(config, tmp_path, monkeypatch):
    monkeypatch.setattr("peft_variator.profiling.report.find_spec", lambda name: None)
    status, _, err = invoke(config("encoder"), *QUICK, "--png", tmp_path / "out.png")
    assert status == 1
    assert "pip install 'peft-variator[plots]'" in err


def test_says_which_product_the_packed_layers_run_and_why(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIGS["causal"]))
    prune(model, PruningConfig(method="magnitude", pattern="2:4"), progress=False)
    model.save_pretrained(tmp_path / "dense")
    pack_checkpoint(tmp_path / "dense", tmp_path / "packed")
    status, out, err = invoke(tmp_path / "packed", *QUICK, "--length", 8, "--json", tmp_path / "out.json")
    assert status == 0, err
    path = "unpack into a buffer, because sparse tensor cores need an NVIDIA GPU of capability 8.0 or more, not cpu"
    assert f"7 of 7 packed 2:4 layers: {path}. They are: model.layers.0.self_attn.q_proj, " in out
    report = BenchmarkReport.load(tmp_path / "out.json")
    assert report.base_parameters == sum(parameter.numel() for parameter in model.parameters())
    packed = report.packed_layers
    assert set(packed.values()) == {path}
    assert "model.layers.0.mlp.down_proj" in packed


def test_a_shape_that_is_misspelt_and_an_adapter_are_told(tmp_path):
    status, _, err = invoke("bert-bse", *QUICK)
    assert (status, "Did you mean 'bert-base'" in err) == (1, True)
    (tmp_path / "adapter_config.json").write_text("{}")
    status, _, err = invoke(tmp_path, *QUICK)
    assert (status, f"bench --adapter {tmp_path}" in err) == (1, True)
    status, _, err = invoke(*QUICK)
    assert (status, "--adapter" in err) == (1, True)


def test_what_is_trained_next_is_a_ratio_that_merges(tmp_path):
    save_plugin(tmp_path)
    for ratios, told in (("1,4", "--ratio 4 --output plugin"), ("1", "--output plugin")):
        status, out, err = invoke(tmp_path / "model", "--ratio", ratios, *QUICK[2:], "--length", 13)
        assert status == 0, err
        assert f"peft-variator train {tmp_path / 'model'} {told} --data FILE" in " ".join(out.split())


def test_a_saved_plugin_is_measured_as_it_is(tmp_path):
    plugin = save_plugin(tmp_path, "classifier", decompression="bottleneck", bottleneck_dim=3, trained_ratios=[2, 8])
    status, out, err = invoke("--adapter", plugin, *QUICK[2:], "--length", 13, "--json", tmp_path / "out.json")
    assert status == 0, err
    report = BenchmarkReport.load(tmp_path / "out.json")
    assert (report.model, report.settings["adapter"]) == (str(tmp_path / "model"), str(plugin))
    assert [each.name for each in report.plugins] == ["k = 2", "k = 8"]
    saved = load_file(plugin / "adapter_model.safetensors")
    assert report.added_parameters == sum(value.numel() for name, value in saved.items() if "variator" in name)
    assert f"evaluate {plugin} --ratio 2,8 --data" in out  # the base is the one that the plugin names
    again = report.command.split()[2:]
    assert invoke(*again, "--json", tmp_path / "again.json")[0] == 0
    assert BenchmarkReport.load(tmp_path / "again.json").settings == report.settings
    lora = tmp_path / "lora"
    get_peft_model(
        BertModel.from_pretrained(tmp_path / "model"), LoraConfig(target_modules=["query"])
    ).save_pretrained(lora)
    status, _, err = invoke("--adapter", lora, *QUICK)
    assert (status, "LORA" in err) == (1, True)
