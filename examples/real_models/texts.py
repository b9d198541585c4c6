"""What plugins for real models are trained on: text, photographs and speech, apart from all that is measured on.

The folder `--data` is laid out as this example's README says.
"""

from __future__ import annotations

import ast
import csv
import importlib.util
import io
import json
import random
import re
import wave
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from speech import synthesise


__all__ = [
    "GENERAL",
    "MIN_WORDS",
    "SOURCES",
    "Article",
    "Utterance",
    "cifar10",
    "digit_utterances",
    "photographs",
    "read_rows",
    "read_squad",
    "sentences",
    "spoken_sentences",
    "training_text",
    "wikitext2",
]

# A paragraph with fewer words is a heading, a signature or a line of code.
MIN_WORDS = 6
# Of the SQuAD articles one in four is measured on: the same as in the GLUE example.
ARTICLES_PER_TESTED = 4
PHOTOGRAPHS_PER_TESTED = 5
# Packages whose documentation is prose; all of them are installed with this project.
DOCUMENTED = ("numpy", "scipy", "sklearn", "torch", "transformers")
# The data set's own test split; 5 to 14 are trained on.
TESTED_DIGITS = range(5)
SAMPLING_RATE = 16_000

_Audio = npt.NDArray[np.float32]


# --- Text --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Article:
    """An article of SQuAD.

    Args:
        title: its title, unique.
        paragraphs: each a context, and its questions with the answers that people gave.
    """

    title: str
    paragraphs: list[tuple[str, list[tuple[str, list[str]]]]]


def read_squad(data: Path) -> tuple[list[Article], list[Article]]:
    """Articles of SQuAD v1.1 dev to train on and to measure on; no title is in both."""
    with zipfile.ZipFile(_existing(data / "squad_v1_dev" / "dev-v1.1.json.zip")) as archive:
        articles = json.loads(archive.read("dev-v1.1.json"))["data"]
    sides: tuple[list[Article], list[Article]] = ([], [])
    for number, article in enumerate(articles):
        paragraphs = [
            (part["context"], [(entry["question"], [a["text"] for a in entry["answers"]]) for entry in part["qas"]])
            for part in article["paragraphs"]
        ]
        sides[number % ARTICLES_PER_TESTED == 0].append(Article(article["title"], paragraphs))
    return sides


def read_rows(path: Path, header: bool) -> list[list[str]]:
    """Rows of a tab-separated file in which quotes are just characters."""
    with _existing(path).open(encoding="utf-8", newline="") as lines:
        return list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))[header:]


def wikitext2(data: Path, split: str) -> list[str]:
    """Paragraphs of WikiText-2 as people write them: its tokens joined again, headings left out.

    Args:
        data: the data folder.
        split: `valid` or `test`.
    """
    lines = _existing(data / "wikitext2_valid_test" / f"{split}.txt").read_text(encoding="utf-8").splitlines()
    return [_detokenise(line.strip()) for line in lines if line.strip() and not line.strip().startswith("= ")]


def _detokenise(text: str) -> str:
    text = re.sub(r" @(.)@ ", r"\1", text).replace("<unk>", "unknown")
    text = re.sub(r' "(?: )?([^"]*?)(?: )?" ', r' "\1" ', text)
    text = re.sub(r" ([.,;:!?)\]%]|'s\b|n't\b)", r"\1", text)
    return re.sub(r"([(\[$]) ", r"\1", text)


def _masc(data: Path) -> Iterator[str]:
    text = _existing(data / "masc" / "masc.txt").read_text(encoding="utf-8")
    yield from (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))


def _tinystories(data: Path) -> Iterator[str]:
    text = _existing(data / "tinystories_sample" / "tinystories_sample.txt").read_text(encoding="utf-8")
    # The last story is cut off.
    yield from (" ".join(story.split()) for story in text.split("<|endoftext|>")[:-1])


def _squad(data: Path) -> Iterator[str]:
    for article in read_squad(data)[0]:
        for context, questions in article.paragraphs:
            yield context
            yield from (question for question, _ in questions)


def _docstrings(data: Path) -> Iterator[str]:
    """Paragraphs of prose in the docstrings of installed packages."""
    for package in DOCUMENTED:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue
        for path in sorted(Path(spec.submodule_search_locations[0]).rglob("*.py")):
            if "test" not in str(path):
                yield from _prose(path)


def _prose(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
            # Tables, examples and signatures have marks that sentences do not.
            parts = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
            yield from (part for part in parts if part.endswith(".") and not re.search(r">>>|--|::|==", part))


SOURCES = {
    "masc": _masc,
    "wikitext2": lambda data: wikitext2(data, "valid"),
    "tinystories": _tinystories,
    "squad": _squad,
    "docstrings": _docstrings,
}
# Technical prose covers headlines and captions worse than the others do, and reading it takes a minute.
GENERAL = ("masc", "wikitext2", "tinystories", "squad")


def training_text(data: Path, sources: Iterable[str] = GENERAL, seed: int = 0) -> list[str]:
    """Paragraphs to train on, in an order that mixes the sources; none has a sentence that is measured on.

    Args:
        data: the data folder.
        sources: names in `SOURCES`.
        seed: of the order.

    Raises:
        FileNotFoundError: a source is not in the folder.
        ValueError: there is no such source.
    """
    measured = _measured_sentences(data)
    paragraphs: dict[str, None] = {}
    for source in sources:
        if source not in SOURCES:
            raise ValueError(f"There is no source {source!r}; choose from {', '.join(SOURCES)}.")
        for paragraph in SOURCES[source](data):
            is_question = source == "squad" and paragraph.endswith("?")
            if is_question or len(paragraph.split()) >= MIN_WORDS:
                paragraphs[paragraph] = None
    kept = [text for text in paragraphs if measured.isdisjoint(map(_normalised, sentences(text)))]
    random.Random(f"order of the training text, seed {seed}").shuffle(kept)
    return kept


def _measured_sentences(data: Path) -> set[str]:
    """Normalised sentences of every set that a table is computed on, so far as it is in the data folder.

    All splits of STS-B and MRPC count, and SQuAD's tested articles and WikiText-2 test by sentence.
    """
    texts: list[str] = []
    columns = {
        "stsb/sts-train.csv": (5, 6),
        "stsb/sts-dev.csv": (5, 6),
        "stsb/sts-test.csv": (5, 6),
        "mrpc/train.tsv": (3, 4),
        "mrpc/val.tsv": (3, 4),
        "mrpc/test.tsv": (3, 4),
        "qqp_10k/eval.tsv": (1, 2),
        "sst2/dev.tsv": (0,),
        "sst2/test.tsv": (0,),
    }
    for name, places in columns.items():
        if (data / name).is_file():
            texts += [row[place] for row in read_rows(data / name, header=False) for place in places]
    if (data / "wikitext2_valid_test" / "test.txt").is_file():
        texts += wikitext2(data, "test")
    if (data / "squad_v1_dev").is_dir():
        for article in read_squad(data)[1]:
            texts += [
                text for context, questions in article.paragraphs for text in (context, *(q for q, _ in questions))
            ]
    # What is shorter is no text of its own ("He said so.") and may stand anywhere.
    found = {_normalised(part) for text in texts for part in (text, *sentences(text))}
    return {sentence for sentence in found if len(sentence.split()) >= MIN_WORDS}


def sentences(text: str) -> list[str]:
    """The sentences of a paragraph, by their full stops."""
    # Not `split_sentences`, whose sentences keep the white space before them: the records were made with these.
    return re.split(r"(?<=[.!?])\s+", text)


def _normalised(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. --data has to name the folder that holds {path.parent.name}.")
    return path


# --- Images ------------------------------------------------------------------------------------------------------


def _records(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(_existing(path)).to_pylist()


def _image(record: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(record["image_jpg"])).convert("RGB")


def photographs(data: Path) -> tuple[list[Image.Image], list[Image.Image]]:
    """Photographs to train on and, one in five, to measure on."""
    sides: tuple[list[Image.Image], list[Image.Image]] = ([], [])
    for number, record in enumerate(_records(data / "imagenet_samples_500" / "images.parquet")):
        sides[number % PHOTOGRAPHS_PER_TESTED == 0].append(_image(record))
    return sides


def cifar10(data: Path, split: str) -> tuple[list[Image.Image], list[int]]:
    """Images of 32 × 32 and their classes; `split` is `train` or `test`."""
    records = _records(data / "cifar10_12k" / f"{split}.parquet")
    return [_image(record) for record in records], [record["label"] for record in records]


# --- Speech ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Utterance:
    """Speech and what was said.

    Args:
        audio: samples at 16 kHz, between −1 and 1.
        text: the words.
    """

    audio: _Audio
    text: str


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digit_utterances(data: Path, count: int, *, is_test: bool, seed: int = 0) -> list[Utterance]:
    """Four to ten spoken digits of one speaker, joined with short pauses.

    Args:
        data: the data folder.
        count: number of utterances.
        is_test: recordings 0 to 4 of each speaker and digit if true, else the others.
        seed: of what is joined.
    """
    generator = random.Random(f"utterances, seed {seed}, test {is_test}")
    speakers: dict[str, list[tuple[int, _Audio]]] = {}
    for record in _records(data / "spoken_digits" / "recordings.parquet"):
        if (record["index"] in TESTED_DIGITS) == is_test:
            speakers.setdefault(record["speaker"], []).append((record["digit"], _read_wave(record["wav"])))
    names = sorted(speakers)
    utterances = []
    for _ in range(count):
        parts = generator.choices(speakers[generator.choice(names)], k=generator.randint(4, 10))
        pauses = [np.zeros(round(SAMPLING_RATE * generator.uniform(0.15, 0.4)), np.float32) for _ in parts]
        audio = np.concatenate(
            [piece for pause, (_, sound) in zip(pauses, parts, strict=True) for piece in (pause, sound)]
        )
        utterances.append(Utterance(audio, " ".join(DIGITS[digit] for digit, _ in parts)))
    return utterances


def spoken_sentences(texts: Iterable[str], voice: str = "en-us") -> list[Utterance]:
    """Sentences that eSpeak NG reads; each becomes an utterance.

    Raises:
        ModuleNotFoundError: `espeakng-loader` is not installed.
    """
    return [Utterance(_resample(*synthesise(text, voice)), text) for text in texts]


def _read_wave(content: bytes) -> _Audio:
    """Samples of a mono 16-bit WAV at 16 kHz."""
    with wave.open(io.BytesIO(content)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
        return _resample(samples, file.getframerate())


def _resample(samples: _Audio, rate: int) -> _Audio:
    from scipy.signal import resample_poly

    return resample_poly(samples, SAMPLING_RATE, rate).astype(np.float32)
