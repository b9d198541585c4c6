"""The table of where the feed-forward network of each architecture starts and ends, and what is read off a model."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from .config import VariatorConfig
from .forward_context import StackKind, parameter_names
from .layer import FeedForwardEnd
from .network import features_of, is_map


__all__ = [
    "ARCHITECTURES",
    "FEED_FORWARDS",
    "REFUSED",
    "FeedForward",
    "Placement",
    "block_of",
    "candidates",
    "check_not_refused",
    "default_targets",
    "feed_forward_at",
    "find_feed_forwards",
    "hidden_size_of",
    "layer_of_torch",
    "named_stack",
    "owner_of",
    "place",
    "regex_for",
    "stack_kind",
]


@dataclass(frozen=True)
class FeedForward:
    """Where the feed-forward network of an architecture is.

    Args:
        start: regex over the end of a module's full name: the module that takes the network's input.
        end: name, relative to the parent of `start`, of the module that gives its output, before the residual is
            added. `None`: `start` is the whole network.
        causal: whether the stack is causal. `None` reads it off the attention modules' `is_causal`.
        stack: name of the module inside the model that receives hidden states and their mask. `None`: the model does.
        entries_a_frame: of encoders of sound, whose hidden states are frames: how many entries of the mask that the
            stack is called with one frame stands for; 0: the stack uses no mask. `None`: it is no such encoder.
        reads_last_place: whether the model's pooled output is the hidden state at the last place of a row, be it
            padding or not. The networks then run there as they do on a real token that is not merged.
    """

    start: str
    end: str | None = None
    causal: bool | None = None
    stack: str | None = None
    entries_a_frame: int | None = None
    reads_last_place: bool = False

    def starts_at(self, module_name: str) -> bool:
        """Whether a network starts at the module of this full name."""
        return re.fullmatch(rf"(?:.*\.)?{self.start}", module_name) is not None


_POST_NORM = FeedForward(r"layer\.\d+\.intermediate", "output.dense")
_T5_ENCODER = FeedForward(r"block\.\d+\.layer\.1\.DenseReluDense")
# The encoder of an encoder–decoder model, also by itself.
_BART_ENCODER = FeedForward(r"(?:encoder\.|^)layers\.\d+\.fc1", "fc2")
_ENCODER_MLP = FeedForward(r"(?:encoder\.|^)layers\.\d+\.mlp")
_DECODER_MLP = FeedForward(r"layers\.\d+\.mlp")
_FEED_FORWARD = FeedForward(r"layers\.\d+\.feed_forward")
_LOOSE = FeedForward(r"layers\.\d+\.fc1", "fc2")
_GRANITE_MOE = FeedForward(r"layers\.\d+\.block_sparse_moe")
_XLM = FeedForward(r"ffns\.\d+")
_GPT2_MLP = FeedForward(r"h\.\d+\.mlp")
_VISION_MLP = FeedForward(r"layers?\.\d+\.mlp")
_WAV2VEC2 = FeedForward(r"encoder\.layers\.\d+\.feed_forward", stack="encoder", entries_a_frame=1)

ARCHITECTURES: dict[str, dict[str, FeedForward]] = {
    "text encoders": {
        "albert": FeedForward(r"albert_layers\.\d+\.ffn", "ffn_output"),
        "bert": _POST_NORM,
        "bert-generation": _POST_NORM,
        "big_bird": _POST_NORM,
        "camembert": _POST_NORM,
        "data2vec-text": _POST_NORM,
        "deberta": _POST_NORM,
        "deberta-v2": _POST_NORM,
        "distilbert": FeedForward(r"layer\.\d+\.ffn"),
        "electra": _POST_NORM,
        "ernie": _POST_NORM,
        "esm": _POST_NORM,
        "eurobert": _DECODER_MLP,
        "flaubert": _XLM,
        "gte": _DECODER_MLP,
        "jina_embeddings_v3": _DECODER_MLP,
        "layoutlm": _POST_NORM,
        "markuplm": _POST_NORM,
        "megatron-bert": _POST_NORM,
        "modernbert": _DECODER_MLP,
        "mpnet": _POST_NORM,
        "nomic_bert": _DECODER_MLP,
        "rembert": _POST_NORM,
        "roberta": _POST_NORM,
        "roformer": _POST_NORM,
        "siglip_text_model": replace(_DECODER_MLP, reads_last_place=True),
        "splinter": _POST_NORM,
        "ultrabert": _DECODER_MLP,
        "visual_bert": _POST_NORM,
        "xlm": _XLM,
        "xlm-roberta": _POST_NORM,
        "xlm-roberta-xl": _POST_NORM,
    },
    "encoder–decoder models (the encoder)": {
        "bart": _BART_ENCODER,
        "blenderbot": _BART_ENCODER,
        "blenderbot-small": _BART_ENCODER,
        "longt5": _T5_ENCODER,
        "m2m_100": _BART_ENCODER,
        "marian": _BART_ENCODER,
        "mbart": _BART_ENCODER,
        "mt5": _T5_ENCODER,
        "mvp": _BART_ENCODER,
        "pegasus": _BART_ENCODER,
        "plbart": _BART_ENCODER,
        "t5": _T5_ENCODER,
        "t5_gemma_module": _ENCODER_MLP,
        "umt5": _T5_ENCODER,
    },
    "causal models": {
        "afmoe": _DECODER_MLP,
        "apertus": _DECODER_MLP,
        "arcee": _DECODER_MLP,
        "aria_text": _DECODER_MLP,
        "biogpt": _LOOSE,
        "bloom": FeedForward(r"h\.\d+\.mlp\.dense_h_to_4h", "dense_4h_to_h"),
        "clip_text_model": FeedForward(r"layers\.\d+\.mlp", causal=True),
        "codegen": _GPT2_MLP,
        "cohere": _DECODER_MLP,
        "cohere2": _DECODER_MLP,
        "cohere2_moe": _DECODER_MLP,
        "cwm": _DECODER_MLP,
        "deepseek_v2": _DECODER_MLP,
        "deepseek_v3": _DECODER_MLP,
        "diffllama": _DECODER_MLP,
        "doge": _DECODER_MLP,
        "ernie4_5": _DECODER_MLP,
        "ernie4_5_moe": _DECODER_MLP,
        "exaone4": _DECODER_MLP,
        "exaone_moe": _DECODER_MLP,
        "falcon": _GPT2_MLP,
        "falcon_h1": _FEED_FORWARD,
        "flex_olmo": _DECODER_MLP,
        "gemma": _DECODER_MLP,
        "gemma2": _DECODER_MLP,
        "gemma3_text": _DECODER_MLP,
        "gemma3n_text": _DECODER_MLP,
        "gemma4_text": _DECODER_MLP,
        "glm": _DECODER_MLP,
        "glm4": _DECODER_MLP,
        "glm4_moe": _DECODER_MLP,
        "glm4_moe_lite": _DECODER_MLP,
        "gpt2": _GPT2_MLP,
        "gpt_bigcode": _GPT2_MLP,
        "gpt_neo": _GPT2_MLP,
        "gpt_neox": _DECODER_MLP,
        "gpt_neox_japanese": _DECODER_MLP,
        "gpt_oss": _DECODER_MLP,
        "gptj": _GPT2_MLP,
        "granite": _DECODER_MLP,
        "granite_swa": _DECODER_MLP,
        "granitemoe": _GRANITE_MOE,
        "granitemoeshared": _GRANITE_MOE,
        "helium": _DECODER_MLP,
        "hunyuan_v1_dense": _DECODER_MLP,
        "hunyuan_v1_moe": _DECODER_MLP,
        "hy_v3": _DECODER_MLP,
        "hyperclovax": _DECODER_MLP,
        "internlm3": _DECODER_MLP,
        "iquestcoder": _DECODER_MLP,
        "jais2": _DECODER_MLP,
        "jetmoe": _DECODER_MLP,
        "lfm2": _FEED_FORWARD,
        "lfm2_moe": _FEED_FORWARD,
        "llama": _DECODER_MLP,
        "llama4_text": _FEED_FORWARD,
        "mellum": _DECODER_MLP,
        "minicpm3": _DECODER_MLP,
        "minimax_m2": _DECODER_MLP,
        "ministral": _DECODER_MLP,
        "ministral3": _DECODER_MLP,
        "mistral": _DECODER_MLP,
        "mixtral": _DECODER_MLP,
        "modernbert-decoder": _DECODER_MLP,
        "nanochat": _DECODER_MLP,
        "nemotron": _DECODER_MLP,
        "olmo": _DECODER_MLP,
        "olmo2": _DECODER_MLP,
        "olmo3": _DECODER_MLP,
        "olmo_hybrid": _DECODER_MLP,
        "olmoe": _DECODER_MLP,
        "opt": _LOOSE,
        "persimmon": _DECODER_MLP,
        "phi": _DECODER_MLP,
        "phi3": _DECODER_MLP,
        "phi4_multimodal": _DECODER_MLP,
        "phimoe": _DECODER_MLP,
        "qwen2": _DECODER_MLP,
        "qwen2_5_vl_text": _DECODER_MLP,
        "qwen2_moe": _DECODER_MLP,
        "qwen2_vl_text": _DECODER_MLP,
        "qwen3": _DECODER_MLP,
        "qwen3_5_moe_text": _DECODER_MLP,
        "qwen3_5_text": _DECODER_MLP,
        "qwen3_moe": _DECODER_MLP,
        "qwen3_next": _DECODER_MLP,
        "qwen3_vl_text": _DECODER_MLP,
        "seed_oss": _DECODER_MLP,
        "smollm3": _DECODER_MLP,
        "solar_open": _DECODER_MLP,
        "stablelm": _DECODER_MLP,
        "starcoder2": _DECODER_MLP,
        "vaultgemma": _DECODER_MLP,
        "xglm": _LOOSE,
        "youtu": _DECODER_MLP,
    },
    "vision encoders": {
        "aimv2_vision_model": FeedForward(r"layers\.\d+\.ffn"),
        "beit": _VISION_MLP,
        "blip_2_vision_model": _VISION_MLP,
        "chinese_clip_vision_model": _VISION_MLP,
        "clip_vision_model": _VISION_MLP,
        "data2vec-vision": _POST_NORM,
        "deit": _VISION_MLP,
        "dinov2": _VISION_MLP,
        "dinov2_with_registers": _VISION_MLP,
        "dinov3_vit": _VISION_MLP,
        "dpt": _POST_NORM,
        "idefics3_vision": _VISION_MLP,
        "ijepa": _VISION_MLP,
        "internvl_vision": _VISION_MLP,
        "mlcd_vision_model": _VISION_MLP,
        "pixio": _VISION_MLP,
        "siglip2_vision_model": _VISION_MLP,
        "siglip_vision_model": _VISION_MLP,
        "smolvlm_vision": _VISION_MLP,
        "timm_wrapper": FeedForward(r"timm_model\.blocks\.\d+\.mlp"),
        "videomae": _POST_NORM,
        "vit": _VISION_MLP,
        "vit_msn": _VISION_MLP,
        "vivit": _VISION_MLP,
    },
    "audio encoders": {
        "data2vec-audio": _WAV2VEC2,
        "hubert": _WAV2VEC2,
        # Three convolutions with strides of 64, 3 and 2.
        "moonshine": replace(_ENCODER_MLP, entries_a_frame=64 * 3 * 2),
        "unispeech": _WAV2VEC2,
        "unispeech-sat": _WAV2VEC2,
        "wav2vec2": _WAV2VEC2,
        "wavlm": _WAV2VEC2,
        "whisper": replace(_BART_ENCODER, entries_a_frame=0),
    },
}
"""Where the networks of each architecture are: by kind, then by the `model_type` in the configuration."""

FEED_FORWARDS: dict[str, FeedForward] = {
    model_type: row for kind in ARCHITECTURES.values() for model_type, row in kind.items()
}

_WIDTHS = "its stages have several widths, and no plugin fits all of them"
_STAGES = f"{_WIDTHS}; its layers cut the image into windows, too"
_WINDOWS = "its layers cut the image into windows and join them again, so neighbours change from layer to layer"
_PADS = "it pads its hidden states inside, so nothing tells the plugin which of them are tokens"
_SEQUENCE_FIRST = (
    "its hidden states are sequence first, (length, batch, dim), so texts would be merged with one another"
)
_QUERIES = "its tokens are learned queries, and none is another's neighbour"
_IN_A_ROW = "the patches of all images come in one row without a batch, so nothing tells where an image ends"
_NONE = "it has no feed-forward networks"
_CAPACITY = "its experts take a limited number of a batch's tokens, so an answer depends on what else is in the batch"

REFUSED: dict[str, str] = {
    "bit": _NONE,
    "blip_2_qformer": _QUERIES,
    "canine": "its layers take characters, then stretches of them, then characters again",
    "clap_audio_model": _STAGES,
    "convbert": "its attention takes the padding in, so an answer depends on it",
    "convnext": _WIDTHS,
    "convnextv2": _WIDTHS,
    "cvt": _WIDTHS,
    "dac": _NONE,
    "dinat": _WIDTHS,
    "dinov3_convnext": _WIDTHS,
    "donut-swin": _STAGES,
    "efficientnet": _NONE,
    "encodec": _NONE,
    "falcon_mamba": _NONE,
    "focalnet": _WIDTHS,
    "fsmt": _SEQUENCE_FIRST,
    "funnel": "it pools its hidden states from block to block, so the groups of one block fit no other",
    "git": "it puts the image's tokens before the text's inside, so its call tells neither their masks nor positions",
    "glm4v_moe_vision": _IN_A_ROW,
    "glm4v_vision": _IN_A_ROW,
    "glm_ocr_vision": _IN_A_ROW,
    "glpn": _WIDTHS,
    "hgnet_v2": _NONE,
    "hiera": _STAGES,
    "idefics2_perceiver": _QUERIES,
    "idefics_perciever": _QUERIES,
    "instructblip_qformer": _QUERIES,
    "instructblipvideo_qformer": _QUERIES,
    "led": _PADS,
    "levit": _WIDTHS,
    "llama4_vision_model": "its class token comes behind the patches, so nothing tells which it is",
    "longformer": _PADS,
    "mamba": _NONE,
    "mamba2": _NONE,
    "maskformer-swin": _STAGES,
    "mobilenet_v1": _NONE,
    "mobilenet_v2": _NONE,
    "mobilevit": _WIDTHS,
    "mobilevitv2": _WIDTHS,
    "nllb-moe": _CAPACITY,
    "nystromformer": "its attention takes means over stretches of the padded length, so an answer depends on padding",
    "pegasus_x": _PADS,
    "perceiver": _QUERIES,
    "poolformer": _WIDTHS,
    "pvt": _WIDTHS,
    "pvt_v2": _WIDTHS,
    "qwen2_5_vl_vision": _IN_A_ROW,
    "qwen2_vl_vision": _IN_A_ROW,
    "qwen3_5_moe_vision": _IN_A_ROW,
    "qwen3_5_vision": _IN_A_ROW,
    "qwen3_vl_moe_vision": _IN_A_ROW,
    "qwen3_vl_vision": _IN_A_ROW,
    "reformer": _PADS,
    "regnet": _NONE,
    "resnet": _NONE,
    "rt_detr_resnet": _NONE,
    "rwkv": "its networks look at the token before each, too",
    "sam": _WINDOWS,
    "sam2_hiera_det_model": _STAGES,
    "sam3_vit_model": _WINDOWS,
    "sam_hq": _WINDOWS,
    "sam_hq_vision_model": _WINDOWS,
    "sam_vision_model": _WINDOWS,
    "segformer": _WIDTHS,
    "swiftformer": _WIDTHS,
    "swin": _STAGES,
    "swin2sr": _WINDOWS,
    "swinv2": _STAGES,
    "switch_transformers": _CAPACITY,
    "textnet": _NONE,
    "univnet": _NONE,
    "uvdoc_backbone": _NONE,
    "vitdet": _WINDOWS,
    "xlnet": _SEQUENCE_FIRST,
    "yolos": "its tokens of detected objects come behind the patches, so nothing tells which are which",
}
"""Why an architecture takes no plugin."""


def owner_of(model: nn.Module, module_name: str) -> tuple[str, nn.Module]:
    """The innermost `PreTrainedModel` around a module, which is the one that sees the 2-D mask; else the model itself.

    Args:
        model: the base model.
        module_name: full name of a module in it.

    Returns:
        The owner's full name ("" for the model itself) and the owner.
    """
    name = module_name
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if isinstance(module, PreTrainedModel):
            return name, module
    return "", model


def refusal_of(module: nn.Module) -> str | None:
    """Why a model takes no plugin, with its architecture's name; `None`: nothing is known against it."""
    if not isinstance(module, PreTrainedModel):
        return None
    model_type = module.config.model_type
    reason = REFUSED.get(model_type)
    if getattr(module.config, "attention_type", None) == "block_sparse":
        reason = f"{_PADS}. Set attention_type='original_full' in its config"
    if model_type == "doge" and module.config.is_moe:
        reason = "its router mixes the logits of all tokens of a batch, so an answer depends on what else is in it"
    return None if reason is None else f"{type(module).__name__} (model type {model_type!r}) takes no plugin: {reason}"


def check_not_refused(model: nn.Module) -> None:
    """Raise if a model in which nothing was found to put a plugin around is, or has a part, that takes none.

    Raises:
        ValueError: it is; the message names the architecture and the reason.
    """
    for module in model.modules():
        refusal = refusal_of(module)
        if refusal is not None:
            raise ValueError(f"{refusal}. Choose another model, or another way to make this one faster.")


def find_feed_forwards(model: nn.Module) -> Iterator[tuple[str, FeedForward]]:
    """Every feed-forward network of a model that the table knows.

    Args:
        model: the base model; composite models (vision-language, dual encoders) are found through their parts.

    Yields:
        The full name of the module it starts at, and its row of the table.
    """
    owners: dict[str, FeedForward | None] = {}
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        if name not in owners:
            owners[name] = owners.get(parent) if name else None
        if isinstance(module, PreTrainedModel):
            owners[name] = FEED_FORWARDS.get(module.config.model_type)
        feed_forward = owners.get(parent) if name else None
        if feed_forward is not None and feed_forward.starts_at(name):
            yield name, feed_forward


def candidates(model: nn.Module, limit: int = 12) -> list[str]:
    """Names of modules that look like a feed-forward network: inside a layer of a `ModuleList`, with a linear map."""
    found = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", f".{name}.").strip(".") for name in _in_layers(model))
    return list(found)[:limit]


def _in_layers(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        inside_layer = re.search(r"\.\d+\.", f".{name}.")
        if inside_layer and any(isinstance(child, nn.Linear | Conv1D) for child in module.children()):
            yield name


# What a model tells when plugins are put in


def default_targets(model: nn.Module, config: VariatorConfig) -> str:
    """A regex for the feed-forward networks of a known architecture."""
    stacks: dict[str, FeedForward] = {}
    widths: dict[str, int] = {}
    names = []
    found = [(name, feed_forward, *owner_of(model, name)) for name, feed_forward in find_feed_forwards(model)]
    found = [each for each in found if not _is_decoder_of_an_encoder(each[-1])]
    towers = {
        owner_name for _, feed_forward, owner_name, owner in found if stack_kind(owner, feed_forward) == "vision"
    }
    # A tower alone: what writes the text would have nothing to merge.
    merges_text = config.compress_text_tokens or config.compress_image_tokens
    only_towers = bool(towers) and config.compress_vision_tower and not merges_text
    for name, feed_forward, owner_name, owner in found:
        if config.compress_vision_tower if owner_name in towers else not only_towers:
            stacks[owner_name] = feed_forward
            names.append(name)
            width = hidden_size_of(owner, model.get_submodule(name), name)
            if widths.setdefault(owner_name, width) != width:
                raise ValueError(f"{type(owner).__name__} takes no plugin: {_WIDTHS}.")
    if not names:
        check_not_refused(model)
        model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ValueError(
            f"No feed-forward network to compress was found in {type(model).__name__} (model type {model_type!r}). "
            "Please specify `target_modules` (where one starts), `end_module` (where it ends) and `stack_module` (the "
            f"module that takes the attention mask). Modules that may be one: {candidates(model)}. Known model types: "
            f"{sorted(FEED_FORWARDS)}."
        )
    if config.compress_vision_tower:
        _warn_about_parts(model, list(stacks))
    return regex_for(model, names, stacks)


def _warn_about_parts(model: nn.Module, stacks: list[str]) -> None:
    """Say which parts of a model of several have layers and get no plugin, since the table has no row for them.

    Args:
        model: the base model.
        stacks: full names of the models that get a plugin.
    """
    left: dict[str, str] = {}
    for key in _in_layers(model):
        name, owner = owner_of(model, key)
        if name not in left and isinstance(owner, PreTrainedModel) and owner.config.model_type not in FEED_FORWARDS:
            model_type = owner.config.model_type
            reason = REFUSED.get(model_type, "not known")
            left[name] = f"{(name or type(owner).__name__)!r} (model type {model_type!r}: {reason})"
    if left:
        warnings.warn(
            f"The plugin of {type(model).__name__} goes into {', '.join(map(repr, stacks))} alone. Without one stay "
            f"{', '.join(left.values())}. `target_modules`, `end_module` and `stack_module` describe others.",
            stacklevel=2,
        )


def _is_decoder_of_an_encoder(owner: nn.Module) -> bool:
    """Whether a stack attends to an encoder: only the encoder's networks merge (Xiao et al. 2023, section 4.1)."""
    return isinstance(owner, PreTrainedModel) and bool(getattr(owner.config, "add_cross_attention", False))


def block_of(name: str) -> str | None:
    """Full name of the block that a module is in: up to the first number, which counts the blocks of a stack."""
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts[:-1]) if part.isdigit()), None)
    return None if number is None else ".".join(parts[: number + 1])


def regex_for(model: nn.Module, names: list[str], stacks: dict[str, FeedForward]) -> str:
    """The most general regex that matches `names` and no other module, so that the plugin fits other heads too.

    Args:
        model: the base model.
        names: full names of modules.
        stacks: the row whose `start` matches them, by the full name of the model that they are in.
    """
    anywhere = "|".join(sorted({rf"(?:.*\.)?{row.start}" for row in stacks.values()}))
    ends = {re.escape(name.rpartition(".")[2]): row for name, row in stacks.items() if name}
    in_stacks = "|".join(rf"(?:.*\.)?{end}\.(?:.*\.)?{row.start}" for end, row in sorted(ends.items()))
    for regex in (anywhere, in_stacks):
        if {name for name, _ in model.named_modules() if re.fullmatch(regex, name)} == set(names):
            return regex
    return "|".join(map(re.escape, names))


def feed_forward_at(owner: nn.Module, key: str, config: VariatorConfig) -> FeedForward:
    """The table's row for a module, or what the configuration says of an architecture that is not in it."""
    row = FEED_FORWARDS.get(owner.config.model_type) if isinstance(owner, PreTrainedModel) else None
    if config.end_module is None and row is not None and row.starts_at(key):
        return row if config.causal is None else replace(row, causal=config.causal)
    reads_last_place = row is not None and row.reads_last_place
    return FeedForward(re.escape(key), config.end_module, config.causal, reads_last_place=reads_last_place)


def named_stack(model: nn.Module, stack_module: str, key: str) -> tuple[str, nn.Module]:
    """The innermost module around `key` whose name is, or ends in, `stack_module`."""
    name = key
    while name:
        name = name.rpartition(".")[0]
        if name == stack_module or name.endswith(f".{stack_module}"):
            return name, model.get_submodule(name)
    if stack_module == "":
        return "", model
    raise ValueError(
        f"stack_module={stack_module!r} is no module around {key!r}. Name one of the modules on its path, or '' for "
        "the model itself."
    )


def stack_kind(stack: nn.Module, feed_forward: FeedForward, model: nn.Module | None = None) -> StackKind:
    """Whether a stack is an encoder, causal, or an encoder of images or of sound.

    Args:
        stack: the module that receives the tokens.
        feed_forward: the table's row for its networks.
        model: the whole model, which may use the stack otherwise than its architecture tells.
    """
    if isinstance(stack, PreTrainedModel) and "pixel_values" in (stack.main_input_name, *parameter_names(stack)[:1]):
        return "vision"
    if feed_forward.entries_a_frame is not None:
        return "audio"
    causal = feed_forward.causal
    if causal is None:
        marks = [bool(module.is_causal) for module in stack.modules() if hasattr(module, "is_causal")]
        causal = any(marks) if marks else _has_causal_heads_alone(stack)
        causal = causal or (model is not None and _writes_for_another(stack, model))
    return "causal" if causal else "encoder"


def _has_causal_heads_alone(stack: nn.Module) -> bool:
    """Whether transformers offers the architecture for next-token prediction and not for filling in masked words."""
    model_type = stack.config.model_type if isinstance(stack, PreTrainedModel) else None
    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _writes_for_another(stack: nn.Module, model: nn.Module) -> bool:
    """Whether a model of several towers writes its text with a stack, though its attention is not all causal.

    PaliGemma's is such a one: images and prompt attend both ways, what it writes does not.
    """
    return any(
        isinstance(around, PreTrainedModel)
        and around.can_generate()
        and around.config.get_text_config() is not around.config
        and not (around.config.is_encoder_decoder or around.config.get_text_config().is_encoder_decoder)
        and _embeds_in(around, stack)
        for around in model.modules()
    )


def _embeds_in(model: PreTrainedModel, stack: nn.Module) -> bool:
    """Whether the embeddings of a model's words lie in a stack."""
    try:
        return model.get_input_embeddings() in stack.modules()
    except NotImplementedError:  # where transformers does not find which they are
        return False


def hidden_size_of(owner: nn.Module, target: nn.Module, key: str) -> int:
    """Width of the hidden states that a feed-forward network takes and gives."""
    if isinstance(owner, PreTrainedModel) and hasattr(owner.config, "hidden_size"):
        return int(owner.config.hidden_size)
    for module in target.modules():
        if isinstance(module, nn.Linear):
            return module.in_features
    raise ValueError(
        f"The width of {key!r} is not known: it has no nn.Linear and its model has no config.hidden_size."
    )


@dataclass(frozen=True)
class Placement:
    """Where the plugin of one feed-forward network goes in a model.

    Args:
        key: full name of the module where the network starts.
        feed_forward: the table's row for it.
        hidden_size: d, width of the hidden states.
        stack_name: full name of the module that receives the tokens and their mask.
        stack: that module.
        kind: whether the stack is an encoder, causal, or an encoder of images or of sound.
        layers: of a span, which starts at a whole layer, the full names of its layers.
    """

    key: str
    feed_forward: FeedForward
    hidden_size: int
    stack_name: str
    stack: nn.Module
    kind: StackKind
    layers: tuple[str, ...] = ()

    @property
    def ends(self) -> list[str]:
        """Full names of the modules where the network starts and ends; one where one module is all of it."""
        parent, end = self.key.rpartition(".")[0], self.feed_forward.end
        return [self.key] if end is None else [self.key, f"{parent}.{end}".strip(".")]


def layer_of_torch(model: nn.Module, key: str) -> nn.TransformerEncoderLayer | nn.TransformerDecoderLayer | None:
    """The layer of torch's own transformer whose feed-forward network starts at `key`, if it is one."""
    parent = model.get_submodule(key.rpartition(".")[0])
    return parent if isinstance(parent, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)) else None


def _check_widths(model: nn.Module, key: str, target: nn.Module, end: str | None, hidden_size: int) -> None:
    """Raise where a network cannot start or end, as far as the modules alone tell it.

    Args:
        model: the base model.
        key: full name of the module where the network starts.
        target: that module.
        end: where it ends, named relative to the parent of `key`; `None`: `target` is all of it.
        hidden_size: d, width of the hidden states.
    """
    if is_map(target) and features_of(target)[0] != hidden_size:
        raise ValueError(
            f"{key} takes vectors of {features_of(target)[0]} entries, but the model's hidden size is "
            f"{hidden_size}: no feed-forward network starts there. Name the module where one does in target_modules."
        )
    if end is None:
        if is_map(target) and features_of(target)[1] != hidden_size:
            raise ValueError(
                f"{key} takes vectors of {hidden_size} entries and gives vectors of {features_of(target)[1]}, so it "
                "is only the start of a feed-forward network. Name the module where the network ends in end_module."
            )
        return
    path = f"{key.rpartition('.')[0]}.{end}".removeprefix(".")
    module = model.get_submodule(path)
    module = module.base_layer if isinstance(module, FeedForwardEnd) else module
    if any(module is inner for inner in target.modules()):
        raise ValueError(
            f"end_module={end!r} lies inside of {key!r}, where the network starts. Leave end_module out where one "
            "module is the whole network, or name one behind it."
        )
    if is_map(module) and features_of(module)[1] != hidden_size:
        raise ValueError(
            f"end_module={end!r} ({path!r}) gives vectors of {features_of(module)[1]} entries, but the model's hidden "
            f"size is {hidden_size}: no feed-forward network ends there. Name the module that gives its output."
        )
    required = [
        name
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and parameter.default is parameter.empty
    ]
    if len(required) > 1:
        raise ValueError(
            f"end_module={end!r} ({path!r}) takes {' and '.join(required)}: what comes beside the merged tokens, such "
            "as a residual, is not merged with them. Name a module in it that takes the network's vectors alone."
        )


def place(model: nn.Module, config: VariatorConfig, key: str, target: nn.Module) -> Placement:
    """Where the plugin of one feed-forward network goes; changes nothing.

    Args:
        model: the base model.
        config: the plugin's configuration.
        key: full name of the module where the network starts.
        target: that module, without a plugin.

    Raises:
        ValueError: the architecture takes no plugin, the model has no such end of the network or no such stack, or
            does not tell its hidden size.
    """
    owner_name, owner = owner_of(model, key)
    refusal = refusal_of(owner)
    if refusal is not None:
        raise ValueError(f"{refusal}. Take {key!r} out of target_modules.")
    layer = layer_of_torch(model, key)
    if layer is not None and not layer.self_attn.batch_first:
        raise ValueError(
            f"{key!r} lies in a {type(layer).__name__} with batch_first=False: {_SEQUENCE_FIRST}. Make it with "
            "batch_first=True."
        )
    feed_forward = feed_forward_at(owner, key, config)
    hidden_size = hidden_size_of(owner, target, key)
    if feed_forward.end is not None:
        parent = model.get_submodule(key.rpartition(".")[0])
        try:
            parent.get_submodule(feed_forward.end)
        except AttributeError as error:
            raise ValueError(
                f"end_module={feed_forward.end!r} was not found beside {key!r}. Name the module relative to the "
                "parent of the module where the feed-forward network starts; that has "
                f"{sorted(dict(parent.named_children()))}."
            ) from error
    _check_widths(model, key, target, feed_forward.end, hidden_size)
    stack_name, stack = owner_name, owner
    if config.stack_module is not None:
        stack_name, stack = named_stack(model, config.stack_module, key)
    elif feed_forward.stack is not None:
        stack_name, stack = named_stack(model, feed_forward.stack, key)
    return Placement(key, feed_forward, hidden_size, stack_name, stack, stack_kind(stack, feed_forward, model))
