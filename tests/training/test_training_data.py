"""Text and images as training examples."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import Table, parquet
from transformers import PreTrainedTokenizerFast, Siglip2ImageProcessor, ViTImageProcessor

from peft_variator.files import TABLE_SUFFIXES
from peft_variator.training.data import (
    TABLES,
    ImageFolder,
    collate_images,
    cut_documents,
    cut_sentences_and_spans,
    cut_spans,
    read_documents,
    read_texts,
    split_sentences,
    split_spans,
    surroundings,
    tokenize,
    tokenize_documents,
)
from tests.word_tokenizer import word_tokenizer


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d"]


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    return word_tokenizer(WORDS, template, pad_token="[PAD]")


TOKENIZER = tokenizer("$A")


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [("[CLS] $A [SEP]", [2], [3]), ("$A [SEP]", [], [3]), ("[CLS] $A", [2], []), ("$A", [], [])],
)
def test_surroundings(template: str, before: list[int], after: list[int]) -> None:
    assert surroundings(tokenizer(template)) == (before, after)


def test_a_missing_table_is_known_for_one_by_its_name() -> None:
    assert set(TABLES) == TABLE_SUFFIXES
    for suffix in TABLE_SUFFIXES:
        with pytest.raises(FileNotFoundError, match=f"no file 'none{suffix}'"):
            read_texts(f"none{suffix}")


def test_tokens_are_those_of_the_text_up_to_the_limit() -> None:
    read: list[str] = []

    def lines():
        for line in ["a b c", "  \n", "", "d"] + ["a b"] * 5000:
            read.append(line)
            yield line

    assert tokenize(lines(), tokenizer("[CLS] $A [SEP]"), limit=6) == [4, 5, 6, 7, 4, 5]
    assert len(read) < 600, "no more is read than is needed"
    assert tokenize([], tokenizer("$A"), limit=6) == []


@settings(deadline=None)
@given(total=st.integers(0, 300), longest=st.integers(4, 40), seed=st.integers(0, 5))
def test_spans_are_uneven_and_lose_no_more_than_a_short_end(total: int, longest: int, seed: int) -> None:
    tokens = list(range(total))
    spans = cut_spans(tokens, longest, seed)
    joined = [token for span in spans for token in span]
    assert joined == tokens[: len(joined)]
    assert total - len(joined) < longest // 4 or total == 0
    assert all(longest // 4 <= len(span) <= longest for span in spans[:-1])
    assert spans == cut_spans(tokens, longest, seed)


def test_lengths_of_spans_differ() -> None:
    assert len({len(span) for span in cut_spans(list(range(2000)), 40, 0)}) > 10
    with pytest.raises(ValueError, match="A span of 3 tokens is too short"):
        cut_spans([1], 3, 0)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(2, 20), min_size=1, max_size=5), seed=st.integers(0, 5))
def test_a_span_is_split_into_prompt_and_rest(lengths: list[int], seed: int) -> None:
    spans = [list(range(10, 10 + length)) for length in lengths]
    causal = split_spans(spans, [2], [3], is_decoder=False, seed=seed)
    decoder = split_spans(spans, [2], [3], is_decoder=True, seed=seed)
    for span, one, two in zip(spans, causal, decoder, strict=True):
        assert one["input_ids"] == [2, *span]
        rest = [label for label in one["labels"] if label != -100]
        assert len(one["labels"]) == len(one["input_ids"])
        assert 1 <= len(rest) < len(span)
        assert rest == span[-len(rest) :] == one["labels"][-len(rest) :]
        assert two["input_ids"] == [2, *span[: -len(rest)], 3]
        assert two["labels"] == [*rest, 3]


def test_texts_of_files(tmp_path: Path) -> None:
    text, records = tmp_path / "some text", tmp_path / "records.jsonl"
    text.write_text("ä b\nc\n", encoding="utf-8")
    records.write_text('{"words": "a"}\n\n{"words": "b"}\n')
    assert list(read_texts(str(text))) == ["ä b\n", "c\n"]
    assert list(read_texts(str(records), column="words")) == ["a", "b"]
    with pytest.raises(ValueError, match=r"records.jsonl has no column 'text', only words"):
        list(read_texts(str(records)))


TEXTS = ["ä, b", 'say "c"', "two\nlines", "", "d\te"]
ROWS = [{"id": number, "body": text} for number, text in enumerate(TEXTS)]


def write_table(path: Path, kind: str) -> Path:
    """The rows as a file of a kind, by the usual writer of it."""
    if kind in ("csv", "tsv", "CSV"):
        with path.open("w", newline="", encoding="utf-8-sig" if kind == "CSV" else "utf-8") as file:
            writer = csv.DictWriter(file, ["id", "body"], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "parquet":
        parquet.write_table(Table.from_pylist(ROWS), path)
    elif kind == "columns.json":
        path.write_text(json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}))
    elif kind == "list.json":
        path.write_text(json.dumps(ROWS, indent=2))
    else:
        path.write_text("\n".join(json.dumps(row) for row in ROWS))
    return path


@pytest.mark.parametrize(
    "kind", ["csv", "tsv", "CSV", "parquet", "list.json", "columns.json", "lines.json", "jsonl", "ndjson"]
)
def test_every_row_of_a_table_is_a_document(tmp_path: Path, kind: str) -> None:
    file = str(write_table(tmp_path / f"table.{kind}", kind))
    assert [list(document) for document in read_documents(file, column="body")] == [[text] for text in TEXTS]
    with pytest.raises(ValueError, match=r"table\..* has no column 'text', only id, body.*--text-column"):
        list(read_texts(file))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "id,text\n1\n", "a.csv, row 1: column 'text' holds a NoneType"),
        ("a.csv", "id,text\n1,b,c\n", "a.csv, line 2 has 3 cells"),
        ("a.csv", 'id,text\n1,"b\n', "a.csv, line 2"),
        ("a.csv", "text,text\na,b\n", "a.csv: .*text, text"),
        ("a.tsv", 'text\n"b" c\n', "a.tsv, line 2"),
        ("a.json", "[1]", "a.json, entry 1 is a int"),
        ("a.json", '{"text": ["a"], "id": []}', "a.json holds one object with lists of 1"),
        ("a.json", "{", "a.json, line 1 is no JSON"),
        ("a.json", "[" * 100_000, "a.json"),
        ("a.parquet", "text", "a.parquet can't be read as Parquet"),
    ],
)
def test_tables_that_are_none_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        list(read_texts(str(tmp_path / name)))


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "a" * 200_000)
    assert list(read_texts(str(tmp_path / "a.csv"))) == ["a" * 200_000]


@settings(deadline=None)
@given(lengths=st.lists(st.lists(st.integers(0, 12), max_size=6), min_size=1, max_size=4), limit=st.integers(0, 60))
def test_sources_give_as_many_tokens_each(lengths: list[list[int]], limit: int) -> None:
    sources = [
        [["a " * (length // 2), "a " * (length - length // 2)] for length in documents] for documents in lengths
    ]
    pieces = tokenize_documents(sources, TOKENIZER, limit)
    found = [[[token for piece in document for token in piece] for document in documents] for documents in pieces]
    sizes = [sum(map(len, documents)) for documents in found]
    assert all(len(document) <= 2 for documents in pieces for document in documents), "pieces stay apart"
    assert sum(sizes) == min(limit, sum(map(sum, lengths)))
    short = [size for size, documents in zip(sizes, lengths, strict=True) if size < sum(documents)]
    assert not short or max(sizes) <= min(short) + len(sizes)
    for documents, wanted in zip(found, lengths, strict=True):
        whole = [length for length in wanted if length]
        assert [len(document) for document in documents[:-1]] == whole[: max(0, len(documents) - 1)]


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 40), max_size=8), longest=st.integers(4, 20), seed=st.integers(0, 5))
def test_no_span_holds_two_documents(lengths: list[int], longest: int, seed: int) -> None:
    documents = [
        [[number] * (length // 3), [number] * (length - length // 3)] for number, length in enumerate(lengths)
    ]
    spans = cut_documents(documents, longest, seed)
    assert all(len(set(span)) == 1 for span in spans)
    kept = [sum(len(span) for span in spans if span[0] == number) for number in range(len(documents))]
    assert all(0 <= length - left < max(1, longest // 4) for length, left in zip(lengths, kept, strict=True))


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", []),
        ("No mark at all", ["No mark at all"]),
        ("One. Two!  Three?\nFour", ["One.", " Two!", "  Three?", "\nFour"]),
        (
            'He said "no." She left (early.) Version 2.0.1 ran…',
            ['He said "no."', " She left (early.)", " Version 2.0.1 ran…"],
        ),
        ("你好。你呢?好。", ["你好。", "你呢?好。"]),
        ("「行くの？」彼は言った。", ["「行くの？」彼は言った。"]),
        (" .  . ", [" .", "  .", " "]),
    ],
)
def test_sentences_are_split_where_they_end(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


@given(text=st.text(alphabet="ab .!?。\n\"')", max_size=60))
def test_sentences_are_the_text(text: str) -> None:
    assert "".join(split_sentences(text)) == text


@settings(deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=12), max_size=5),
    longest=st.integers(4, 40),
    seed=st.integers(0, 5),
)
def test_sentences_and_spans(lengths: list[list[int]], longest: int, seed: int) -> None:
    """Against the text they are cut from: in order, of one document, and where they begin."""
    numbers = iter(range(10**6))
    documents = [[[next(numbers) for _ in range(length)] for length in document] for document in lengths]
    before = json.loads(json.dumps(documents))
    examples = cut_sentences_and_spans(documents, longest, seed)
    assert documents == before, "what is given is left as it is"
    assert examples == cut_sentences_and_spans(documents, longest, seed)
    joined = [token for example in examples for token in example]
    assert joined == sorted(set(joined)), "no token twice, and in order"
    for document in documents:
        tokens = [token for sentence in document for token in sentence]
        here = [example for example in examples if example[0] in tokens]
        assert here, "every document is shown"
        assert all(example == list(range(example[0], example[-1] + 1)) for example in here)
        assert all(example[-1] <= tokens[-1] for example in here)
        starts = {sentence[0] for sentence in document} | {example[-1] + 1 for example in here}
        assert all(example[0] in starts for example in here)
        assert len(here) == 1 or all(4 <= len(example) <= longest for example in here)
        skipped = len(tokens) - sum(map(len, here))
        assert skipped < (len(here) + 1) * max(4, longest // 4) + 3 * len(document)


def test_every_other_example_is_a_sentence() -> None:
    sentences = [[number] * (5 + number % 20) for number in range(4000)]
    examples = cut_sentences_and_spans([sentences], 128, 0)
    whole = [example for example in examples if example == sentences[example[0]]]
    assert 0.45 < len(whole) / len(examples) < 0.55
    spans = [len(example) for example in examples if example not in whole]
    assert min(spans) >= 32 - 24
    assert 60 < sum(spans) / len(spans) < 100
    with pytest.raises(ValueError, match="A span of 3 tokens is too short"):
        cut_sentences_and_spans([[[1]]], 3, 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"records.jsonl, line 2 is no JSON"),
        ("[1]", r"records.jsonl, line 2 holds a list\. Every line has to be an object"),
        ('{"text": null}', r"records.jsonl, row 2: column 'text' holds a NoneType, but it has to be a text"),
        ('{"text": 3}', r"row 2: column 'text' holds a int"),
        ("\udcff", r"records.jsonl is no text in UTF-8"),
    ],
)
def test_records_that_hold_no_text_are_refused(tmp_path: Path, line: str, message: str) -> None:
    records = tmp_path / "records.jsonl"
    records.write_bytes(f'{{"text": "a"}}\n{line}\n'.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        list(read_texts(str(records)))


@pytest.mark.parametrize("name", ["missing.txt", "/no/such/place", "./here", "a/b.jsonl"])
def test_a_missing_file_is_named(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"There is no file '{name}'"):
        read_texts(name)


def test_a_data_set_in_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": word}) for word in "abc"))
    assert list(read_texts(str(tmp_path))) == ["a", "b", "c"]


def test_a_folder_without_a_data_set(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    told = f"'{tmp_path}' is a folder, and no data set that `datasets` reads: name its files, each with --data"
    with pytest.raises(ValueError, match=told):
        read_texts(str(tmp_path))
    (tmp_path / "a.md").write_text("Words.\n")
    with pytest.raises(ValueError, match=told):
        read_texts(str(tmp_path))
    (tmp_path / "train.jsonl").write_text("{broken\n")
    with pytest.raises(
        ValueError, match=f"'{tmp_path}' is a folder, and no data set .*: name its files.* says: .*JSON"
    ):
        read_texts(str(tmp_path))


def test_data_sets_need_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"'some/dataset' is no local file.*pip install datasets"):
        read_texts("some/dataset")


def test_images_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    for name, colour in (("b.png", "white"), ("inner/a.JPG", "black")):
        Image.new("RGB", (20, 30), colour).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    images = ImageFolder(tmp_path, ViTImageProcessor(size={"height": 8, "width": 8}))
    assert [path.name for path in images.paths] == ["b.png", "a.JPG"]
    assert len(images) == 2
    torch.testing.assert_close(images[0]["pixel_values"], torch.ones(3, 8, 8))
    torch.testing.assert_close(images[1]["pixel_values"], -torch.ones(3, 8, 8))


def test_images_of_several_shapes_keep_their_masks(tmp_path: Path) -> None:
    Image.new("RGB", (20, 30)).save(tmp_path / "a.png")
    names = ["pixel_values", "pixel_attention_mask", "spatial_shapes"]
    processor = Siglip2ImageProcessor(patch_size=4, max_num_patches=40)
    image = ImageFolder(tmp_path, processor, names)[0]
    assert image.keys() == set(names)
    batch = collate_images([image, image])
    assert batch["pixel_values"].shape == (2, 40, 48)
    assert batch["pixel_attention_mask"].sum(1).tolist() == batch["spatial_shapes"].prod(1).tolist()


def test_images_of_several_sizes_are_told() -> None:
    images = [{"pixel_values": torch.zeros(3, *size)} for size in ((8, 12), (8, 8))]
    with pytest.raises(ValueError, match=r"sizes 8×8, 8×12 .*do_center_crop or size in preprocessor_config.json"):
        collate_images(images)


def test_images_that_cannot_be_read_are_passed_over(tmp_path: Path) -> None:
    for index in range(6):
        Image.new("RGB", (20, 30), (index, 0, 0)).save(tmp_path / f"{index}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:-30])
    (tmp_path / "3.jpg").write_text("no image")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.png").mkdir()
    images = ImageFolder(tmp_path, ViTImageProcessor(size={"height": 8, "width": 8}))
    drawn, unreadable = images.draw(wanted=10, seed=0)
    assert {images.paths[index].name for index in drawn} == {"0.png", "2.png", "3.png", "4.png", "5.png"}
    assert {path.name for path in unreadable} == {"1.png", "3.jpg", "gone.png"}
    assert images.draw(wanted=10, seed=0)[0] == drawn
    assert images.draw(wanted=2, seed=0)[0] == drawn[:2]


def test_folders_without_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="There is no folder"):
        ImageFolder(tmp_path / "missing", None)
    with pytest.raises(ValueError, match=r"There is no image in .*\.png"):
        ImageFolder(tmp_path, None)


def test_a_name_that_is_neither_a_file_nor_to_be_fetched_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'my_texts' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(OSError, match="no file 'my_texts' here"):
        read_texts("my_texts")
