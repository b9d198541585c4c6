"""Which tokens and predictions of a batch count."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertLMHeadModel,
    PreTrainedModel,
)

from peft_variator.training.loss_masks import (
    CAUSAL,
    EXAMPLES,
    SPANS,
    TOKENS,
    batch_size,
    decoder_tokens,
    input_tokens,
    labelled_tokens,
    predicting_tokens,
    prediction_of,
)
from peft_variator.tuners.variator.attention_mask import last_tokens


IDS = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])


def test_real_tokens() -> None:
    assert input_tokens({"input_ids": IDS, "attention_mask": MASK}).equal(MASK.bool())
    assert input_tokens({"input_ids": IDS}).equal(torch.ones(2, 4, dtype=torch.bool))
    assert input_tokens({"inputs_embeds": torch.zeros(2, 3, 5)}).equal(torch.ones(2, 3, dtype=torch.bool))
    assert input_tokens({"pixel_values": torch.zeros(2, 3, 4, 4)}) is None
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1, 4, 4\).*Pass the 2-D mask"):
        input_tokens({"attention_mask": torch.ones(2, 1, 4, 4)})


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
