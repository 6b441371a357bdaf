import os
import subprocess
import sys
import textwrap

import pytest

from ftray.core.errors import TuneError
from ftray.tune.journal import Journal, encode, read

RECORDS = [
    {"kind": "open", "n": 1},
    {"kind": "start", "text": "Grüße\n\r"},
    {"kind": "commit", "score": 0.1 + 0.2},
]


def write(path, records=RECORDS):
    with Journal(path) as journal:
        for record in records:
            journal.append(record)
    return path.read_bytes()


def test_what_was_appended_is_read_back_and_kept(tmp_path):
    path = tmp_path / "journal.jsonl"
    write(path)
    assert read(path) == RECORDS
    with Journal(path) as journal:
        assert journal.records == RECORDS and journal.torn_bytes == 0
        journal.append({"kind": "more"})
    assert read(path) == [*RECORDS, {"kind": "more"}]


def test_cut_at_every_byte_keeps_the_whole_records_and_can_be_continued(tmp_path):
    data = write(tmp_path / "whole.jsonl")
    ends = [0]
    for record in RECORDS:
        ends.append(ends[-1] + len(encode(record)))
    assert ends[-1] == len(data)
    path = tmp_path / "journal.jsonl"
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        whole = sum(1 for end in ends[1:] if end <= size)
        with Journal(path) as journal:
            assert journal.records == RECORDS[:whole]
            assert journal.torn_bytes == size - ends[whole]
            journal.append({"kind": "after"})
        assert read(path) == [*RECORDS[:whole], {"kind": "after"}]


def test_damage_to_any_byte_stops_the_search_and_changes_nothing(tmp_path):
    path = tmp_path / "journal.jsonl"
    data = write(path)
    for position in range(len(data) - 1):
        damaged = bytearray(data)
        damaged[position] ^= 0x15
        path.write_bytes(damaged)
        with pytest.raises(TuneError, match="damaged"):
            Journal(path)
        assert path.read_bytes() == bytes(damaged)


def test_a_second_driver_is_refused_in_one_line_and_admitted_after_the_first_is_killed(tmp_path):
    path = tmp_path / "journal.jsonl"
    script = textwrap.dedent(
        """
        import pathlib, sys, time
        from ftray.tune.journal import Journal
        journal = Journal(pathlib.Path(sys.argv[1]))
        journal.append({"kind": "open"})
        print("held", flush=True)
        time.sleep(60)
        """
    )
    holder = subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(TuneError, match="another driver") as caught:
            Journal(path)
        assert "\n" not in str(caught.value)
    finally:
        holder.kill()
        holder.wait()
    with Journal(path) as journal:
        assert journal.records == [{"kind": "open"}]


def test_a_full_disk_leaves_no_torn_record(tmp_path, monkeypatch):
    path = tmp_path / "journal.jsonl"
    real = os.write
    with Journal(path) as journal:
        journal.append(RECORDS[0])
        monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[: len(data) // 2]))
        with pytest.raises(TuneError, match="disk is full"):
            journal.append(RECORDS[1])
        monkeypatch.undo()
        journal.append(RECORDS[2])
    assert read(path) == [RECORDS[0], RECORDS[2]]


def test_a_disk_that_takes_no_more_leaves_the_journal_whole(tmp_path):
    """In a process that may write no larger files, which the kernel tells it by a short write and then EFBIG."""
    path = tmp_path / "journal.jsonl"
    script = textwrap.dedent(
        """
        import pathlib, resource, signal, sys
        from ftray.core.errors import TuneError
        from ftray.tune.journal import Journal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        journal = Journal(pathlib.Path(sys.argv[1]))
        try:
            while True:
                journal.append({"kind": "start", "number": len(journal.records)})
        except TuneError as error:
            print(len(journal.records), error)
        """
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    count, _, message = done.stdout.partition(" ")
    assert "cannot be written" in message and "--resume" in message and message.count("\n") == 1
    with Journal(path) as journal:
        assert journal.torn_bytes == 0 and len(journal.records) == int(count) > 50


def test_no_journal(tmp_path):
    with pytest.raises(TuneError, match="no such journal"):
        read(tmp_path / "journal.jsonl")
