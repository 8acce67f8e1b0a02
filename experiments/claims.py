"""Who works on which cell: one log a cell, on a file system that all workers share.

The log of a cell is a folder with the files 1.json, 2.json, ... Each is one entry: claimed, released, failed, retried
or done. An entry is written whole under another name and then linked to the next free number. `link` fails where the
name exists, for all but one writer, on NFS too. So every change of state is a contest for one number, made on the
ground of the entry before it, and no lock, no deletion and no comparison of two machines' clocks is needed:

- Two takers of one free or expired cell contend for the same number: one wins.
- A holder that finishes contends with those who think it dead. Either its outcome is the next entry, and no taker can
  follow, or a taker's claim is, and its outcome cannot be written: a result that came too late drops out by itself.
- Whoever wins a claim knows that the entry before it was the last, thus that the cell was not done.
- An entry that a stale directory listing hides is met when its number is contended for.

What the log cannot do is stop a process. A holder kills its driver when it sees that it lost the claim, or when it
could not renew it for most of the timeout, which comes before others may take it.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

WAITING, CLAIMED, RELEASED, FAILED, RETRIED, DONE = "waiting", "claimed", "released", "failed", "retried", "done"


class Entry(NamedTuple):
    """The last word on a cell; number 0 and WAITING where nothing was said yet.

    Attributes:
      worker: host, process and a random part, of who wrote it.
      error: why the driver failed.
      timeout: of a claim: seconds without renewal after which others may take it.
      modified: seconds of the file system's clock, when a claim was last renewed.
    """

    number: int = 0
    state: str = WAITING
    worker: str = ""
    error: str = ""
    timeout: float = 0.0
    modified: float = 0.0

    @property
    def has_outcome(self) -> bool:
        """Whether the cell is done or failed."""
        return self.state in (DONE, FAILED)


def read(folder: Path) -> Entry:
    """The last entry of a log."""
    number = max((int(path.stem) for path in folder.glob("[0-9]*.json")), default=0)
    if not number:
        return Entry()
    # opening makes NFS ask the server, where a bare stat may answer from a cache as old as a minute
    with (folder / f"{number}.json").open() as file:
        modified = os.fstat(file.fileno()).st_mtime
        return Entry(number, modified=modified, **json.load(file))


def publish(path: Path, content: Any) -> bool:
    """Writes a JSON file whole and once; returns False, and changes nothing, where another writer was first.

    Raises:
      ValueError: where the file system cannot be written or has no hard links.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix="part-") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)
            try:
                os.link(file.name, path)
            except FileExistsError:
                # where the answer of an NFS server was lost, the second try meets the first one's link
                return os.fstat(file.fileno()).st_nlink > 1
    except OSError as error:
        raise ValueError(f"workdir: wanted a place to write and link, got {path.parent} ({error.strerror})") from error
    return True


def append(folder: Path, number: int, **content: Any) -> bool:
    """Writes entry `number` of a log, as `publish` does."""
    return publish(folder / f"{number}.json", content)


def age(folder: Path, entry: Entry) -> float:
    """Seconds since a claim was renewed, both ends by the file system's clock."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="clock-") as file:
        os.utime(file.fileno())
        return os.fstat(file.fileno()).st_mtime - entry.modified


def is_held(folder: Path, entry: Entry) -> bool:
    """Whether somebody claimed the cell and still renews the claim."""
    return entry.state == CLAIMED and age(folder, entry) <= entry.timeout


def take(folder: Path, worker: str, timeout: float) -> Claim | None:
    """Claims a cell; None where it has an outcome, is held, or another taker was first.

    Args:
      timeout: seconds without renewal after which others may take the cell.
    """
    last = read(folder)
    if last.has_outcome or is_held(folder, last):
        return None
    claim = Claim(folder, last.number + 1, worker, timeout)
    won = append(folder, claim.number, state=CLAIMED, worker=worker, timeout=timeout)
    return claim if won else None


class Claim:
    """A claim that was won; inside `with`, a thread renews it."""

    def __init__(self, folder: Path, number: int, worker: str, timeout: float):
        self.folder, self.number, self.worker, self.timeout = folder, number, worker, timeout
        self._taken_over = False
        self._renewed = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> Claim:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()  # without joining: the file system may hang, and a renewal that comes late does no harm

    @property
    def is_lost(self) -> bool:
        """Whether another worker took the cell, or may soon because this one could not renew its claim."""
        return self._taken_over or time.monotonic() - self._renewed > 0.75 * self.timeout

    def finish(self, state: str, error: str = "") -> bool:
        """Writes what became of the cell; returns False where another worker took it before."""
        return append(self.folder, self.number + 1, state=state, worker=self.worker, error=error)

    def _keep(self) -> None:
        while not self._ended.wait(self.timeout / 4):
            start = time.monotonic()  # before the renewal: others count from it or from later
            try:
                os.utime(self.folder / f"{self.number}.json")
                self._taken_over = (self.folder / f"{self.number + 1}.json").exists()
            except OSError:
                continue  # not renewed; `is_lost` tells when that has lasted too long
            if self._taken_over:
                return
            self._renewed = start


def retry(folder: Path, worker: str) -> bool:
    """Makes a failed cell one that can be taken again; returns whether this call did."""
    last = read(folder)
    return last.state == FAILED and append(folder, last.number + 1, state=RETRIED, worker=worker)
