"""Rows of every kind of file, and every bad row in its place."""

from __future__ import annotations

import json
import sys

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from npr_megatron.data.rows import Fault, Row, files_of, list_faults, read_rows
from npr_megatron.errors import EnvironmentFault, InputError

ROWS = [{"prompt": f"p{i}", "response": "r\u2028s"} for i in range(5)]


def test_json_lines_are_read_by_number_and_bad_ones_named(tmp_path):
    path = tmp_path / "train.jsonl"
    good = json.dumps(ROWS[0], ensure_ascii=False).encode()
    path.write_bytes(
        b"\xef\xbb\xbf" + good + b"\n\n{broken\n[1]\n\xff\n" + b"[" * 100_000 + b"\n" + good
    )
    first, *faults, last = read_rows(path)
    assert first == Row(f"{path}:1", ROWS[0])
    assert last == Row(f"{path}:7", ROWS[0])
    assert [str(fault).replace(str(path), "f") for fault in faults] == [
        "f:3: not JSON (Expecting property name enclosed in double quotes at column 2)",
        "f:4: a JSON list, not an object",
        "f:5: byte 0 is not UTF-8",
        "f:6: JSON nested too deeply",
    ]


def test_patterns_name_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).write_text("")
    assert files_of(f"{tmp_path}/*.jsonl") == [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("missing.jsonl", "does not exist"),
        ("c.txt", r"ends in .txt; known are .jsonl, .parquet"),
        ("plain", "no state.json"),
        ("splits", "several splits, test, train; name one of them"),
    ],
)
def test_what_is_no_data_is_refused_by_name(tmp_path, name, complaint):
    (tmp_path / "c.txt").write_text("")
    (tmp_path / "plain").mkdir()
    for split in ("train", "test"):
        (tmp_path / "splits" / split).mkdir(parents=True)
        (tmp_path / "splits" / split / "state.json").write_text("{}")
    with pytest.raises(InputError, match=complaint):
        files_of(str(tmp_path / name))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(EnvironmentFault, match=r'pip install "npr-megatron\[data\]"'):
        list(read_rows(tmp_path / "train.parquet"))


def write_saved(folder, tables):
    """Write what ``datasets.save_to_disk`` writes."""
    folder.mkdir()
    names = [f"data-{i:05d}-of-{len(tables):05d}.arrow" for i in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        path = str(folder / name)
        with (
            pyarrow.OSFile(path, "wb") as sink,
            pyarrow.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(table)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names]})
    )


def test_parquet_and_saved_datasets_give_the_same_rows(tmp_path):
    nested = [{**row, "messages": [{"role": "user", "content": "hi"}]} for row in ROWS]
    table = pyarrow.Table.from_pylist(nested)
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet", row_group_size=2)
    write_saved(tmp_path / "saved", [table.slice(0, 3), table.slice(3)])
    for path in (tmp_path / "train.parquet", tmp_path / "saved"):
        assert list(read_rows(path)) == [Row(f"{path}[{i}]", row) for i, row in enumerate(nested)]


def test_broken_parquet_and_saved_datasets_are_named(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(InputError, match=r"train\.parquet cannot be read as Parquet from row 0"):
        list(read_rows(tmp_path / "train.parquet"))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": [{"filename": "gone.arrow"}]}')
    with pytest.raises(InputError, match=r"gone\.arrow cannot be read as Arrow"):
        list(read_rows(tmp_path / "saved"))
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(InputError, match="does not list the files"):
        list(read_rows(tmp_path / "saved"))


def test_a_parquet_file_that_breaks_off_says_from_which_row_on(tmp_path):
    path = tmp_path / "train.parquet"
    rows = [{"prompt": f"p{i}", "response": "r" * 50} for i in range(4096)]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(
        table, path, row_group_size=1024, compression="none", use_dictionary=False
    )
    with pyarrow.parquet.ParquetFile(path) as file:
        third = file.metadata.row_group(2).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[third : third + 64] = bytes(64)
    path.write_bytes(content)
    read = []
    with pytest.raises(InputError, match=r"cannot be read as Parquet from row (1024|2048) on"):
        read.extend(read_rows(path))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"cannot be read as Parquet from row 0 on"):
        list(read_rows(path))


def test_only_the_first_faults_are_listed_and_the_rest_counted():
    faults = [Fault(f"f:{i}", "corrupt", "bad") for i in range(25)]
    listed = list_faults(faults)
    assert listed[0] == "f:0: bad"
    assert listed[-1] == "and 5 more rows"
    assert len(listed) == 21
