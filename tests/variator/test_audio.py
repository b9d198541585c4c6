"""Encoders of sound: their frames have no ids and no special ones, and a mask of samples, of frames, or none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from peft_variator import VariatorConfig
from peft_variator.tuners.variator import VariatorLayer
from tests.tiny_models import AUDIO, FIRST_WORD, Case, by_name

from .reference import feed_forward_of, plugin_output, text_groups, watch


CASES = {case.name: case for case in AUDIO}
WITH_MASK = [case for case in AUDIO if case.name != "whisper"]
WITH_DECODER = [case for case in AUDIO if case.is_seq2seq]
FRAMES = {"whisper": 20, "moonshine": 21}
OTHERS = 20


def with_plugin(case: Case, **fields: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(case.build(), VariatorConfig(init_weights=False, bottleneck_dim=8, **fields)).eval()


def check(model: PeftModel, inputs: dict[str, Tensor], real: list[list[bool]], ratio: int) -> None:
    """Compare the encoder's networks with loops over the groups of frames."""
    groups = [text_groups(row, (), ratio) for row in real]
    with torch.no_grad():
        seen_networks = watch(model, lambda: model(**inputs))
        assert len(seen_networks) == 2
        for seen in seen_networks:
            assert seen.inputs.shape[:2] == (len(real), len(real[0]))
            assert seen.rows == sum(map(len, groups))
            expected = plugin_output(seen.layer, feed_forward_of(model, seen), seen.inputs, groups, "default")
            atol = 1e-5 * float(expected.abs().max().clamp(min=1))
            where = torch.tensor(real)
            assert seen.outputs is not None
            torch.testing.assert_close(seen.outputs[where], expected[where], rtol=0, atol=atol)


@pytest.mark.parametrize("ratio", [2, 4, 7])
@pytest.mark.parametrize("case", AUDIO, ids=by_name)
def test_all_frames_are_merged(case: Case, ratio: int) -> None:
    frames = FRAMES.get(case.name, OTHERS)
    check(with_plugin(case, compression_ratio=ratio), case.inputs(2), [[True] * frames] * 2, ratio)


@pytest.mark.parametrize("case", AUDIO, ids=by_name)
def test_what_is_said_of_words_does_not_count_for_frames(case: Case) -> None:
    fields = {"keep_first_tokens": 3, "keep_last_tokens": 3, "keep_token_ids": [*range(99)]}
    model, frames = with_plugin(case, **fields, compress_text_tokens=False), FRAMES.get(case.name, OTHERS)
    inputs = case.inputs(2)
    if case.is_seq2seq:
        del inputs["decoder_input_ids"]
        inputs["labels"] = torch.full((2, frames), FIRST_WORD)  # of the decoder, though as many as frames
    check(model, inputs, [[True] * frames] * 2, 4)


@pytest.mark.parametrize("case", WITH_MASK, ids=by_name)
def test_padding_is_not_merged(case: Case) -> None:
    """Samples that are masked: which frames that are, the base model says."""
    model, inputs = with_plugin(case), case.inputs(2)
    mask = torch.ones(inputs["input_values"].shape, dtype=torch.long)
    mask[0, mask.shape[1] // 2 :] = 0
    frames = FRAMES.get(case.name, OTHERS)
    base = case.build()
    if case.model_type == "moonshine":
        real = mask[:, ::384][:, :frames].bool()
    else:
        real = base._get_feature_vector_attention_mask(frames, mask)
    assert 0 < int(real[0].sum()) < frames
    check(model, inputs | {"attention_mask": mask}, real.tolist(), 4)


def test_a_mask_that_the_base_does_not_read_changes_nothing() -> None:
    model, inputs = with_plugin(CASES["whisper"]), CASES["whisper"].inputs(2)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[:, 10:] = 0
    encoder = model.get_base_model().get_encoder()
    with torch.no_grad():
        expected = encoder(inputs["input_features"]).last_hidden_state
        assert torch.equal(encoder(inputs["input_features"], attention_mask=mask).last_hidden_state, expected)


@pytest.mark.parametrize("case", WITH_DECODER, ids=by_name)
def test_the_decoder_has_no_plugin(case: Case) -> None:
    names = [name for name, module in with_plugin(case).named_modules() if isinstance(module, VariatorLayer)]
    assert len(names) == 2
    assert all(".encoder." in name for name in names)


@pytest.mark.parametrize("case", WITH_DECODER, ids=by_name)
def test_generation_is_the_base_model_s_on_the_merged_encoding(case: Case) -> None:
    model, inputs = with_plugin(case), case.inputs(2)
    sound = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    found = model.generate(**sound, **options)
    with torch.no_grad():
        encoding = model.get_base_model().get_encoder()(**sound)
    base = case.build()
    assert found.tolist() == base.generate(**sound, encoder_outputs=encoding, **options).tolist()
    with torch.no_grad():
        assert not torch.equal(base.get_encoder()(**sound).last_hidden_state, encoding.last_hidden_state)


def test_an_encoder_by_itself() -> None:
    case = CASES["whisper"]
    encoder = case.build().get_encoder()
    model = get_peft_model(encoder, VariatorConfig())
    assert sorted(model.targeted_module_names) == ["layers.0.fc1", "layers.1.fc1"]
    seen = watch(model, lambda: model(case.inputs(1)["input_features"]))
    assert [each.rows for each in seen] == [5, 5]


def test_labels_of_a_recogniser_leave_all_frames_to_merge() -> None:
    case = CASES["wav2vec2"]
    model, inputs = with_plugin(case).train(), case.inputs(2)
    loss = model(**inputs, labels=torch.randint(FIRST_WORD, 99, (2, OTHERS))).loss
    loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "variator_" in name]
    assert all(gradient is not None and gradient.any() for gradient in gradients)
