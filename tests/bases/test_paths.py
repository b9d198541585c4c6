"""What a packed layer says about the product that it runs."""

from __future__ import annotations

import pytest
import torch

from peft_variator.bases import Sparse24Linear, describe_paths
from peft_variator.bases.kernels import Accelerator
from peft_variator.bases.linear import describe_path

from .models import tiny_llama
from .reference import two_four_linear


ON_CPU = "sparse tensor cores need an NVIDIA GPU of capability 8.0 or more, not cpu"


@pytest.mark.parametrize(
    ("unpacked", "path"),
    [
        ("forward", f"unpack into a buffer, because {ON_CPU}"),
        ("always", f"a dense weight that is unpacked once and kept, because unpacked='always', and {ON_CPU}"),
    ],
)
def test_on_the_cpu(unpacked, path):
    assert describe_path(Sparse24Linear.from_dense(two_four_linear(16, 32), unpacked=unpacked)) == path


@pytest.mark.parametrize("unpacked", ["forward", "always"])
def test_on_sparse_tensor_cores(monkeypatch, unpacked):
    monkeypatch.setattr(Accelerator, "of", classmethod(lambda cls, device: cls("cuda", (9, 0), cusparselt=True)))
    layer = Sparse24Linear.from_dense(two_four_linear(16, 32, torch.bfloat16), unpacked=unpacked)
    assert describe_path(layer) == (
        "sparse tensor cores (cusparselt), because bfloat16 16×32 qualifies for cusparselt"
    )
    assert "not float32" in describe_path(layer, torch.float32)


@pytest.mark.parametrize("unpacked", ["forward", "always"])
def test_an_offloaded_layer(unpacked):
    layer = Sparse24Linear.from_dense(two_four_linear(16, 32), unpacked=unpacked)
    layer.offloaded = True
    assert describe_path(layer).startswith("unpack into a buffer, because the layer is offloaded")


def test_every_packed_layer_of_a_model_and_no_other():
    model = tiny_llama()
    assert describe_paths(model) == {}
    model.model.layers[0].mlp.up_proj = Sparse24Linear.from_dense(model.model.layers[0].mlp.up_proj)
    assert describe_paths(model) == {"model.layers.0.mlp.up_proj": f"unpack into a buffer, because {ON_CPU}"}
