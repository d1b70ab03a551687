"""Lines of a log that is written, and replaced, while somebody follows it."""

from __future__ import annotations

import logging
import logging.handlers
from pathlib import Path

from shardlift.client.follow import Follower


def test_whole_lines_from_now_on(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    follower = Follower(path)
    assert follower.lines() == []
    with path.open("a") as file:
        file.write("one\ntw")
        file.flush()
        assert follower.lines() == ["one"]
        assert follower.lines() == []
        file.write("o\n")
    assert follower.lines() == ["two"]
    with path.open("ab") as file:
        file.write(b"\xff\n")
    assert follower.lines() == ["\ufffd"]


def test_a_file_that_is_not_there_yet(tmp_path: Path) -> None:
    follower = Follower(tmp_path / "log")
    assert follower.lines() == []
    (tmp_path / "log").write_text("first\n")
    assert follower.lines() == ["first"]
    (tmp_path / "log").unlink()
    assert follower.lines() == []


def test_no_line_is_lost_when_the_log_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "log"
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=100, backupCount=1)
    follower = Follower(path)
    got: list[str] = []
    written = [f"line {number:03}" for number in range(60)]
    for number, line in enumerate(written):
        handler.emit(logging.LogRecord("x", logging.INFO, "", 0, line, None, None))
        if number % 3 == 0:
            got += follower.lines()
    handler.close()
    assert got + follower.lines() == written
    path.write_text("cut\n")
    assert follower.lines() == ["cut"], "one that is shorter than before is read from its beginning"
