"""A log of decisions: one line of JSON each, on the disk before the answer goes out, whoever else is writing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class AuditLog:
    """An append-only file that survives crashes, threads and other processes; POSIX only, on a local disk.

    A line that a crash tore is moved to ``PATH.torn`` at the next opening or writing.

    Attributes:
        path: The file; its folder must exist.
        texts: Log what was said; False logs SHA-256 hashes, which hide short texts from nobody who can guess them.
    """

    path: str | Path
    texts: bool = False

    def __post_init__(self) -> None:
        """Open once, so that a path that cannot be written fails now, and mend what a crash left."""
        with self._locked():
            pass

    def write(self, record: Mapping[str, Any], texts: Mapping[str, str | None]) -> None:
        """Append a record with the time and the texts or their hashes."""
        shown = {key: text if self.texts or text is None else _hash(text) for key, text in texts.items()}
        line = json.dumps({"time": datetime.now(UTC).isoformat(), **record, **shown}).encode() + b"\n"
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

        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._mend(file)
            yield file
        finally:
            os.close(file)

    def _mend(self, file: int) -> None:
        """Move what stands behind the last line's end aside."""
        size = os.fstat(file).st_size
        if size == 0 or os.pread(file, 1, size - 1) == b"\n":
            return
        whole = Path(self.path).read_bytes().rfind(b"\n") + 1
        with Path(f"{self.path}.torn").open("ab") as torn:
            torn.write(os.pread(file, size - whole, whole) + b"\n")
            torn.flush()
            os.fsync(torn.fileno())
        os.ftruncate(file, whole)


def _hash(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
