"""Which tests run by default: all of them on the usual architectures, a few on every other one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .cases import Case


# What every row of the table goes through in each run, with the parameters that are enough for it.
QUICK: dict[str, dict[str, Any]] = {
    "test_all_frames_are_merged": {"ratio": 4},
    "test_alone_padded_or_in_a_batch": {"ratio": 4},
    "test_at_the_whole_width_the_untrained_plugin_is_the_base": {"ratio": 4},
    "test_default_configuration_merges_and_disabling_gives_the_base_model_back": {},
    "test_experts_take_the_bottleneck_and_say_so": {},
    "test_greedy_decoding_gives_the_logits_of_training": {},
    "test_left_padding_and_cache_change_nothing": {"cache": "static", "attention": "sdpa"},
    "test_only_the_encoder_has_plugins": {},
    "test_padding_is_not_merged": {},
    "test_padding_never_reaches_the_feed_forward_network": {},
    "test_patches_of_a_video_are_merged_in_reading_order": {},
    "test_predictions_that_have_a_label": {"where": "conversation"},
    "test_ratio_1_is_the_base_model": {},
    "test_saved_and_loaded": {},
    "test_windows": {"ratio": 4, "scoring": "token"},
}
# Of tests with many parameters, those that are enough on an architecture other than BERT and Llama.
THINNED: dict[str, dict[str, Any]] = {
    "test_autocast_is_close_to_single_precision": {"dtype": torch.bfloat16, "uneven": True},
    "test_half_precision_base": {"dtype": torch.bfloat16, "uneven": True, "autocast_adapter_dtype": True},
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the costly tests of architectures that are not `core` as slow."""
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        case = params.get("case")
        if not isinstance(case, Case):
            continue
        test = getattr(item, "originalname", "")
        if not case.core:
            wanted = QUICK.get(test)
        else:
            wanted = {} if case.name in ("bert", "llama") else THINNED.get(test, {})
        if wanted is None or any(params.get(name) != value for name, value in wanted.items()):
            item.add_marker(pytest.mark.slow)
