"""Files are whole or absent, and documents say what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixbit.errors import MixbitError, check_choice
from mixbit.files import read_document, write_atomic, write_document, write_text


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = write_text(tmp_path / "a.txt", "old")

    def write_half(file) -> None:
        file.write(b"half")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_atomic(target, write_half)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(MixbitError, match="cannot write .*missing"):
        write_text(tmp_path / "missing" / "a.txt", "x")


def test_documents_round_trip_and_keep_the_order_of_keys(tmp_path: Path) -> None:
    path = write_document(tmp_path / "a.json", "mixbit-test", 2, {"b": 1, "a": [1, 2]})
    assert list(read_document(path, "mixbit-test", 2)) == ["format", "version", "b", "a"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"format": "mixbit-test", "vers', "not a whole JSON document"),
        ("[1, 2]", "is not a mixbit-test file"),
        (json.dumps({"format": "mixbit-recipe", "version": 1}), "its format is 'mixbit-recipe'"),
        (json.dumps({"format": "mixbit-test", "version": 3}), "newer than this mixbit reads"),
        (json.dumps({"format": "mixbit-test", "version": "one"}), "expected a whole number"),
    ],
)
def test_truncated_foreign_and_newer_files_are_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(MixbitError, match=complaint):
        read_document(path, "mixbit-test", 2)


def test_a_missing_and_a_binary_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MixbitError, match="No such file"):
        read_document(tmp_path / "none.json", "mixbit-test", 1)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MixbitError, match="not a text file"):
        read_document(tmp_path / "binary.json", "mixbit-test", 1)


def test_a_wrong_choice_names_the_nearest() -> None:
    with pytest.raises(MixbitError, match=r"method='gredy' is not known.*did you mean 'greedy'"):
        check_choice("method", "gredy", ["greedy", "ilp"])
