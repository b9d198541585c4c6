"""What config.json says about a packed model: reading it, `Sparse24Config`, and the rules that follow from it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..field_types import shown
from ..files import write_text
from .compressed_tensors import CODECS, Sparse24Codec
from .linear import Unpacked


__all__ = [
    "METHOD",
    "Rules",
    "Sparse24Config",
    "drop_notice",
    "names_dtype",
    "names_layer",
    "pop_quantization",
    "read_quantization",
    "translate_compressed_tensors",
]

METHOD = "sparse24"
"""The `quant_method` of packed models."""

_PACKED_FORMAT = Sparse24Codec.name
# What compressed-tensors calls the form of the values; that of the zeros is in its sparsity_config.
_QUANTIZED_FORMATS = ("dense", "sparse-24-bitmask", "int-quantized", "float-quantized", "naive-quantized")


@dataclass(frozen=True)
class Rules:
    """Which layers are, or become, packed.

    Args:
        pack_dense: pack the dense weights that are 2:4. Otherwise a weight that `targets` means has to be packed.
        targets: the layers that have to be 2:4, see [`names_layer`]; None for those that happen to be.
        ignore: exceptions from `targets`, never packed from dense.
    """

    pack_dense: bool
    targets: tuple[str, ...] | None
    ignore: tuple[str, ...]

    def __post_init__(self) -> None:
        for pattern in (*(self.targets or ()), *self.ignore):
            if not pattern.startswith("re:"):
                continue
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}.") from error

    def requires(self, module: nn.Module, name: str) -> bool:
        """Whether the layer has to be 2:4."""
        return self.targets is not None and names_layer(module, name, self.targets) and not self.ignores(module, name)

    def ignores(self, module: nn.Module, name: str) -> bool:
        """Whether the layer stays as it is stored."""
        return names_layer(module, name, self.ignore)


class Sparse24Config(QuantizationConfigMixin):
    """How a 2:4 model is packed; `from_pretrained(dense, quantization_config=Sparse24Config())` packs while loading.

    In config.json the fields sit in `sparsity_config`, with `format` and `sparsity_structure`, as compressed-tensors
    has them, so that its readers of this layout find what they look for.

    Args:
        targets: layers that have to be 2:4, by name, class (`"Linear"`) or by `"re:"` and a regular expression for
            the name, as in the checkpoint; None packs the linear layers that are 2:4 and leaves the others dense.
        ignore: exceptions from `targets`, written alike.
        unpacked: when the dense weights exist, see `Sparse24Linear`.
        format: layout of the files, `"sparse-24-bitmask"`, `"sparse-bitmask"` or `"dense"`. A model is always written
            as `"sparse-24-bitmask"`.
        checksums: whether every tensor of the files has a checksum, which is then checked when they are loaded.

    Raises:
        ValueError: a value that is not allowed, or an unknown field.
    """

    def __init__(
        self,
        targets: Iterable[str] | None = None,
        ignore: Iterable[str] = (),
        unpacked: Unpacked = "forward",
        format: str = _PACKED_FORMAT,
        checksums: bool = False,
    ) -> None:
        self.quant_method = METHOD  # transformers takes any string here
        self.targets = None if targets is None else _names("targets", targets)
        self.ignore = _names("ignore", ignore)
        self.unpacked = unpacked
        self.format = format
        self.checksums = checksums
        if not isinstance(checksums, bool):
            raise ValueError(f"checksums={shown(checksums)} is neither True nor False.")
        if not isinstance(unpacked, str) or unpacked not in get_args(Unpacked):
            raise ValueError(f"unpacked={shown(unpacked)} is not one of {get_args(Unpacked)}.")
        if not isinstance(format, str) or format not in CODECS:
            raise ValueError(f"format={shown(format)} can't be read. These can: {', '.join(CODECS)}.")

    def rules(self, pre_quantized: bool = True) -> Rules:
        """Which layers are, or become, packed.

        Args:
            pre_quantized: whether the files are those that the config was saved with, and not dense ones to pack.
        """
        return Rules(
            pack_dense=not pre_quantized or self.format == "dense",
            targets=None if self.targets is None else tuple(self.targets),
            ignore=tuple(self.ignore),
        )

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Sparse24Config | tuple[Sparse24Config, dict[str, Any]]:
        """`from_entry`, as transformers calls it."""
        config = cls.from_entry(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    @classmethod
    def from_entry(cls, entry: dict[str, Any]) -> Sparse24Config:
        """Read the entry of config.json; see `to_dict`.

        Raises:
            ValueError: it is not the entry of a packed 2:4 model.
        """
        fields = _sparsity_of(entry)
        structure = fields.pop("sparsity_structure", "2:4")
        unknown = fields.keys() - {"targets", "ignore", "unpacked", "format", "checksums"}
        if unknown or structure != "2:4" or "sparsity_config" not in entry:
            raise ValueError(
                f"quantization_config={entry} is no entry of a packed 2:4 model: it has a sparsity_config with "
                "sparsity_structure '2:4' and fields of Sparse24Config alone."
            )
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """The entry of config.json."""
        fields = {name: value for name, value in vars(self).items() if name != "quant_method"}
        return {"quant_method": METHOD, "sparsity_config": {"sparsity_structure": "2:4", **fields}}


def names_dtype(config: dict[str, Any]) -> bool:
    """Whether the fields of a config.json name the model's dtype.

    Where they don't, it has to be given from `Checkpoint.dtype`: transformers takes it from the first floating tensor
    of the files, which may be an 8-bit one, before they are checked.
    """
    return bool(config.get("dtype") or config.get("torch_dtype"))


def pop_quantization(config: dict[str, Any]) -> dict[str, Any] | None:
    """Take the entry about quantization and sparsity out of the fields of a config.json; None for a dense model.

    Raises:
        ValueError: it is no dict.
    """
    # config.json had the entry `compression_config` before transformers knew the format
    entries = {name: config.pop(name, None) for name in ("quantization_config", "compression_config")}
    for name, entry in entries.items():
        if entry and not isinstance(entry, dict):
            raise ValueError(f"{name}={shown(entry)} in config.json is no dict of fields.")
    return next((entry for entry in entries.values() if entry), None)


def read_quantization(entry: dict[str, Any]) -> Sparse24Config:
    """What an entry of config.json says about sparsity, written by this package or by compressed-tensors.

    Raises:
        ValueError: the model is quantized in a way that can't be read.
    """
    ours = entry.get("quant_method") == METHOD
    return Sparse24Config.from_entry(entry) if ours else translate_compressed_tensors(entry)


def _sparsity_of(entry: dict[str, Any]) -> dict[str, Any]:
    """A copy of the `sparsity_config` of an entry of config.json; empty if there is none."""
    fields = entry.get("sparsity_config") or {}
    if not isinstance(fields, dict):
        raise ValueError(f"sparsity_config={shown(fields)} in config.json is no dict of fields.")
    return dict(fields)


def _names(field: str, values: Any) -> list[str]:
    """Names and expressions of layers as a list."""
    names = None if isinstance(values, str) or not isinstance(values, Iterable) else list(values)
    if names is None or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{field}={shown(values)} is no list of texts: names of layers, classes, or 're:' and an expression."
        )
    return names


def translate_compressed_tensors(entry: dict[str, Any]) -> Sparse24Config:
    """What the `quantization_config` of a model written by compressed-tensors says about its sparsity.

    Raises:
        ValueError: the model is quantized in a way that can't be read.
    """
    method = entry.get("quant_method", "compressed-tensors")
    quantized_format = entry.get("format") or "dense"
    if method != "compressed-tensors" or quantized_format not in _QUANTIZED_FORMATS:
        raise ValueError(
            f"The model is quantized with quant_method={method!r}, format={quantized_format!r}, which can't be read. "
            f"compressed-tensors can, with format {', '.join(_QUANTIZED_FORMATS)}."
        )
    sparsity = _sparsity_of(entry)
    # what is called unstructured may still be 2:4; then nothing has to be
    claimed = str(sparsity.get("sparsity_structure")).lower() == "2:4" and sparsity.get("targets")
    return Sparse24Config(
        targets=sparsity["targets"] if claimed else None,
        ignore=sparsity.get("ignore") or (),
        format=sparsity.get("format") or "dense",
    )


def names_layer(module: nn.Module, name: str, patterns: Iterable[str]) -> bool:
    """Whether `patterns` mean a layer: by its name, its class, or a regular expression `re:...` for its name.

    Args:
        module: the layer.
        name: its name in the checkpoint.
        patterns: as in the `targets` and `ignore` of compressed-tensors; an expression has to match from the start.
    """
    return any(
        re.match(pattern[3:], name) is not None
        if pattern.startswith("re:")
        else pattern in (name, type(module).__name__)
        for pattern in patterns
    )


README_NAME = "README.md"
NOTICE = """
**Import `peft_variator` before you load this model.** Its 2:4-sparse layers are packed, and transformers alone does
not know the format: it warns of an "unknown quantization type" and fills the layers with **random numbers**.

```python
import peft_variator  # pip install peft-variator
from transformers import AutoModel  # or the class for your task

model = AutoModel.from_pretrained("this folder")
```
"""


def write_notice(folder: Path) -> None:
    """Have the README of a packed model say first what transformers does without this package."""
    readme = folder / README_NAME
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if NOTICE in text:
        return
    metadata = re.match(r"---\n.*?\n---\n", text, re.DOTALL)  # the Hub reads it at the very beginning
    start = metadata.end() if metadata else 0
    write_text(readme, f"{text[:start]}{NOTICE}\n{text[start:]}")


def drop_notice(folder: Path) -> None:
    """Take the notice of [`write_notice`] out of the README of a model that is dense again."""
    readme = folder / README_NAME
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if text == f"{NOTICE}\n":
        readme.unlink()
    elif NOTICE in text:
        write_text(readme, text.replace(f"{NOTICE}\n", "", 1))
