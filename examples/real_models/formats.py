"""Weights in the formats of other runtimes (ONNX, GGUF, CTranslate2) as tensors of torch."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


__all__ = ["read_ctranslate2", "read_gguf", "read_onnx"]


def read_onnx(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters of an exported torch model under their names in torch.

    torch's exporter keeps the names of biases, norms and embeddings, but transposes the weight of a Linear into a
    nameless constant. It is found again as the matrix whose product the bias of that Linear is added to.

    Args:
        path: an ONNX file with float32 weights.

    Returns:
        The named parameters, a Linear's weight as `(out, in)`; and the constants without a name in torch.

    Raises:
        ImportError: `onnx` is not installed.
        ValueError: two matrices claim the same name.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise ImportError(f"{path} is read with onnx: pip install onnx") from error
    graph = onnx.load(str(path)).graph
    values = {entry.name: torch.from_numpy(numpy_helper.to_array(entry).copy()) for entry in graph.initializer}
    named = {name: value for name, value in values.items() if not name.startswith("onnx::")}
    products = {node.output[0]: node for node in graph.node if node.op_type == "MatMul" and node.input[1] in values}
    used = set()
    for node in graph.node:
        if node.op_type != "Add":
            continue
        bias = next((name for name in node.input if name in values and name.endswith(".bias")), None)
        product = next((products[name] for name in node.input if name in products), None)
        if bias is None or product is None:
            continue
        name = bias.removesuffix("bias") + "weight"
        if name in named:
            raise ValueError(f"{path} has two matrices for {name}; it is not an export of one torch model.")
        named[name] = values[product.input[1]].T.contiguous()
        used.add(product.input[1])
    return named, {name: value for name, value in values.items() if name not in named and name not in used}


def read_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A SmolLM2 from a GGUF file, dequantised to float32, and its tokenizer.

    Raises:
        ImportError: `gguf` is not installed.
    """
    from tokenizers import pre_tokenizers

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # The file names the rule "smollm": digits one by one, then GPT-2's pattern. The converter leaves the first out.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    dequantised = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # The loaded model is marked as quantised although its weights are not, and then neither saved nor trained. A new
    # one of the same configuration is not.
    fields = dequantised.config.to_dict()
    fields.pop("quantization_config", None)
    model = type(dequantised)(type(dequantised.config).from_dict(fields))
    model.load_state_dict(dequantised.state_dict())
    model.tie_weights()
    return model, tokenizer


# Numbers of CTranslate2's types in its files.
_CTRANSLATE2_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_CTRANSLATE2_VERSION = 6


def read_ctranslate2(path: Path) -> dict[str, Tensor]:
    """Variables of a CTranslate2 model file in float32.

    The file is little-endian: version (uint32), name of the specification, its revision (uint32), count (uint32), and
    for each variable its name, rank (uint8), dimensions (uint32), type (uint8), bytes (uint32) and values. A name is
    its length with a final zero (uint16) and its characters.

    Raises:
        ValueError: the file is of another version.
    """
    with path.open("rb") as file:
        (version,) = _unpack(file, "I")
        if version != _CTRANSLATE2_VERSION:
            raise ValueError(f"{path} is of CTranslate2's version {version}; {_CTRANSLATE2_VERSION} is read.")
        _name(file)
        _, count = _unpack(file, "II")
        variables = {}
        for _ in range(count):
            name = _name(file)
            (rank,) = _unpack(file, "B")
            shape = _unpack(file, f"{rank}I")
            kind, size = _unpack(file, "BI")
            values = np.frombuffer(file.read(size), _CTRANSLATE2_TYPES[kind]).reshape(shape)
            variables[name] = torch.from_numpy(values.astype(np.float32))
    return variables


def _unpack(file: BinaryIO, format: str) -> tuple[int, ...]:
    return struct.unpack(f"<{format}", file.read(struct.calcsize(f"<{format}")))


def _name(file: BinaryIO) -> str:
    (length,) = _unpack(file, "H")
    return file.read(length)[:-1].decode()
