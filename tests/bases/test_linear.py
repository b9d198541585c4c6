"""`Sparse24Linear` against the dense layer: outputs, gradients, moving, copying, saving, and what it refuses."""

from __future__ import annotations

import copy
import functools
import io
import threading

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_variator.bases import Sparse24Linear
from peft_variator.bases.packing import LayoutError
from peft_variator.profiling import peak_memory

from .reference import DTYPES, same_bits, two_four, two_four_linear


SHAPES = [(16,), (3, 16), (2, 3, 16), (0, 16), (2, 0, 16)]


@pytest.fixture(params=["forward", "always"])
def unpacked(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_dense_layer_bit_for_bit(dtype, shape, bias, unpacked):
    dense = two_four_linear(12, 16, dtype, bias)
    packed = Sparse24Linear.from_dense(dense, unpacked=unpacked)
    x, z = (torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    x, z = x.to(dtype).requires_grad_(), z.to(dtype).requires_grad_()
    expected, actual = dense(x), packed(z)
    assert same_bits(actual, expected)
    gradient = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [x, *([dense.bias] if bias else [])], gradient)
    given = torch.autograd.grad(actual, [z, *([packed.bias] if bias else [])], gradient)
    assert all(same_bits(one, other) for one, other in zip(given, wanted, strict=True))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert same_bits(packed(z), expected)


@pytest.mark.parametrize("width", [4, 12, 20])
def test_rows_that_do_not_end_on_a_byte(width, unpacked):
    dense = two_four_linear(5, width)
    x = torch.randn(3, width)
    assert same_bits(Sparse24Linear.from_dense(dense, unpacked=unpacked)(x), dense(x))


def test_gradient_of_the_input_by_finite_differences():
    packed = Sparse24Linear.from_dense(two_four_linear(4, 8, torch.float64))
    assert torch.autograd.gradcheck(packed, torch.randn(3, 8, dtype=torch.float64, requires_grad=True))


def test_layers_share_one_buffer_and_do_not_disturb_each_other():
    dense = nn.Sequential(two_four_linear(32, 16), nn.Tanh(), two_four_linear(8, 32), two_four_linear(16, 8))
    packed = nn.Sequential(*(Sparse24Linear.from_dense(m) if isinstance(m, nn.Linear) else m for m in dense))
    x = torch.randn(4, 16, requires_grad=True)
    wanted = torch.autograd.grad(dense(x).square().sum(), x)[0]
    assert same_bits(torch.autograd.grad(packed(x).square().sum(), x)[0], wanted)
    # two forwards before either backward, and a checkpointed one
    one, two = packed(x), packed(2 * x)
    assert same_bits(torch.autograd.grad(one.square().sum(), x)[0], wanted)
    two.sum().backward()
    x.grad = None
    checkpoint(packed, x, use_reentrant=False).square().sum().backward()
    assert same_bits(x.grad, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_buffer_is_reused_and_no_other_is_made(dtype):
    first, second = (Sparse24Linear(2048, 2048, dtype=dtype, bias=False) for _ in range(2))
    x = torch.randn(1, 2048, dtype=dtype)
    with torch.no_grad():
        first(x)  # the buffer is made here at the latest
        held = peak_memory(functools.partial(second, x), torch.device("cpu"))
    places_of_two_blocks = 2 * 2**19 * 5  # bytes; what unpacking needs at a time
    assert held < places_of_two_blocks < 2048 * 2048 * dtype.itemsize


def test_the_dense_weight_is_kept_if_asked_for_and_the_layer_is_not_offloaded():
    packed = Sparse24Linear.from_dense(two_four_linear(32, 16), unpacked="always")
    x = torch.randn(2, 16)
    packed(x)
    kept = packed._dense
    assert same_bits(kept, packed.unpack())
    packed(x)
    assert packed._dense is kept
    packed.forget()
    packed.offloaded = True
    packed.eval()(x)
    assert packed._dense is None


def test_keeps_nothing_of_the_size_of_the_weight_for_the_backward():
    packed = Sparse24Linear.from_dense(two_four_linear(64, 64))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        packed(torch.randn(2, 64, requires_grad=True))
    assert set(saved) <= {packed.compressed.data_ptr(), packed.bitmask.data_ptr()}


def test_threads_do_not_share_the_buffer():
    dense = two_four_linear(256, 256)
    packed = Sparse24Linear.from_dense(dense)
    other = Sparse24Linear.from_dense(two_four_linear(256, 256, bias=False))
    x, wrong = torch.randn(2, 256), []
    wanted = dense(x)

    def work(layer, check):
        with torch.no_grad():
            for _ in range(50):
                y = layer(x)
                if check and not torch.allclose(y, wanted, atol=1e-5):
                    wrong.append(y)

    threads = [threading.Thread(target=work, args=(layer, layer is packed)) for layer in (packed, other, packed)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_as_the_dense_layer(dtype, unpacked):
    dense = two_four_linear(12, 16, dtype)
    packed = Sparse24Linear.from_dense(dense, unpacked=unpacked)
    x, z = torch.randn(3, 16, dtype=dtype, requires_grad=True), None
    z = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = dense(x), packed(z)
    assert same_bits(actual, expected)
    wanted = torch.autograd.grad(expected.sum(), [x, dense.bias])
    assert all(
        same_bits(one, other)
        for one, other in zip(torch.autograd.grad(actual.sum(), [z, packed.bias]), wanted, strict=True)
    )


def test_another_dtype_without_autocast_is_refused_as_by_the_dense_layer():
    packed = Sparse24Linear.from_dense(two_four_linear(4, 8, torch.bfloat16))
    with pytest.raises(RuntimeError, match="dtype"):
        packed(torch.randn(2, 8))


def test_compiled_agrees_with_eager():
    packed = nn.Sequential(*(Sparse24Linear.from_dense(two_four_linear(16, 16)) for _ in range(2)))
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 16, requires_grad=True)
    wanted = torch.autograd.grad(packed(x).square().sum(), x)[0]
    assert same_bits(torch.autograd.grad(compiled(x).square().sum(), x)[0], wanted)
    with torch.no_grad():
        assert same_bits(compiled(x), packed(x))


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("grad", [False, True])
def test_traced_saved_and_loaded_agrees_with_eager(unpacked, tokens, grad):
    """Also at other lengths, and at a shape for which the compiled product is used."""
    packed = Sparse24Linear.from_dense(two_four_linear(516, 512), unpacked=unpacked).eval()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(packed, torch.randn(tokens, 512), check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    x = torch.randn(tokens + 2, 512)
    with torch.no_grad():
        # Sums of 512 products, in another order.
        torch.testing.assert_close(torch.jit.load(file)(x), packed(x), rtol=1e-5, atol=1e-4)


def test_parameters_are_packed_and_frozen():
    packed = Sparse24Linear.from_dense(two_four_linear(12, 16))
    assert {name: parameter.requires_grad for name, parameter in packed.named_parameters()} == {
        "compressed": False,
        "bitmask": False,
        "shape": False,
        "bias": True,
    }
    packed.compressed.requires_grad_(True)
    with pytest.raises(RuntimeError, match="frozen"):
        packed(torch.randn(2, 16))


def test_a_new_layer_is_a_valid_zero_weight():
    for width in (8, 12):
        layer = Sparse24Linear(width, 3)
        assert same_bits(layer.unpack(), torch.zeros(3, width))
        assert layer(torch.randn(2, width)).tolist() == [[0.0] * 3] * 2
        assert layer.mask().sum() == 3 * width // 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_to_casts_the_values_and_leaves_the_positions(dtype, unpacked):
    dense = two_four_linear(12, 16)
    packed = Sparse24Linear.from_dense(dense, unpacked=unpacked)
    x = torch.randn(3, 16)
    packed(x)  # builds what has to be dropped
    packed.to(dtype)
    assert packed.bitmask.dtype == torch.uint8
    assert packed.shape.dtype == torch.int64
    assert same_bits(packed(x.to(dtype)), dense.to(dtype)(x.to(dtype)))


def test_deepcopy_and_pickle_are_independent(unpacked):
    packed = Sparse24Linear.from_dense(two_four_linear(12, 16), unpacked=unpacked).eval()
    x = torch.randn(3, 16)
    before = packed(x)
    clone = copy.deepcopy(packed)
    assert not clone.training
    clone.compressed.data.mul_(2)
    assert not torch.equal(clone(x), before)
    assert same_bits(packed(x), before)
    stream = io.BytesIO()
    torch.save(packed, stream)
    stream.seek(0)
    assert same_bits(torch.load(stream, weights_only=False)(x), before)


def test_state_dict_round_trip_through_safetensors(tmp_path, unpacked):
    packed = Sparse24Linear.from_dense(two_four_linear(12, 16), unpacked=unpacked)
    assert sorted(packed.state_dict()) == ["bias", "bitmask", "compressed", "shape"]
    safetensors.torch.save_file(packed.state_dict(), tmp_path / "layer.safetensors")
    fresh = Sparse24Linear(16, 12, unpacked=unpacked)
    x = torch.randn(3, 16)
    fresh(x)
    fresh.load_state_dict(safetensors.torch.load_file(tmp_path / "layer.safetensors"))
    assert same_bits(fresh(x), packed(x))


def test_a_state_dict_with_damaged_positions_is_refused():
    packed = nn.Sequential(Sparse24Linear.from_dense(two_four_linear(12, 16)))
    state = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    state["0.bitmask"][7, 1] = 0xFF
    with pytest.raises(LayoutError, match=r"0\.bitmask, row 7: columns 8 to 11 keep 4 weights"):
        packed.load_state_dict(state)


def test_dense_and_back():
    dense = two_four_linear(12, 16).eval()
    packed = Sparse24Linear.from_dense(dense)
    again = packed.to_dense()
    assert type(again) is nn.Linear
    assert same_bits(again.weight, dense.weight)
    assert again.bias is dense.bias
    assert not again.training
    assert same_bits(packed.unpack(torch.bfloat16), dense.weight.to(torch.bfloat16))


def test_from_dense_names_the_row():
    dense = two_four_linear(12, 16)
    dense.weight.data[5, :4] = 1
    with pytest.raises(LayoutError, match=r"encoder\.key, row 5"):
        Sparse24Linear.from_dense(dense, "encoder.key")


def test_write_replaces_the_values_and_keeps_the_zeros(unpacked):
    packed = Sparse24Linear.from_dense(two_four_linear(12, 16), unpacked=unpacked)
    x = torch.randn(3, 16)
    packed(x)
    matrix = torch.randn(12, 16).where(packed.mask(), 0.0)
    bitmask = packed.bitmask.clone()
    packed.write(-matrix)  # its zeros are -0.0
    assert same_bits(packed.unpack(), torch.where(matrix == 0, 0.0, -matrix))
    assert torch.equal(packed.bitmask, bitmask)
    assert torch.allclose(packed(x), nn.functional.linear(x, -matrix, packed.bias))
    matrix[3] = 1.0
    with pytest.raises(LayoutError, match="row 3: a weight outside the kept places is not zero"):
        packed.write(matrix)
    with pytest.raises(LayoutError, match=r"shape \(2, 16\)"):
        packed.write(matrix[:2])


def test_weight_answers_questions_and_refuses_writes():
    packed = Sparse24Linear.from_dense(two_four_linear(12, 16, torch.bfloat16))
    weight = packed.weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((12, 16), torch.bfloat16, "cpu")
    assert isinstance(weight, torch.Tensor)
    assert same_bits(weight.data.clone(), packed.unpack())
    assert weight.float().sum() == packed.unpack().float().sum()
    for write in (
        lambda: weight.add_(1),
        lambda: weight.data.add_(1),
        lambda: weight.copy_(packed.unpack()),
        lambda: setattr(weight, "data", packed.unpack()),
        lambda: nn.init.normal_(weight),
    ):
        with pytest.raises(NotImplementedError, match="the change would be lost"):
            write()
    with pytest.raises(NotImplementedError, match="no random initialisation"):
        packed.reset_parameters()


def test_a_width_that_does_not_fill_groups_is_refused():
    for width in (0, 6):
        with pytest.raises(LayoutError, match=f"in_features={width}"):
            Sparse24Linear(width, 4)


def test_memory_of_the_parameters():
    packed = Sparse24Linear.from_dense(two_four_linear(64, 128, torch.bfloat16, bias=False))
    size = sum(parameter.nbytes for parameter in packed.parameters())
    assert size == 0.5625 * 64 * 128 * 2 + 16  # 16 bytes: the shape


def test_negative_zeros_of_a_dense_layer_come_back_positive():
    dense = two_four_linear(4, 8, bias=False)
    dense.weight.data = torch.where(dense.weight == 0, -0.0, dense.weight)
    packed = Sparse24Linear.from_dense(dense)
    assert not packed.unpack().masked_fill(packed.unpack() != 0, 1).signbit().any()
    assert torch.equal(packed.unpack(), two_four(4, 8))
