"""The user's own tables: every kind is read alike, what is wrong is named by file and row, or left out and counted."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lightning_unitscale.cookbook.data.examples import Pair
from lightning_unitscale.cookbook.data.labelled_files import labelled_file, paired_file
from lightning_unitscale.errors import InputError

PAIRS = [("grün", "green"), ("ein, zwei", "one\ntwo"), ("drei", "three")]


def write(file: Path, pairs: list[tuple[str, str]]) -> str:
    """The pairs as a table of the kind that the file's name says."""
    if file.suffix == ".csv":
        cells = [["source", "target"], *pairs]
        file.write_text("\n".join(",".join(f'"{cell}"' for cell in row) for row in cells), encoding="utf-8")
    elif file.suffix == ".jsonl":
        rows = [{"source": source, "target": target} for source, target in pairs]
        file.write_text("\n\n".join(map(json.dumps, rows)))
    else:
        sources, targets = zip(*pairs, strict=True)
        pyarrow.parquet.write_table(pyarrow.table({"source": sources, "target": targets}), file)
    return str(file)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_all_kinds_of_tables_give_the_same_pairs(ending: str, tmp_path: Path) -> None:
    assert paired_file(write(tmp_path / f"a.{ending}", PAIRS)) == [Pair(*pair) for pair in PAIRS]


def test_a_byte_order_mark_belongs_to_no_column(tmp_path: Path) -> None:
    for name, text in (("a.csv", "source,target\na,b\n"), ("a.jsonl", '{"source": "a", "target": "b"}\n')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert paired_file(str(tmp_path / name)) == [Pair("a", "b")]
        (tmp_path / name).write_text(text, encoding="utf-16")
        assert paired_file(str(tmp_path / name)) == [Pair("a", "b")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "source,target\na,b\ngr\xfcn,green\n".encode("latin-1"), r"a\.csv: line 3 is not UTF-8"),
        ("a.csv", "source,target\na,b\n".encode("utf-16")[:-1], r"a\.csv: line 1 is not UTF-8"),
        ("a.csv", b"source,target\na,b\nc\n", r"a\.csv: row 2 has no 'target' \(data\.target\); it has source, target"),
        ("a.csv", b"source,target\na,b\n,c\n", r"row 2 has no 'source'"),
        ("a.csv", b"", "the file has no rows"),
        ("a.jsonl", b'{"source": "a", "target": "b"}\n{"source": "a"\n', r"a\.jsonl: line 2 is not JSON"),
        ("a.jsonl", b'{"source": "a"}\n', r"row 1 has no 'target' \(data\.target\); it has source"),
        ("a.parquet", b"no Parquet", "no Parquet file"),
        ("a.xlsx", b"x", r"ends in \.csv or \.jsonl or \.parquet"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_row(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        paired_file(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "source,target\na,b\ngr\xfcn,green\nc,\nd,e\n".encode("latin-1")),
        (
            "a.jsonl",
            '{"source": "a", "target": "b"}\n{"source": "gr\xfcn"\n[1]\n{"source": "d", "target": "e"}'.encode(
                "latin-1"
            ),
        ),
    ],
)
def test_broken_rows_are_left_out_and_counted(
    name: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert paired_file(str(tmp_path / name), skip_broken=True) == [Pair("a", "b"), Pair("d", "e")]
    assert "left out 2 of 4 rows that are broken; the first: data.path=" in capsys.readouterr().out


def test_classes_are_read_with_broken_rows_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,x\n,y\nb,y\n")
    assert [row.label for row in labelled_file(str(tmp_path / "a.csv"), skip_broken=True)] == ["x", "y"]
    with pytest.raises(InputError, match=r"row 2 has no 'text' .*data\.skip_broken=true leaves such rows out"):
        labelled_file(str(tmp_path / "a.csv"))
