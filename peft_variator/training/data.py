"""Text and images as training examples: documents, spans of their tokens of uneven length, and folders of images."""

from __future__ import annotations

import csv
import json
import random
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.image_utils import load_image

from ..files import check_data_name


__all__ = [
    "ImageFolder",
    "collate_images",
    "cut_documents",
    "cut_sentences_and_spans",
    "cut_spans",
    "is_plain_text",
    "read_documents",
    "read_texts",
    "split_sentences",
    "split_spans",
    "surroundings",
    "tokenize",
    "tokenize_documents",
]

LINES_AT_ONCE = 512
ROWS_AT_ONCE = 1024
# Characters in a cell of a CSV file; Python's own limit is that of short cells.
LONGEST_CELL = 2**31 - 1
# Where a span is cut into what is read and what is predicted, as a fraction of it: mostly prompt, as that is where a
# plugin works.
PROMPT_SHARE = (0.5, 0.9)
# Between sentences: white space after a mark that ends one, or nothing where a script puts no white space there.
SENTENCE_BORDER = re.compile(r"""(?<=[.!?…])(?=\s)|(?<=[.!?…]["'”’)\]])(?=\s)|(?<=[。！？])(?=[^\s"'”’」』)\]])""")
# There is nothing to merge in fewer tokens.
FEWEST_TOKENS = 4
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

Record = dict[str, Any]
Document = list[list[int]]
"""The tokens of a document's pieces: lines, or sentences."""


def read_documents(data: str, *, column: str = "text", split: str = "train") -> Iterator[Iterable[str]]:
    """Documents, each as its pieces: a plain text file is one, of its lines; of tables and data sets every row is one.

    Args:
        data: path of a file, or what `datasets.load_dataset` takes.
        column: which column of a table or a data set holds the text.
        split: which split of a data set is read.

    Raises:
        FileNotFoundError: `data` looks like a file and there is none.
        ImportError: `data` is no file and `datasets` is not installed.
        ValueError: there is no such column, or the file can't be read.
    """
    texts = read_texts(data, column=column, split=split)
    return iter([texts]) if is_plain_text(data) else ([text] for text in texts)


def is_plain_text(data: str) -> bool:
    """Whether data is a text file: neither a table nor a data set."""
    return Path(data).is_file() and Path(data).suffix.lower() not in TABLES


def read_texts(data: str, *, column: str = "text", split: str = "train") -> Iterator[str]:
    """The lines of a text file, or a column of a table (CSV, TSV, Parquet, JSON, JSON Lines) or of a data set.

    Args:
        data: path of a file, or what `datasets.load_dataset` takes.
        column: which column of a table or a data set holds the text.
        split: which split of a data set is read.

    Raises:
        ConnectionError: `data` is no file, and the Hub can't be reached.
        FileNotFoundError: `data` looks like a file and there is none.
        ImportError: `data` is no file and `datasets` is not installed.
        ValueError: there is no such column, or the file can't be read.
    """
    path = Path(data)
    suffix = path.suffix.lower()
    if path.is_file():
        return _column(TABLES[suffix](path), column, data) if suffix in TABLES else _lines(path)
    check_data_name(data)
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ImportError(
            f"{data!r} is no local file, and reading it as a data set needs `datasets`: pip install datasets. Or name "
            "a text file."
        ) from error
    try:
        records = load_dataset(data, split=split)
    except (DatasetsError, FileNotFoundError, ValueError) as error:
        reason = error.__cause__ or error
        if path.is_dir():
            raise ValueError(
                f"{data!r} is a folder, and no data set that `datasets` reads: name its files, each with --data. "
                f"`datasets` says: {reason}"
            ) from error
        if not isinstance(error, DatasetsError):
            raise
        here = "" if path.exists() else f"There is no file {data!r} here. "
        raise ValueError(f"{here}`datasets` can't read {data!r}: {reason}") from error
    except ConnectionError as error:
        raise ConnectionError(
            f"There is no file {data!r} here, and no data set of that name can be fetched: {error}. Name a text file "
            "or a table, or fetch the data set where there is a network."
        ) from error
    return _column(records, column, data)


def _lines(path: Path, newline: str | None = None) -> Iterator[str]:
    """Lines; with `newline=""` with the ends that they have, which may be a part of a quoted cell."""
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:  # Windows starts files with a mark
            yield from file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}. Save it as UTF-8.") from error


def _json_lines(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is no JSON: {error}. Every line has to be an object.") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number} holds a {type(record).__name__}. Every line has to be an object.")
        yield record


def _json(path: Path) -> Iterator[Record]:
    """A list of objects, an object of columns, or JSON Lines under another name."""
    try:
        found = json.loads("".join(_lines(path)))
    except json.JSONDecodeError:
        yield from _json_lines(path)
        return
    except (ValueError, RecursionError) as error:  # UTF-8, or numbers and nesting that Python does not read
        raise ValueError(f"{path} can't be read as JSON: {error}") from error
    if isinstance(found, dict) and found and all(isinstance(values, list) for values in found.values()):
        if len({len(values) for values in found.values()}) > 1:
            raise ValueError(
                f"{path} holds one object with lists of {', '.join(f'{len(v)} ({k!r})' for k, v in found.items())} "
                "entries, which are no columns of a table. Save it as a list of objects, or as JSON Lines."
            )
        found = [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]
    for number, record in enumerate(found if isinstance(found, list) else [found], start=1):
        if not isinstance(record, dict):
            raise ValueError(f"{path}, entry {number} is a {type(record).__name__}. Every entry has to be an object.")
        yield record


def _separated(delimiter: str) -> Callable[[Path], Iterator[Record]]:
    """Reads files whose first line names the columns."""

    def read(path: Path) -> Iterator[Record]:
        csv.field_size_limit(LONGEST_CELL)
        rows = csv.DictReader(_lines(path, newline=""), delimiter=delimiter, strict=True)
        try:
            names = rows.fieldnames or []
            if len(set(names)) < len(names):
                raise ValueError(
                    f"{path}: the first line has to name the columns, and it says {', '.join(names)}, one of them "
                    "twice. Give every column a name of its own."
                )
            for row in rows:
                if None in row:
                    raise ValueError(
                        f"{path}, line {rows.line_num} has {len(row) - 1 + len(row[None])} cells, and the first line "
                        f"names {len(row) - 1} columns. Quote cells that hold the separator."
                    )
                yield row
        except csv.Error as error:
            raise ValueError(f"{path}, line {rows.reader.line_num}: {error}. Quote cells as CSV does.") from error

    return read


def _parquet(path: Path) -> Iterator[Record]:
    from pyarrow import ArrowException, parquet  # takes a while to import, and few need it

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
                yield from batch.to_pylist()
    except ArrowException as error:
        raise ValueError(f"{path} can't be read as Parquet: {error}") from error


TABLES: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".csv": _separated(","),
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
    ".tab": _separated("\t"),
    ".tsv": _separated("\t"),
}


def _column(records: Iterable[Record], column: str, data: str) -> Iterator[str]:
    for number, record in enumerate(records, start=1):
        if column not in record:
            if "image" in record:
                raise ValueError(
                    f"{data} holds images and no column {column!r}, and this model reads text. Name a text file, a "
                    "table or a data set with texts, or a vision model."
                )
            raise ValueError(
                f"{data} has no column {column!r}, only {', '.join(map(str, record))}. Name the one with the text by "
                "--text-column."
            )
        if not isinstance(record[column], str):
            kind = type(record[column]).__name__
            raise ValueError(f"{data}, row {number}: column {column!r} holds a {kind}, but it has to be a text.")
        yield record[column]


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, by the marks that end them; joined again they are the text."""
    return [part for part in SENTENCE_BORDER.split(text) if part]


def tokenize_documents(
    sources: Sequence[Iterable[Iterable[str]]], tokenizer: PreTrainedTokenizerBase, limit: int
) -> list[list[Document]]:
    """Token ids of the documents of several sources, without special tokens; empty documents are left out.

    Args:
        sources: for each its documents, each as its pieces; no more of them is read than is needed.
        tokenizer: the model's tokenizer.
        limit: how many tokens are wanted in all. Sources give as many each, but those that have fewer.

    Returns:
        list[list[Document]]: for each source its documents; the last one that is read may be cut.
    """
    readers = [_TokenReader(documents, tokenizer) for documents in sources]
    unread, left = readers, limit
    while unread and left > 0:
        still = []
        share, over = divmod(left, len(unread))
        for index, reader in enumerate(unread):
            wanted = share + (index < over)
            found = reader.read(wanted)
            left -= found
            still += [reader] if found == wanted else []
        unread = still
    return [reader.documents for reader in readers]


class _TokenReader:
    """The tokens of documents, read on from where the last call stopped."""

    def __init__(self, documents: Iterable[Iterable[str]], tokenizer: PreTrainedTokenizerBase) -> None:
        self.documents: list[Document] = []
        self._pieces = _token_pieces(documents, tokenizer)
        self._rest: list[int] = []
        self._number = -1

    def read(self, count: int) -> int:
        """Read so many tokens more; gives their number, which is smaller only where there are no more."""
        done = 0
        while done < count:
            if not self._rest:
                number, self._rest = next(self._pieces, (self._number, []))
                if not self._rest:
                    break
                if number != self._number:
                    self.documents.append([])
                    self._number = number
                self.documents[-1].append([])
            ids, self._rest = self._rest[: count - done], self._rest[count - done :]
            self.documents[-1][-1] += ids
            done += len(ids)
        return done


def _token_pieces(
    documents: Iterable[Iterable[str]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[int, list[int]]]:
    """The tokens of every piece that has any, with the number of its document."""
    pieces = ((number, piece) for number, pieces in enumerate(documents) for piece in pieces if piece.strip())
    while batch := list(islice(pieces, LINES_AT_ONCE)):
        texts = [piece for _, piece in batch]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        yield from ((number, ids) for (number, _), ids in zip(batch, encoded, strict=True) if ids)


def tokenize(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, limit: int) -> list[int]:
    """Token ids of the texts one after the other, as one document, without special tokens.

    Args:
        texts: lines or documents; no more of them is read than is needed.
        tokenizer: the model's tokenizer.
        limit: about how many tokens are wanted.
    """
    (documents,) = tokenize_documents([[texts]], tokenizer, limit)
    return list(chain.from_iterable(documents[0])) if documents else []


def surroundings(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(place for place in range(len(whole)) if whole[place : place + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def cut_spans(tokens: list[int], longest: int, seed: int) -> list[list[int]]:
    """Cut the tokens of one document into spans; see [`cut_documents`]."""
    return cut_documents([[tokens]], longest, seed)


def cut_documents(documents: Iterable[Document], longest: int, seed: int) -> list[list[int]]:
    """Cut tokens into spans of uneven length, drawn evenly from a quarter of `longest` to all of it.

    A plugin trained on one length only would not have seen groups that end early, nor padding. No span holds tokens of
    two documents, and the end of a document is left out if it is shorter than a quarter and not all of it.

    Args:
        documents: the tokens of each document's pieces, one after the other.
        longest: most tokens in a span, 4 or more.
        seed: seed of the lengths.

    Raises:
        ValueError: `longest` is below 4.
    """
    generator = _generator_of_lengths(longest, seed)
    spans: list[list[int]] = []
    for pieces in documents:
        tokens = list(chain.from_iterable(pieces))
        start = 0
        while start < len(tokens):
            end = start + generator.randint(longest // 4, longest)
            if start == 0 or len(tokens) - start >= longest // 4:
                spans.append(tokens[start:end])
            start = end
    return spans


def cut_sentences_and_spans(documents: Iterable[Document], longest: int, seed: int) -> list[list[int]]:
    """Sentences as they stand and spans that begin with one, by turns: what an encoder is asked for may be either.

    A plugin learns the lengths, the beginnings and the ends that it is shown: trained on spans alone it loses more on
    single sentences. Spans are as long as those of [`cut_documents`], and neither holds tokens of two documents. What
    is shorter than 4 tokens is no example, unless it is a whole document, and what a cut leaves of a sentence is left
    out where it is shorter than a quarter of `longest`.

    Args:
        documents: the tokens of each document's sentences.
        longest: most tokens in an example, 4 or more.
        seed: seed of the lengths.

    Raises:
        ValueError: `longest` is below 4.
    """
    generator = _generator_of_lengths(longest, seed)
    shortest = max(FEWEST_TOKENS, longest // 4)
    examples: list[list[int]] = []
    for sentences in documents:
        tokens = list(chain.from_iterable(sentences))
        ends = list(accumulate(map(len, sentences)))
        found: list[list[int]] = []
        takes_sentence = generator.random() < 0.5
        start = 0
        while start < len(tokens):
            wanted = longest if takes_sentence else generator.randint(shortest, longest)
            # One sentence, or as many as make up the length that is wanted.
            enough = start + (1 if takes_sentence else wanted)
            border = ends[min(bisect_left(ends, enough), len(ends) - 1)]
            end = min(border, start + wanted)
            if end - start >= FEWEST_TOKENS:
                found.append(tokens[start:end])
            start = end if border - end >= shortest else border
            takes_sentence = not takes_sentence
        examples += found or [tokens[:longest]]
    return examples


def _generator_of_lengths(longest: int, seed: int) -> random.Random:
    if longest < FEWEST_TOKENS:
        raise ValueError(
            f"A span of {longest} tokens is too short to merge anything in. Choose a length of {FEWEST_TOKENS} or "
            "more."
        )
    return random.Random(f"lengths of spans, seed {seed}")


def split_spans(
    spans: Iterable[list[int]], before: list[int], after: list[int], *, is_decoder: bool, seed: int
) -> list[dict[str, list[int]]]:
    """Examples in which a model reads the first part of a span and predicts the rest.

    Args:
        spans: spans of tokens, each of 2 or more.
        before: special tokens that start a text.
        after: special tokens that end a text.
        is_decoder: whether the rest is the target of a decoder (an encoder–decoder model), rather than the rest of
            the same sequence, whose prompt has labels of −100.
        seed: seed of where spans are split.
    """
    generator = random.Random(f"ends of prompts, seed {seed}")
    examples = []
    for span in spans:
        place = min(max(1, round(len(span) * generator.uniform(*PROMPT_SHARE))), len(span) - 1)
        prompt, rest = span[:place], span[place:]
        if is_decoder:
            examples.append({"input_ids": [*before, *prompt, *after], "labels": [*rest, *after]})
        else:
            labels = [-100] * (len(before) + place) + rest
            examples.append({"input_ids": [*before, *span], "labels": labels})
    return examples


def collate_images(images: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of images.

    Raises:
        ValueError: their sizes differ.
    """
    sizes = sorted({tuple(image["pixel_values"].shape[-2:]) for image in images})
    if len(sizes) > 1:
        raise ValueError(
            f"The model's image processor makes images of the sizes {', '.join('×'.join(map(str, s)) for s in sizes)} "
            "(height × width), and a batch has to be of one: set do_center_crop or size in preprocessor_config.json."
        )
    return {name: torch.stack([image[name] for image in images]) for name in images[0]}


class ImageFolder(Dataset[dict[str, Tensor]]):
    """The images in folders and the folders in them, each folder sorted by path, read when they are asked for.

    Args:
        folders: a folder, or several.
        processor: the model's image processor.
        names: arguments that the model takes; of what the processor makes only these are kept.

    Raises:
        NotADirectoryError: there is no such folder.
        ValueError: there is no image in it.
    """

    def __init__(
        self,
        folders: str | Path | Sequence[str | Path],
        processor: Any,
        names: Collection[str] = ("pixel_values",),
    ) -> None:
        self.processor, self.names = processor, names
        self.paths: list[Path] = []
        for folder in [folders] if isinstance(folders, str | Path) else folders:
            if not Path(folder).is_dir():
                what = f"{str(folder)!r} is a file" if Path(folder).exists() else f"There is no folder {str(folder)!r}"
                raise NotADirectoryError(f"{what}. Vision models take a folder of images.")
            found = [path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES]
            if not found:
                raise ValueError(
                    f"There is no image in {str(folder)!r}. Known are {', '.join(sorted(IMAGE_SUFFIXES))}."
                )
            self.paths += sorted(path for path in found if not path.is_dir())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The image of an index as the model takes it: `pixel_values` of shape `(channels, height, width)`.

        Of models for images of several shapes they are `(patches, values)`, beside the patches' mask and the shape.
        """
        image = load_image(str(self.paths[index]))
        made = self.processor(image, return_tensors="pt")
        return {name: values[0] for name, values in made.items() if name in self.names and isinstance(values, Tensor)}

    def draw(self, wanted: int, seed: int) -> tuple[list[int], list[Path]]:
        """Draw images that can be read; each is read for that, since damage shows nowhere else.

        Args:
            wanted: number of images that are enough.
            seed: seed of the order in which they are drawn.

        Returns:
            tuple[list[int], list[Path]]: their indices in the order drawn, and the images that were passed over.
        """
        order = list(range(len(self)))
        random.Random(seed).shuffle(order)
        drawn: list[int] = []
        unreadable: list[Path] = []
        for index in order:
            if len(drawn) == wanted:
                break
            try:
                self[index]
            except Exception:  # decoders raise errors of many kinds on what is damaged
                unreadable.append(self.paths[index])
            else:
                drawn.append(index)
        return drawn, unreadable
