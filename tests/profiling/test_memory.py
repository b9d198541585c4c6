"""Peak memory against sizes known beforehand."""

import os
import sys

import pytest
import torch

from peft_variator.profiling import peak_memory


CPU = torch.device("cpu")
MEGA = 1_000_000


def allocate(*sizes):
    """Tensors of so many bytes."""
    return [torch.empty(size, dtype=torch.uint8) for size in sizes]


def test_what_lives_at_the_same_time_adds_up():
    assert peak_memory(lambda: allocate(3 * MEGA, 2 * MEGA), CPU) == pytest.approx(5 * MEGA, rel=1e-3)


def test_what_is_released_in_between_does_not():
    def run():
        allocate(3 * MEGA)
        allocate(2 * MEGA)

    assert peak_memory(run, CPU) == pytest.approx(3 * MEGA, rel=1e-3)


def test_what_was_there_before_does_not_count():
    weight = torch.ones(1000, 1000)
    inputs = torch.ones(10, 1000)
    assert peak_memory(lambda: inputs @ weight, CPU) == pytest.approx(10 * 1000 * 4, rel=0.1)


def test_memory_inside_of_an_operator_counts():
    """`logsumexp` holds the exponentials in a tensor that no Python code ever sees."""
    values = torch.ones(1000, 1000)
    assert peak_memory(lambda: values.logsumexp(dim=1), CPU) >= 4 * MEGA


def test_nothing():
    assert peak_memory(lambda: None, CPU) == 0


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="measured on cpu and cuda devices, not on 'meta'"):
        peak_memory(lambda: None, torch.device("meta"))


def test_the_error_stream_keeps_everything_but_the_announcements(capfd):
    def run():
        os.write(2, b"from a library\n")
        print("from Python", file=sys.stderr)

    peak_memory(run, CPU)
    assert sorted(capfd.readouterr().err.splitlines()) == ["from Python", "from a library"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda():
    device = torch.device("cuda")
    kept = torch.empty(MEGA, dtype=torch.uint8, device=device)
    found = peak_memory(lambda: torch.empty(4 * MEGA, dtype=torch.uint8, device=device), device)
    assert found == pytest.approx(4 * MEGA, rel=0.05)
    del kept
