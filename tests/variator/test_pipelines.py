"""transformers' pipelines and PEFT's automatic classes run a plugin from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForSequenceClassification,
    PeftModel,
    get_peft_model,
)
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    CLIPImageProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
    pipeline,
)

from peft_variator import VariatorConfig
from tests.tiny_models import LLAVA

from .reference import watch


TEXT = "a b c d e f g h i j k l m n"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A plugin with random weights on a tiny encoder, with the tokenizer beside both."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(ord("a"), ord("z") + 1))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path / "base")
    base = BertModel.from_pretrained(tmp_path / "base")
    config = VariatorConfig(init_weights=False, compression_ratio=8, task_type="FEATURE_EXTRACTION")
    get_peft_model(base, config).save_pretrained(tmp_path / "plugin")
    for folder in ("base", "plugin"):
        BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / folder)
    return tmp_path / "plugin"


@pytest.fixture
def expected(adapter: Path) -> np.ndarray:
    model = PeftModel.from_pretrained(BertModel.from_pretrained(adapter.parent / "base"), adapter).eval()
    inputs = BertTokenizerFast.from_pretrained(adapter)(TEXT, return_tensors="pt")
    with torch.no_grad():
        found = model(**inputs).last_hidden_state
        model.set_compression_ratio(1)
        assert (found - model(**inputs).last_hidden_state).abs().max() > 1e-3
    return found.numpy()


def test_a_pipeline_takes_the_plugin_s_folder(adapter: Path, expected: np.ndarray) -> None:
    extract = pipeline("feature-extraction", model=str(adapter), device="cpu")
    np.testing.assert_allclose(np.array(extract(TEXT)), expected, atol=1e-5)


def test_a_pipeline_takes_a_peft_model(adapter: Path, expected: np.ndarray) -> None:
    model = AutoPeftModelForFeatureExtraction.from_pretrained(str(adapter))
    extract = pipeline(
        "feature-extraction", model=model, tokenizer=BertTokenizerFast.from_pretrained(adapter), device="cpu"
    )
    np.testing.assert_allclose(np.array(extract(TEXT)), expected, atol=1e-5)


def with_saved_base(base: PreTrainedModel, folder: Path, **fields: Any) -> PeftModel:
    """A plugin with random weights, in `folder/plugin`, on a base that was loaded from `folder/base`."""
    base.save_pretrained(folder / "base")
    config = VariatorConfig(init_weights=False, compression_ratio=4, **fields)
    model = get_peft_model(type(base).from_pretrained(folder / "base"), config).eval()
    model.save_pretrained(folder / "plugin")
    return model


def generated(model: PeftModel, inputs: Any) -> tuple[list[int], set[int]]:
    """What a model answers, and how many rows the networks with a plugin saw of the input."""
    options = {"max_new_tokens": 6, "do_sample": False}
    seen = watch(model, lambda: model.generate(**inputs, max_new_tokens=1))
    return model.generate(**inputs, **options)[0].tolist(), {network.rows for network in seen}


def test_speech_is_recognised_with_a_plugin_in_whispers_encoder(tmp_path: Path) -> None:
    specials = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = {word: index for index, word in enumerate([*letters, *specials])}
    special = {"pad_token_id": 26, "bos_token_id": 26, "eos_token_id": 26, "decoder_start_token_id": 27}
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    lengths = {"max_source_positions": 50, "max_target_positions": 24, "num_mel_bins": 8}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "init_std": 0.5}
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=len(vocabulary),
        **special,
        **sizes,
        **lengths,
        **heads,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = with_saved_base(WhisperForConditionalGeneration(config), tmp_path)
    features, tokenizer = WhisperFeatureExtractor(feature_size=8, chunk_length=1), WhisperTokenizer(vocabulary, [])
    sound = np.random.default_rng(0).normal(size=16000).astype(np.float32)
    inputs = features(sound, sampling_rate=16000, return_tensors="pt")
    ids, rows = generated(model, inputs)
    assert rows == {13}, "50 frames in groups of 4"
    answers: list[str] = []
    text = tokenizer.decode(ids, skip_special_tokens=True)
    for folder in ("base", "plugin"):
        WhisperProcessor(features, tokenizer).save_pretrained(tmp_path / folder)
    for given in (
        {"model": model, "tokenizer": tokenizer, "feature_extractor": features},
        {"model": tmp_path / "plugin"},
    ):
        given["model"] = str(given["model"]) if isinstance(given["model"], Path) else given["model"]
        recognize = pipeline("automatic-speech-recognition", device="cpu", **given)

        def answer(recognize: Any = recognize) -> None:
            answers.append(recognize(sound.copy(), generate_kwargs={"max_new_tokens": 6})["text"])

        assert {network.rows for network in watch(recognize.model, answer)} == rows
    assert answers == [text, text]


def test_an_image_is_described_by_a_model_with_a_plugin(tmp_path: Path) -> None:
    model = with_saved_base(LLAVA.build(), tmp_path, compress_vision_tower=True)
    config = model.get_base_model().config
    words = [f"w{index}" for index in range(config.text_config.vocab_size)]
    words[config.image_token_id] = "<image>"
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="w1"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0", extra_special_tokens=["<image>"])
    vision = config.vision_config
    size = {"height": vision.image_size, "width": vision.image_size}
    processor = LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size),
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
    )
    pixels = np.random.default_rng(0).integers(0, 256, (vision.image_size, vision.image_size, 3), dtype=np.uint8)
    image, text = Image.fromarray(pixels), "<image> w5 w6 w7 w8 w9 w10"
    inputs = processor(images=image, text=text, return_tensors="pt")
    ids, rows = generated(model, inputs)
    assert max(rows) < inputs["input_ids"].shape[1] / 2
    model.set_compression_ratio(1)
    assert generated(model, inputs)[0] != ids
    model.set_compression_ratio(4)
    for folder in ("base", "plugin"):
        processor.save_pretrained(tmp_path / folder)
    for given in ({"model": model, "processor": processor}, {"model": str(tmp_path / "plugin")}):
        describe = pipeline("image-text-to-text", device="cpu", **given)
        options = {"generate_kwargs": {"do_sample": False}, "max_new_tokens": 6, "return_tensors": True}
        assert describe(image, text=text, **options)[0]["generated_token_ids"].tolist() == ids


@pytest.mark.parametrize(
    ("auto", "build", "task_type"),
    [
        (AutoPeftModel, BertModel, None),
        (AutoPeftModelForSequenceClassification, BertForSequenceClassification, "SEQ_CLS"),
        (AutoPeftModelForCausalLM, LlamaForCausalLM, "CAUSAL_LM"),
    ],
)
def test_automatic_classes_load_a_plugin(tmp_path: Path, auto: Any, build: Any, task_type: str | None) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = (LlamaConfig if build is LlamaForCausalLM else BertConfig)(vocab_size=50, initializer_range=0.4, **sizes)
    model = with_saved_base(build(config), tmp_path, task_type=task_type)
    inputs = {"input_ids": torch.randint(5, 50, (2, 12))}
    loaded = auto.from_pretrained(tmp_path / "plugin").eval()
    with torch.no_grad():
        expected = model(**inputs)[0]
        torch.testing.assert_close(loaded(**inputs)[0], expected, rtol=0, atol=0)
        loaded.set_compression_ratio(1)
        assert (loaded(**inputs)[0] - expected).abs().max() > 1e-3
