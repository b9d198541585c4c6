"""`Sparse24Config`: the entry `quantization_config` of a packed model's config.json."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

from transformers.utils.quantization_config import QuantizationConfigMixin

from .linear import Unpacked


__all__ = ["METHOD", "Sparse24Config"]

METHOD = "sparse24"
"""The `quant_method` of packed models."""

_PACKED_FORMAT = "sparse-24-bitmask"
_FORMATS = (_PACKED_FORMAT, "sparse-bitmask", "dense")


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
        self.targets = None if targets is None else list(targets)
        self.ignore = list(ignore)
        self.unpacked = unpacked
        self.format = format
        self.checksums = checksums
        if unpacked not in get_args(Unpacked):
            raise ValueError(f"unpacked={unpacked!r} is not one of {get_args(Unpacked)}.")
        if format not in _FORMATS:
            raise ValueError(f"format={format!r} can't be read. These can: {', '.join(_FORMATS)}.")

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
        fields = dict(entry.get("sparsity_config", {}))
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
