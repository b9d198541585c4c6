"""Which model is built, what it is fed, and that two models can share their weights."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, BertConfig, BertForMaskedLM, LlamaConfig

from peft_variator.profiling import (
    SHAPES,
    build_model,
    count_positions,
    describe_environment,
    find_task,
    load_config,
    make_inputs,
    make_lengths,
    share_weights,
)


CPU = torch.device("cpu")
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}

# Millions of parameters of the published checkpoints, without heads that the task does not use.
PUBLISHED = {
    "bert-base": 109.48,
    "minilm-l6": 22.71,
    "t5-base-encoder": 109.63,
    "vit-base": 86.39,
    "qwen2.5-0.5b": 494.03,
    "qwen2.5-7b": 7615.62,
    "llama-3.2-1b": 1235.81,
}


@pytest.fixture
def tiny_file(tmp_path):
    """Path of a configuration file of a tiny model of the given type."""

    def write(model_type, **fields):
        path = tmp_path / f"{model_type}.json"
        path.write_text(json.dumps({"model_type": model_type, **TINY, **fields}))
        return str(path)

    return write


def build(model, **options):
    config = load_config(model)
    defaults = {"dtype": torch.float32, "device": CPU, "random_weights": False}
    return build_model(model, config, find_task(model, config), **{**defaults, **options})


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes_have_the_size_of_the_published_models(name):
    model = build(name, device=torch.device("meta"))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(PUBLISHED[name], abs=0.01)


@pytest.mark.parametrize(
    ("model_type", "fields", "task"),
    [
        ("bert", {}, "encoder"),
        ("modernbert", {}, "encoder"),
        ("mpnet", {}, "encoder"),
        ("llama", {}, "causal"),
        ("gpt2", {}, "causal"),
        ("qwen2", {}, "causal"),
        ("t5", {}, "seq2seq"),
        ("bart", {}, "seq2seq"),
        ("vit", {}, "vision"),
        ("clip_vision_model", {}, "vision"),
    ],
)
def test_the_task_is_read_off_the_architecture(tiny_file, model_type, fields, task):
    path = tiny_file(model_type, **fields)
    assert find_task(path, load_config(path)) == task


def test_a_model_of_several_towers_has_no_task():
    with pytest.raises(
        ValueError, match="How some/clip .architecture 'clip'. is used is not known. Name the task: enc"
    ):
        find_task("some/clip", AutoConfig.for_model("clip"))


def test_random_weights_follow_the_seed_and_have_the_dtype(tiny_file):
    path = tiny_file("bert")
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(build(path, dtype=torch.bfloat16))
    first, again, other = [model.encoder.layer[0].attention.self.query.weight for model in models]
    assert first.dtype == torch.bfloat16
    assert not models[0].training
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_pretrained_weights_are_read_unless_random_ones_are_asked_for(tmp_path):
    saved = BertForMaskedLM(BertConfig(**TINY))
    saved.save_pretrained(tmp_path)
    path = str(tmp_path)
    weight = saved.bert.encoder.layer[0].output.dense.weight
    assert torch.equal(build(path).encoder.layer[0].output.dense.weight, weight)
    assert not torch.equal(build(path, random_weights=True).encoder.layer[0].output.dense.weight, weight)


def test_only_the_encoder_is_built_where_the_encoder_is_asked_for(tiny_file):
    path = tiny_file("t5", d_model=16, d_ff=24, num_layers=2, d_kv=8, num_heads=2)
    config = load_config(path)
    options = {"dtype": torch.float32, "device": CPU, "random_weights": False}
    assert type(build_model(path, config, "encoder", **options)).__name__ == "T5EncoderModel"
    assert type(build_model(path, config, "seq2seq", **options)).__name__ == "T5ForConditionalGeneration"


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_shared_weights_are_the_same_tensors_in_other_modules(tiny_file, model_type):
    model = build(tiny_file(model_type, tie_word_embeddings=True))
    twin = share_weights(model)
    tensors, others = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (model, twin))
    assert tensors.keys() == others.keys()
    assert all(tensors[name] is others[name] for name in tensors)
    assert not set(model.modules()) & set(twin.modules())
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    assert torch.equal(model(**inputs)[0], twin(**inputs)[0])


def test_lengths():
    generator = torch.Generator().manual_seed(0)
    assert make_lengths(3, 20, "even", generator).tolist() == [20, 20, 20]
    uneven = make_lengths(500, 20, "uneven", generator)
    assert uneven[0] == 20
    assert (uneven.min(), uneven.max()) == (5, 20)
    assert make_lengths(2, 1, "uneven", generator).tolist() == [1, 1]
    for name, arguments in {"batch": (0, 20), "length": (3, 0)}.items():
        with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
            make_lengths(*arguments, "even", generator)


def make(config, task, *lengths, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return make_inputs(config, task, torch.tensor(lengths), dtype=dtype, generator=generator)


def test_encoder_inputs_are_padded_on_the_right_and_hold_no_special_token():
    config = BertConfig(**TINY, pad_token_id=3, sep_token_id=7, bos_token_id=9)
    inputs = make(config, "encoder", 500, 30, 1)
    assert set(inputs) == {"input_ids", "attention_mask"}
    mask = inputs["attention_mask"]
    assert [row.tolist() for row in mask] == [[1] * n + [0] * (500 - n) for n in (500, 30, 1)]
    words = inputs["input_ids"][mask == 1]
    assert set(words.tolist()) == set(range(40)) - {3, 7, 9}
    assert set(inputs["input_ids"][mask == 0].tolist()) == {3}


def test_causal_inputs_ask_for_a_prefill():
    inputs = make(LlamaConfig(**TINY), "causal", 5, 2)
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert inputs["use_cache"] is True
    assert inputs["logits_to_keep"] == 1


def test_seq2seq_inputs_ask_for_one_decoder_step():
    inputs = make(AutoConfig.for_model("bart", vocab_size=40), "seq2seq", 5, 2)
    assert inputs["decoder_input_ids"].tolist() == [[0], [0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]


@pytest.mark.parametrize("size", [8, [8, 8], (8, 8)])
def test_vision_inputs_are_images_of_the_models_size(size):
    config = AutoConfig.for_model("vit", image_size=size, num_channels=2)
    pixels = make(config, "vision", 1, 1, 1, dtype=torch.bfloat16)["pixel_values"]
    assert pixels.shape == (3, 2, 8, 8)
    assert pixels.dtype == torch.bfloat16


def test_vision_inputs_are_patches_where_images_have_several_shapes():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = AutoConfig.for_model("siglip2_vision_model", **sizes, num_patches=36, patch_size=4)
    inputs = make(config, "vision", 1, 1)
    assert inputs["pixel_values"].shape == (2, 36, 48)
    assert AutoModel.from_config(config)(**inputs).last_hidden_state.shape == (2, 36, 16)


@pytest.mark.parametrize(
    ("fields", "positions"),
    [
        ({"model_type": "roberta", **TINY, "max_position_embeddings": 34, "pad_token_id": 1}, 32),
        ({"model_type": "mpnet", **TINY, "max_position_embeddings": 34, "pad_token_id": 1}, 32),
        ({"model_type": "bert", **TINY, "max_position_embeddings": 34}, 34),
        ({"model_type": "opt", "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 34}, 34),
        ({"model_type": "t5"}, None),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else str(value),
)
def test_positions(fields, positions):
    config = AutoConfig.for_model(**fields)
    assert count_positions(config) == positions
    if positions is None:
        return
    inputs = {"input_ids": torch.full((1, positions), 5), "attention_mask": torch.ones(1, positions)}
    AutoModel.from_config(config)(**inputs)
    longer = {name: torch.cat([value, value[:, :1]], dim=1) for name, value in inputs.items()}
    with pytest.raises((IndexError, RuntimeError)):
        AutoModel.from_config(config)(**longer)


def test_inputs_longer_than_the_positions():
    with pytest.raises(ValueError, match="length is 65; the model has 64 positions"):
        make(BertConfig(**TINY, max_position_embeddings=64), "encoder", 65)


@pytest.mark.parametrize("name", ["videomae", "vivit", "timesformer"])
def test_videos_are_not_made(name):
    with pytest.raises(
        ValueError, match=f"'{name}' takes videos, and inputs are made of texts, images and sound alone"
    ):
        make(AutoConfig.for_model(name), "vision", 1)


def test_environment_names_what_figures_depend_on():
    facts = describe_environment(CPU)
    assert facts["threads"] == torch.get_num_threads()
    assert facts["torch"] == torch.__version__
    assert {"date", "device", "cpu", "cores", "system", "python", "peft", "transformers", "peft-variator"} <= set(
        facts
    )
    assert facts["cpu"]
    assert 0 <= facts["cpu_in_use"] <= 1
    json.dumps(facts)
