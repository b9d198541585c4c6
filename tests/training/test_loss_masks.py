"""Which tokens and predictions of a batch count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertLMHeadModel,
    PreTrainedModel,
)

from peft_variator.models import shifts_labels
from peft_variator.training.loss_masks import (
    CAUSAL,
    EXAMPLES,
    SPANS,
    TOKENS,
    batch_size,
    decoder_tokens,
    has_several_labels,
    input_tokens,
    labelled_tokens,
    patch_tokens,
    predicting_tokens,
    prediction_of,
    stacks_of,
)
from peft_variator.tuners.variator.attention_mask import last_tokens


WIDTHS_OF_BART = {
    "vocab_size": 9,
    "d_model": 8,
    "max_position_embeddings": 32,
    **{f"{part}_layers": 1 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 1 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 8 for part in ("encoder", "decoder")},
    **{f"{name}_token_id": place for place, name in enumerate(("pad", "bos", "eos", "decoder_start"))},
}
WIDTHS_OF_BERT = {
    "vocab_size": 9,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
}
BART_LIKE = [
    T.BartForCausalLM,
    T.BlenderbotForCausalLM,
    T.BlenderbotSmallForCausalLM,
    T.MBartForCausalLM,
    T.MarianForCausalLM,
    T.MvpForCausalLM,
    T.PLBartForCausalLM,
    T.PegasusForCausalLM,
    T.TrOCRForCausalLM,
]


IDS = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])


def test_real_tokens() -> None:
    assert input_tokens({"input_ids": IDS, "attention_mask": MASK}).equal(MASK.bool())
    assert input_tokens({"input_ids": IDS}).equal(torch.ones(2, 4, dtype=torch.bool))
    assert input_tokens({"inputs_embeds": torch.zeros(2, 3, 5)}).equal(torch.ones(2, 3, dtype=torch.bool))
    assert input_tokens({"pixel_values": torch.zeros(2, 3, 4, 4)}) is None
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1, 4, 4\).*Pass the 2-D mask"):
        input_tokens({"attention_mask": torch.ones(2, 1, 4, 4)})


def test_real_patches() -> None:
    pixels = {"pixel_values": torch.zeros(2, 4, 48)}
    assert patch_tokens(pixels | {"pixel_attention_mask": MASK}).equal(MASK.bool())
    patches = torch.tensor([[[1, 1], [0, 0]], [[1, 1], [1, 1]]]).bool()
    assert patch_tokens(pixels | {"patch_attention_mask": patches}).equal(patches.flatten(1))
    assert patch_tokens(pixels) is None
    with pytest.raises(ValueError, match="pixel_attention_mask has shape"):
        patch_tokens(pixels | {"pixel_attention_mask": torch.ones(2, 8, 8)})


def test_decoder_tokens() -> None:
    labels = torch.tensor([[3, 4, -100], [5, -100, -100]])
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    assert decoder_tokens(inputs | {"labels": labels}).equal(labels != -100)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert decoder_tokens(inputs | {"labels": labels, "decoder_attention_mask": mask}).equal(mask.bool())
    assert decoder_tokens(inputs | {"decoder_input_ids": labels}).equal(torch.ones(2, 3, dtype=torch.bool))
    # A sequence classifier of BART's kind: one label an example, and the decoder reads the encoder's tokens.
    assert decoder_tokens(inputs | {"labels": torch.tensor([0, 1])}).equal(MASK.bool())
    with pytest.raises(ValueError, match="decoder_attention_mask has shape"):
        decoder_tokens({"decoder_attention_mask": torch.ones(2, 1, 3, 3)})


@pytest.mark.parametrize(
    ("mask", "last"),
    [([[1, 1, 0]], [[0, 1, 0]]), ([[0, 1, 1]], [[0, 0, 1]]), ([[0, 0, 0]], [[0, 0, 0]]), ([[1, 0, 1]], [[0, 0, 1]])],
)
def test_last_tokens(mask: list[list[int]], last: list[list[int]]) -> None:
    assert last_tokens(torch.tensor(mask).bool()).equal(torch.tensor(last).bool())


def test_predicting_tokens_come_right_before_a_label() -> None:
    labels = torch.tensor([[-100, -100, 7, -100], [4, 9, -100, -100]])
    used = predicting_tokens({"input_ids": IDS, "attention_mask": MASK, "labels": labels})
    assert used.tolist() == [[False, True, False, False], [True, False, False, False]]
    assert predicting_tokens({"input_ids": IDS, "attention_mask": MASK}).equal(last_tokens(MASK.bool()))
    with pytest.raises(ValueError, match="only pixel_values, so it does not tell"):
        predicting_tokens({"pixel_values": torch.zeros(1)})


def test_labelled_tokens() -> None:
    labels = torch.tensor([[-100, 6], [3, -100]])
    assert labelled_tokens({"labels": labels}).equal(labels != -100)
    assert labelled_tokens({"attention_mask": MASK}).equal(MASK.bool())


def test_batch_size_is_that_of_the_first_tensor() -> None:
    assert batch_size({"return_dict": True, "pixel_values": torch.zeros(3, 2)}) == 3


@pytest.mark.parametrize(
    ("name", "prediction"),
    [
        ("bert", None),
        ("bert-classifier", EXAMPLES),
        ("gpt2", CAUSAL),
        ("llama", CAUSAL),
        ("t5", TOKENS),
        ("vit", EXAMPLES),
    ],
)
def test_prediction_of_the_model_classes(base_model, name: str, prediction: object) -> None:
    assert prediction_of(base_model(name)) is prediction


@pytest.mark.parametrize(
    ("cls", "prediction"),
    [
        (BertForMaskedLM, TOKENS),
        (BertForTokenClassification, TOKENS),
        (BertForQuestionAnswering, SPANS),
        (BertLMHeadModel, CAUSAL),
    ],
)
def test_prediction_of_heads(cls: type[PreTrainedModel], prediction: object) -> None:
    config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9, is_decoder=True
    )
    assert prediction_of(cls(config)) is prediction
    assert prediction_of(type("Mine", (cls,), {})(config)) is prediction


WIDTHS_OF_WAV2VEC2 = {
    "conv_dim": (8, 8),
    "conv_stride": (4, 4),
    "conv_kernel": (8, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}


def test_prediction_of_heads_of_sound() -> None:
    whisper = T.WhisperConfig(**WIDTHS_OF_BART, max_source_positions=20)
    samples = T.Wav2Vec2Config(**WIDTHS_OF_BERT, **WIDTHS_OF_WAV2VEC2)
    assert prediction_of(T.WhisperForConditionalGeneration(whisper)) is TOKENS
    assert prediction_of(T.WhisperForAudioClassification(whisper)) is EXAMPLES
    assert prediction_of(T.Wav2Vec2ForSequenceClassification(samples)) is EXAMPLES
    assert prediction_of(T.Wav2Vec2ForCTC(samples)) is None
    # Of a decoder without labels its own tokens count, whatever the encoder's are.
    sound = {"input_features": torch.zeros(2, 80, 40), "attention_mask": torch.ones(2, 40)}
    assert labelled_tokens({**sound, "decoder_input_ids": IDS}).equal(torch.ones(2, 4, dtype=torch.bool))


UNSHIFTED_CASES = [
    (T.XLMWithLMHeadModel, T.XLMConfig(vocab_size=9, emb_dim=8, n_layers=1, n_heads=1)),
    (T.XLNetLMHeadModel, T.XLNetConfig(vocab_size=9, d_model=8, n_layer=1, n_head=1, d_inner=8)),
    *[(cls, cls.config_class(**WIDTHS_OF_BART)) for cls in BART_LIKE],
    (T.WhisperForCausalLM, T.WhisperConfig(**WIDTHS_OF_BART, max_source_positions=4)),
    (T.BertLMHeadModel, T.BertConfig(**WIDTHS_OF_BERT, is_decoder=True)),
    (T.LlamaForCausalLM, T.LlamaConfig(**WIDTHS_OF_BERT)),
]


@pytest.mark.parametrize(("cls", "config"), UNSHIFTED_CASES, ids=[cls.__name__ for cls, _ in UNSHIFTED_CASES])
def test_labels_count_where_the_models_own_loss_counts_them(cls: Any, config: Any) -> None:
    torch.manual_seed(0)
    model = cls(config).eval()
    inputs = {"input_ids": torch.randint(3, 9, (2, 6))}
    labels = torch.randint(3, 9, (2, 6))
    labels[:, 3:] = -100
    labels[0, 1] = -100
    outputs = model(**inputs, labels=labels)
    found = prediction_of(model)
    assert found is not None
    used = found.mask({**inputs, "labels": labels})
    counted = labels[:, 1:] if shifts_labels(model) else labels
    targets = counted[counted != -100]
    expected = torch.nn.functional.cross_entropy(outputs.logits[used], targets)
    torch.testing.assert_close(outputs.loss, expected)


def test_several_labels_are_told_by_the_problem_or_by_the_labels() -> None:
    floats, classes = {"labels": torch.zeros(2, 3)}, {"labels": torch.zeros(2, dtype=torch.long)}
    assert has_several_labels("multi_label_classification", EXAMPLES, {})
    assert has_several_labels(None, EXAMPLES, floats)
    assert not has_several_labels(None, EXAMPLES, classes)
    assert not has_several_labels("single_label_classification", EXAMPLES, floats)
    assert not has_several_labels(None, CAUSAL, floats)
    assert decoder_tokens({"input_ids": IDS, **floats}).shape == IDS.shape


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_frames_of_sound(padded: bool, adapter: bool) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    convolutions = {"conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (8, 4), "num_feat_extract_layers": 2}
    config = T.Wav2Vec2Config(**sizes, **convolutions, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    config.add_adapter = adapter
    mask = torch.ones(2, 400, dtype=torch.long)
    mask[1, 200 if padded else 400 :] = 0
    frames = stacks_of(T.Wav2Vec2Model(config))["hidden_states"]
    found = frames({"input_values": torch.zeros(2, 400), "attention_mask": mask})
    model = T.Wav2Vec2Model(config).eval()
    length = model(torch.zeros(1, 400), output_hidden_states=True).hidden_states[-1].shape[1]
    assert found.shape == (2, length)
    assert found.sum(1).tolist() == [length, length // 2 if padded else length]
    assert frames({"input_values": torch.zeros(2, 400)}) is None
    whisper = T.WhisperConfig(**WIDTHS_OF_BART, max_source_positions=20)
    whole = stacks_of(T.WhisperForConditionalGeneration(whisper))["encoder_hidden_states"]
    finer = torch.arange(40).lt(torch.tensor([[40], [20]])).long()
    assert whole({"input_features": torch.zeros(2, 80, 40), "attention_mask": finer}).sum(1).tolist() == [20, 10]
    with pytest.raises(ValueError, match=r"attention_mask has 30 positions.*Leave it out"):
        whole({"input_features": torch.zeros(2, 80, 30), "attention_mask": finer[:, :30]})


def test_a_module_of_another_kind_has_no_known_prediction() -> None:
    assert prediction_of(torch.nn.Linear(2, 2)) is None


def test_spans_are_distributions_over_real_positions() -> None:
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    outputs = {"start_logits": torch.randn(2, 4), "end_logits": torch.randn(2, 4)}
    logits = SPANS.logits(outputs)
    assert logits.shape == (2, 2, 4)
    assert logits[:, 1].equal(outputs["end_logits"])
    assert SPANS.mask(inputs).equal(torch.ones(2, 2, dtype=torch.bool))
    classes = SPANS.classes(inputs, logits)
    assert classes.equal(MASK.bool().unsqueeze(1).expand(2, 2, 4))
    assert SPANS.classes({"pixel_values": torch.zeros(2)}, logits) is None
