"""The journal holds what was recorded, whatever happened to the process and to its last line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen35.errors import OutputError
from qwen35.sinks.journal import Journal

KEY = {"plan": "abc", "source": {"files": {"a": [1, 2]}}}


def test_pieces_are_there_again(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", KEY) as journal:
        assert dict(journal) == {}
        journal.record({"layer 0": {"loss": 0.1}, "layer 1": None})
        journal.record({})
        journal.record({"layer 2": [1.5, "x"]})
        journal.record({"layer 0": {"loss": 0.2}})
    with Journal(tmp_path / "j", KEY) as journal:
        assert dict(journal) == {"layer 0": {"loss": 0.2}, "layer 1": None, "layer 2": [1.5, "x"]}
        assert "layer 3" not in journal


@given(st.dictionaries(st.text(), st.floats(allow_nan=False) | st.text()))
def test_names_and_results_survive_exactly(
    tmp_path_factory: pytest.TempPathFactory, pieces: dict[str, object]
) -> None:
    path = tmp_path_factory.mktemp("j") / "j"
    with Journal(path, KEY) as journal:
        journal.record(pieces)
    with Journal(path, KEY) as journal:
        assert dict(journal) == pieces


def test_a_journal_cut_anywhere_holds_whole_records_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path, KEY) as journal:
        for number in range(3):
            journal.record({f"a{number}": 1, f"b{number}": 2})
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with Journal(path, KEY) as journal:
            count = data[:length].count(b"\n")
            assert len(journal) == max(0, count - 1) * 2
            journal.record({"more": 1})
        with Journal(path, KEY) as journal:
            assert journal["more"] == 1


def test_nothing_after_a_damaged_line_is_believed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "j"
    with Journal(path, KEY) as journal:
        journal.record({"a": 1})
        journal.record({"b": 1})
        journal.record({"c": 1})
    path.write_bytes(path.read_bytes().replace(b'{"b":1}', b'{"b":2}'))
    with Journal(path, KEY) as journal:
        assert dict(journal) == {"a": 1}
    assert "j: is damaged from byte 72 on: what it held is done again" in caplog.text
    caplog.clear()
    path.write_bytes(path.read_bytes() + bytes(4096))  # a size without data, after a power failure
    with Journal(path, KEY) as journal:
        assert dict(journal) == {"a": 1}
    path.write_bytes(path.read_bytes()[:-1])  # a torn line
    with Journal(path, KEY) as journal:
        assert dict(journal) == {}
    assert not caplog.records
    path.write_bytes(b"0" + path.read_bytes())
    with Journal(path, {"plan": "x"}) as journal:
        assert dict(journal) == {}
    assert caplog.messages == [f"{path}: is damaged: starting over"]


def test_other_work_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path, KEY) as journal:
        journal.record({"a": 1})
    words = "j: holds an unfinished run with another plan and another model; run the original"
    for _ in range(2):
        with pytest.raises(OutputError, match=words):
            Journal(path, {**KEY, "plan": "x", "model": 1})
    with Journal(path, KEY) as journal:
        assert dict(journal) == {"a": 1}


def test_other_work_may_begin_where_nothing_was_finished(tmp_path: Path) -> None:
    Journal(tmp_path / "j", KEY).close()
    with Journal(tmp_path / "j", {"plan": "x"}) as journal:
        journal.record({"a": 1})
    with pytest.raises(OutputError, match="another plan"):
        Journal(tmp_path / "j", KEY)


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", KEY) as journal:
        with pytest.raises(OutputError, match="j: another run is writing it; wait for it to end"):
            Journal(tmp_path / "j", KEY)
        journal.record({"a": 1})
    Journal(tmp_path / "j", KEY).close()


def test_a_record_is_on_the_disk_when_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = []
    with Journal(tmp_path / "j", KEY) as journal:
        real = os.fdatasync

        def flush(descriptor: int) -> None:
            flushed.append((tmp_path / "j").read_bytes())
            real(descriptor)

        monkeypatch.setattr(os, "fdatasync", flush)
        journal.record({"a": 1})
        assert flushed[0].endswith(b'{"a":1}\n')


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:5]))
    with Journal(tmp_path / "j", KEY) as journal:
        journal.record({"a": "x" * 100})
    with Journal(tmp_path / "j", KEY) as journal:
        assert journal["a"] == "x" * 100
