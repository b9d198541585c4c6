"""Configuration of a Variator plugin."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from transformers import PreTrainedTokenizerBase

from ...adapter_card import CardContent, hub_id, pipeline_tag, usage_of_config
from ...field_types import check_choice, check_regex, shown, whole_number
from ...saved_config import SavedConfig
from .decompression import DECOMPRESSIONS
from .scoring import SCORINGS


__all__ = ["VariatorConfig"]

DEFAULT_CORRECTION = 0.25
DEFAULT_BOTTLENECK = 64
MOST_KEPT = 2**16
PATCH_GROUPINGS = ("window", "raster")
CORRECTION_FORMS = ("added", "sliced")
CORRECTION_BITS = (4, 8)
COMPENSATION_BITS = 8
_PARTS = r"(?:.*\.)?(?:{})(?:\..*)?$"  # groups without numbers: the pattern may refer to its own


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

    method = "VARIATOR"

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
    layer_spans: list[list[int]] | None = field(
        default=None,
        metadata={
            "help": "Merge around whole layers, attention included, instead of around feed-forward networks: "
            "`[[1, 3]]` runs layers 1 to 3 on merged vectors, and every token keeps its own residual. For encoders of "
            "images and of sound whose layers take the hidden states alone; with `decompression='bottleneck'`."
        },
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
    ratio_schedule: dict[int, dict[str, int]] | None = field(
        default=None,
        metadata={
            "help": "What each compression ratio means in each module, `{k: {module: ratio}}`, with modules named as "
            "in `ratio_pattern`; `1` leaves a module alone, and one that a row does not name takes k. Choosing k "
            "chooses the row. Made by `peft_variator.allocate`."
        },
    )
    bottleneck_dim: int | None = field(
        default=None,
        metadata={
            "help": "Width of `decompression='bottleneck'`, which it means where no decompression is named; the same "
            "as `correction_dim` there."
        },
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
    keep_outliers: float | None = field(
        default=None,
        metadata={
            "help": "Share of a text's tokens, in (0, 1), that are not merged on top of those above: the ⌈share · n⌉ "
            "of its n tokens whose output of the network is going to be longest, by a linear probe that "
            "`peft_variator.calibrate` fits. They are chosen where a call reaches the first module that merges. "
            "`None`: none. Image patches and frames of sound are merged as without it."
        },
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
    decompression: str | None = field(
        default=None,
        metadata={
            "help": "How each token of a group gets back what is its own: `neurons` runs a copy of some of the "
            "network's neurons for every token, and the rest once for a group; `bottleneck` is the paper's, "
            "`Linear(2d → r), tanh, Linear(r → d)`. `None` is `neurons`, or `bottleneck` where `bottleneck_dim` is "
            "given, or `layer_spans`."
        },
    )
    correction_dim: int | float | None = field(
        default=None,
        metadata={
            "help": "Width of the correction: the number of neurons that `decompression='neurons'` copies, or a share "
            "of the network's inner width as a float in (0, 1] (`None` is a quarter of it); entries of the hidden "
            "layer of `decompression='bottleneck'` (`None` is 64)."
        },
    )
    correction_form: str = field(
        default="added",
        metadata={
            "help": "What `decompression='neurons'` does at merged rows: `added` runs the whole network and takes off "
            "what the copies give for the row, which serves a quantised or packed base; `sliced` runs the network "
            "without the neurons that are copied, which is less work and needs plain weights. Both start at the same "
            "value, and a plugin that was trained in one form is another function in the other."
        },
    )
    correction_pattern: dict[str, int | float] = field(
        default_factory=dict,
        metadata={"help": "`correction_dim` of single modules, which are named as in `ratio_pattern`."},
    )
    correction_rank: int | None = field(
        default=None,
        metadata={
            "help": "Rank of what is trained and saved of the neurons that `decompression='neurons'` copies: they are "
            "the base model's rows and a low-rank update, read when the plugin is loaded. `None` trains and saves "
            "them whole."
        },
    )
    correction_bits: int | None = field(
        default=None,
        metadata={
            "help": "Bits of each number of the copied neurons in a plugin that was shrunk: 4 or 8. They are the base "
            "model's rows, read when the plugin is loaded, and a rounded difference. Written by "
            "`peft_variator.shrink_plugin`; `None`: they are whole."
        },
    )
    compensation_rank: int | None = field(
        default=None,
        metadata={
            "help": "Rank of an update of the block's maps that is active only while the plugin merges: those of the "
            "attention for all tokens, those of the network for the merged rows. `None`: there is none."
        },
    )
    compensation_bits: int | None = field(
        default=None,
        metadata={
            "help": "Bits of each number of the compensation in a plugin that was shrunk: 8. Written by "
            "`peft_variator.shrink_plugin`; `None`: they are whole."
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
            "with an error. Those of `keep_outliers`, and further ones at the ends of a text, have room beside them. "
            "Without a compiler it has no effect."
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
        if self.peft_version is not None and isinstance(self.ratio_schedule, dict):  # JSON has no integer keys
            self.ratio_schedule = {_key_of_row(k): row for k, row in self.ratio_schedule.items()}
        super().__post_init__()

    def check(self) -> None:
        """Check every field; see [`SavedConfig.check`]."""
        super().check()
        if isinstance(self.target_modules, str) and self.target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            raise ValueError(
                f"target_modules={self.target_modules!r} means every linear map of a model, but a plugin goes around "
                "whole feed-forward networks. Leave target_modules out where the architecture is known, or "
                "name the modules where its networks start, and in end_module where they end."
            )
        if self.end_module == "":
            raise ValueError("end_module='' names no module. Leave it out where a target module is the whole network.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform. Name the layers' "
                "indices in layers_to_transform, or drop layers_pattern."
            )
        self._check_spans()
        self._check_ratios()
        self._check_schedule()
        self._choose_decompression()
        self._check_choices()
        self._check_counts()

    def _check_spans(self) -> None:
        if self.layer_spans is None:
            return
        behind = 0  # number of the first layer that may come next
        for span in self.layer_spans:
            numbers = [whole_number("layer_spans: number of a layer", number, 0) for number in span]
            if len(numbers) != 2 or not behind <= numbers[0] <= numbers[1]:
                raise ValueError(
                    f"layer_spans={shown(self.layer_spans)} has to hold pairs, the numbers of the first and the last "
                    "layer of each span (from 0), in order and without a layer in two of them: [[1, 3]], say."
                )
            behind = numbers[1] + 1
        if not self.layer_spans:
            raise ValueError("layer_spans=[] names no layers. Leave it out to merge around feed-forward networks.")
        for name in ("end_module", "stack_module", "causal", "layers_to_transform", "keep_outliers", "ratio_schedule"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={shown(getattr(self, name))} beside layer_spans={shown(self.layer_spans)}: it describes "
                    "plugins around feed-forward networks. Leave one of them out."
                )
        if self.decompression == "neurons":
            raise ValueError(
                f"decompression='neurons' copies neurons of one network, and layer_spans={shown(self.layer_spans)} "
                "merges around whole layers. Leave decompression out, or choose 'bottleneck'."
            )

    def _check_ratios(self) -> None:
        whole_number("compression_ratio", self.compression_ratio, 1)
        for name, ratio in self.ratio_pattern.items():
            whole_number(f"ratio_pattern[{name!r}]", ratio, 1)
            _check_pattern("ratio_pattern", name)

    def _check_schedule(self) -> None:
        if self.ratio_schedule is None:
            return
        if self.ratio_pattern:
            raise ValueError(
                "ratio_pattern beside a ratio_schedule: both say what the ratio is in a module. Put "
                f"{self.ratio_pattern} into the rows of the schedule."
            )
        rows = sorted(self.ratio_schedule)
        for k, row in self.ratio_schedule.items():
            whole_number("ratio_schedule: key", k, 2)  # 1 is the base model everywhere
            for name, ratio in row.items():
                whole_number(f"ratio_schedule[{k}][{name!r}]", ratio, 1)
                _check_pattern(f"ratio_schedule[{k}]", name)
        if self.compression_ratio != 1 and self.compression_ratio not in self.ratio_schedule:
            raise ValueError(
                f"compression_ratio={self.compression_ratio} is no row of ratio_schedule, which has {rows}. Choose "
                "one of them, or 1."
            )

    def _choose_decompression(self) -> None:
        if self.decompression is None:
            is_meant = self.output_bias or self.bottleneck_dim is not None or self.layer_spans is not None
            self.decompression = "bottleneck" if is_meant or self.was_saved else "neurons"  # files of 0.1 name none
        if self.decompression == "bottleneck":
            self._choose_bottleneck()
        elif self.decompression == "neurons":
            if self.output_bias:
                raise ValueError(
                    f"output_bias={self.output_bias} belongs to decompression='bottleneck', not to 'neurons'. Leave "
                    "one of them out."
                )
            self._check_correction("correction_dim", self.correction_dim)
            for name, width in self.correction_pattern.items():
                _check_pattern("correction_pattern", name)
                self._check_correction(f"correction_pattern[{name!r}]", width)
            if self.bottleneck_dim is not None and not self.was_saved and self.bottleneck_dim != self.correction_dim:
                raise ValueError(
                    f"bottleneck_dim={self.bottleneck_dim!r} is a width of decompression='bottleneck', not of "
                    "'neurons'. Name correction_dim in its place."
                )
            self.bottleneck_dim = None

    def _choose_bottleneck(self) -> None:
        for name in ("correction_pattern", "correction_rank", "correction_bits"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} belongs to decompression='neurons', not to 'bottleneck'. Set "
                    "decompression='neurons', or leave it out."
                )
        if self.correction_form == "sliced":
            raise ValueError(
                f"correction_form={self.correction_form!r} belongs to decompression='neurons', not to 'bottleneck'. "
                "Set decompression='neurons', or leave it out."
            )
        if isinstance(self.correction_dim, float):
            raise ValueError(
                f"correction_dim={self.correction_dim!r}: a share of the network's inner width is meant for "
                "decompression='neurons'. The width of 'bottleneck' is an integer."
            )
        for name in ("bottleneck_dim", "correction_dim"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), 1)
        if None not in (self.bottleneck_dim, self.correction_dim) and self.bottleneck_dim != self.correction_dim:
            raise ValueError(
                f"bottleneck_dim={self.bottleneck_dim} and correction_dim={self.correction_dim} are the same width. "
                "Name one of them."
            )
        self.bottleneck_dim = self.bottleneck_dim or self.correction_dim or DEFAULT_BOTTLENECK
        self.correction_dim = None

    def _check_choices(self) -> None:
        check_choice("scoring", self.scoring, SCORINGS)
        check_choice("decompression", self.decompression, DECOMPRESSIONS)
        check_choice("patch_grouping", self.patch_grouping, PATCH_GROUPINGS)
        check_choice("correction_form", self.correction_form, CORRECTION_FORMS)

    def _check_counts(self) -> None:
        for name in ("correction_rank", "compensation_rank"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), 1)
        if self.correction_bits is not None:
            if self.correction_bits not in CORRECTION_BITS:
                raise ValueError(f"correction_bits={shown(self.correction_bits)} has to be 4 or 8, or None.")
            if self.correction_rank is not None:
                raise ValueError(
                    f"correction_bits={self.correction_bits} beside correction_rank={self.correction_rank}: an update "
                    "of low rank is small as it is. Leave one of them out."
                )
        if self.compensation_bits not in (None, COMPENSATION_BITS):
            raise ValueError(
                f"compensation_bits={shown(self.compensation_bits)} has to be {COMPENSATION_BITS}, or None."
            )
        if self.compensation_bits is not None and self.compensation_rank is None:
            raise ValueError(
                f"compensation_bits={self.compensation_bits} without compensation_rank: there is no compensation that "
                "could have been rounded. Leave it out."
            )
        share = self.keep_outliers
        if share is not None and (not isinstance(share, float) or not 0 < share < 1):
            raise ValueError(
                f"keep_outliers={shown(share)} is a share of a text's tokens, so it has to be a float between 0 and "
                "1. Leave it out to keep none."
            )
        if whole_number("max_kept_tokens", self.max_kept_tokens, 0) > MOST_KEPT:
            raise ValueError(
                f"max_kept_tokens={self.max_kept_tokens} is room for more rows than compiled code could allocate; it "
                f"has to be at most {MOST_KEPT}."
            )
        if self.trained_ratios is not None:
            for ratio in self.trained_ratios:
                whole_number("trained_ratios: entry", ratio, 1)
            self.trained_ratios = sorted(set(self.trained_ratios))
        whole_number("keep_first_tokens", self.keep_first_tokens, 0)
        whole_number("keep_last_tokens", self.keep_last_tokens, 0)
        for token_id in self.keep_token_ids:
            whole_number("keep_token_ids: entry", token_id, 0)
        self.keep_token_ids = sorted(set(self.keep_token_ids))

    @staticmethod
    def _check_correction(name: str, width: int | float | None) -> None:
        if isinstance(width, float):
            if not 0 < width <= 1:
                raise ValueError(
                    f"{name}={width!r}: as a float it is a share of the network's inner width, so it has to lie in "
                    "(0, 1]. A number of neurons is an integer."
                )
        elif width is not None:
            whole_number(name, width, 1)

    @property
    def reads_base(self) -> bool:
        """Whether the copied neurons are the base model's rows and something that is kept."""
        return self.correction_rank is not None or self.correction_bits is not None

    @property
    def bottleneck_width(self) -> int:
        """Width of the bottleneck, also where it stands in for neurons that a network has not."""
        return self.bottleneck_dim or DEFAULT_BOTTLENECK

    def correction_width(self, inner: int, module_name: str) -> int:
        """Number of neurons that `decompression="neurons"` copies of a network.

        Args:
            inner: number of neurons of the network.
            module_name: full name of the module in the base model.

        Raises:
            ValueError: the network has fewer.
        """
        field_name = "correction_dim"
        width = DEFAULT_CORRECTION if self.correction_dim is None else self.correction_dim
        for pattern, special in self.correction_pattern.items():
            if matches_pattern(pattern, module_name):
                field_name, width = f"correction_pattern[{pattern!r}]", special
                break
        if isinstance(width, float):
            return max(1, round(width * inner))
        if width > inner:
            raise ValueError(
                f"{field_name}={width} is more than the {inner} neurons that the feed-forward network "
                f"{module_name!r} has. Choose a smaller one, or a share of them as a float in (0, 1]."
            )
        return width

    @property
    def merged_around(self) -> str:
        """What the plugin merges around, in words."""
        if self.layer_spans is None:
            return "every feed-forward network"
        spans = [f"{first} to {last}" if first < last else str(first) for first, last in self.layer_spans]
        return f"layers {', '.join(spans)}, attention included,"

    def card(self, class_name: str | None) -> CardContent:
        """What the card of a plugin with this configuration says; see [`SavedConfig.card`]."""
        base = self.base_model_name_or_path
        trained = self.trained_ratios
        rows = f"; rows of its schedule: {', '.join(map(str, self.ratio_schedule))}" if self.ratio_schedule else ""
        body = _CARD.format(
            base=hub_id(base) or "a base model",
            merged_around=self.merged_around,
            ratio=f"{self.compression_ratio}{rows}",
            trained="not recorded" if trained is None else ", ".join(map(str, trained)),
            scoring=self.scoring,
            decompression=f"{self.decompression}"
            + ("" if self.correction_bits is None else f", its copies in {self.correction_bits} bits a number")
            + ("" if self.compensation_bits is None else f", its compensation in {self.compensation_bits}"),
            kept=f"the first {self.keep_first_tokens} and the last {self.keep_last_tokens} of a text"
            + (f", and {len(self.keep_token_ids)} special ones" if self.keep_token_ids else "")
            + (f", and {self.keep_outliers:.3g} of its tokens, by a probe" if self.keep_outliers else ""),
        )
        other = [ratio for ratio in self.ratio_schedule or trained or () if ratio != self.compression_ratio]
        lines = ["model.eval()"] + [f"model.set_compression_ratio({ratio})  # more: faster" for ratio in other[-1:]]
        return CardContent(
            body=body + usage_of_config(self, class_name, lines),
            base=base,
            tags=["peft-variator", "variator", "compression"],
            pipeline_tag=pipeline_tag(class_name, self.task_type),
        )

    def ratio_of(self, module_name: str, k: int | None = None) -> int:
        """The compression ratio that this configuration gives a module.

        Args:
            module_name: full name of the module in the base model.
            k: row of `ratio_schedule`, or 1; `None`: `compression_ratio`.

        Raises:
            ValueError: the schedule has no such row.
        """
        k = self.compression_ratio if k is None else k
        if self.ratio_schedule is None:
            ratios = self.ratio_pattern
        elif k == 1:
            return 1
        elif k in self.ratio_schedule:
            ratios = self.ratio_schedule[k]
        else:
            raise ValueError(
                f"compression_ratio={k} is no row of the plugin's ratio_schedule, which has "
                f"{sorted(self.ratio_schedule)}. Choose one of them, or 1 (the exact base model)."
            )
        for pattern, ratio in ratios.items():
            if matches_pattern(pattern, module_name):
                return ratio
        return k

    def leaves_alone(self, module_name: str) -> bool:
        """Whether no row of the schedule merges anything in a module, which then gets no plugin."""
        rows = self.ratio_schedule
        return rows is not None and all(self.ratio_of(module_name, k) == 1 for k in rows)

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


_CARD = """# Variator plugin for {base}

A compression plugin (Variator, [Xiao et al. 2023](https://arxiv.org/abs/2310.15724)), made with peft-variator. It
merges k neighbouring tokens before {merged_around} of the base model and expands them after it, which saves
computation at some cost in quality. At k = 1, and without the plugin, the base is what it was.

- Compression ratio k: {ratio}
- Trained for k: {trained}
- Scoring: {scoring}; decompression: {decompression}
- Tokens that are never merged: {kept}

"""


def matches_pattern(pattern: str, module_name: str) -> bool:
    """Whether a key of `ratio_pattern` or the like means a module: its name's end, whole parts of it, or a regex."""
    return re.match(_PARTS.format(pattern), module_name) is not None


def _key_of_row(key: Any) -> Any:
    """A key of `ratio_schedule` in a file as the ratio that it is, if it is one; checked later."""
    return int(key) if isinstance(key, str) and re.fullmatch("[1-9][0-9]{0,9}", key) else key


def _check_pattern(field_name: str, pattern: str) -> None:
    if not pattern:
        raise ValueError(f"{field_name} has the key {pattern!r}, which names no module.")
    check_regex(f"{field_name}, as a key,", pattern, _PARTS)
