"""Parquet, Arrow and Hugging Face datasets, with text or with rows of token ids."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from source_reading import DOCUMENTS, error_of, locations, read, read_all, read_skipping, splits_of, write_arrow, write_file, write_parquet

from manta.data.source_config import SourceConfig
from manta.data.sources import splits
from manta.data.sources.source import identity

IDS = [[5, 4_000_000_000, 0], [], [7]]
NOT_IDS = "field 'ids': expected token ids (integers from 0 to 4294967295), got"
ROWS = [f"row {i} " * 20 for i in range(100)]


def test_parquet_is_read(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", id=[1, 2, 3, 4], body=DOCUMENTS)
    assert read(path, text_field="body") == DOCUMENTS
    assert locations(path, text_field="body") == [f"{path}: row {row}" for row in range(1, 5)]


@pytest.mark.parametrize("stream", [False, True])
def test_arrow_file_and_stream_formats_are_read(tmp_path, stream):
    path = write_arrow(tmp_path / "x.arrow", stream=stream, id=[1, 2, 3, 4], body=DOCUMENTS)
    assert read(path, text_field="body") == DOCUMENTS
    assert locations(path, text_field="body") == [f"{path}: row {row}" for row in range(1, 5)]
    renamed = Path(path).rename(tmp_path / "x.feather")
    assert read(renamed, text_field="body", format="arrow") == DOCUMENTS


@pytest.mark.parametrize(
    "write", [write_parquet, write_arrow, lambda path, **columns: write_arrow(path, stream=True, batch=1000, **columns)]
)
def test_splits_of_a_large_table_yield_each_row_once(tmp_path, monkeypatch, write):
    suffix = "parquet" if write is write_parquet else "arrow"
    path = write(tmp_path / f"x.{suffix}", text=["", *ROWS], number=list(range(101)))
    for split_bytes in (10**9, 10_000, 1000, 1):
        monkeypatch.setattr(splits, "SPLIT_BYTES", split_bytes)
        found = splits_of(path)
        assert read(path) == ROWS
        assert locations(path) == [f"{path}: row {row}" for row in range(2, 102)]
        assert abs(sum(split.size for split in found) - Path(path).stat().st_size) < len(found)
        assert len({split.name for split in found}) == len(found)
    assert len(found) >= 50


def test_splits_of_a_parquet_file_have_about_the_wanted_size(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "x.parquet", text=[os.urandom(500).hex() for _ in range(200)])
    monkeypatch.setattr(splits, "SPLIT_BYTES", 20_000)
    sizes = [split.size for split in splits_of(path)]
    assert len(sizes) > 20
    assert all(20_000 <= size < 27_000 for size in sizes[:-1])  # of row groups of about 6,000


def test_a_bad_row_is_reported_with_file_and_row(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "null.parquet", text=["a", "b", None, "d"])
    message = f"{path}: row 3: field 'text': expected text, got null. Fix or remove the row."
    assert error_of(path) == message
    assert read_skipping(path) == (["a", "b", "d"], [message])
    monkeypatch.setattr(splits, "SPLIT_BYTES", 1)
    assert error_of(path) == message
    path = write_parquet(tmp_path / "number.parquet", text=[1, 2])
    assert error_of(path).startswith(f"{path}: row 1: field 'text': expected text or a list of token ids, got int")
    path = write_arrow(tmp_path / "null.arrow", text=["a", "b", None, "d"])
    assert error_of(path) == f"{path}: row 3: field 'text': expected text, got null. Fix or remove the row."


@pytest.mark.parametrize("bad_rows", ["fail", "skip"])
def test_a_missing_column_is_reported_with_the_existing_ones(tmp_path, bad_rows):
    columns = {"texts": ["a"], "url": ["b"]}
    for path in (write_parquet(tmp_path / "other.parquet", **columns), write_arrow(tmp_path / "other.arrow", **columns)):
        assert error_of(path, bad_rows=bad_rows) == f"{path}: expected a field 'text', got 'texts', 'url'. Set data.text_field to 'texts'."
        message = f"{path}: expected a field 'title', got 'texts', 'url'. Set template of {path!r}."
        assert error_of(path, bad_rows=bad_rows, template="{texts} {title}") == message


def test_a_cell_that_is_not_utf8_is_reported_with_its_row(tmp_path):
    cells = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    for path in (write_parquet(tmp_path / "x.parquet", text=cells), write_arrow(tmp_path / "x.arrow", text=cells)):
        message = f"{path}: row 2: field 'text': expected UTF-8, got an invalid start byte. Convert it."
        assert error_of(path) == message
        assert read_skipping(path) == (["a", "c"], [message])


@pytest.mark.parametrize("bad_rows", ["fail", "skip"])
def test_a_truncated_or_damaged_table_is_never_skipped(tmp_path, bad_rows):
    whole = Path(write_parquet(tmp_path / "whole.parquet", text=["a" * 100] * 10)).read_bytes()
    filed = Path(write_arrow(tmp_path / "file.arrow", text=["a" * 100] * 10)).read_bytes()
    streamed = Path(write_arrow(tmp_path / "stream.arrow", stream=True, text=["a" * 100] * 10)).read_bytes()
    for name, content in {
        "t.parquet": whole[:-40],
        "u.parquet": b"no parquet",
        "t.arrow": filed[:-40],
        "u.arrow": filed[: len(filed) // 2],
        "v.arrow": streamed[:-40],
        "w.arrow": streamed[:-8],  # at a message boundary: only the end marker is missing
        "x.arrow": b"no Arrow",
        "y.arrow": b"no",
    }.items():
        path = write_file(tmp_path / name, content)
        assert error_of(path, bad_rows=bad_rows).startswith(f"{path}: ")
        assert error_of(path, bad_rows=bad_rows).endswith("Download it again.")


def test_arrow_offsets_outside_of_the_file_are_not_followed(tmp_path):
    sound = Path(write_arrow(tmp_path / "x.arrow", batch=4, text=["aaaa"] * 4)).read_bytes()
    offsets = np.arange(0, 20, 4, dtype=np.int32)
    assert sound.count(offsets.tobytes()) == 1
    offsets[2:4] = 2**31 - 16, -(2**31)
    path = write_file(tmp_path / "x.arrow", sound.replace(np.arange(0, 20, 4, dtype=np.int32).tobytes(), offsets.tobytes()))
    assert error_of(path, bad_rows="skip").startswith(f"{path}: expected a readable file, got ArrowInvalid")


def saved_dataset(folder: Path, **columns) -> str:
    datasets.Dataset.from_dict(columns).save_to_disk(folder, num_shards=2)
    return str(folder)


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets.disable_progress_bars()


@pytest.mark.usefixtures("offline")
def test_a_dataset_saved_to_disk_is_a_directory_of_arrow_files(tmp_path):
    saved = saved_dataset(tmp_path / "saved", text=DOCUMENTS)
    write_arrow(tmp_path / "saved" / "cache-1234.arrow", text=["computed from it"])
    expected = [f"{saved}/data-0000{part}-of-00002.arrow: row {row}" for part in (0, 1) for row in (1, 2)]
    for path in (saved, f"{saved}/*", f"hf:{saved}"):
        assert read(path) == DOCUMENTS
        assert locations(path) == expected


@pytest.mark.usefixtures("offline")
def test_a_dataset_saved_in_splits_needs_one_of_them_named(tmp_path):
    for split in ("train", "test"):
        saved_dataset(tmp_path / "saved" / split, text=[split, split])
    write_file(tmp_path / "saved" / "dataset_dict.json", b'{"splits": ["train", "test"]}')
    assert "expected one split of a dataset, got several. Name a folder of" in error_of(tmp_path / "saved")
    assert error_of(tmp_path / "saved").endswith("saved: test, train.")
    assert read(tmp_path / "saved" / "test") == ["test", "test"]
    assert read(f"hf:{tmp_path / 'saved'}") == ["train", "train"]


@pytest.mark.usefixtures("offline")
def test_a_local_hugging_face_dataset_is_read(tmp_path):
    for part in range(2):
        write_parquet(tmp_path / f"train-{part}.parquet", text=[f"{text} {part}" for text in DOCUMENTS])
    write_parquet(tmp_path / "test-0.parquet", text=["of another split"])
    write_file(tmp_path / "README.md", b"---\nlicense: mit\n---\nThe card.")
    assert read(f"hf:{tmp_path}") == read(tmp_path) == [f"{text} {part}" for part in range(2) for text in DOCUMENTS]
    assert locations(f"hf:{tmp_path}")[3:5] == [f"hf:{tmp_path} shard 0: row 4", f"hf:{tmp_path} shard 1: row 1"]
    assert "row 1: expected a field 'txet', got 'text'. Set text_field of" in error_of(f"hf:{tmp_path}", text_field="txet")
    assert f"hf:{tmp_path / 'none'}: expected a dataset that can be opened" in error_of(f"hf:{tmp_path / 'none'}")
    assert "got no dataset" in error_of("hf:")


@pytest.mark.usefixtures("offline")
def test_rows_of_token_ids_are_read_unchanged(tmp_path):
    columns = {"input_ids": IDS, "text": ["a", "b", "c"]}
    lines = "".join(json.dumps({"input_ids": ids, "text": "a"}) + "\n" for ids in IDS).encode()
    (tmp_path / "hub").mkdir()
    write_parquet(tmp_path / "hub" / "x.parquet", **columns)
    for path in (
        write_file(tmp_path / "x.jsonl", lines),
        write_parquet(tmp_path / "x.parquet", **columns),
        write_arrow(tmp_path / "x.arrow", **columns),
        write_arrow(tmp_path / "large.arrow", input_ids=pa.array(IDS, pa.large_list(pa.uint32()))),
        saved_dataset(tmp_path / "saved", **columns),
        f"hf:{tmp_path / 'hub'}",
    ):
        assert read(path, text_field="input_ids") == [IDS[0], IDS[2]]  # an empty row is ignored, as an empty text is
    fixed = pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.uint16(), 2))
    assert read(write_parquet(tmp_path / "fixed.parquet", ids=fixed), text_field="ids") == [[1, 2], [3, 4], [5, 6]]
    sliced = pa.array([[9], [1, 2], [3]], pa.list_(pa.int64()))[1:]
    assert read(write_arrow(tmp_path / "sliced.arrow", ids=sliced), text_field="ids") == [[1, 2], [3]]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([1, -100], f"{NOT_IDS} -100 at [1]"),
        ([2**32], f"{NOT_IDS} 4294967296 at [0]"),
        ([1, None], f"{NOT_IDS} null at [1]"),
        ([1.5], f"{NOT_IDS} 1.5 at [0]"),
        ([1, True], f"{NOT_IDS} True at [1]"),
        ([1, "2"], f"{NOT_IDS} str at [1]"),
        ([10**30], f"{NOT_IDS} 1000000000000000000000000000000 at [0]"),
        (None, "field 'ids': expected a list of token ids, got null"),
        (7, "field 'ids': expected a list of token ids, got int"),
    ],
)
def test_a_bad_token_id_is_reported_with_file_and_row(tmp_path, bad, words):
    good = {"ids": [1, 2]}
    path = write_file(tmp_path / "x.jsonl", "".join(json.dumps(row) + "\n" for row in (good, {"ids": bad}, good)).encode())
    assert error_of(path, text_field="ids").startswith(f"{path}: line 2: {words}")
    documents, messages = read_skipping(path, text_field="ids")
    assert [ids.tolist() for ids in documents] == [[1, 2], [1, 2]]
    assert len(messages) == 1
    try:
        column = pa.array([[1, 2], bad, [1, 2]])
    except (pa.ArrowException, OverflowError):
        return  # no column can hold it
    for path in (write_parquet(tmp_path / "x.parquet", group=9, ids=column), write_arrow(tmp_path / "x.arrow", batch=9, ids=column)):
        if pa.types.is_floating(column.type.value_type):
            assert f"{NOT_IDS} 1.0 at [0]" in error_of(path, text_field="ids")  # each row of a column of floats is bad
        else:
            assert error_of(path, text_field="ids").startswith(f"{path}: row 2: {words}")
            assert [ids.tolist() for ids in read_skipping(path, text_field="ids")[0]] == [[1, 2], [1, 2]]


@pytest.mark.parametrize("bad_rows", ["fail", "skip"])
def test_a_source_that_mixes_text_and_ids_is_never_skipped(tmp_path, bad_rows):
    text, ids = b'{"ids": "abc"}\n', b'{"ids": [1, 2]}\n'
    got_text = "expected a list of token ids as in other rows, got text"
    got_ids = "expected text as in other rows, got a list of token ids"

    def error(path) -> str:
        return error_of(path, text_field="ids", bad_rows=bad_rows)

    path = write_file(tmp_path / "a" / "x.jsonl", ids + text)
    assert f"{path}: line 2: field 'ids': {got_text}" in error(path)
    path = write_file(tmp_path / "b" / "x.jsonl", text + ids)
    assert f"{path}: line 2: field 'ids': {got_ids}" in error(path)
    write_file(tmp_path / "c" / "a.jsonl", ids)
    path = write_parquet(tmp_path / "c" / "b.parquet", ids=["abc"])
    assert f"{path}: row 1: field 'ids': {got_text}" in error(tmp_path / "c")
    write_file(tmp_path / "d" / "a.jsonl", text)
    path = write_parquet(tmp_path / "d" / "b.parquet", ids=[[1]])
    assert f"{path}: row 1: field 'ids': {got_ids}" in error(tmp_path / "d")
    write_file(tmp_path / "e" / "a.jsonl", ids)
    path = write_file(tmp_path / "e" / "b.txt", b"abc")
    assert f"{path}: expected token ids as in the source's other files, got text" in error(tmp_path / "e")


def test_a_text_filter_on_token_ids_is_refused(tmp_path):
    path = write_file(tmp_path / "x.jsonl", b'{"ids": [1, 2]}\n')
    assert "expected no filter for a source of token ids" in error_of(path, text_field="ids", filter={"minimum_characters": 3})
    assert read(path, text_field="ids", filter={"dedup": True}) == [[1, 2]]


def test_a_large_batch_is_not_converted_to_python_at_once(tmp_path):
    path = write_arrow(tmp_path / "x.arrow", batch=10**6, text=[f"row {row}" for row in range(30_000)])
    split = splits_of(path)[0]
    next(split.documents())  # imports before the measurement
    tracemalloc.start()
    try:
        assert sum(1 for _ in split.documents()) == 30_000
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_the_first_of_two_columns_of_one_name_is_read(tmp_path):
    doubled = pa.Table.from_arrays([pa.array(["first"]), pa.array(["second"])], names=["text", "text"])
    with pa.ipc.new_file(str(tmp_path / "x.arrow"), doubled.schema) as writer:
        writer.write_table(doubled)
    assert read(tmp_path / "x.arrow") == ["first"]


def test_dictionary_encoded_and_large_strings_are_text(tmp_path):
    for number, kind in enumerate((pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view())):
        column = pa.array(DOCUMENTS, pa.string()).cast(kind)
        assert read(write_arrow(tmp_path / f"{number}.arrow", text=column)) == DOCUMENTS
        assert read(write_parquet(tmp_path / f"{number}.parquet", text=column)) == DOCUMENTS


def test_id_columns_are_read_the_same_by_batch_and_by_row(tmp_path):
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 2**32, size=size).tolist() for size in rng.integers(0, 50, size=3000)]
    path = write_parquet(tmp_path / "x.parquet", group=700, ids=pa.array(rows, pa.list_(pa.int64())))
    assert read(path, text_field="ids") == [row for row in rows if row]
    assert [document.position for _, document in read_all(path, text_field="ids")] == [position for position, row in enumerate(rows) if row]
    assert parquet.ParquetFile(path).num_row_groups > 1


def test_identity_of_a_saved_dataset_depends_on_its_tables_only(tmp_path):
    saved = saved_dataset(tmp_path / "saved", text=DOCUMENTS)
    before = identity(SourceConfig(path=saved))
    write_file(tmp_path / "saved" / "state.json", b"{}")
    assert identity(SourceConfig(path=saved)) == before
    os.utime(f"{saved}/data-00000-of-00002.arrow", ns=(0, 1))
    assert identity(SourceConfig(path=saved)) != before


def test_a_row_that_is_too_long_is_bad(tmp_path):
    texts, limit = ["a" * 10, "b" * 11, "ß" * 5, "ß" * 6, "c"], {"longest_document": 10}
    message = "row 2: expected at most 10 bytes (data.longest_document), got a longer document. Split it, or raise data.longest_document."
    for number, kind in enumerate((pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view())):
        column = pa.array(texts, pa.string()).cast(kind)
        for path in (write_arrow(tmp_path / f"{number}.arrow", text=column), write_parquet(tmp_path / f"{number}.parquet", text=column)):
            assert error_of(path, data=limit) == f"{path}: {message}"
            assert read_skipping(path, data=limit)[0] == [texts[0], texts[2], texts[4]]
    path = write_parquet(tmp_path / "ids.parquet", ids=[[1, 2], [1, 2, 3]])
    assert error_of(path, text_field="ids", data=limit) == f"{path}: {message}"
    path = write_file(tmp_path / "ids.jsonl", b'{"ids": [1,2]}\n{"ids": [1,22]}\n')
    assert error_of(path, text_field="ids", data={"longest_document": 14}).startswith(f"{path}: line 2: expected at most 14 bytes")


def test_a_field_of_an_object_is_read(tmp_path):
    rows = [{"meta": {"text": "a", "ids": [1]}}, {"meta": {"text": "b", "ids": [2, 3]}}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    metas = [row["meta"] for row in rows]
    for path in (
        write_file(tmp_path / "x.jsonl", lines),
        write_parquet(tmp_path / "x.parquet", meta=metas),
        write_arrow(tmp_path / "x.arrow", meta=metas),
    ):
        assert read(path, text_field="meta.text") == ["a", "b"]
        assert read(path, text_field="meta.ids") == [[1], [2, 3]]
        assert read(path, template="{meta.text}!") == ["a!", "b!"]
        assert ": expected a field 'txt', got 'text', 'ids'. Set text_field of" in error_of(path, text_field="meta.txt")
        assert "field 'meta': expected text or a list of token ids, got an object with fields. Name one of them, such as meta." in error_of(
            path, text_field="meta"
        )
        assert read_skipping(path, text_field="meta.text.x")[0] == []
    columns = {"meta": metas, "meta.text": ["c", "d"]}
    for path in (write_parquet(tmp_path / "y.parquet", **columns), write_arrow(tmp_path / "y.arrow", **columns)):
        assert read(path, text_field="meta.text") == ["c", "d"]


def test_the_fields_of_a_row_are_listed_with_the_most_likely_one(tmp_path):
    for row, words in [
        ({"title": "t", "body": "b"}, "got 'title', 'body'. Set data.text_field to 'body'."),
        ({"id": 1, "txt": "a", "content": "b"}, "got 'id', 'txt', 'content'. Set data.text_field to 'txt'."),
        ({f"f{number}": 1 for number in range(30)}, "'f11' and 18 more. Set data.text_field."),
        ({"k" * 500: 1}, f"got {'k' * 500!r:.60}. Set data.text_field."),
        ({"text": ["one", "two"]}, "field 'text': expected text or a list of token ids, got a list of 2 texts. Join them to one text."),
    ]:
        assert words in error_of(write_file(tmp_path / "x.jsonl", json.dumps(row).encode()))


def test_a_home_that_cannot_be_written_is_named_with_its_remedy(tmp_path):
    """datasets writes to its cache whatever it reads."""
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    code = f"from manta.data.sources.tables import _open_dataset; _open_dataset({str(tmp_path)!r}, None)"
    environment = os.environ | {"HF_HOME": "/proc/none"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "/proc/none'. Set HF_HOME to a directory in which you can write." in ended.stderr
