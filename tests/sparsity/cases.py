"""Tiny models with random weights, and a batch for each: what the pruning tests run on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import transformers as T

from peft_variator.sparsity.chains import run_model
from peft_variator.sparsity.methods.magnitude import Magnitude
from peft_variator.sparsity.methods.wanda import Wanda
from peft_variator.sparsity.modules import find_targets
from peft_variator.sparsity.patterns import Target
from tests.tiny_models import BART, VOCABULARY


IMAGE = VOCABULARY - 1
BLOCKS = {"num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, **BLOCKS}
GROUPED = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PATCHES = {**VISION, "image_size": 16, "patch_size": 8}
QFORMER = {**VISION, "vocab_size": VOCABULARY, "encoder_hidden_size": 16, "cross_attention_frequency": 1}
OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 64,
    **BLOCKS,
}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
Case = tuple[torch.nn.Module, dict[str, Any]]


def tokens(length: int = 10, rows: int = 2) -> torch.Tensor:
    return torch.randint(3, VOCABULARY - 4, (rows, length))


def text_batch(length: int = 10, rows: int = 2) -> dict[str, Any]:
    ids = tokens(length, rows)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def image_text_batch(image_tokens: int, labels: torch.Tensor | None = None) -> dict[str, Any]:
    batch = text_batch()
    batch["input_ids"][:, 1 : 1 + image_tokens] = IMAGE
    batch["labels"] = batch["input_ids"] if labels is None else labels
    return {**batch, "pixel_values": torch.randn(2, 3, 16, 16)}


def llama() -> Case:
    return T.LlamaForCausalLM(T.LlamaConfig(**GROUPED)), text_batch()


def llava() -> Case:
    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**PATCHES), text_config=T.LlamaConfig(**GROUPED), image_token_index=IMAGE
    )
    return T.LlavaForConditionalGeneration(config), image_text_batch(4)


def blip2() -> Case:
    config = T.Blip2Config(
        vision_config=PATCHES,
        qformer_config=QFORMER,
        text_config={"model_type": "opt", **OPT},
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    return T.Blip2ForConditionalGeneration(config), image_text_batch(4)


def instructblip() -> Case:
    config = T.InstructBlipConfig(
        vision_config=PATCHES,
        qformer_config=QFORMER,
        text_config={"model_type": "t5", **T5, "decoder_start_token_id": 0, "pad_token_id": 0},
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    batch = {**image_text_batch(4, labels=tokens(6)), "qformer_input_ids": tokens(5)}
    return T.InstructBlipForConditionalGeneration(config), batch


QWEN_VL_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VOCABULARY - 2,
    "vision_start_token_id": VOCABULARY - 3,
    "vision_end_token_id": VOCABULARY - 4,
}


def qwen_vl_batch() -> dict[str, Any]:
    """Two texts, each with an image of 4 x 4 patches of 4 x 4 pixels in two frames, which become 4 tokens."""
    batch = image_text_batch(4)
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).long()
    batch["pixel_values"] = torch.randn(32, 3 * 2 * 4 * 4)
    batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
    return batch


def qwen2_vl() -> Case:
    config = T.Qwen2VLConfig(
        text_config={
            **GROUPED,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        },
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        **QWEN_VL_TOKENS,
    )
    return T.Qwen2VLForConditionalGeneration(config), qwen_vl_batch()


def paligemma() -> Case:
    config = T.PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **PATCHES},
        text_config={"model_type": "gemma", **GROUPED, "head_dim": 8},
        image_token_index=IMAGE,
        projection_dim=32,
    )
    batch = image_text_batch(4)
    return T.PaliGemmaForConditionalGeneration(config), {**batch, "token_type_ids": torch.zeros_like(batch["labels"])}


def clip() -> Case:
    text = {**VISION, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
    config = T.CLIPConfig(text_config=text, vision_config=PATCHES, projection_dim=16)
    batch = {"input_ids": tokens(), "pixel_values": torch.randn(2, 3, 16, 16), "return_loss": True}
    return T.CLIPModel(config), batch


def seq2seq(cls: type, config: Any) -> Case:
    return cls(config), {**text_batch(), "labels": tokens(6)}


def encoder(cls: type, config: Any) -> Case:
    batch = text_batch()
    del batch["labels"]
    return cls(config), batch


VISION_LANGUAGE: dict[str, Callable[[], Case]] = {
    "llava": llava,
    "blip2": blip2,
    "instructblip": instructblip,
    "qwen2_vl": qwen2_vl,
    "paligemma": paligemma,
    "clip": clip,
}
OTHERS: dict[str, Callable[[], Case]] = {
    "llama": llama,
    "gpt2": lambda: (
        T.GPT2LMHeadModel(
            T.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
        ),
        text_batch(),
    ),
    "gemma3": lambda: (T.Gemma3ForCausalLM(T.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=4)), text_batch()),
    "bert": lambda: encoder(T.BertModel, T.BertConfig(**SMALL)),
    "albert": lambda: encoder(T.AlbertModel, T.AlbertConfig(**SMALL, embedding_size=16)),
    "t5": lambda: seq2seq(T.T5ForConditionalGeneration, T.T5Config(**T5, decoder_start_token_id=0)),
    "bart": lambda: seq2seq(T.BartForConditionalGeneration, T.BartConfig(**BART)),
    "vit": lambda: (T.ViTModel(T.ViTConfig(**PATCHES)), {"pixel_values": torch.randn(2, 3, 16, 16)}),
}


@cache
def _built(name: str) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    torch.manual_seed(0)
    build = {**VISION_LANGUAGE, **OTHERS}[name]
    model, first = build()
    second = {key: value.roll(1, 0) if isinstance(value, torch.Tensor) else value for key, value in first.items()}
    if name not in ("qwen2_vl", "llava", "blip2", "instructblip", "paligemma"):
        second = {**second, **({"input_ids": tokens()} if "input_ids" in second else {})}
    return model.eval(), [first, second]


def make(name: str) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    """A fresh copy of the model called `name`, in evaluation mode, and two batches for it."""
    model, batches = _built(name)
    return copy.deepcopy(model), [dict(batch) for batch in batches]


def with_own_head(model: torch.nn.Module) -> torch.nn.Module:
    """The model, with a head that no longer shares its weight with the embeddings."""
    head = model.get_output_embeddings() if isinstance(model, T.PreTrainedModel) else None
    if head is not None:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    return model


def magnitude_mask(weight: torch.Tensor, target: Target) -> torch.Tensor:
    """What magnitude pruning keeps of a weight."""
    return Magnitude().solve(weight, None, target)[0]


def wanda_mask(weight: torch.Tensor, input_norm: torch.Tensor, target: Target) -> torch.Tensor:
    """What Wanda keeps of a weight whose inputs have these norms."""
    return Wanda().solve(weight, SimpleNamespace(norm=input_norm), target)[0]


def run_order(model, targets, batch):
    """The blocks of the targets, in the order in which their first module runs."""
    order = []
    hooks = [
        target.module.register_forward_pre_hook(lambda module, args, block=target.block: order.append(block))
        for target in targets
    ]
    with torch.no_grad():
        run_model(model, batch)
    for hook in hooks:
        hook.remove()
    return list(dict.fromkeys(order))


def reference_masks(model, config, batches):
    """Wanda by full forward passes: one for every block, on the model as it is by then, or on the dense one."""
    dense = copy.deepcopy(model)
    targets = find_targets(model, config)
    masks = {}
    for block in dict.fromkeys(block for batch in batches for block in run_order(model, targets, batch)):
        members = [target for target in targets if target.block == block]
        source = model if config.propagate else dense
        inputs = {target.name: [] for target in members}
        hooks = [
            source.get_submodule(name).register_forward_pre_hook(
                lambda module, args, rows=rows: rows.append(args[0].reshape(-1, args[0].shape[-1]).clone())
            )
            for name, rows in inputs.items()
        ]
        with torch.no_grad():
            for batch in batches:
                run_model(source, batch)
        for hook in hooks:
            hook.remove()
        for target in members:
            weight = target.module.weight.data
            matrix = weight.T if target.transposed else weight
            mask = wanda_mask(matrix, torch.cat(inputs[target.name]).double().norm(dim=0), target.target)
            masks[target.name] = mask.T if target.transposed else mask
            weight[~masks[target.name]] = 0
    return masks
