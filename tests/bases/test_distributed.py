"""Two processes that train above a packed base do what one does, through DDP and through FSDP2."""

from __future__ import annotations

import pytest
import torch

from tests.processes import run_processes

from .distributed_run import CONFIGS, PROCESSES, batches, build, train_alone, work


@pytest.fixture(scope="module")
def results(packed_source, tmp_path_factory):
    output = tmp_path_factory.mktemp("distributed")
    run_processes(work, str(packed_source), str(output), count=PROCESSES)
    return torch.load(output / "results.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone(packed_source):
    return {method: train_alone(build(packed_source, method)) for method in CONFIGS}


def check_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], untrained: dict[str, torch.Tensor]):
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    moved, wanted = (
        {name for name, value in run.items() if not value.equal(untrained[name])} for run in (found, expected)
    )
    assert moved == wanted
    assert moved
    assert all(any(prefix in name for prefix in ("lora_", "sparse_low_rank_", "variator_")) for name in moved)


@pytest.mark.slow
@pytest.mark.parametrize("method", CONFIGS)
def test_ddp_with_accumulation(results, alone, packed_source, method):
    check_same(results["ddp", method], alone[method], build(packed_source, method).state_dict())


@pytest.mark.parametrize(
    "run",
    [*CONFIGS, "sparse_lora, loaded by one process", "variator on dense"],
)
def test_fsdp2_with_accumulation(results, alone, packed_source, run):
    found = dict(results["fsdp", run])
    held = found.pop("held").item()
    method, folder = run.partition(",")[0].partition(" ")[0], None if "dense" in run else packed_source
    untrained = build(folder, method)
    expected = alone[method] if folder else train_alone(build(None, method))
    check_same(found, expected, untrained.state_dict())
    whole = sum(parameter.nbytes for parameter in untrained.parameters())
    assert held == pytest.approx(whole / 2, rel=0.02)


@pytest.mark.slow
def test_fsdp2_casts_values_and_not_positions(results, packed_source):
    model = build(packed_source, "sparse_lora").to(torch.bfloat16)
    with torch.no_grad():
        expected = model(input_ids=next(batches())["input_ids"]).logits
    torch.testing.assert_close(results["fsdp", "bfloat16"]["logits"], expected.float(), rtol=0.02, atol=0.02)
