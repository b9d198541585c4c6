"""What all metrics have in common: found by name, loaded by path, without the network, from an installed package."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
from setuptools import find_packages

import peft_variator
from peft_variator import metrics


NAMES = ["fidelity", "nearest_neighbour"]
ROWS = {"predictions": [[1.0, 0.0], [0.0, 1.0], [1.0, 0.2]], "references": [[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]}

OFFLINE_SCRIPT = """
import json, socket, sys

def refuse(*args, **kwargs):
    raise AssertionError(f"network call: {args}")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
import evaluate
print(json.dumps([evaluate.load(path).name for path in sys.argv[1:]]))
"""


def test_names_are_the_folders_of_the_package():
    assert metrics.names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_loads_by_path_and_by_name(name):
    assert evaluate.load(metrics.path(name)).name == name
    assert metrics.load(name).name == name
    assert "Returns:" in metrics.load(name).inputs_description


@pytest.mark.slow
def test_paths_are_loaded_without_the_network_and_without_a_cache(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", OFFLINE_SCRIPT, *map(metrics.path, NAMES)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == NAMES
    assert list(tmp_path.glob("evaluate_modules/metrics/fidelity/*/fidelity.py"))


def test_metrics_travel_with_an_installed_package():
    root = Path(peft_variator.__file__).parent
    packages = find_packages(str(root.parent), include=["peft_variator*"])
    assert {f"peft_variator.metrics.{name}" for name in NAMES} <= set(packages)


def test_metrics_combine():
    combined = evaluate.combine([metrics.path("fidelity"), metrics.path("nearest_neighbour")]).compute(**ROWS)
    alone = [metrics.load(name).compute(**ROWS) for name in NAMES]
    assert combined["kl"] == alone[0]["kl"]
    assert set(combined) == {"cosine", "relative_error", "kl", "fidelity_agreement", "nearest_neighbour_agreement"}


def test_batches_add_up_and_options_are_handed_on():
    metric = metrics.load("fidelity", config_name="logits", keep_in_memory=True)
    for prediction, reference in zip(*ROWS.values(), strict=True):
        metric.add_batch(predictions=[prediction], references=[reference])
    assert metric.compute() == metrics.load("fidelity", config_name="logits").compute(**ROWS)


def test_unknown_name():
    with pytest.raises(ValueError, match="no metric 'glue'.*Choose one of: fidelity, nearest_neighbour"):
        metrics.path("glue")


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("accuracy", "sklearn.metrics.accuracy_score"),
        ("f1", "sklearn.metrics.f1_score"),
        ("matthews_correlation", "sklearn.metrics.matthews_corrcoef"),
        ("pearsonr", "scipy.stats.pearsonr"),
        ("spearmanr", "scipy.stats.spearmanr"),
        ("squad", 'evaluate.load("squad")'),
    ],
)
@pytest.mark.parametrize("function", [metrics.load, metrics.path])
def test_a_removed_metric_names_the_call_to_use(function, name, call):
    with pytest.raises(ValueError, match=f"{name!r}.*{re.escape(call)}"):
        function(name)


def test_evaluate_is_imported_when_a_metric_is_first_loaded():
    script = "import sys, peft_variator.metrics as m; m.names(); sys.exit('evaluate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
