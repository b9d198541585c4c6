"""The losses against plain loops over tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from peft_variator.training.losses import LossSums, embedding_loss, hidden_state_loss, items_per_example, kl_loss


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


def states(layers: int, batch: int, length: int, dim: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, length, dim, generator=generator, dtype=torch.float64).to(dtype) for _ in range(layers)]


def random_mask(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def hidden_reference(student: list[Tensor], teacher: list[Tensor], mask: Tensor, variance: Tensor) -> list[float]:
    sums = []
    for row in range(mask.shape[0]):
        total = 0.0
        for layer in range(len(student)):
            for position in range(mask.shape[1]):
                if mask[row, position]:
                    error = 0.0
                    mine, target = student[layer][row, position].tolist(), teacher[layer][row, position].tolist()
                    for dim in range(len(mine)):
                        error += (mine[dim] - target[dim]) ** 2
                    total += error / student[layer].shape[-1] / float(variance[layer]) / len(student)
        sums.append(total)
    return sums


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 7, 5), (3, 2, 1, 8), (2, 4, 5, 3)])
def test_hidden_state_loss_is_the_loop(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    layers, batch, length, dim = shape
    student, teacher = states(layers, batch, length, dim, dtype, 1), states(layers, batch, length, dim, dtype, 2)
    mask, variance = random_mask(batch, length), torch.linspace(0.5, 3.0, layers, dtype=torch.float64)
    sums = hidden_state_loss(student, teacher, mask, variance)
    assert sums.errors.tolist() == pytest.approx(
        hidden_reference(student, teacher, mask, variance), rel=TOLERANCE[dtype], abs=TOLERANCE[dtype]
    )
    assert sums.items.tolist() == mask.sum(1).tolist()


def test_hidden_state_loss_of_images_is_the_mean_of_each() -> None:
    student, teacher = states(2, 3, 5, 4, torch.float64, 1), states(2, 3, 5, 4, torch.float64, 2)
    variance = torch.tensor([0.5, 2.0], dtype=torch.float64)
    sums = hidden_state_loss(student, teacher, None, variance)
    everything = torch.ones(3, 5, dtype=torch.bool)
    reference = torch.tensor(hidden_reference(student, teacher, everything, variance)) / 5
    torch.testing.assert_close(sums.errors, reference.double(), rtol=1e-6, atol=0)
    assert sums.items.tolist() == [1, 1, 1]


def test_predicting_the_mean_costs_one() -> None:
    teacher = [3.0 + 2.0 * layer for layer in states(2, 4, 9, 6, torch.float64, 0)]
    mask = random_mask(4, 9)
    variance = torch.stack([layer[mask].var(0, correction=0).mean() for layer in teacher])
    student = [layer[mask].mean(0).expand_as(layer) for layer in teacher]
    assert float(hidden_state_loss(student, teacher, mask, variance).mean()) == pytest.approx(1.0)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_padding_never_counts(garbage: float) -> None:
    mask = random_mask(3, 6)
    clean = states(1, 3, 6, 4, torch.float32, 1)[0]
    target = states(1, 3, 6, 4, torch.float32, 2)[0]
    results = []
    for fill in (0.0, garbage):
        student = clean.masked_fill(~mask.unsqueeze(-1), fill).requires_grad_()
        teacher = target.masked_fill(~mask.unsqueeze(-1), fill)
        hidden = hidden_state_loss([student], [teacher], mask, torch.ones(1)).mean()
        loss = hidden + kl_loss(student, teacher, mask).mean()
        results.append((loss, *torch.autograd.grad(loss, student)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert not results[0][1][~mask].any()


def kl_reference(student: Tensor, teacher: Tensor, temperature: float) -> float:
    mine, target = student.double() / temperature, teacher.double() / temperature
    p = [math.exp(value) for value in target.tolist()]
    q = [math.exp(value) for value in mine.tolist()]
    p, q = [value / sum(p) for value in p], [value / sum(q) for value in q]
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_loss_is_the_loop(dtype: torch.dtype, temperature: float) -> None:
    student, teacher = states(1, 3, 4, 7, dtype, 1)[0], states(1, 3, 4, 7, dtype, 2)[0]
    mask = random_mask(3, 4)
    sums = kl_loss(student, teacher, mask, temperature)
    for row in range(3):
        wanted = [kl_reference(student[row, t], teacher[row, t], temperature) for t in range(4) if mask[row, t]]
        assert float(sums.errors[row]) == pytest.approx(sum(wanted), rel=1e-4, abs=1e-6)
        assert int(sums.items[row]) == len(wanted)


def test_kl_loss_of_one_prediction_an_example() -> None:
    student, teacher = states(1, 1, 5, 3, torch.float64, 1)[0][0], states(1, 1, 5, 3, torch.float64, 2)[0][0]
    sums = kl_loss(student, teacher, torch.tensor([True, True, False, True, True]))
    wanted = [kl_reference(student[row], teacher[row], 1.0) for row in range(5)]
    assert sums.errors.tolist() == pytest.approx([*wanted[:2], 0.0, *wanted[3:]])
    assert sums.items.tolist() == [1, 1, 0, 1, 1]


def test_kl_loss_leaves_out_classes_that_do_not_exist() -> None:
    student, teacher = states(1, 1, 2, 6, torch.float64, 1)[0][0], states(1, 1, 2, 6, torch.float64, 2)[0][0]
    classes = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    student.requires_grad_()
    sums = kl_loss(student, teacher, torch.ones(2, dtype=torch.bool), 1.0, classes)
    wanted = [kl_reference(student[0, :4], teacher[0, :4], 1.0), kl_reference(student[1], teacher[1], 1.0)]
    assert sums.errors.tolist() == pytest.approx(wanted)
    (gradient,) = torch.autograd.grad(sums.mean(), student)
    assert torch.isfinite(gradient).all()
    assert not gradient[0, 4:].any()


def kl_by_autograd(
    student: Tensor, teacher: Tensor, mask: Tensor, temperature: float, classes: Tensor | None
) -> Tensor:
    """The divergence of all that counts, as it is written."""
    mine, target = (logits[mask].double() / temperature for logits in (student, teacher))
    if classes is not None:
        mine, target = (logits.masked_fill(~classes[mask], -math.inf) for logits in (mine, target))
    p = target.softmax(-1)
    terms = torch.where(p > 0, p * (target.log_softmax(-1) - mine.log_softmax(-1)), 0)
    return terms.sum() * temperature**2


@pytest.mark.parametrize("with_classes", [False, True], ids=["all", "some classes"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_kl_loss(dtype: torch.dtype, with_classes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several passes of a few rows, and weighed differently for each example."""
    monkeypatch.setattr("peft_variator.training.losses._NUMBERS_AT_A_TIME", 25)
    student, teacher = states(1, 3, 6, 9, dtype, 1)[0].requires_grad_(), states(1, 3, 6, 9, dtype, 2)[0]
    mask, weights = random_mask(3, 6), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    classes = random_mask(3, 6, 9, seed=5) | (torch.arange(9) < 2) if with_classes else None
    sums = kl_loss(student, teacher, mask, 2.0, classes)
    found = torch.autograd.grad((sums.errors.double() * weights).sum(), student)[0]
    parts = [kl_by_autograd(student, teacher, mask & (torch.arange(3) == n)[:, None], 2.0, classes) for n in range(3)]
    torch.testing.assert_close(sums.errors.double(), torch.stack(parts), rtol=1e-4, atol=1e-5)
    (wanted,) = torch.autograd.grad((torch.stack(parts) * weights).sum(), student)
    loose = {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(dtype, 1e-5)
    torch.testing.assert_close(found, wanted, rtol=loose, atol=loose / 10)
    assert found.dtype == dtype


def test_a_class_without_probability_counts_for_nothing() -> None:
    """A model gives −inf to what it excludes; where the student alone does so, KL is infinite."""
    student, teacher = states(1, 1, 2, 5, torch.float32, 1)[0][0], states(1, 1, 2, 5, torch.float32, 2)[0][0]
    everything = torch.ones(2, dtype=torch.bool)
    teacher[:, 3] = -math.inf
    left_out = student.clone()
    left_out[:, 3] = -math.inf
    for logits in (student, left_out):
        mine = logits.clone().requires_grad_()
        loss = kl_loss(mine, teacher, everything).mean()
        assert loss.isfinite()
        assert torch.autograd.grad(loss, mine)[0].isfinite().all()
    kept = [0, 1, 2, 4]
    alone = kl_loss(student[:, kept], teacher[:, kept], everything)
    torch.testing.assert_close(kl_loss(left_out, teacher, everything).errors, alone.errors)
    teacher[:, 3] = 0
    assert kl_loss(left_out, teacher, everything).errors.isinf().all()


def test_gradients_do_not_shrink_with_temperature() -> None:
    """For small logits the gradient of T² KL(p ‖ q) does not depend on T (Hinton et al. 2015, section 2.1)."""
    teacher, mask = 1e-3 * states(1, 1, 2, 5, torch.float64, 2)[0][0], torch.ones(2, dtype=torch.bool)
    gradients = []
    for temperature in (1.0, 10.0):
        student = (1e-3 * states(1, 1, 2, 5, torch.float64, 1)[0][0]).requires_grad_()
        gradients += torch.autograd.grad(kl_loss(student, teacher, mask, temperature).mean(), student)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-2, atol=1e-9)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = states(1, 2, 3, 4, torch.float32, 1)[0], states(1, 2, 3, 4, torch.float32, 2)[0]
    student.requires_grad_(), teacher.requires_grad_()
    mask = torch.ones(2, 3, dtype=torch.bool)
    loss = hidden_state_loss([student], [teacher], mask, torch.ones(1)).mean() + kl_loss(student, teacher, mask).mean()
    loss.backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_nothing_that_counts_is_a_loss_of_zero() -> None:
    mask = torch.zeros(2, 3, dtype=torch.bool)
    student, teacher = states(1, 2, 3, 4, torch.float32, 1)[0], states(1, 2, 3, 4, torch.float32, 2)[0]
    assert float(hidden_state_loss([student], [teacher], mask, torch.ones(1)).mean()) == 0
    assert float(kl_loss(student, teacher, mask).mean()) == 0


def test_a_mean_over_parts_is_the_mean_over_the_whole() -> None:
    student, teacher = states(1, 6, 5, 4, torch.float64, 1)[0], states(1, 6, 5, 4, torch.float64, 2)[0]
    mask, one = random_mask(6, 5), torch.ones(1)
    whole = hidden_state_loss([student], [teacher], mask, one)
    parts = [hidden_state_loss([student[s]], [teacher[s]], mask[s], one) for s in (slice(0, 1), slice(1, 6))]
    joined = LossSums(torch.cat([p.errors for p in parts]), torch.cat([p.items for p in parts]))
    torch.testing.assert_close(joined.mean(), whole.mean())


def test_items_per_example() -> None:
    assert items_per_example(torch.tensor([True, False])).tolist() == [1, 0]
    assert items_per_example(random_mask(2, 3, 4)).tolist() == random_mask(2, 3, 4).sum((1, 2)).tolist()


def test_errors_name_the_shapes() -> None:
    two, three = torch.zeros(1, 2, 4), torch.zeros(1, 3, 4)
    mask, one = torch.ones(1, 2, dtype=torch.bool), torch.ones(1)
    with pytest.raises(
        ValueError, match=r"hidden states of student and teacher have shapes \(1, 2, 4\) and \(1, 3, 4\)"
    ):
        hidden_state_loss([two], [three], mask, one)
    with pytest.raises(ValueError, match=r"1 layers of the student, 2 of the teacher and 1 variances"):
        hidden_state_loss([two], [two, two], mask, one)
    with pytest.raises(ValueError, match=r"mask of the hidden states has shape \(1, 2\).*must be \(1, 3\)"):
        hidden_state_loss([three], [three], mask, one)
    with pytest.raises(ValueError, match=r"logits of student and teacher have shapes"):
        kl_loss(two, three, mask)
    with pytest.raises(ValueError, match=r"\(2, 1\): one class only.*Set logits_weight=0"):
        kl_loss(torch.zeros(2, 1), torch.zeros(2, 1), torch.ones(2, dtype=torch.bool))


POOLED_BY_HAND: dict[str, Callable[[list[torch.Tensor]], torch.Tensor]] = {
    "mean": lambda rows: sum(rows, torch.zeros(())),
    "first": lambda rows: rows[0],
    "cls": lambda rows: rows[0],
    "lasttoken": lambda rows: rows[-1],
    "max": lambda rows: torch.stack(rows).amax(0),
}


@pytest.mark.parametrize("pooling", ["mean", "first", "cls", "lasttoken", "max"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_loss_is_the_loop(dtype: torch.dtype, pooling: str) -> None:
    student, teacher = (states(1, 4, 7, 5, dtype, seed)[0] for seed in (1, 2))
    mask = random_mask(4, 7)
    mask[2] = False
    student[~mask] = torch.nan
    student.requires_grad_()
    sums = embedding_loss(student, teacher, mask, pooling)
    sums.errors.sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    for row in range(4):
        real = mask[row].nonzero().flatten().tolist()
        assert sums.items[row] == (1 if real else 0)
        expected = 0.0
        if real:
            mine, target = (
                POOLED_BY_HAND[pooling]([values.detach()[row, at].double() for at in real])
                for values in (student, teacher)
            )
            expected = 1 - float(mine @ target / mine.norm() / target.norm())
        assert sums.errors[row].item() == pytest.approx(expected, abs=10 * TOLERANCE[dtype])
    assert embedding_loss(student[:1, :3], teacher[:1, :3], None).items.tolist() == [1]
