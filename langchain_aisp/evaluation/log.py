"""A file of finished runs, one JSON line each, that survives being killed at any moment.

The first line pins what was asked, so that a file never mixes runs that cannot be compared. A line counts once its line
break is on the disk; whatever follows the last line break was being written when the process died, and is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

from langchain_aisp.types import require

FORMAT = 1
"""Rises when the lines change so much that old files cannot be read."""

Line: TypeAlias = dict[str, Any]
Key: TypeAlias = tuple[str, str, int]
"""Method, prompt and seed of a run."""


class RunLog:
    """Appends runs to a file and knows which ones it holds."""

    def __init__(self, path: str | Path, config: Mapping[str, Any]) -> None:
        """Begin a file, or go on with one that was begun with the same configuration.

        Args:
            path: The file; folders are made.
            config: What is evaluated, as JSON.

        Raises:
            ValueError: The file was begun with another configuration, or is no file of runs.
        """
        self.path = Path(path)
        self.done: set[Key] = set()
        self._header = _encoded({"kind": "header", "format": FORMAT, "config": config})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._is_begun():
            self._check(config)
            self.done = {key_of(line) for line in read_log(self.path)[1] if line["kind"] == "run"}
            os.truncate(self.path, sum(map(len, _whole_lines(self.path))))
        else:
            self.path.write_bytes(b"")
        self._file = self.path.open("ab")
        if self._file.tell() == 0:
            self._write(self._header)

    def append(self, kind: str, content: Mapping[str, Any]) -> None:
        """Write a line and wait until it is on the disk."""
        self._write(_encoded({"kind": kind, **content}))
        if kind == "run":
            self.done.add(key_of(content))

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def __enter__(self) -> Self:
        """Close the file when the scope ends."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()

    def _is_begun(self) -> bool:
        """Whether there is a whole first line; half of one is begun anew, another file's content is not touched."""
        if not self.path.exists():
            return False
        if next(_whole_lines(self.path), None) is not None:
            return True
        content = self.path.read_bytes()
        require(self._header.startswith(content), f"{self.path} is no file of runs; write to another one")
        return False

    def _check(self, config: Mapping[str, Any]) -> None:
        wanted, found = json.loads(_encoded(dict(config))), read_log(self.path)[0]
        unlike = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
        told = "; ".join(f"{key} was {found.get(key)!r} and is {wanted.get(key)!r}" for key in unlike)
        require(
            not unlike,
            f"{self.path} was begun with another configuration: {told}. Ask for the same again to go on with it, or "
            "write to another file; a report can read several",
        )

    def _write(self, line: bytes) -> None:
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())


def read_log(path: str | Path) -> tuple[Line, Iterator[Line]]:
    """The configuration of a file of runs, and its other lines one after the other; half a last line is left out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no file of runs, or of a format that this version does not read; while iterating, a line that
            is no JSON, or a run that is there twice.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there are no runs at {path}; langchain-aisp eval --out {path.name} makes such a file")
    lines = _whole_lines(path)
    try:
        header = json.loads(next(lines, b""))
        found, config = header["format"], header["config"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no file of runs: its first line should be a header with the settings") from error
    require(found == FORMAT, f"{path} has the format {found}, this version reads {FORMAT}; evaluate anew")
    return config, _parsed(lines, path)


def key_of(run: Mapping[str, Any]) -> Key:
    """What names a run within its file."""
    return run["method"], run["prompt"], run["seed"]


def _parsed(lines: Iterator[bytes], path: Path) -> Iterator[Line]:
    seen: set[Key] = set()
    for number, line in enumerate(lines, start=2):
        try:
            content = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} of {path} is no JSON: {error}; was the file edited?") from error
        if content["kind"] == "run":
            key = key_of(content)
            require(key not in seen, f"{path} holds the run {key} twice; did two processes write to it?")
            seen.add(key)
        yield content


def _whole_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))


def _encoded(content: Line) -> bytes:
    return json.dumps(content, ensure_ascii=False, allow_nan=False).encode() + b"\n"
