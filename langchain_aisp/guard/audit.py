"""A log of decisions: one line of JSON each, on the disk before the answer goes out, whoever else is writing."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SCHEMA = 1
"""Version of the records' form; it rises when a key changes its meaning or goes."""

_OWNER_ONLY = 0o600


@dataclass(frozen=True)
class AuditLog:
    """An append-only file that survives crashes, threads and other processes; POSIX only, on a local disk.

    Every record is synced to the disk by itself. A new file is for its owner alone; the permissions of one that is
    there stay as they are. A line that a crash tore is moved to ``PATH.torn`` at the next opening or writing.

    Attributes:
        path: The file; its folder must exist.
        texts: Log what was said; False logs SHA-256 hashes, which hide short texts from nobody who can guess them.

    Raises:
        OSError: At construction, when the file cannot be opened for reading and writing.
    """

    path: str | Path
    texts: bool = False

    def __post_init__(self) -> None:
        """Open once, so that a path that cannot be written fails now, and mend what a crash left."""
        with self._locked():
            _sync_folder(Path(self.path).parent)

    def quote(self, text: str) -> str:
        """A text as it stands in the log: itself or its hash."""
        return text if self.texts else "sha256:" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record, with the schema's version and the time; it is on the disk when this returns.

        Raises:
            OSError: When it is not.
        """
        line = json.dumps({"schema": SCHEMA, "time": datetime.now(UTC).isoformat(), **record}).encode() + b"\n"
        with self._locked() as file:
            written = os.write(file, line)
            if written != len(line):
                raise OSError(f"only {written} of {len(line)} bytes went to {self.path}; is the disk full?")
            os.fsync(file)

    def read(self) -> Iterator[dict[str, Any]]:
        """Every whole record, oldest first."""
        with Path(self.path).open("rb") as lines:
            yield from (json.loads(line) for line in lines if line.endswith(b"\n"))

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The file, mended and ours alone: every opening has a lock of its own, so threads wait for each other too."""
        import fcntl

        file = self._open()
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._mend(file)
            yield file
        finally:
            os.close(file)

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, _OWNER_ONLY)
        except OSError as error:
            remedy = "an audit log needs a folder that exists, and a file there that may be read and written"
            raise type(error)(error.errno, f"{error.strerror}; {remedy}", str(self.path)) from error

    def _mend(self, file: int) -> None:
        """Move what stands behind the last line's end aside."""
        size = os.fstat(file).st_size
        if size == 0 or os.pread(file, 1, size - 1) == b"\n":
            return
        with mmap.mmap(file, size, access=mmap.ACCESS_READ) as lines:
            whole = lines.rfind(b"\n") + 1
            rest = lines[whole:]
        torn = os.open(f"{self.path}.torn", os.O_WRONLY | os.O_APPEND | os.O_CREAT, _OWNER_ONLY)
        try:
            os.write(torn, rest + b"\n")
            os.fsync(torn)
        finally:
            os.close(torn)
        os.ftruncate(file, whole)


def _sync_folder(path: Path) -> None:
    """Make the names in a folder last: a file that is new may otherwise be gone after a crash."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
