"""What one rendering of a chat template may spend: processor time and memory.

A template comes with a model file, so it is code from outside. The renderer reports every loop turn, call, comparison
and piece of output here, and asks before it makes anything whose size the template controls. Nothing in this module
knows templates. The engine process with its own limits is the outer wall.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

# Templates of real models take 0.05 to 0.4 ms per message. What a hostile one can take is the flat part, and what one
# operation between two looks at the clock takes: together under half a second.
CPU_S = 0.25
CPU_S_PER_MESSAGE = 0.0005
# Bytes made over the whole rendering, not bytes alive: a template copies content about five times on its way out.
MEMORY_BYTES = 40 * 1024 * 1024
MEMORY_PER_INPUT_BYTE = 16

_STEPS_BETWEEN_CLOCKS = 32
_BYTES_PER_STEP = 4096
_SLOT_BYTES = 16
_SCALARS = (str, int, float, bool, type(None))


class BudgetExceeded(Exception):
    """The template asked for more time or memory than a rendering may have."""


class Budget:
    """Allowance of one rendering; every method raises BudgetExceeded when it is used up."""

    __slots__ = ("_bytes_left", "_cpu_end", "_steps_left", "textless")

    def __init__(self, *, messages: int = 0, input_bytes: int = 0, textless: tuple[type, ...] = ()) -> None:
        """`textless` are types whose values have an empty text form."""
        self.textless = textless
        self._bytes_left = MEMORY_BYTES + MEMORY_PER_INPUT_BYTE * input_bytes
        # CPU time of this thread: a busy machine must not turn an honest template into a refusal.
        self._cpu_end = time.thread_time() + CPU_S + CPU_S_PER_MESSAGE * messages
        self._steps_left = _STEPS_BETWEEN_CLOCKS

    def tick(self, steps: int = 1) -> None:
        """Count work; looks at the clock now and then."""
        self._steps_left -= steps
        if self._steps_left < 0:
            self._steps_left = _STEPS_BETWEEN_CLOCKS
            if time.thread_time() > self._cpu_end:
                raise BudgetExceeded

    def need(self, size_bytes: int) -> None:
        """Ask for memory that an operation may take at most, without counting it."""
        if size_bytes > self._bytes_left:
            raise BudgetExceeded

    def charge(self, size_bytes: int) -> None:
        """Count memory that is about to be made, or has just been made."""
        self._bytes_left -= size_bytes
        if self._bytes_left < 0:
            raise BudgetExceeded
        self.tick(1 + size_bytes // _BYTES_PER_STEP)

    def charge_value(self, value: object) -> None:
        """Count a value that an operation returned, one level deep."""
        if isinstance(value, str):
            self.charge(sys.getsizeof(value))
        elif isinstance(value, list | tuple | dict):
            self.charge(_SLOT_BYTES * len(value))
        else:
            self.tick()

    def charge_text(self, value: object) -> int:
        """Count the text form of a value before it is made; returns its size in bytes, roughly.

        Shared parts count each time they would be written or compared, so nested containers cannot multiply unseen.
        Raises TypeError for anything but plain data: only that has a text form with a known size.
        """
        if isinstance(value, str):
            size = sys.getsizeof(value)
            self.charge(size)
            return size
        total = 0
        stack = [value]
        while stack:
            item = stack.pop()
            size = _SLOT_BYTES
            if isinstance(item, str):
                size = sys.getsizeof(item)
            elif isinstance(item, Mapping):
                size += 2 * _SLOT_BYTES * len(item)
                stack.extend(item.keys())
                stack.extend(item.values())
            elif isinstance(item, list | tuple):
                size += _SLOT_BYTES * len(item)
                stack.extend(item)
            elif isinstance(item, int):
                size += item.bit_length() // 3
            elif not (item is None or isinstance(item, (float, range, *self.textless))):
                raise TypeError("only plain data has a text form")
            self.charge(size)
            total += size
        return total


def is_scalar(value: object) -> bool:
    """Whether comparing, hashing and writing the value costs no more than its own length."""
    return isinstance(value, _SCALARS)
