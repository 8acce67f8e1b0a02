"""Several hosts: JAX processes that each take a range of the examples and sweep it on their own devices.

Nothing is exchanged during a sweep. Hosts meet where they agree on what they do, and where their losses are gathered.
With one process every function here is trivial.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def connect(coordinator: str | None, num_hosts: int | None, host: int | None, timeout: int = 300) -> None:
    """Joins this process to the others; to be called before anything else of JAX.

    Where the coordinator or another host does not come within `timeout` seconds, the process ends with one line and
    exit code 1: JAX's own waiting cannot be interrupted, and ends in an abort.

    Args:
      coordinator: "address:port" of host 0; found out by JAX on TPU pods, SLURM and GKE where None.
      num_hosts, host: how many there are and which this is; found out likewise.

    Raises:
      ValueError: where JAX can find out neither.
    """

    def give_up() -> None:
        who = f"host {host} of {num_hosts}" if host is not None else "this host"
        where = coordinator or "the coordinator that JAX found"
        print(f"error: coordinator: {where} and all hosts did not come within {timeout} s ({who})", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)

    watchdog = threading.Timer(timeout, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        jax.distributed.initialize(coordinator, num_hosts, host, initialization_timeout=timeout + 60)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"distributed: JAX cannot join the hosts ({' '.join(str(error).split())[:200]})") from error
    finally:
        watchdog.cancel()


def count() -> int:
    """Number of hosts."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this host is the one that writes what all of them found."""
    return jax.process_index() == 0


def host_range(count: int) -> slice:
    """This host's range of `count` examples; all but the last hosts have equally many, the last perhaps none."""
    size = range_size(count)
    start = min(jax.process_index() * size, count)
    return slice(start, min(start + size, count))


def range_size(count: int) -> int:
    """Examples of a host."""
    return -(-count // jax.process_count())


def gather(part: np.ndarray, count: int, axis: int = 0) -> np.ndarray:
    """All hosts' ranges of an array whose `axis` counts `count` examples, joined, on every host."""
    if jax.process_count() == 1:
        return part
    padding = [(0, 0)] * part.ndim
    padding[axis] = (0, range_size(count) - part.shape[axis])
    parts = multihost_utils.process_allgather(np.pad(part, padding))
    return np.take(np.concatenate(list(parts), axis=axis), np.arange(count), axis=axis)


def barrier(name: str) -> None:
    """Waits for all hosts."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def first(text: str) -> str:
    """The text of host 0, on all."""
    return everywhere(text)[0]


def agree(name: str, settings: dict[str, Any]) -> None:
    """Raises ValueError on every host unless all have the same settings, which must survive JSON; names the others."""
    all_settings = [json.loads(text) for text in everywhere(json.dumps(settings))]
    different = [
        f"{key} is {', '.join(f'{one.get(key)} on host {host}' for host, one in enumerate(all_settings))}"
        for key in sorted({key for one in all_settings for key in one})
        if any(one.get(key) != all_settings[0].get(key) for one in all_settings)
    ]
    if different:
        raise ValueError(f"{name}: hosts disagree: {'; '.join(different)}")


def everywhere(text: str) -> list[str]:
    """Every host's text, on all."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    padded = multihost_utils.process_allgather(np.pad(data, (0, int(lengths.max()) - len(data))))
    return [bytes(row[:length]).decode() for row, length in zip(padded, lengths, strict=True)]
