"""What all commands share: help, versions, errors, interrupts, and what importing the package does."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import typer
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModel, LlamaForCausalLM, set_seed
from transformers.utils import logging
from typer.testing import CliRunner

import peft_variator
import peft_variator.cli.prune
from peft_variator.__main__ import main
from peft_variator.cli.console import Reporter, parse_ratios, reported
from peft_variator.cli.main import app
from peft_variator.models import load_whole
from peft_variator.sparsity.config import SCORE_ORDERS
from peft_variator.sparsity.methods import METHODS
from peft_variator.tuners.variator.decompression import DECOMPRESSIONS
from tests.tiny_models import tiny_model


COMMANDS = [
    "bench",
    "convert-checkpoint",
    "doctor",
    "evaluate",
    "export",
    "info",
    "inspect",
    "merge",
    "pack",
    "prune",
    "restore",
    "serve",
    "shrink",
    "train",
    "unpack",
]


def run_python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_nothing_is_cut_in_help(command: str, option: str) -> None:
    done = CliRunner().invoke(app, [command, option])
    assert done.exit_code == 0
    assert "…" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("command", "option", "names"),
    [
        ("train", "--decompression", DECOMPRESSIONS),
        ("prune", "--method", METHODS),
        ("prune", "--score-order", SCORE_ORDERS),
    ],
)
def test_choices_are_those_of_the_package(command: str, option: str, names: Iterable[str]) -> None:
    printed = CliRunner().invoke(app, [command, "--help"]).stdout
    found = re.search(rf"{option} <([\w|]+)>", printed)
    assert found is not None
    assert set(found[1].split("|")) == set(names)


HEAVY = ("torch", "peft", "transformers", "numpy", "rich")  # the last one writes messages


def test_help_and_versions_import_nothing_heavy() -> None:
    for words in (["--help"], ["--version"]):
        done = run_python("-X", "importtime", "-m", "peft_variator", *words)
        assert done.returncode == 0, done.stderr
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert not set(HEAVY) & imported


def test_help_of_every_command_imports_nothing_heavy() -> None:
    done = run_python(
        "-c",
        "import sys\n"
        "sys.argv = ['/usr/bin/peft-variator']\n"
        "from peft_variator.cli.main import app\n"
        "for command in app.registered_commands:\n"
        "    try:\n"
        "        app([command.name, '--help'])\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0, command.name\n"
        f"assert not [name for name in {HEAVY} if name in sys.modules]\n",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage:") >= len(COMMANDS)


def test_wrong_paths_are_told_of_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    calls = [
        [name, "model", "-o", str(tmp_path / "new"), "--data", "./none.csv"] for name in ("train", "restore", "prune")
    ]
    calls += [[name, "model", "-o", str(tmp_path / "full")] for name in ("prune", "pack", "unpack")]
    done = run_python(
        "-c",
        "import sys\n"
        "sys.argv = ['/usr/bin/peft-variator']\n"
        "from peft_variator.cli.main import app\n"
        f"for words in {calls}:\n"
        "    try:\n"
        "        app(words)\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 1, words\n"
        f"assert not [name for name in {HEAVY[:-1]} if name in sys.modules]\n",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("There is no file './none.csv'. Name a text file") == 3
    assert done.stderr.count("already exists and is not empty") == 3


@pytest.mark.parametrize(
    ("orig_argv", "argv", "expected"),
    [
        (["python", "-m", "peft_variator", "train"], ["-m", "train"], True),
        (["python", "-X", "importtime", "-Im", "peft_variator"], ["-m"], True),
        (["python", "-mpeft_variator"], ["-m"], True),
        (["python", "/usr/bin/peft-variator", "--help"], ["/usr/bin/peft-variator", "--help"], True),
        (["python", "-m", "peft_variator_tools"], ["-m"], False),
        (["python", "-m", "pytest", "-m", "peft_variator"], ["-m", "-m", "peft_variator"], False),
        (["python", "peft-variator.py"], ["peft-variator.py"], False),
        (["python", "-c", "import peft_variator"], ["-c"], False),
        (["python"], [""], False),
    ],
)
def test_only_the_command_itself_registers_late(
    orig_argv: list[str], argv: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    monkeypatch.setattr(sys, "argv", argv)
    assert peft_variator._is_own_command() is expected


@pytest.mark.slow
def test_importing_the_package_takes_little_more_than_importing_peft() -> None:
    program = (
        "import peft, time\nbefore = time.process_time()\nimport peft_variator\nprint(time.process_time() - before)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    runs = [subprocess.check_output([sys.executable, "-c", program], env=environment, text=True) for _ in range(2)]
    assert min(map(float, runs)) < 0.2


def test_the_version_is_the_package_s() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout.strip().endswith(peft_variator.__version__)


PROGRAMS = {
    "before": "import peft_variator, peft",
    "after": "import peft, peft_variator",
    "alone": "import peft_variator",
}


@pytest.mark.parametrize(
    "imports",
    [pytest.param(text, id=name, marks=[pytest.mark.slow] * (name != "alone")) for name, text in PROGRAMS.items()],
)
def test_a_program_that_imports_the_package_can_load_everything(imports: str, tmp_path: Path) -> None:
    set_seed(0)
    base = tiny_model("llama", num_hidden_layers=1)
    peft_variator.prune(base, peft_variator.PruningConfig(method="magnitude", pattern="2:4"), progress=False)
    base.save_pretrained(tmp_path / "base")
    from peft import get_peft_model

    from peft_variator.bases import pack_checkpoint

    pack_checkpoint(tmp_path / "base", tmp_path / "packed")
    adapters = {
        "variator": peft_variator.VariatorConfig(),
        "sparse": peft_variator.SparseLoraConfig(target_modules=["q_proj"]),
    }
    for name, adapter in adapters.items():
        get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), adapter).save_pretrained(tmp_path / name)
    done = run_python(
        "-c",
        f"{imports}\n"
        "from transformers import AutoModelForCausalLM\n"
        "import sys\n"
        "root = sys.argv[1]\n"
        "packed = AutoModelForCausalLM.from_pretrained(root + '/packed')\n"
        "assert type(packed.model.layers[0].mlp.up_proj).__name__ == 'Sparse24Linear'\n"
        "from peft import PeftModel\n"
        "for name in ('variator', 'sparse'):\n"
        "    base = AutoModelForCausalLM.from_pretrained(root + '/base')\n"
        "    print(PeftModel.from_pretrained(base, f'{root}/{name}').peft_config['default'].peft_type.value)\n"
        "    AutoModelForCausalLM.from_pretrained(root + '/base').load_adapter(f'{root}/{name}')\n"
        "import peft_variator\n"
        "assert set(peft_variator.__all__) <= set(dir(peft_variator))\n",
        str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["VARIATOR", "SPARSE_LOW_RANK"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(28, "No space left on device"), 1),
        (OSError(27, "File too large", "out"), 1),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 1),
        (RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_what_ends_a_command_is_a_line(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as raised, reported():
        raise error
    assert raised.value.exit_code == code
    told = capsys.readouterr().err
    assert str(error) in told
    assert len(told.strip().splitlines()) == 1
    assert ("free space" in told) is (code == 1)


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt()])
def test_a_bar_that_an_error_cuts_off_is_not_drawn_below_it(
    error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = tqdm(total=3, file=sys.stderr)
    bar.update()
    with pytest.raises(typer.Exit), reported():
        raise error
    told = capsys.readouterr().err
    assert told.rpartition("\r")[2].startswith(("Error", "Interrupted"))
    bar.close()  # as when it is collected
    assert capsys.readouterr().err == ""


def test_figures_that_fit_nowhere_are_not_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "figures.json").write_text("old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(typer.Exit), reported():
        Reporter(str(tmp_path / "figures.json")).write_json('{"k": 2}')
    told = capsys.readouterr()
    assert json.loads(told.out) == {"k": 2}
    assert str(tmp_path / "figures.json") in told.err
    assert "run the command again" not in told.err
    assert (tmp_path / "figures.json").read_text() == "old"


def test_other_errors_speak_of_no_full_disk(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (FileNotFoundError(2, "No such file", "model"), SafetensorError("header too large")):
        with pytest.raises(typer.Exit), reported():
            raise error
        assert "free space" not in capsys.readouterr().err


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="shapes"), reported():
        raise RuntimeError("shapes do not match")


@pytest.mark.slow
@pytest.mark.parametrize("module", ["peft_variator.cli.main", "torch", "transformers"])
def test_an_interrupt_while_importing_ends_with_a_word(module: str) -> None:
    program = f"""
import runpy, signal, sys

class Interrupt:
    def find_spec(self, name, *args):
        if name == {module!r}:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
sys.argv = ["peft-variator", "inspect", {os.devnull!r}]
runpy.run_module("peft_variator", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    assert done.returncode == 130
    assert "Interrupted" in done.stderr


@pytest.mark.parametrize("place", ["peft_variator.cli.main.Command.parse_args", "peft_variator.cli.prune.inspect"])
def test_an_interrupt_is_told_once(
    place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While options are read, and while a command runs."""

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupted)
    monkeypatch.setattr(sys, "argv", ["peft-variator", "inspect", os.devnull])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 130
    told = capsys.readouterr().err
    assert told.count("Interrupted") == 1
    assert len(told.strip().splitlines()) == 1


@pytest.mark.parametrize(("module", "extra"), [("serve", "serve"), ("export", "onnx")])
@pytest.mark.parametrize("lacks_all", [True, False])
def test_missing_packages_are_installed_by_their_extra(
    module: str, extra: str, lacks_all: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose versions are bounded."""
    lacking = ("litserve", "prometheus_client", "onnx", "onnxruntime") if lacks_all else ("litserve", "onnx")
    find = importlib.util.find_spec
    # The module first: it is imported for that, and has to take the function as it is.
    for place in ("peft_variator.cli.serve.find_spec", "importlib.util.find_spec"):
        monkeypatch.setattr(place, lambda name, *args: None if name in lacking else find(name, *args))
    words = ["serve", "model"] if module == "serve" else ["export", "plugin", "-o", str(tmp_path / "model.onnx")]
    done = CliRunner().invoke(app, words)
    told = " ".join(done.stderr.split())
    assert done.exit_code == 1
    assert f"which {'are' if lacks_all else 'is'} not installed. Run: pip install 'peft-variator[{extra}]'" in told


def test_json_goes_to_standard_output_and_text_leaves_it(tmp_path: Path) -> None:
    tiny_model("llama", num_hidden_layers=1).save_pretrained(tmp_path / "base")
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "base"), "--json", "-"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["total"]["zeros"] == 0
    assert "Sparsity by block" in done.stderr
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "base"), "--quiet"])
    assert (done.exit_code, done.stdout) == (0, "")


def test_swapped_arguments_of_merge_are_told(tmp_path: Path) -> None:
    for name, file in {"base": "config.json", "adapter": "adapter_config.json"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    words = ["merge", str(tmp_path / "adapter"), str(tmp_path / "base"), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert f"merge {tmp_path / 'base'} {tmp_path / 'adapter'}" in done.stderr


def test_ratios_are_repeated_or_listed() -> None:
    assert parse_ratios(["2,4", "8", "4"]) == [2, 4, 8]
    with pytest.raises(ValueError, match="--ratio"):
        parse_ratios(["2", "k"])


@pytest.mark.parametrize("width", [40, 80, 100])
def test_a_table_fits_and_nothing_in_it_is_broken(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("peft_variator.cli.console.PIPE_WIDTH", width)  # as a terminal of that width
    heads = [f"agreement before head {index}" for index in range(7)]
    figures = [f"1,234,567.8{index}\n0.1–0.2" for index in range(7)]
    Reporter().show_figures(
        "title", [["row", *heads], ["a.name.of.a.module", *figures], ["total", *figures]], ["below"]
    )
    *lines, below = capsys.readouterr().out.splitlines()
    printed = "\n".join(lines)
    assert (max(map(len, lines)) <= width, below) == (True, "below")
    for index in range(7):
        assert printed.count(f"1,234,567.8{index}") == 2
    assert printed.count("agreement") == 7
    assert "…" not in printed


def test_quiet_hides_the_bars_of_other_libraries() -> None:
    logging.enable_progress_bar()
    try:
        Reporter(quiet=True).check()
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()


def test_weights_of_another_head_are_not_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_model("bert-sequence", num_hidden_layers=1).save_pretrained(tmp_path)
    logging.enable_propagation()
    try:
        load_whole(AutoModel, str(tmp_path), pooler=False)
        assert "LOAD REPORT" not in caplog.text
        AutoModel.from_pretrained(tmp_path)
        assert "LOAD REPORT" in caplog.text
    finally:
        logging.disable_propagation()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["bench", "qwen2.5-0.5"], "Did you mean 'qwen2.5-0.5b'?"),
        (["bench", "bertt"], "Did you mean 'bert-base'"),
        (["merge", "someone/model", "adapter", "-o", "out"], "hf download someone/model --local-dir model"),
        (["inspect", "someone/model"], "hf download someone/model --local-dir model"),
        (["evaluate", "{file}", "--data", "{file}"], "is a file. Name the folder"),
        (["bench", "{file}"], "is a file. Name the folder"),
        (["train", "{file}", "--data", "{file}", "-o", "out"], "is a file. Name the folder"),
        (["pack", "{file}", "-o", "out"], "is a file. Name the folder"),
        (["unpack", "{file}-none", "-o", "out"], "there is no folder"),
    ],
)
def test_what_is_no_model_is_told(words: list[str], told: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    done = CliRunner().invoke(app, [word.format(file=tmp_path / "notes.txt") for word in words])
    assert done.exit_code == 1
    assert told in done.stderr
