"""Tables: parquet, Arrow and Hugging Face datasets, and rows of token ids in each."""

import json
import os
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from reading import DOCUMENTS, arrow, found, pieces, places, put, read, skipped, table, told

from manta.data.sources import splits
from manta.data.sources.config import SourceConfig

IDS = [[5, 4_000_000_000, 0], [], [7]]
ROWS = [f"row {i} " * 20 for i in range(100)]


def test_parquet_is_read(tmp_path):
    path = table(tmp_path / "x.parquet", id=[1, 2, 3, 4], body=DOCUMENTS)
    assert read(path, text_field="body") == DOCUMENTS
    assert places(path, text_field="body") == [f"{path}: row {row}" for row in range(1, 5)]


@pytest.mark.parametrize("stream", [False, True])
def test_arrow_is_read_in_both_of_its_formats(tmp_path, stream):
    path = arrow(tmp_path / "x.arrow", stream=stream, id=[1, 2, 3, 4], body=DOCUMENTS)
    assert read(path, text_field="body") == DOCUMENTS
    assert places(path, text_field="body") == [f"{path}: row {row}" for row in range(1, 5)]
    renamed = Path(path).rename(tmp_path / "x.feather")
    assert read(renamed, text_field="body", format="arrow") == DOCUMENTS


@pytest.mark.parametrize("write", [table, arrow, lambda path, **columns: arrow(path, stream=True, batch=1000, **columns)])
def test_a_large_table_is_shared_by_its_rows_and_yields_each_once(tmp_path, monkeypatch, write):
    suffix = "parquet" if write is table else "arrow"
    path = write(tmp_path / f"x.{suffix}", text=["", *ROWS], number=list(range(101)))
    for piece_bytes in (10**9, 10_000, 1000, 1):
        monkeypatch.setattr(splits, "PIECE", piece_bytes)
        work = pieces(path)
        assert read(path) == ROWS
        assert places(path) == [f"{path}: row {row}" for row in range(2, 102)]
        assert abs(sum(piece.size for piece in work) - Path(path).stat().st_size) < len(work)
        assert len({piece.name for piece in work}) == len(work)
    assert len(work) >= 50


def test_pieces_of_a_table_are_about_as_large_as_wanted(tmp_path, monkeypatch):
    path = table(tmp_path / "x.parquet", text=[os.urandom(500).hex() for _ in range(200)])
    monkeypatch.setattr(splits, "PIECE", 20_000)
    sizes = [piece.size for piece in pieces(path)]
    assert len(sizes) > 20
    assert all(20_000 <= size < 27_000 for size in sizes[:-1])  # of row groups of about 6,000


def test_a_bad_row_is_told_by_file_and_row(tmp_path, monkeypatch):
    path = table(tmp_path / "null.parquet", text=["a", "b", None, "d"])
    assert told(path) == f"{path}: row 3: field 'text' is null; wants text"
    assert skipped(path) == (["a", "b", "d"], [f"{path}: row 3: field 'text' is null; wants text"])
    monkeypatch.setattr(splits, "PIECE", 1)
    assert told(path) == f"{path}: row 3: field 'text' is null; wants text"
    path = table(tmp_path / "number.parquet", text=[1, 2])
    assert told(path).startswith(f"{path}: row 1: field 'text' is int; wants text or a list of token ids")
    path = arrow(tmp_path / "null.arrow", text=["a", "b", None, "d"])
    assert told(path) == f"{path}: row 3: field 'text' is null; wants text"


@pytest.mark.parametrize("bad_rows", ["fail", "skip"])
def test_a_column_that_is_missing_is_told_with_those_there_are(tmp_path, bad_rows):
    for path in (table(tmp_path / "other.parquet", texts=["a"], url=["b"]), arrow(tmp_path / "other.arrow", texts=["a"], url=["b"])):
        assert told(path, bad_rows=bad_rows) == f"{path}: no field 'text'; it has 'texts'; set data.text_field"
        problem = f"{path}: no field 'title'; it has 'texts'; set template of {path!r}"
        assert told(path, bad_rows=bad_rows, template="{texts} {title}") == problem


def test_a_cell_that_is_not_utf8_is_told_by_its_row(tmp_path):
    cells = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    for path in (table(tmp_path / "x.parquet", text=cells), arrow(tmp_path / "x.arrow", text=cells)):
        problem = f"{path}: row 2: field 'text' is not UTF-8 (invalid start byte); convert it"
        assert told(path) == problem
        assert skipped(path) == (["a", "c"], [problem])


@pytest.mark.parametrize("bad_rows", ["fail", "skip"])
def test_a_truncated_or_damaged_table_is_told_and_never_skipped(tmp_path, bad_rows):
    whole = Path(table(tmp_path / "whole.parquet", text=["a" * 100] * 10)).read_bytes()
    filed = Path(arrow(tmp_path / "file.arrow", text=["a" * 100] * 10)).read_bytes()
    streamed = Path(arrow(tmp_path / "stream.arrow", stream=True, text=["a" * 100] * 10)).read_bytes()
    for name, content in {
        "t.parquet": whole[:-40],
        "u.parquet": b"no parquet",
        "t.arrow": filed[:-40],
        "u.arrow": filed[: len(filed) // 2],
        "v.arrow": streamed[:-40],
        "w.arrow": streamed[:-8],  # at a boundary of messages, where nothing but the end's own mark is missing
        "x.arrow": b"no Arrow",
        "y.arrow": b"no",
    }.items():
        path = put(tmp_path / name, content)
        assert told(path, bad_rows=bad_rows).startswith(f"{path}: ")
        assert told(path, bad_rows=bad_rows).endswith("fetch it again")


def test_an_arrow_file_that_points_outside_of_itself_is_told_and_not_followed(tmp_path):
    sound = Path(arrow(tmp_path / "x.arrow", batch=4, text=["aaaa"] * 4)).read_bytes()
    offsets = np.arange(0, 20, 4, dtype=np.int32)
    assert sound.count(offsets.tobytes()) == 1
    offsets[2:4] = 2**31 - 16, -(2**31)
    path = put(tmp_path / "x.arrow", sound.replace(np.arange(0, 20, 4, dtype=np.int32).tobytes(), offsets.tobytes()))
    assert told(path, bad_rows="skip").startswith(f"{path}: cannot be read (ArrowInvalid")


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
    arrow(tmp_path / "saved" / "cache-1234.arrow", text=["computed from it"])
    expected = [f"{saved}/data-0000{part}-of-00002.arrow: row {row}" for part in (0, 1) for row in (1, 2)]
    for path in (saved, f"{saved}/*", f"hf:{saved}"):
        assert read(path) == DOCUMENTS
        assert places(path) == expected


@pytest.mark.usefixtures("offline")
def test_of_a_dataset_saved_in_splits_one_is_named(tmp_path):
    for split in ("train", "test"):
        saved_dataset(tmp_path / "saved" / split, text=[split, split])
    put(tmp_path / "saved" / "dataset_dict.json", b'{"splits": ["train", "test"]}')
    assert "a dataset in several splits; wants one of them: name a folder of" in told(tmp_path / "saved")
    assert told(tmp_path / "saved").endswith("saved: test, train")
    assert read(tmp_path / "saved" / "test") == ["test", "test"]
    assert read(f"hf:{tmp_path / 'saved'}") == ["train", "train"]


@pytest.mark.usefixtures("offline")
def test_a_local_hugging_face_dataset_is_read(tmp_path):
    for part in range(2):
        table(tmp_path / f"train-{part}.parquet", text=[f"{text} {part}" for text in DOCUMENTS])
    assert read(f"hf:{tmp_path}") == [f"{text} {part}" for part in range(2) for text in DOCUMENTS]
    assert places(f"hf:{tmp_path}")[3:5] == [f"hf:{tmp_path} shard 0, row 4", f"hf:{tmp_path} shard 1, row 1"]
    assert "row 1: no field 'txet'; it has 'text'; set text_field of" in told(f"hf:{tmp_path}", text_field="txet")
    assert f"hf:{tmp_path / 'none'}: cannot be opened" in told(f"hf:{tmp_path / 'none'}")
    assert "names no dataset" in told("hf:")


@pytest.mark.usefixtures("offline")
def test_token_ids_are_taken_as_they_are(tmp_path):
    columns = {"input_ids": IDS, "text": ["a", "b", "c"]}
    lines = "".join(json.dumps({"input_ids": ids, "text": "a"}) + "\n" for ids in IDS).encode()
    (tmp_path / "hub").mkdir()
    table(tmp_path / "hub" / "x.parquet", **columns)
    for path in (
        put(tmp_path / "x.jsonl", lines),
        table(tmp_path / "x.parquet", **columns),
        arrow(tmp_path / "x.arrow", **columns),
        arrow(tmp_path / "large.arrow", input_ids=pa.array(IDS, pa.large_list(pa.uint32()))),
        saved_dataset(tmp_path / "saved", **columns),
        f"hf:{tmp_path / 'hub'}",
    ):
        assert read(path, text_field="input_ids") == [IDS[0], IDS[2]]  # an empty row is passed over, as an empty text is
    fixed = pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.uint16(), 2))
    assert read(table(tmp_path / "fixed.parquet", ids=fixed), text_field="ids") == [[1, 2], [3, 4], [5, 6]]
    sliced = pa.array([[9], [1, 2], [3]], pa.list_(pa.int64()))[1:]
    assert read(arrow(tmp_path / "sliced.arrow", ids=sliced), text_field="ids") == [[1, 2], [3]]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([1, -100], "field 'ids' holds -100 at [1]; wants token ids: whole numbers from 0 to 4294967295"),
        ([2**32], "field 'ids' holds 4294967296 at [0]"),
        ([1, None], "field 'ids' holds null at [1]"),
        ([1.5], "field 'ids' holds 1.5 at [0]"),
        ([1, True], "field 'ids' holds True at [1]"),
        ([1, "2"], "field 'ids' holds str at [1]"),
        ([10**30], "field 'ids' holds 1000000000000000000000000000000 at [0]"),
        (None, "field 'ids' is null; wants a list of token ids"),
        (7, "field 'ids' is int; wants a list of token ids"),
    ],
)
def test_what_is_no_token_id_is_told_by_file_and_row(tmp_path, bad, words):
    good = {"ids": [1, 2]}
    path = put(tmp_path / "x.jsonl", "".join(json.dumps(row) + "\n" for row in (good, {"ids": bad}, good)).encode())
    assert told(path, text_field="ids").startswith(f"{path}: line 2: {words}")
    documents, problems = skipped(path, text_field="ids")
    assert [ids.tolist() for ids in documents] == [[1, 2], [1, 2]]
    assert len(problems) == 1
    try:
        column = pa.array([[1, 2], bad, [1, 2]])
    except (pa.ArrowException, OverflowError):
        return  # no column can hold it
    for path in (table(tmp_path / "x.parquet", group=9, ids=column), arrow(tmp_path / "x.arrow", batch=9, ids=column)):
        if pa.types.is_floating(column.type.value_type):
            assert "field 'ids' holds 1.0 at [0]" in told(path, text_field="ids")  # a column of fractions, each of them
        else:
            assert told(path, text_field="ids").startswith(f"{path}: row 2: {words}")
            assert [ids.tolist() for ids in skipped(path, text_field="ids")[0]] == [[1, 2], [1, 2]]


@pytest.mark.parametrize("bad_rows", ["fail", "skip"])
def test_text_and_ids_in_one_source_are_an_error_that_is_never_skipped(tmp_path, bad_rows):
    text, ids = b'{"ids": "abc"}\n', b'{"ids": [1, 2]}\n'
    path = put(tmp_path / "a" / "x.jsonl", ids + text)
    assert f"{path}: line 2: field 'ids' holds text, other rows a list of token ids" in told(path, text_field="ids", bad_rows=bad_rows)
    path = put(tmp_path / "b" / "x.jsonl", text + ids)
    assert f"{path}: line 2: field 'ids' holds a list of token ids, other rows text" in told(path, text_field="ids", bad_rows=bad_rows)
    put(tmp_path / "c" / "a.jsonl", ids)
    path = table(tmp_path / "c" / "b.parquet", ids=["abc"])
    assert f"{path}: row 1: field 'ids' holds text" in told(tmp_path / "c", text_field="ids", bad_rows=bad_rows)
    put(tmp_path / "d" / "a.jsonl", text)
    path = table(tmp_path / "d" / "b.parquet", ids=[[1]])
    assert f"{path}: row 1: field 'ids' holds a list of token ids" in told(tmp_path / "d", text_field="ids", bad_rows=bad_rows)
    put(tmp_path / "e" / "a.jsonl", ids)
    path = put(tmp_path / "e" / "b.txt", b"abc")
    assert f"{path}: text, and other files of the source hold token ids" in told(tmp_path / "e", text_field="ids", bad_rows=bad_rows)


def test_a_filter_of_text_has_no_use_for_token_ids(tmp_path):
    path = put(tmp_path / "x.jsonl", b'{"ids": [1, 2]}\n')
    assert "got a filter, which asks of text" in told(path, text_field="ids", filter={"minimum_characters": 3})
    assert read(path, text_field="ids", filter={"dedup": True}) == [[1, 2]]


def test_a_table_in_one_batch_is_not_made_python_objects_at_once(tmp_path):
    path = arrow(tmp_path / "x.arrow", batch=10**6, text=[f"row {row}" for row in range(30_000)])
    piece = pieces(path)[0]
    next(piece.documents())  # imports are done
    tracemalloc.start()
    try:
        assert sum(1 for _ in piece.documents()) == 30_000
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
        assert read(arrow(tmp_path / f"{number}.arrow", text=column)) == DOCUMENTS
        assert read(table(tmp_path / f"{number}.parquet", text=column)) == DOCUMENTS


def test_ids_of_a_clean_batch_come_as_they_would_one_by_one(tmp_path):
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 2**32, size=size).tolist() for size in rng.integers(0, 50, size=3000)]
    path = table(tmp_path / "x.parquet", group=700, ids=pa.array(rows, pa.list_(pa.int64())))
    assert read(path, text_field="ids") == [row for row in rows if row]
    assert [one.place for _, one in found(path, text_field="ids")] == [place for place, row in enumerate(rows) if row]
    assert parquet.ParquetFile(path).num_row_groups > 1


def test_the_identity_of_a_saved_dataset_is_that_of_its_tables(tmp_path):
    saved = saved_dataset(tmp_path / "saved", text=DOCUMENTS)
    before = splits.identity(SourceConfig(path=saved))
    put(tmp_path / "saved" / "state.json", b"{}")
    assert splits.identity(SourceConfig(path=saved)) == before
    os.utime(f"{saved}/data-00000-of-00002.arrow", ns=(0, 1))
    assert splits.identity(SourceConfig(path=saved)) != before
