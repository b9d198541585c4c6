"""A small LLaVA: a CLIP vision tower on 64×64 images, a projector, a Llama."""

from __future__ import annotations

from data import IMAGE_SIZE, PATCH_SIZE
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)


__all__ = ["make_model"]

TOWER = {"hidden_size": 160, "num_hidden_layers": 4, "num_attention_heads": 5}


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The model with random weights."""
    vision = CLIPVisionConfig(**TOWER, intermediate_size=640, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE)
    text = LlamaConfig(
        **TOWER,
        intermediate_size=432,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,  # every layer is used: one that is left out could be pruned at no cost
    )
    return LlavaForConditionalGeneration(config)
