"""What the package says of itself, what its source distribution holds, and the worked examples of CONTRIBUTING.md."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from peft import get_peft_model
from typer.testing import CliRunner

import peft_variator
from peft_variator import PruningConfig, VariatorConfig, prune
from peft_variator.sparsity.methods import METHODS
from peft_variator.tuners.variator import scoring
from tests.tiny_models import tiny_model


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    found = configparser.ConfigParser()
    found.read(ROOT / "setup.cfg")
    return found


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def test_the_version_stands_in_one_place_and_is_read_without_importing_anything() -> None:
    program = (
        "import sys\n"
        "from setuptools.config.setupcfg import read_configuration\n"
        "print(read_configuration('setup.cfg')['metadata']['version'])\n"
        "assert 'torch' not in sys.modules and 'peft_variator' not in sys.modules\n"
    )
    printed = subprocess.check_output([sys.executable, "-c", program], text=True, cwd=ROOT)
    assert Version(printed.split()[-1]) == Version(peft_variator.__version__)
    assert f"version: {peft_variator.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_lowest_versions_are_those_that_setup_cfg_admits(setup: configparser.ConfigParser) -> None:
    lowest = pins("constraints-lowest.txt")
    requirements = [Requirement(line) for line in setup["options"]["install_requires"].split("\n")[1:]]
    assert {requirement.name for requirement in requirements} == set(lowest)
    for requirement in requirements:
        bounds = [part.version for part in requirement.specifier if part.operator == ">="]
        assert [Version(bound) for bound in bounds] == [Version(lowest[requirement.name])]


def test_what_has_one_version_alone_takes_the_lowest_ones(setup: configparser.ConfigParser) -> None:
    """Of what is tested with at its own lowest version, pip cannot choose an earlier one that would do."""
    lowest, pinned = pins("constraints-lowest.txt"), pins("constraints.txt")
    extras = setup["options.extras_require"]
    lines = "\n".join(extras[name] for name in ("examples", "onnx", "serve", "test")).splitlines()
    wanted = [Requirement(line) for line in lines if line and not line.startswith("peft-variator")]
    fixed = [each.name for each in wanted if _is_lowest(each, pinned)]
    assert "trl" in fixed
    for name in fixed:
        for needed in map(Requirement, metadata.requires(name) or ()):
            here = needed.marker is None or needed.marker.evaluate({"extra": ""})
            if here and needed.name in lowest:
                assert needed.specifier.contains(lowest[needed.name]), f"{name} needs {needed}"


def _is_lowest(requirement: Requirement, pinned: dict[str, str]) -> bool:
    bounds = [Version(part.version) for part in requirement.specifier if part.operator == ">="]
    return bounds == [Version(pinned[requirement.name])]


def test_everything_that_is_tested_with_is_pinned_and_admitted(setup: configparser.ConfigParser) -> None:
    constraints = pins("constraints.txt")
    extras = setup["options.extras_require"].values()
    for line in "\n".join([setup["options"]["install_requires"], *extras]).splitlines():
        if line and not line.startswith("peft-variator"):
            requirement = Requirement(line)
            assert requirement.specifier.contains(constraints[requirement.name]), line


@pytest.mark.slow
def test_the_source_distribution_holds_what_the_repository_holds(tmp_path: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    if listed.returncode != 0:
        pytest.skip("this is no repository")
    program = f"from setuptools import build_meta\nprint(build_meta.build_sdist({str(tmp_path)!r}))"
    name = subprocess.check_output([sys.executable, "-c", program], text=True, cwd=ROOT).split()[-1]
    with tarfile.open(tmp_path / name) as archive:
        held = {member.partition("/")[2] for member in archive.getnames()}
    assert set(listed.stdout.splitlines()) <= held
    assert not [member for member in held if "__pycache__" in member]


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_scoring_that_contributing_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = [block for block in blocks_of("CONTRIBUTING.md") if "(Scoring)" in block]
    names = dict(vars(scoring))
    exec(block, names)
    monkeypatch.setitem(scoring.SCORINGS, "norm", names["NormScoring"]())
    torch.manual_seed(0)
    base = tiny_model("bert", num_hidden_layers=1).eval()
    inputs = torch.randint(0, 20, (2, 11))
    with torch.no_grad():
        expected = base(inputs).last_hidden_state
        model = get_peft_model(base, VariatorConfig(scoring="norm", compression_ratio=4, correction_dim=4)).eval()
        found = model(inputs).last_hidden_state
        scorer = base.encoder.layer[0].intermediate.variator_scorer["default"]
        scorer.weight.fill_(3.0)
        other = model(inputs).last_hidden_state
        model.set_compression_ratio(1)
        assert torch.equal(model(inputs).last_hidden_state, expected)
    assert scorer.weight.shape == (1, 1)
    assert not torch.equal(found, other)
    assert found.isfinite().all()


@pytest.fixture
def ria(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The file that CONTRIBUTING.md adds, imported for one test."""
    (block,) = [block for block in blocks_of("CONTRIBUTING.md") if "(ScoredMethod)" in block]
    (tmp_path / "ria.py").write_text(block, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield import_module("ria")
    del METHODS["ria"], sys.modules["ria"]


def import_again(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module as a process sees it that imports it now."""
    parent, _, child = name.rpartition(".")
    package = import_module(parent)
    monkeypatch.setattr(package, child, import_module(name))
    monkeypatch.delitem(sys.modules, name)
    return import_module(name)


def test_the_pruning_method_that_contributing_adds(ria: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight, batch = torch.randn(8, 16), torch.randn(30, 16)
    config = import_again("peft_variator.sparsity.config", monkeypatch)
    configs = [
        config.PruningConfig(method="ria", norm_power=0.25, pattern="2:4"),
        PruningConfig(method=ria.RIA(norm_power=0.25), pattern="2:4"),
    ]
    magnitude = weight.abs()
    scores = (magnitude / magnitude.sum(0) + magnitude / magnitude.sum(1, keepdim=True)) * batch.norm(dim=0) ** 0.25
    kept = torch.zeros(8, 4, 4).scatter(2, scores.view(8, 4, 4).topk(2, dim=2).indices, 1.0).view(8, 16).bool()
    for chosen in configs:
        model = torch.nn.Sequential(torch.nn.Linear(16, 8))
        model[0].weight.data.copy_(weight)
        report = prune(model, chosen, [batch], progress=False)
        assert torch.equal(model[0].weight != 0, kept)
        assert (report.source["config"]["method"], report.source["config"]["norm_power"]) == ("ria", 0.25)
    app = import_again("peft_variator.cli.main", monkeypatch).app
    printed = CliRunner().invoke(app, ["prune", "--help"]).stdout
    assert re.search(r"--method \S*\bria\b", printed)
    assert "--norm-power" in printed
