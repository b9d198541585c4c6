"""The one list of tiny models: of each architecture one, with random weights; no files, no network.

A [`Case`] is a model to run a test on, with weights that matter and inputs. [`tiny_model`] makes one of any size with
transformers' own initial weights.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTokenClassification,
    Blip2VisionModel,
    CLIPTextModel,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipTextModel,
    SiglipVisionModel,
    T5EncoderModel,
)


Model = TypeVar("Model", bound=nn.Module)

VOCABULARY = 99
FIRST_WORD = 10  # smaller ids are special tokens
IMAGE_TOKEN = 9

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DECODER = {key: TEXT[key] for key in TEXT if "dropout" not in key} | {"num_key_value_heads": 2, "head_dim": 8}
MOE = DECODER | {"num_experts_per_tok": 2, "num_local_experts": 4}
FALCON = {key: DECODER[key] for key in DECODER if key != "head_dim"} | {"ffn_hidden_size": 48}
FALCON_NEW = {"new_decoder_architecture": True, "num_kv_heads": 2}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "initializer_factor": 1.0,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 24,
    "patch_size": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
TOWER = {key: VISION[key] for key in VISION if "dropout" not in key}
CLIP = {
    "text_config": DECODER | {"eos_token_id": 2, "max_position_embeddings": 64},
    "vision_config": TOWER,
    "projection_dim": 16,
}


@dataclass(frozen=True)
class Case:
    """One tiny model.

    Args:
        name: name of the test.
        model_type: transformers' name of the architecture.
        auto: class that builds the model from a configuration.
        config: fields of the configuration.
        kind: what the stack that is compressed is: `encoder`, `causal`, `vision`, `audio`, `dual` (text and image) or
            `vlm`.
        prefix: number of tokens before the patches of an image.
        zero_positions: whether to zero the position embeddings, of models that take no position ids: only then is the
            base model itself indifferent to padding on the left.
        core: whether all tests run by default; else those of [`QUICK`], and the others with `make test-all`.
        quick: of one that is not `core`, whether those of [`QUICK`] run by default, too.
    """

    name: str
    model_type: str
    auto: Any
    config: dict[str, Any] = field(hash=False)
    kind: str
    prefix: int = 0
    zero_positions: bool = False
    core: bool = True
    quick: bool = True

    @functools.cached_property
    def prototype(self) -> PreTrainedModel:
        """The model to copy from; nothing may change it."""
        torch.manual_seed(0)
        model = self.make(attn_implementation="eager").eval()
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                _strengthen(name, parameter, self.zero_positions)
        return model

    def configure(self, **fields: Any) -> PreTrainedConfig:
        """Its configuration, with other values of some fields."""
        return AutoConfig.for_model(self.model_type, **copy.deepcopy(self.config | fields))

    def make(self, attn_implementation: str | None = None, **fields: Any) -> PreTrainedModel:
        """A model with transformers' own initial weights, and other values of some fields of its configuration."""
        config = self.configure(**fields)
        builder = getattr(self.auto, "from_config", None) or self.auto._from_config
        options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        return builder(getattr(config, _PART.get(self.auto, ""), config), **options)

    def build(self) -> PreTrainedModel:
        """A fresh model, alike in every call."""
        return copy.deepcopy(self.prototype)

    def inputs(self, batch: int = 2, length: int = 11, seed: int = 0) -> dict[str, Tensor]:
        """Arguments of a call without padding."""
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randn(batch, 3, 24, 24, generator=generator)
        ids = torch.randint(FIRST_WORD, VOCABULARY, (batch, length), generator=generator)
        if self.model_type in ("videomae", "vivit"):
            return {"pixel_values": torch.randn(batch, 4, 3, 24, 24, generator=generator)}
        if self.model_type == "siglip2_vision_model":
            patches = {"pixel_values": torch.randn(batch, 36, 48, generator=generator)}
            mask, shapes = torch.ones(batch, 36, dtype=torch.long), torch.full((batch, 2), 6)
            return patches | {"pixel_attention_mask": mask, "spatial_shapes": shapes}
        if self.kind == "vision":
            return {"pixel_values": pixels}
        if self.kind == "audio":
            return self._sound(batch, generator) | ({"decoder_input_ids": ids[:, :5]} if self.is_seq2seq else {})
        if self.kind == "dual":
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        if self.kind == "vlm":
            ids = torch.cat([ids[:, :3], torch.full((batch, 36), IMAGE_TOKEN), ids[:, 3:]], dim=1)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        if self.is_seq2seq:
            return {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
        return {"input_ids": ids}

    def _sound(self, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        config = self.prototype.config
        if self.model_type == "whisper":
            shape = (batch, config.num_mel_bins, 2 * config.max_source_positions)
            return {"input_features": torch.randn(shape, generator=generator)}
        samples = 384 * 23 if self.model_type == "moonshine" else 176
        return {"input_values": torch.randn(batch, samples, generator=generator)}

    @property
    def has_experts(self) -> bool:
        """Whether its networks are mixtures of experts."""
        return "num_experts_per_tok" in self.config

    @property
    def is_seq2seq(self) -> bool:
        return self.auto in (AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq)


_PART = {
    CLIPTextModel: "text_config",
    CLIPVisionModel: "vision_config",
    SiglipTextModel: "text_config",
    SiglipVisionModel: "vision_config",
}


def _strengthen(name: str, parameter: nn.Parameter, zero_positions: bool) -> None:
    """Weights so large that a feed-forward network matters; a transformer at its usual start hides most mistakes."""
    if zero_positions and "position" in name:
        parameter.zero_()
    elif not parameter.requires_grad:
        pass  # sines, of models that turn queries and keys by them
    elif parameter.dim() > 1:
        parameter.normal_(std=0.25)
    else:
        parameter.add_(torch.randn_like(parameter), alpha=0.1)


def outputs_of(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Every floating-point tensor that a call returns, by name."""
    with torch.no_grad():
        output = model(**inputs)
    return {name: value for name, value in output.items() if isinstance(value, Tensor) and value.is_floating_point()}


ENCODERS = [
    Case("bert", "bert", AutoModel, TEXT, "encoder"),
    Case("roberta", "roberta", AutoModel, TEXT, "encoder"),
    Case("xlm-roberta", "xlm-roberta", AutoModel, TEXT, "encoder"),
    Case(
        "distilbert",
        "distilbert",
        AutoModel,
        {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "pad_token_id": 0},
        "encoder",
        zero_positions=True,
    ),
    Case("mpnet", "mpnet", AutoModel, TEXT | {"pad_token_id": 1}, "encoder"),
    Case("electra", "electra", AutoModel, TEXT | {"embedding_size": 16}, "encoder"),
    Case("deberta-v2", "deberta-v2", AutoModel, TEXT | {"relative_attention": True}, "encoder", zero_positions=True),
    Case("modernbert", "modernbert", AutoModel, TEXT | {"global_attn_every_n_layers": 2}, "encoder"),
    Case("albert", "albert", AutoModel, TEXT | {"embedding_size": 16}, "encoder"),
]
ENCODERS += [
    Case("big-bird", "big_bird", AutoModel, TEXT | {"attention_type": "original_full"}, "encoder", core=False),
    Case("eurobert", "eurobert", AutoModel, DECODER | {"mask_token_id": 3}, "encoder", core=False),
    Case("esm", "esm", AutoModel, TEXT | {"mask_token_id": 3}, "encoder", core=False),
    *(
        Case(name, name, AutoModel, TEXT, "encoder", core=False)
        for name in ("data2vec-text", "ernie", "jina_embeddings_v3", "megatron-bert", "nomic_bert", "roformer")
    ),
]
TASK_HEADS = [
    Case("bert-mlm", "bert", AutoModelForMaskedLM, TEXT, "encoder"),
    Case("bert-sequence", "bert", AutoModelForSequenceClassification, TEXT, "encoder"),
    Case("bert-token", "bert", AutoModelForTokenClassification, TEXT, "encoder"),
    Case("bert-qa", "bert", AutoModelForQuestionAnswering, TEXT, "encoder"),
    Case("modernbert-sequence", "modernbert", AutoModelForSequenceClassification, TEXT, "encoder"),
    Case("llama-sequence", "llama", AutoModelForSequenceClassification, DECODER, "causal"),
    Case("llama-token", "llama", AutoModelForTokenClassification, DECODER, "causal"),
    Case("vit-classes", "vit", AutoModelForImageClassification, VISION, "vision", prefix=1),
]
SEQ2SEQ = [
    Case("t5", "t5", AutoModelForSeq2SeqLM, T5, "encoder"),
    Case("flan-t5", "t5", AutoModelForSeq2SeqLM, T5 | {"feed_forward_proj": "gated-gelu"}, "encoder"),
    Case("mt5", "mt5", AutoModelForSeq2SeqLM, T5 | {"feed_forward_proj": "gated-gelu"}, "encoder"),
    Case("bart", "bart", AutoModelForSeq2SeqLM, BART, "encoder", zero_positions=True),
    Case("mbart", "mbart", AutoModelForSeq2SeqLM, BART, "encoder", zero_positions=True),
]
SEQ2SEQ += [
    *(
        Case(name, name, AutoModelForSeq2SeqLM, BART, "encoder", zero_positions=True, core=False)
        for name in ("blenderbot", "blenderbot-small", "m2m_100", "marian", "pegasus")
    ),
    *(
        Case(
            f"longt5-{attention}",
            "longt5",
            AutoModelForSeq2SeqLM,
            T5 | {"encoder_attention_type": attention, "local_radius": 4},
            "encoder",
            core=False,
        )
        for attention in ("local", "transient-global")
    ),
    Case(
        "t5gemma",
        "t5gemma",
        AutoModelForSeq2SeqLM,
        {"vocab_size": VOCABULARY, "encoder": DECODER | {"sliding_window": 8}, "decoder": DECODER},
        "encoder",
        core=False,
    ),
]
ENCODERS_OF_SEQ2SEQ = [Case("t5-encoder", "t5", T5EncoderModel, T5, "encoder")]
CAUSAL = [
    Case("llama", "llama", AutoModelForCausalLM, DECODER, "causal"),
    Case("mistral", "mistral", AutoModelForCausalLM, DECODER | {"sliding_window": 8}, "causal"),
    Case("qwen2", "qwen2", AutoModelForCausalLM, DECODER, "causal"),
    Case("qwen3", "qwen3", AutoModelForCausalLM, DECODER, "causal"),
    Case("gemma2", "gemma2", AutoModelForCausalLM, DECODER | {"sliding_window": 8}, "causal"),
    Case("gemma3", "gemma3_text", AutoModelForCausalLM, DECODER | {"sliding_window": 8}, "causal"),
    Case("phi3", "phi3", AutoModelForCausalLM, DECODER, "causal"),
    Case(
        "gpt2",
        "gpt2",
        AutoModelForCausalLM,
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 128}
        | {"bos_token_id": 1, "eos_token_id": 2},
        "causal",
    ),
    Case("opt", "opt", AutoModelForCausalLM, DECODER | {"ffn_dim": 48, "word_embed_proj_dim": 32}, "causal"),
    Case("gpt-neox", "gpt_neox", AutoModelForCausalLM, DECODER, "causal"),
    Case("smollm3", "smollm3", AutoModelForCausalLM, DECODER, "causal"),
    Case("mixtral", "mixtral", AutoModelForCausalLM, MOE, "causal"),
    Case(
        "qwen3-moe",
        "qwen3_moe",
        AutoModelForCausalLM,
        MOE | {"num_experts": 4, "moe_intermediate_size": 16, "mlp_only_layers": [0]},
        "causal",
    ),
]
CAUSAL += [
    Case("bloom", "bloom", AutoModelForCausalLM, DECODER | {"n_layer": 2, "n_head": 4}, "causal", core=False),
    *(
        Case(name, name, AutoModelForCausalLM, DECODER, "causal", core=False)
        for name in ("cohere", "glm", "glm4", "granite", "nemotron", "olmo", "phi", "stablelm", "starcoder2")
    ),
    *(
        Case(name, name, AutoModelForCausalLM, DECODER | {"sliding_window": 8}, "causal", core=False)
        for name in ("cohere2", "exaone4", "olmo3")
    ),
    Case("granitemoe", "granitemoe", AutoModelForCausalLM, MOE, "causal", core=False),
    Case("falcon", "falcon", AutoModelForCausalLM, FALCON, "causal", core=False),
    Case("falcon-new", "falcon", AutoModelForCausalLM, FALCON | FALCON_NEW, "causal", core=False),
]
CAUSAL += [
    Case(
        "deepseek-v3",
        "deepseek_v3",
        AutoModelForCausalLM,
        {key: DECODER[key] for key in DECODER if key != "head_dim"}
        | {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
        | {"v_head_dim": 8, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "first_k_dense_replace": 1},
        "causal",
        core=False,
    ),
    Case(
        "gemma3n",
        "gemma3n_text",
        AutoModelForCausalLM,
        DECODER
        | {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
        | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "laurel_rank": 4}
        | {"activation_sparsity_pattern": [0.0, 0.0]},
        "causal",
        core=False,
    ),
    Case("gpt-oss", "gpt_oss", AutoModelForCausalLM, MOE | {"sliding_window": 8}, "causal", core=False),
    Case(
        "lfm2",
        "lfm2",
        AutoModelForCausalLM,
        DECODER | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        "causal",
        core=False,
    ),
    Case(
        "llama4",
        "llama4_text",
        AutoModelForCausalLM,
        MOE | {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 2, "no_rope_layers": [1, 0]},
        "causal",
        core=False,
    ),
    Case(
        "phi4-multimodal",
        "phi4_multimodal",
        AutoModelForCausalLM,
        DECODER
        | {"vision_config": {**TOWER, "crop_size": 24, "image_token_id": IMAGE_TOKEN}}
        | {"audio_config": {"hidden_size": 32, "intermediate_size": 48, "num_blocks": 1, "num_attention_heads": 4}},
        "causal",
        core=False,
    ),
    Case(
        "qwen3-next",
        "qwen3_next",
        AutoModelForCausalLM,
        DECODER
        | {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2}
        | {"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4}
        | {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        "causal",
        core=False,
    ),
]
FURTHER: dict[str, Any] = {"core": False, "quick": False}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 128}
GPT |= {"bos_token_id": 1, "eos_token_id": 2}
CAUSAL += [
    *(
        Case(name, name, AutoModelForCausalLM, DECODER, "causal", **FURTHER)
        for name in ("apertus", "arcee", "biogpt", "cwm", "diffllama", "ernie4_5", "helium", "jais2")
        + ("doge", "hyperclovax", "internlm3", "nanochat")
        + ("ministral3", "persimmon", "seed_oss")
    ),
    Case("gpt-bigcode", "gpt_bigcode", AutoModelForCausalLM, GPT, "causal", **FURTHER),
    Case("granite-swa", "granite_swa", AutoModelForCausalLM, DECODER | {"sliding_window": 8}, "causal", **FURTHER),
    Case(
        "exaone-moe",
        "exaone_moe",
        AutoModelForCausalLM,
        MOE | {"num_experts": 4, "moe_intermediate_size": 16, "sliding_window": 8},
        "causal",
        **FURTHER,
    ),
    Case(
        "gpt-neo",
        "gpt_neo",
        AutoModelForCausalLM,
        DECODER | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        "causal",
        **FURTHER,
    ),
    Case("gpt-neox-japanese", "gpt_neox_japanese", AutoModelForCausalLM, DECODER, "causal", **FURTHER),
    *(
        Case(name, name, AutoModelForCausalLM, MOE | {"num_experts": 4}, "causal", **FURTHER)
        for name in ("flex_olmo", "olmoe", "phimoe")
    ),
    Case(
        "glm4-moe",
        "glm4_moe",
        AutoModelForCausalLM,
        MOE
        | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
        | {"first_k_dense_replace": 1},
        "causal",
        **FURTHER,
    ),
    Case(
        "ernie4-5-moe",
        "ernie4_5_moe",
        AutoModelForCausalLM,
        MOE | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1},
        "causal",
        **FURTHER,
    ),
]
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = MOE | {"num_experts": 4, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
ROUTED |= {"first_k_dense_replace": 1}
LATENT = {key: DECODER[key] for key in DECODER if key != "head_dim"} | {"num_key_value_heads": 4, "q_lora_rank": 8}
LATENT |= {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
LAYER_INPUTS = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0}
XGLM = {key: DECODER[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
XGLM |= {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 128}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
XLM = {"vocab_size": VOCABULARY, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128}
XLM |= {"dropout": 0.0, "attention_dropout": 0.0, "pad_index": 0, "pad_token_id": 0}
CAUSAL += [
    Case(name, name, AutoModelForCausalLM, config, "causal", **FURTHER)
    for name, config in {
        "afmoe": EXPERTS | {"num_dense_layers": 1, "sliding_window": 8},
        "aria_text": EXPERTS | {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
        "codegen": GPT | {"rotary_dim": 4, "pad_token_id": 0},
        "cohere2_moe": EXPERTS | {"sliding_window": 8},
        "deepseek_v2": LATENT | ROUTED,
        "falcon_h1": DECODER | MAMBA,
        "gemma4_text": DECODER
        | LAYER_INPUTS
        | {"sliding_window": 8, "global_head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
        "glm4_moe_lite": LATENT | ROUTED,
        "granitemoeshared": MOE | {"shared_intermediate_size": 16},
        "hunyuan_v1_dense": DECODER,
        "hunyuan_v1_moe": EXPERTS | {"moe_topk": 2},
        "hy_v3": EXPERTS,
        "iquestcoder": DECODER,
        "jetmoe": MOE | {"kv_channels": 8},
        "lfm2_moe": EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        "mellum": EXPERTS | {"sliding_window": 8},
        "minicpm3": LATENT,
        "minimax_m2": EXPERTS,
        "ministral": DECODER | {"sliding_window": 8},
        "modernbert-decoder": DECODER | {"global_attn_every_n_layers": 2, "local_attention": 8},
        "olmo_hybrid": DECODER | LINEAR | {"num_key_value_heads": 4},
        "qwen3_5_moe_text": EXPERTS | LINEAR | {"shared_expert_intermediate_size": 16},
        "qwen3_5_text": DECODER | LINEAR,
        "solar_open": DECODER | ROUTED,
        "vaultgemma": DECODER | {"sliding_window": 8},
        "xglm": XGLM | {"dropout": 0.0, "attention_dropout": 0.0},
        "youtu": LATENT,
    }.items()
]
CAUSAL += [
    Case("gemma", "gemma", AutoModelForCausalLM, DECODER, "causal", **FURTHER),
    Case("gptj", "gptj", AutoModelForCausalLM, GPT | {"rotary_dim": 4, "pad_token_id": 0}, "causal", **FURTHER),
    Case("olmo2", "olmo2", AutoModelForCausalLM, DECODER, "causal", **FURTHER),
    Case(
        "qwen2-moe",
        "qwen2_moe",
        AutoModelForCausalLM,
        EXPERTS | {"shared_expert_intermediate_size": 16},
        "causal",
        **FURTHER,
    ),
]
SEQ2SEQ += [Case("umt5", "umt5", AutoModelForSeq2SeqLM, T5, "encoder", **FURTHER)]
ENCODERS += [
    Case("camembert", "camembert", AutoModel, TEXT, "encoder", **FURTHER),
    Case("deberta", "deberta", AutoModel, TEXT | {"relative_attention": True}, "encoder", **FURTHER),
    *(Case(name, name, AutoModel, XLM, "encoder", zero_positions=True, **FURTHER) for name in ("flaubert", "xlm")),
    Case("ultrabert", "ultrabert", AutoModel, DECODER, "encoder", **FURTHER),
]
ENCODERS += [
    *(
        Case(name, name, AutoModel, TEXT, "encoder", **FURTHER)
        for name in ("bert-generation", "gte", "layoutlm", "markuplm", "rembert", "splinter")
        + ("visual_bert", "xlm-roberta-xl")
    ),
]
SEQ2SEQ += [
    *(
        Case(name, name, AutoModelForSeq2SeqLM, BART, "encoder", zero_positions=True, **FURTHER)
        for name in ("mvp", "plbart")
    ),
]
VISIONS = [
    Case("vit", "vit", AutoModel, VISION, "vision", prefix=1),
    Case("deit", "deit", AutoModel, VISION, "vision", prefix=2),
    Case("dinov2", "dinov2", AutoModel, VISION, "vision", prefix=1),
    Case(
        "dinov2-registers",
        "dinov2_with_registers",
        AutoModel,
        VISION | {"num_register_tokens": 3},
        "vision",
        prefix=4,
    ),
    Case("clip-vision", "clip", CLIPVisionModel, CLIP, "vision", prefix=1),
    Case("siglip-vision", "siglip", SiglipVisionModel, {"vision_config": TOWER}, "vision"),
]
SOUND = {key: TEXT[key] for key in TEXT if key != "max_position_embeddings"} | {
    "conv_dim": [32, 32],
    "conv_stride": [4, 2],
    "conv_kernel": [8, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "feat_proj_dropout": 0.0,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
}
AUDIO = [
    Case(
        "whisper",
        "whisper",
        AutoModelForSpeechSeq2Seq,
        BART
        | {"max_source_positions": 20, "max_target_positions": 64, "num_mel_bins": 8, "suppress_tokens": None}
        | {"begin_suppress_tokens": None},
        "audio",
    ),
    Case("wav2vec2", "wav2vec2", AutoModelForCTC, SOUND, "audio"),
    Case(
        "wav2vec2-stable",
        "wav2vec2",
        AutoModel,
        SOUND | {"do_stable_layer_norm": True, "feat_extract_norm": "layer"},
        "audio",
        core=False,
    ),
    Case("hubert", "hubert", AutoModel, SOUND, "audio", core=False),
    Case(
        "moonshine",
        "moonshine",
        AutoModelForSpeechSeq2Seq,
        {key: DECODER[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "pad_token_id")}
        | {"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2, "encoder_num_attention_heads": 4}
        | {"decoder_num_attention_heads": 4, "encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4}
        | {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        "audio",
        core=False,
    ),
]
TEXT_TOWERS = [
    Case("clip-text", "clip", CLIPTextModel, CLIP, "causal"),
    Case("siglip-text", "siglip", SiglipTextModel, {"text_config": DECODER}, "encoder", zero_positions=True),
]
VISIONS += [
    Case("aimv2", "aimv2_vision_model", AutoModel, VISION, "vision", core=False),
    Case("beit", "beit", AutoModel, VISION, "vision", prefix=1, core=False),
    Case("dinov3", "dinov3_vit", AutoModel, VISION | {"num_register_tokens": 3}, "vision", prefix=4, core=False),
    Case("dinov3-gated", "dinov3_vit", AutoModel, VISION | {"use_gated_mlp": True}, "vision", prefix=1, core=False),
    Case("ijepa", "ijepa", AutoModel, VISION, "vision", core=False),
    Case(
        "internvl-vision",
        "internvl_vision",
        AutoModel,
        VISION | {"image_size": [24, 24], "patch_size": [4, 4]},
        "vision",
        prefix=1,
        core=False,
    ),
]
VISIONS += [
    Case("data2vec-vision", "data2vec-vision", AutoModel, VISION, "vision", prefix=1, **FURTHER),
    Case("chinese-clip-vision", "chinese_clip_vision_model", AutoModel, TOWER, "vision", prefix=1, **FURTHER),
    Case("vit-msn", "vit_msn", AutoModel, VISION, "vision", prefix=1, **FURTHER),
    Case("pixio", "pixio", AutoModel, VISION, "vision", prefix=8, **FURTHER),
    Case("dpt", "dpt", AutoModel, VISION, "vision", prefix=1, **FURTHER),
    Case("mlcd", "mlcd_vision_model", AutoModel, TOWER, "vision", prefix=1, **FURTHER),
    Case("blip-2-vision", "blip_2_vision_model", Blip2VisionModel, TOWER, "vision", prefix=1, **FURTHER),
]
AUDIO += [
    Case(name, name, AutoModel, SOUND, "audio", **FURTHER)
    for name in ("data2vec-audio", "unispeech", "unispeech-sat", "wavlm")
]
IN_READING_ORDER = [
    Case("siglip2-vision", "siglip2_vision_model", AutoModel, TOWER | {"num_patches": 36}, "vision", core=False),
    Case("videomae", "videomae", AutoModel, VISION | {"num_frames": 4, "tubelet_size": 2}, "vision", core=False),
    Case("vivit", "vivit", AutoModel, VISION | {"num_frames": 4, "tubelet_size": [2, 4, 4]}, "vision", core=False),
]
DUAL = [
    Case("clip", "clip", AutoModel, CLIP, "dual", prefix=1),
    Case("siglip", "siglip", AutoModel, {"text_config": DECODER, "vision_config": TOWER}, "dual"),
]
LLAVA = Case(
    "llava",
    "llava",
    AutoModelForImageTextToText,
    {
        "text_config": DECODER | {"model_type": "llama"},
        "vision_config": TOWER | {"model_type": "clip_vision_model"},
        "image_token_id": IMAGE_TOKEN,
        "image_token_index": IMAGE_TOKEN,
        "vision_feature_layer": -1,
    },
    "vlm",
    prefix=1,
)
TEXT_CASES = [*ENCODERS, *ENCODERS_OF_SEQ2SEQ, *SEQ2SEQ, *CAUSAL, *TEXT_TOWERS]
ALL = [*TEXT_CASES, *TASK_HEADS, *VISIONS, *IN_READING_ORDER, *AUDIO, *DUAL, LLAVA]
BERT, LLAMA = ENCODERS[0], CAUSAL[0]


def by_name(case: Case) -> str:
    """Name of a parametrised test."""
    return case.name


BY_NAME = {case.name: case for case in ALL}
"""All cases. Those of one architecture with another head are `bert-mlm`, `vit-classes` and so on."""


def tiny_model(name: str, **fields: Any) -> PreTrainedModel:
    """A tiny model with transformers' own initial weights: seed before it.

    Args:
        name: of a case.
        fields: of its configuration, where they are not to be the case's.
    """
    return BY_NAME[name].make(**fields)


def built_once(build: Callable[..., Model]) -> Callable[..., Model]:
    """A builder of models that builds each one once, and gives a copy in every call.

    What is drawn after the call is what would be drawn after building, so that tests do not depend on their order.
    """
    made: dict[str, tuple[Model, Tensor]] = {}

    @functools.wraps(build)
    def copy_of(*args: Any, **kwargs: Any) -> Model:
        key = repr((args, sorted(kwargs.items())))
        if key not in made:
            made[key] = build(*args, **kwargs), torch.get_rng_state()
        model, drawn = made[key]
        torch.set_rng_state(drawn)
        return copy.deepcopy(model)

    return copy_of
