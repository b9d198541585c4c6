"""Which tests run by default: all of them on a few architectures, a few on every other one; the rest is slow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tiny_models import Case


# What every row of the table goes through in each run, with the parameters that are enough for it.
QUICK: dict[str, dict[str, Any]] = {
    "test_all_frames_are_merged": {"ratio": 4},
    "test_alone_padded_or_in_a_batch": {"ratio": 4},
    "test_at_the_whole_width_the_untrained_plugin_is_the_base": {"ratio": 4, "form": "added"},
    "test_default_configuration_merges_and_disabling_gives_the_base_model_back": {},
    "test_experts_take_the_bottleneck_and_say_so": {},
    "test_left_padding_and_cache_change_nothing": {"cache": "static", "attention": "sdpa"},
    "test_only_the_encoder_has_plugins": {},
    "test_padding_is_not_merged": {},
    "test_patches_of_a_video_are_merged_in_reading_order": {},
    "test_predictions_that_have_a_label": {"where": "conversation"},
    "test_saved_and_loaded": {},
    "test_windows": {"ratio": 4, "scoring": "token"},
}
# One architecture of each way to be called and laid out, for tests of what does not depend on a row of the table.
STAND_INS = frozenset(
    ("albert", "bart", "bert", "bert-sequence", "clip", "deberta-v2", "gemma2", "gpt2", "llama", "llava", "mixtral")
    + ("modernbert", "t5", "vit", "wav2vec2", "whisper")
)
# Tests that take those alone.
NARROW = frozenset(
    {
        "test_a_flattened_batch_gives_what_each_text_gives_alone",
        "test_an_empty_cache_of_the_caller_changes_nothing",
        "test_autocast_is_close_to_single_precision",
        "test_content_of_the_padding_does_not_matter",
        "test_decoding_one_token_is_the_base_model",
        "test_embeddings_alone",
        "test_forward_is_call",
        "test_full_sequence_loss_merges_nothing_and_warns_once",
        "test_greedy_decoding_gives_the_logits_of_training",
        "test_half_precision_base",
        "test_no_argument_is_needed",
        "test_one_text_with_padding",
        "test_padding_never_reaches_the_feed_forward_network",
        "test_predictions_that_have_a_label_in_a_padded_batch",
        "test_ratio_1_at_run_time_is_the_base_model",
        "test_ratio_1_is_the_base_model",
        "test_round_trip",
        "test_same_gradients_as_without",
        "test_transformers_load_adapter",
        "test_two_forwards_before_one_backward",
    }
)
# Of tests with many parameters, those that are enough on an architecture that is not in `EVERY_FORM`.
EVERY_FORM = frozenset({"bert", "llama", "vit"})
THINNED: dict[str, dict[str, Any]] = {
    "test_alone_padded_or_in_a_batch": QUICK["test_alone_padded_or_in_a_batch"],
    "test_at_the_whole_width_the_untrained_plugin_is_the_base": {"ratio": 4},
    "test_autocast_is_close_to_single_precision": {"dtype": torch.bfloat16, "uneven": True},
    "test_chunked_prefill": {"chunk": 5},
    "test_half_precision_base": {"dtype": torch.bfloat16, "uneven": True, "autocast_adapter_dtype": True},
    "test_left_padding_and_cache_change_nothing": {"attention": "sdpa"},
    "test_predictions_that_have_a_label": {"where": "conversation"},
    "test_raster_order": {"ratio": 4},
    "test_same_gradients_as_without": {"mode": {"use_reentrant": False}},
    "test_two_forwards_before_one_backward": {"mode": {"use_reentrant": True}},
    "test_windows": {"ratio": 4, "scoring": "token"},
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the costly tests of architectures that others stand for as slow."""
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        case = params.get("case")
        if not isinstance(case, Case):
            continue
        test = getattr(item, "originalname", "")
        if not case.core:
            wanted = QUICK.get(test) if case.quick else None
        elif test in NARROW and case.name not in STAND_INS:
            wanted = None
        elif case.name in EVERY_FORM:
            wanted = {}
        else:
            wanted = THINNED.get(test, {}) if case.name in STAND_INS else QUICK.get(test, THINNED.get(test, {}))
        if wanted is None or any(params.get(name, value) != value for name, value in wanted.items()):
            item.add_marker(pytest.mark.slow)
