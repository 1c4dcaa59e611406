"""Which files of a directory or a glob are documents, what is skipped, and that it is reported."""

import pytest
from small_corpora import SMALL, config, documents, texts_of, write_lines
from source_reading import error_of, read, write_file, write_parquet

from manta.data.prepare.prepare import prepare
from manta.data.source_config import SourceConfig
from manta.data.sources.selection import select
from manta.data.sources.source import select_files

CASES = {  # the files of a directory: those that are skipped
    "a clone of tables": (
        "README.md dataset_infos.json data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet data/test-00000-of-00001.parquet",
        "README.md dataset_infos.json data/test-00000-of-00001.parquet",
    ),
    "a clone with its script": ("clone.py clone_extra.py LICENSE.txt train.jsonl dev.jsonl", "clone.py LICENSE.txt dev.jsonl"),
    "folders of text": ("README.md train/pos/0.txt train/neg/0.txt test/pos/0.txt", "README.md test/pos/0.txt"),
    "text files": ("README.md train.txt val.txt", "README.md val.txt"),
    "names with more": ("ptb.train.txt ptb.valid.txt ptb.test.txt", "ptb.valid.txt ptb.test.txt"),
    "capitals": ("Train.JSONL TEST.JSONL.GZ", "TEST.JSONL.GZ"),
    "several configs": ("en/train.jsonl en/test.jsonl de/train.jsonl de/eval/0.jsonl", "en/test.jsonl de/eval/0.jsonl"),
    "the outer folder counts": ("train/test-questions.jsonl test/train-questions.jsonl", "test/train-questions.jsonl"),
    "token shards": ("train.bin val.bin", "val.bin"),
    "shards of Megatron": ("web.train.bin web.train.idx web.test.bin web.test.idx", "web.test.bin web.test.idx"),
    "an unnamed split stays": ("train.jsonl extra.jsonl test.jsonl", "test.jsonl"),
    "no train split": ("part-0.jsonl test.jsonl", ""),
    "one other split": ("test-0.jsonl test-1.jsonl", ""),
    "programs": ("README.md train.py test_train.py tests/test_x.py docs/eval.md LICENSE", ""),
    "pages": ("README.md index.md test.md train.md", ""),
    "words that start alike": ("trained.jsonl testament.jsonl devil.txt contest.txt", ""),
    "only a card": ("README.md", ""),
    "a settings file": ("config.json", ""),
}


@pytest.mark.parametrize("case", CASES)
def test_other_splits_and_what_describes_a_dataset_are_left_out(case):
    names, left_out = (text.split() for text in CASES[case])
    for root in ("/home/test/clone/", "clone/", "s3://bucket/eval/clone/", "/"):
        paths = sorted(root + name for name in names)
        expected = [path for path in paths if path.removeprefix(root) not in left_out]
        if root == "/" and "clone.py" in names:
            continue
        selected, notes = select(paths, SourceConfig(path=root), is_directory=False)
        assert selected == expected
        assert sum(int(note.split()[1]) for note in notes if note.startswith("skipped")) == len(left_out)
        looks = [f"reads 1 file of a name like those of validation and test splits, first {root}test.jsonl"]
        assert [note for note in notes if not note.startswith("skipped")] == (looks if case == "no train split" else [])


def test_a_split_or_a_card_that_is_named_itself_is_read(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}-0.parquet", text=[split])
    write_file(tmp_path / "README.md", b"card")
    write_file(tmp_path / "photo.png", b"x")
    assert read(tmp_path) == read(tmp_path / "*.parquet") == ["train"]
    for name, text in (("test-0.parquet", "test"), ("test-*", "test"), ("README.md", "card"), ("README*", "card")):
        assert read(tmp_path / name) == [text]
    assert [note.partition(" (")[0].partition(", first")[0] for note in select_files(SourceConfig(path=str(tmp_path)))[1]] == [
        "skipped 1 file by format",
        "skipped 1 file with the description of a dataset",
        "skipped 1 file of other splits than train",
    ]


def test_empty_files_among_others_are_left_out(tmp_path):
    write_file(tmp_path / "a.txt", b"a")
    write_file(tmp_path / "b.jsonl", b"")
    write_file(tmp_path / "__init__.py", b"")
    assert read(tmp_path) == read(tmp_path / "*") == ["a"]
    assert select_files(SourceConfig(path=str(tmp_path)))[1] == [f"skipped 2 without content, first {tmp_path}/__init__.py"]
    assert "b.jsonl: expected data, got an empty file" in error_of(tmp_path / "b.jsonl")
    assert "got an empty file" in error_of(tmp_path / "*.jsonl")
    for name in ("c.parquet", "c.jsonl.gz"):  # no file of this format is empty: its download was cut off
        empty = write_file(tmp_path / name, b"")
        assert error_of(tmp_path, bad_rows="skip").startswith(f"{empty}: expected data, got an empty file.")
        (tmp_path / name).unlink()


def test_prepare_says_what_it_left_out(tmp_path, capsys):

    clone = tmp_path / "clone"
    clone.mkdir()
    for split, seed in {"train": 0, "test": 1, "validation": 2}.items():
        write_lines(clone / f"{split}.jsonl", documents(60, seed=seed))
    write_file(clone / "README.md", b"the card")
    prepared = prepare(config(tmp_path / "corpora", clone), SMALL)
    assert sorted(texts_of(prepared, "train") + texts_of(prepared, "validation")) == sorted(documents(60))
    printed = capsys.readouterr().err
    for words in (
        f"skipped 1 file with the description of a dataset (a file that is itself a source is read), first {clone}/README.md",
        f"skipped 2 files of other splits than train (name them as validation, or as sources), first {clone}/test.jsonl",
    ):
        assert f"prepare: {clone}: {words}\n" in printed
