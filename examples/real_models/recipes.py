"""How a plugin for each kind of model is made: its configuration, and what it is trained on for how long."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from texts import (
    MIN_WORDS,
    SAMPLING_RATE,
    cifar10,
    digit_utterances,
    photographs,
    read_squad,
    sentences,
    spoken_sentences,
    training_text,
)
from torch.nn.functional import interpolate
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, default_data_collator
from vision_quality import CIFAR_SIDE, PHOTOGRAPH_SIDE, pixels
from weights import WEIGHTS, Loaded

from peft_variator import VariatorConfig
from peft_variator.files import replacing
from peft_variator.training.data import cut_spans, split_spans, surroundings, tokenize


__all__ = [
    "RECIPES",
    "Recipe",
    "answered_questions",
    "collate_photographs",
    "make_dataset",
    "name_for_whole_model",
    "plugin_config",
    "trained_part",
]


# Tokens of an answer that a chat model's examples end with, at most.
TAUGHT_TOKENS = 32
# How questions about a passage are asked.
ASKED = (
    "{context}\n\n{question}",
    "{question}\n\n{context}",
    "Context: {context}\nQuestion: {question}\nAnswer:",
    "Read this passage and answer the question in one short sentence.\n\n{context}\n\nQuestion: {question}",
)


@dataclass(frozen=True)
class Recipe:
    """Training of one plugin.

    Args:
        steps: optimizer steps.
        batch_size: examples a step.
        length: tokens of the longest example; images and sounds have none.
        learning_rate: the peak.
        ratios: compression ratios that are drawn from.
        bf16: whether products of matrices are in bfloat16, which pays from about 100M parameters on.
        sentences: share of single sentences among an encoder's texts, the others are spans.
        questions: share of questions about a passage in the prompt, answered by the base itself, among a chat model's
            examples; the others are spans.
        losses: fields of `DistillationConfig` that weigh the parts of the loss.
        plugin: fields of `VariatorConfig`.
    """

    steps: int
    batch_size: int
    length: int = 128
    learning_rate: float = 2e-3
    ratios: tuple[int, ...] = (2, 4, 8)
    bf16: bool = False
    sentences: float = 0.0
    questions: float = 0.0
    losses: dict[str, Any] = field(default_factory=dict)
    plugin: dict[str, Any] = field(default_factory=dict)


RECIPES: dict[str, Recipe] = {
    "all-MiniLM-L6-v2": Recipe(steps=2500, batch_size=32, sentences=0.5),
    "all-mpnet-base-v2": Recipe(steps=1500, batch_size=16, bf16=True, sentences=0.5),
    "SmolLM2-135M-Instruct": Recipe(
        steps=1500, batch_size=8, length=320, bf16=True, losses={"hidden_weight": 0.5, "logits_weight": 1.0}
    ),
    "dinov2-vit-s14": Recipe(steps=1000, batch_size=16, ratios=(4, 16), bf16=True),
    # Frames have neither token ids nor a mask, so nothing at their ends is kept.
    "whisper-tiny.en": Recipe(
        steps=600,
        batch_size=4,
        plugin={"keep_first_tokens": 0, "keep_last_tokens": 0},
    ),
}


def plugin_config(name: str, base: Loaded, **fields: Any) -> VariatorConfig:
    """The configuration of a model's plugin; the only place where one is made.

    Args:
        name: one of `RECIPES`.
        base: the model, with its tokenizer if it has one.
        fields: fields of `VariatorConfig` that differ from the recipe's.
    """
    chosen = RECIPES[name].plugin | fields
    if base.tokenizer is None or WEIGHTS[name].kind == "audio":
        return VariatorConfig(**chosen)
    return VariatorConfig.from_tokenizer(base.tokenizer, **chosen)


def trained_part(name: str, base: Loaded) -> PreTrainedModel:
    """What a plugin goes into: the encoder alone where a decoder only follows it, else the whole model."""
    return base.model.get_encoder() if WEIGHTS[name].kind == "audio" else base.model


def name_for_whole_model(folder: Path) -> None:
    """Rename what was saved of an audio encoder's plugin as in the model that has a decoder, too, where it is used.

    Args:
        folder: a saved plugin.
    """
    config = VariatorConfig.from_pretrained(str(folder))
    config.auto_mapping = None  # of the encoder
    config.save_pretrained(str(folder))
    file = folder / "adapter_model.safetensors"
    on_encoder, on_whole = "base_model.model.", "base_model.model.model.encoder."
    tensors = {key.replace(on_encoder, on_whole, 1): value for key, value in load_file(file).items()}
    with replacing(file) as temporary:
        save_file(tensors, str(temporary), metadata={"format": "pt"})


def make_dataset(
    name: str, base: Loaded, data: Path, count: int, seed: int, recipe: Recipe | None = None
) -> Sequence[Any] | Dataset[Any]:
    """Examples to train on, made from what is never measured on.

    Args:
        name: one of `RECIPES`.
        base: the model, with what prepares its inputs.
        data: the data folder.
        count: number of examples; text starts over when it is used up, cut at other places.
        seed: of order, cuts and crops.
        recipe: how long texts are, and how many are single sentences; the model's if not given.
    """
    kind, recipe = WEIGHTS[name].kind, recipe or RECIPES[name]
    if kind == "vision":
        return Photographs(data, count, seed)
    if kind == "audio":
        return Spectrograms(base, data, count, seed)
    before, after = surroundings(base.tokenizer)
    room = recipe.length - len(before) - len(after)
    text = training_text(data, seed=seed)
    whole = _whole_sentences(text, base.tokenizer, room, round(recipe.sentences * count), seed)
    answered = answered_questions(base, data, round(recipe.questions * count), recipe.length, seed)
    # Spans are five eighths of the longest in the mean.
    spanned = count - len(whole) - len(answered)
    stream = tokenize(cycle(text), base.tokenizer, spanned * room)
    spans = cut_spans(stream, room, seed)[:spanned]
    if kind == "causal":
        return [*split_spans([*whole, *spans], before, after, is_decoder=False, seed=seed), *answered]
    return [{"input_ids": [*before, *span, *after]} for span in (*whole, *spans)]


def _whole_sentences(
    paragraphs: list[str], tokenizer: PreTrainedTokenizerBase, longest: int, count: int, seed: int
) -> list[list[int]]:
    """Tokens of sentences as they stand, in an order that mixes them; they start over when they are used up.

    An encoder embeds single sentences more often than spans, and a plugin learns what it is shown.
    """
    found = dict.fromkeys(part for text in paragraphs for part in sentences(text) if len(part.split()) >= MIN_WORDS)
    order = list(found)
    random.Random(f"order of the sentences, seed {seed}").shuffle(order)
    chosen = list(islice(cycle(order), count))
    return [ids[:longest] for ids in tokenizer(chosen, add_special_tokens=False)["input_ids"]] if chosen else []


@torch.inference_mode()
def answered_questions(
    base: Loaded, data: Path, count: int, longest: int, seed: int, batch_size: int = 8
) -> list[dict[str, list[int]]]:
    """Questions about a passage of SQuAD's articles to train on, with what the base answers, word for word.

    The answer is the base's, not people's: it is the base that a plugin follows, and these are the tokens it will
    stand at. Asked in several ways, none of them the one that is measured with.

    Args:
        base: a chat model without a plugin, with its tokenizer.
        data: the data folder.
        count: number of examples; questions start over when they are used up.
        longest: tokens of a prompt with its answer at most; longer prompts are left out.
        seed: of what is asked, and how.
        batch_size: prompts that are answered at once.

    Returns:
        Examples with `input_ids` and `labels`, which are −100 in the prompt.

    Raises:
        ValueError: no prompt is short enough.
    """
    if not count:
        return []
    generator = random.Random(f"questions about passages, seed {seed}")
    asked = [
        (context, question)
        for article in read_squad(data)[0]
        for context, questions in article.paragraphs
        for question, _ in questions
    ]
    generator.shuffle(asked)
    prompts: list[list[int]] = []
    for number, (context, question) in enumerate(cycle(asked)):
        if number == len(asked) and not prompts:
            raise ValueError(f"No question on a passage fits into {longest} tokens with its answer. Raise --length.")
        content = generator.choice(ASKED).format(context=context, question=question)
        ids = base.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        if len(ids) <= longest - TAUGHT_TOKENS:
            prompts.append(ids)
        if len(prompts) == count:
            break
    examples = []
    # Neighbours of one length: little padding. The order is the data loader's.
    prompts.sort(key=len)
    for batch in range(0, count, batch_size):
        part = prompts[batch : batch + batch_size]
        padded = base.tokenizer.pad({"input_ids": part}, padding_side="left", return_tensors="pt")
        answers = base.model.generate(**padded, max_new_tokens=TAUGHT_TOKENS, do_sample=False)
        for ids, answer in zip(part, answers[:, padded["input_ids"].shape[1] :].tolist(), strict=True):
            end = answer.index(base.tokenizer.eos_token_id) + 1 if base.tokenizer.eos_token_id in answer else None
            examples.append({"input_ids": [*ids, *answer[:end]], "labels": [-100] * len(ids) + answer[:end]})
    return examples


class Photographs(Dataset[dict[str, torch.Tensor]]):
    """Random squares of photographs, one in four an image of CIFAR-10: as much as a probe is trained on.

    Args:
        data: the data folder.
        count: number of examples.
        seed: of what is drawn.
    """

    def __init__(self, data: Path, count: int, seed: int) -> None:
        self.photographs, self.small = photographs(data)[0], cifar10(data, "train")[0]
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`pixel_values` of shape `(3, height, width)`; the same for the same index."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        generator = random.Random(f"crop {index}, seed {self.seed}")
        if index % 4 == 0:
            image = generator.choice(self.small)
        else:
            image = generator.choice(self.photographs)
            side = round(min(image.size) * generator.uniform(0.5, 1))
            left, top = (generator.randint(0, length - side) for length in image.size)
            image = image.crop((left, top, left + side, top + side))
        return {"pixel_values": pixels([image], PHOTOGRAPH_SIDE)[0]}


def collate_photographs(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch, half of them made as small as the images that a probe sees: a plugin learns the length it is shown."""
    batch = default_data_collator(examples)
    if torch.rand(()) < 0.5:
        batch["pixel_values"] = interpolate(batch["pixel_values"], CIFAR_SIDE, mode="bicubic", antialias=True)
    return batch


class Spectrograms(Dataset[dict[str, torch.Tensor]]):
    """Utterances of digits and sentences that eSpeak NG reads, as the encoder takes them.

    Args:
        base: the model with its feature extractor.
        data: the data folder.
        count: number of examples.
        seed: of what is drawn.
    """

    def __init__(self, base: Loaded, data: Path, count: int, seed: int) -> None:
        spoken = [text for text in training_text(data, ["masc"], seed) if len(text.split()) <= 40]
        self.utterances = digit_utterances(data, count - count // 2, is_test=False, seed=seed)
        self.utterances += spoken_sentences(spoken[: count // 2])
        random.Random(f"order of the utterances, seed {seed}").shuffle(self.utterances)
        self.features = base.features

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`input_features` of shape `(80, 3000)`."""
        audio = self.utterances[index].audio
        features = self.features(audio, sampling_rate=SAMPLING_RATE, return_tensors="pt")
        return {"input_features": features["input_features"][0]}
