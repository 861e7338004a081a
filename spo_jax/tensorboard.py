"""TensorBoard event files, written without a thread: whoever logs hears of a full disk.

`tensorboardX.SummaryWriter` writes from a thread of its own, which an error ends; from then on
its queue fills up, and whoever logs waits. Its records and messages are used here directly.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class EventFile:
  """One new event file of a directory.

  Args:
    purge_step: TensorBoard hides what older files of the directory say from this step on.
  Raises: ImportError where tensorboardX is not installed.
  """

  def __init__(self, directory: Path, purge_step: int | None = None):
    from tensorboardX import record_writer
    from tensorboardX.proto.event_pb2 import SessionLog

    directory.mkdir(parents=True, exist_ok=True)
    # TensorBoard reads the files of a directory in the order of their names.
    name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
    record_writer.register_writer_factory(_UNBUFFERED, _Unbuffered())
    self._records = record_writer.RecordWriter(f"{_UNBUFFERED}:{directory / name}")
    self._add(file_version="brain.Event:2")
    if purge_step is not None:
      self._add(step=purge_step, session_log=SessionLog(status=SessionLog.START))

  def add_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """Appends the figures of one step."""
    from tensorboardX.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=name, simple_value=x) for name, x in scalars.items()]
    self._add(step=step, summary=Summary(value=values))

  def close(self) -> None:
    self._records.close()

  def _add(self, **event: Any) -> None:
    from tensorboardX.proto.event_pb2 import Event

    self._records.write(Event(wall_time=time.time(), **event).SerializeToString())


_UNBUFFERED = "unbuffered"


class _Unbuffered:
  """How tensorboardX opens a path: without a buffer, which would try again when it is closed."""

  def open(self, path: str) -> Any:
    return open(path.removeprefix(f"{_UNBUFFERED}:"), "xb", buffering=0)
