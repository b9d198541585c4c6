"""Configuration of a Variator plugin."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from peft import PeftType
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from transformers import PreTrainedTokenizerBase

from ...adapter_state import SavedConfig


__all__ = ["VariatorConfig"]

SCORINGS = ("token", "concat")
DECOMPRESSIONS = ("bottleneck", "neurons")
DEFAULT_CORRECTION = 0.125
PATCH_GROUPINGS = ("window", "raster")


@dataclass
class VariatorConfig(SavedConfig):
    """Configuration of Variator, plug-and-play compression plugins around the feed-forward networks of a transformer.

    Based on Xiao et al. 2023, "Variator: Accelerating Pre-trained Models with Plug-and-Play Compression Modules"
    (https://arxiv.org/abs/2310.15724). `VariatorConfig()` works as it is for every architecture in
    [`peft_variator.tuners.variator.architectures.FEED_FORWARDS`]; any other one is described by `target_modules`
    (where a feed-forward network starts), `end_module` (where it ends) and `stack_module` (which module sees the
    mask).

    Raises:
        ValueError: a field has a value that no plugin can be built from; the message names the field, the value and
            what is allowed.
    """

    target_modules: set[str] | str | None = field(
        default=None,
        metadata={
            "help": "Modules at which a feed-forward network starts: a list of name suffixes or a regex that matches "
            "the full name. `None` finds the feed-forward networks of the architecture."
        },
    )
    exclude_modules: set[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave out, as name suffixes or as a regex over the full name."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers that get a plugin. `None` takes all of them."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Name of the ModuleList that `layers_to_transform` counts in. `None` takes the first number in a "
            "module's name."
        },
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules besides the plugin that are trained and saved with it, such as a new head."},
    )
    compression_ratio: int = field(
        default=4,
        metadata={
            "help": "k, the number of neighbouring hidden vectors merged into one; `1` is the exact base model."
        },
    )
    ratio_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={
            "help": "Compression ratio of the modules whose name ends in the key, contains it as whole parts "
            "(`layer.0` is all of layer 0), or matches it as a regex."
        },
    )
    bottleneck_dim: int = field(
        default=64, metadata={"help": "Width of the decompressor's hidden layer, in units of vector entries."}
    )
    scoring: str = field(
        default="token",
        metadata={
            "help": "How members of a group are weighted: `token` gives one score per token from weights that do not "
            "depend on k, so that one plugin serves every k; `concat` is the paper's Linear(k·d → k), tied to its k."
        },
    )
    keep_first_tokens: int = field(
        default=1,
        metadata={"help": "Number of tokens at the start of each sequence that are never merged (attention sinks)."},
    )
    keep_last_tokens: int = field(
        default=1, metadata={"help": "Number of tokens at the end of each sequence that are never merged."}
    )
    keep_token_ids: list[int] = field(
        default_factory=list,
        metadata={"help": "Token ids that are never merged, such as separators; see `VariatorConfig.from_tokenizer`."},
    )
    patch_grouping: str = field(
        default="window",
        metadata={
            "help": "Which image patches are neighbours: `window` takes the most nearly square block of k patches "
            "(2×2 for k = 4), `raster` takes k patches in reading order."
        },
    )
    compress_text_tokens: bool = field(
        default=True, metadata={"help": "Whether the text tokens of a language model are merged."}
    )
    compress_image_tokens: bool = field(
        default=True, metadata={"help": "Whether the image tokens inside a vision-language model's text are merged."}
    )
    compress_vision_tower: bool = field(
        default=True, metadata={"help": "Whether the patches inside a vision model or vision tower are merged."}
    )
    end_module: str | None = field(
        default=None,
        metadata={
            "help": "For architectures that are not known: where the feed-forward network ends, named relative to the "
            "parent of the module it starts at (`output.dense`). `None`: the module it starts at is all of it."
        },
    )
    stack_module: str | None = field(
        default=None,
        metadata={
            "help": "For architectures that are not known: name of the module whose forward takes `input_ids` or "
            "`inputs_embeds` and the 2-D `attention_mask`. `None`: the innermost `PreTrainedModel` around it."
        },
    )
    causal: bool | None = field(
        default=None,
        metadata={
            "help": "For architectures that are not known: whether each token sees only those before it, so that none "
            "whose prediction is used may be merged with later ones. `None` asks the model, which a home-made one "
            "cannot answer: it counts as bidirectional."
        },
    )
    decompression: str = field(
        default="bottleneck",
        metadata={
            "help": "How each token of a group gets back what is its own: `bottleneck` is the paper's correction, "
            "`Linear(2d → r), tanh, Linear(r → d)`; `neurons` runs a copy of some of the network's neurons for every "
            "token, and the rest once for a group."
        },
    )
    correction_dim: int | float | None = field(
        default=None,
        metadata={
            "help": "Number of neurons that `decompression='neurons'` copies, or a share of the network's inner width "
            "as a float in (0, 1]. `None` is an eighth of it."
        },
    )
    correction_rank: int | None = field(
        default=None,
        metadata={
            "help": "Rank of what is trained and saved of the neurons that `decompression='neurons'` copies: they are "
            "the base model's rows and a low-rank update, read when the plugin is loaded. `None` trains and saves "
            "them whole."
        },
    )
    compensation_rank: int | None = field(
        default=None,
        metadata={
            "help": "Rank of an update of the block's maps that is active only while the plugin merges: those of the "
            "attention for all tokens, those of the network for the merged rows. `None`: there is none."
        },
    )
    output_bias: bool = field(
        default=False,
        metadata={"help": "Whether the bottleneck adds a bias to what a merged token gets, as the paper's code does."},
    )
    max_kept_tokens: int = field(
        default=4,
        metadata={
            "help": "K, how many tokens of a sequence that are not merged there is room for in compiled and exported "
            "code, whose shapes cannot depend on a text: ⌈length / k⌉ + 2K + 1 rows. A sequence that needs more stops "
            "with an error. Without a compiler it has no effect."
        },
    )
    trained_ratios: list[int] | None = field(
        default=None,
        metadata={
            "help": "The compression ratios that the plugin was trained for, in order; `None`: it is not known. "
            "Written by the trainer."
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "`True` starts from plain mean pooling (zero scores, zero decompressor); `False` draws all "
            "weights at random, which is meant for tests."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("VARIATOR")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.target_modules, str) and self.target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            raise ValueError(
                f"target_modules={self.target_modules!r} means every linear map of a model, but a plugin goes around "
                "whole feed-forward networks. Leave target_modules out where the architecture is known, or "
                "name the modules where its networks start, and in end_module where they end."
            )
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform. Name the layers' "
                "indices in layers_to_transform, or drop layers_pattern."
            )
        self._check_ratios()
        self._check_choices()
        self._check_counts()

    def _check_ratios(self) -> None:
        _check_integer("compression_ratio", self.compression_ratio, 1)
        if not isinstance(self.ratio_pattern, dict):
            raise ValueError(f"ratio_pattern={self.ratio_pattern!r} has to map module names to ratios.")
        for name, ratio in self.ratio_pattern.items():
            _check_integer(f"ratio_pattern[{name!r}]", ratio, 1)
            try:
                re.compile(name)
            except (re.error, TypeError) as error:
                raise ValueError(
                    f"ratio_pattern has the key {name!r}, which is neither the end of a module's name nor a regular "
                    f"expression: {error}."
                ) from error

    def _check_choices(self) -> None:
        for name, allowed in (
            ("scoring", SCORINGS),
            ("decompression", DECOMPRESSIONS),
            ("patch_grouping", PATCH_GROUPINGS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(map(repr, allowed))}.")

    def _check_counts(self) -> None:
        _check_integer("bottleneck_dim", self.bottleneck_dim, 1)
        self._check_correction()
        if self.correction_rank is not None:
            _check_integer("correction_rank", self.correction_rank, 1)
            if self.decompression != "neurons":
                raise ValueError(
                    f"correction_rank={self.correction_rank!r} belongs to decompression='neurons', not to "
                    f"{self.decompression!r}. Set decompression='neurons', or leave it out."
                )
        if self.compensation_rank is not None:
            _check_integer("compensation_rank", self.compensation_rank, 1)
        _check_integer("max_kept_tokens", self.max_kept_tokens, 0)
        if self.trained_ratios is not None:
            if not isinstance(self.trained_ratios, list | tuple | set):
                raise ValueError(f"trained_ratios={self.trained_ratios!r} has to be a list of compression ratios.")
            for ratio in self.trained_ratios:
                _check_integer("trained_ratios: entry", ratio, 1)
            self.trained_ratios = sorted(set(self.trained_ratios))
        _check_integer("keep_first_tokens", self.keep_first_tokens, 0)
        _check_integer("keep_last_tokens", self.keep_last_tokens, 0)
        if not isinstance(self.keep_token_ids, list | tuple | set):
            raise ValueError(f"keep_token_ids={self.keep_token_ids!r} has to be a list of token ids.")
        for token_id in self.keep_token_ids:
            _check_integer("keep_token_ids: entry", token_id, 0)
        self.keep_token_ids = sorted(set(self.keep_token_ids))

    def _check_correction(self) -> None:
        if self.output_bias and self.decompression != "bottleneck":
            raise ValueError(
                f"output_bias={self.output_bias!r} is a part of decompression='bottleneck', not of "
                f"{self.decompression!r}. Leave one of them out."
            )
        if self.correction_dim is None:
            return
        if self.decompression != "neurons":
            raise ValueError(
                f"correction_dim={self.correction_dim!r} is the width of decompression='neurons', not of "
                f"{self.decompression!r}. Set decompression='neurons', or bottleneck_dim in its place."
            )
        if isinstance(self.correction_dim, float):
            if not 0 < self.correction_dim <= 1:
                raise ValueError(
                    f"correction_dim={self.correction_dim!r}: as a float it is a share of the network's inner width, "
                    "so it has to lie in (0, 1]. A number of neurons is an integer."
                )
        else:
            _check_integer("correction_dim", self.correction_dim, 1)

    def correction_width(self, inner: int) -> int:
        """Number of neurons that `decompression="neurons"` copies of a network.

        Args:
            inner: number of neurons of the network.

        Raises:
            ValueError: the network has fewer than `correction_dim`.
        """
        width = DEFAULT_CORRECTION if self.correction_dim is None else self.correction_dim
        if isinstance(width, float):
            return max(1, round(width * inner))
        if width > inner:
            raise ValueError(
                f"correction_dim={width} is more than the {inner} neurons that a feed-forward network of this model "
                "has. Choose a smaller one, or a share of them as a float in (0, 1]."
            )
        return width

    def ratio_of(self, module_name: str) -> int:
        """The compression ratio that this configuration gives a module.

        Args:
            module_name: full name of the module in the base model.
        """
        for pattern, ratio in self.ratio_pattern.items():
            if matches_pattern(pattern, module_name):
                return ratio
        return self.compression_ratio

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, **fields: Any) -> VariatorConfig:
        """A configuration whose `keep_token_ids` are the tokenizer's [CLS], [SEP], [MASK], start and end tokens.

        Padding needs no entry (it is never merged), unknown words are ordinary text.

        Args:
            tokenizer: tokenizer of the base model.
            fields: any other field of the configuration.

        Raises:
            ValueError: `keep_token_ids` was passed too.
        """
        if "keep_token_ids" in fields:
            raise ValueError(
                f"keep_token_ids={fields['keep_token_ids']!r} was passed to from_tokenizer, which fills that field. "
                "Pass a tokenizer or token ids, not both."
            )
        special = (
            tokenizer.cls_token_id,
            tokenizer.sep_token_id,
            tokenizer.mask_token_id,
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
        )
        return cls(keep_token_ids=[token_id for token_id in special if token_id is not None], **fields)


def matches_pattern(pattern: str, module_name: str) -> bool:
    """Whether a key of `ratio_pattern` means a module: as the end of its name, whole parts of it, or a regex."""
    return re.match(rf"(.*\.)?({pattern})(\..*)?$", module_name) is not None


def _check_integer(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name}={value!r} has to be an integer of at least {minimum}.")
