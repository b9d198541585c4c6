"""The table of where the feed-forward network of each architecture starts and ends, and which take no plugin."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


__all__ = [
    "ARCHITECTURES",
    "FEED_FORWARDS",
    "REFUSED",
    "SEQUENCE_FIRST",
    "WIDTHS",
    "FeedForward",
    "candidates",
    "check_not_refused",
    "find_feed_forwards",
    "in_layers",
    "owner_of",
    "refusal_of",
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

WIDTHS = "its stages have several widths, and no plugin fits all of them"
_STAGES = f"{WIDTHS}; its layers cut the image into windows, too"
_WINDOWS = "its layers cut the image into windows and join them again, so neighbours change from layer to layer"
_PADS = "it pads its hidden states inside, so nothing tells the plugin which of them are tokens"
SEQUENCE_FIRST = (
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
    "convnext": WIDTHS,
    "convnextv2": WIDTHS,
    "cvt": WIDTHS,
    "dac": _NONE,
    "dinat": WIDTHS,
    "dinov3_convnext": WIDTHS,
    "donut-swin": _STAGES,
    "efficientnet": _NONE,
    "encodec": _NONE,
    "falcon_mamba": _NONE,
    "focalnet": WIDTHS,
    "fsmt": SEQUENCE_FIRST,
    "funnel": "it pools its hidden states from block to block, so the groups of one block fit no other",
    "git": "it puts the image's tokens before the text's inside, so its call tells neither their masks nor positions",
    "glm4v_moe_vision": _IN_A_ROW,
    "glm4v_vision": _IN_A_ROW,
    "glm_ocr_vision": _IN_A_ROW,
    "glpn": WIDTHS,
    "hgnet_v2": _NONE,
    "hiera": _STAGES,
    "idefics2_perceiver": _QUERIES,
    "idefics_perciever": _QUERIES,
    "instructblip_qformer": _QUERIES,
    "instructblipvideo_qformer": _QUERIES,
    "led": _PADS,
    "levit": WIDTHS,
    "llama4_vision_model": "its class token comes behind the patches, so nothing tells which it is",
    "longformer": _PADS,
    "mamba": _NONE,
    "mamba2": _NONE,
    "maskformer-swin": _STAGES,
    "mobilenet_v1": _NONE,
    "mobilenet_v2": _NONE,
    "mobilevit": WIDTHS,
    "mobilevitv2": WIDTHS,
    "nllb-moe": _CAPACITY,
    "nystromformer": "its attention takes means over stretches of the padded length, so an answer depends on padding",
    "pegasus_x": _PADS,
    "perceiver": _QUERIES,
    "poolformer": WIDTHS,
    "pvt": WIDTHS,
    "pvt_v2": WIDTHS,
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
    "segformer": WIDTHS,
    "swiftformer": WIDTHS,
    "swin": _STAGES,
    "swin2sr": _WINDOWS,
    "swinv2": _STAGES,
    "switch_transformers": _CAPACITY,
    "textnet": _NONE,
    "univnet": _NONE,
    "uvdoc_backbone": _NONE,
    "vitdet": _WINDOWS,
    "xlnet": SEQUENCE_FIRST,
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
        others = "" if model_type in FEED_FORWARDS else ", described by target_modules and end_module"
        reason = f"{_PADS}; with attention_type='original_full' in its config it takes one{others}"
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
    found = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", f".{name}.").strip(".") for name in in_layers(model))
    return list(found)[:limit]


def in_layers(model: nn.Module) -> Iterator[str]:
    """Full names of the modules inside of a numbered layer that have a linear map."""
    for name, module in model.named_modules():
        inside_layer = re.search(r"\.\d+\.", f".{name}.")
        if inside_layer and any(isinstance(child, nn.Linear | Conv1D) for child in module.children()):
            yield name
