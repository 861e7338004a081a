"""TensorBoard event files, written without a thread: whoever logs hears of a full disk.

The format: records of a length u64, its checksum u32, a message and its checksum u32; the
messages are protocol buffers (tensorflow's event.proto), of which scalars need very little.
"""

from __future__ import annotations

import functools
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path


class EventFile:
  """One new event file of a directory.

  Args:
    purge_step: TensorBoard hides what older files of the directory say from this step on.
  """

  def __init__(self, directory: Path, purge_step: int | None = None):
    directory.mkdir(parents=True, exist_ok=True)
    # TensorBoard reads the files of a directory in the order of their names.
    name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
    self._file = (directory / name).open("xb", buffering=0)
    self._add(_bytes(3, b"brain.Event:2"))
    if purge_step is not None:
      session_start = _varint(1, 1)
      self._add(_varint(2, purge_step) + _bytes(7, session_start))

  def add_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """Appends the figures of one step."""
    values = (_bytes(1, name.encode()) + _fixed(2, "f", x) for name, x in scalars.items())
    summary = b"".join(_bytes(1, value) for value in values)
    self._add(_varint(2, step) + _bytes(5, summary))

  def close(self) -> None:
    self._file.close()

  def _add(self, event: bytes) -> None:
    message = _fixed(1, "d", time.time()) + event
    length = struct.pack("<Q", len(message))
    left = memoryview(length + _checksum(length) + message + _checksum(message))
    while left:  # the last free bytes of a disk take a part
      left = left[self._file.write(left) :]


def _varint(field: int, value: int) -> bytes:
  return bytes([field << 3]) + _base128(value)


def _fixed(field: int, kind: str, value: float) -> bytes:
  return bytes([field << 3 | {"d": 1, "f": 5}[kind]]) + struct.pack(f"<{kind}", value)


def _bytes(field: int, value: bytes) -> bytes:
  return bytes([field << 3 | 2]) + _base128(len(value)) + value


def _base128(value: int) -> bytes:
  """Seven bits a byte, lowest first; the eighth says that more follow."""
  digits = bytearray()
  while value > 127:
    digits.append(value & 127 | 128)
    value >>= 7
  return bytes([*digits, value])


@functools.cache
def _crc_table() -> tuple[int, ...]:
  table = []
  for value in range(256):
    for _ in range(8):
      value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    table.append(value)
  return tuple(table)


def _checksum(data: bytes) -> bytes:
  """CRC-32C, masked as the format wants it."""
  table, crc = _crc_table(), 0xFFFFFFFF
  for byte in data:
    crc = crc >> 8 ^ table[(crc ^ byte) & 255]
  crc ^= 0xFFFFFFFF
  return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
