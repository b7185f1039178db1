"""How large the parts of a multipart upload are, so that 10,000 of them are enough and memory stays small.

S3 takes at most 10,000 parts, each but the last of 5 MiB to 5 GiB (Amazon S3 user guide, "multipart upload limits").
A body of known size gets parts that fit it: beyond what can be held in memory they are relayed to the store while they
arrive. A body of unknown size cannot be relayed, as a request for a part must say its length first: its parts grow in
steps up to what may be held, which bounds how long such a body can be.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.errors import TooLargeError

MIB = 1 << 20
MAX_PARTS = 10_000
SMALLEST_PART = 5 * MIB
LARGEST_PART = 5 * 1024 * MIB


@dataclass(frozen=True, slots=True)
class PartPlan:
    """Sizes of the parts of one body, in bytes: `part_bytes` at first, at most `held_bytes` of them in memory."""

    part_bytes: int
    held_bytes: int
    total: int | None = None
    max_parts: int = MAX_PARTS

    def __post_init__(self) -> None:
        if not 0 < self.part_bytes <= self.held_bytes:
            raise ValueError("a part must fit into the memory of an upload")

    def size(self, number: int) -> int:
        """Size of part `number` (from 1); of the last part the most that it can be.

        Raises:
            TooLargeError: the store takes no such part.
        """
        if number > self.max_parts:
            raise TooLargeError(
                f"a body of undeclared size may have {self.longest_unknown()} bytes: declare its size"
                if self.total is None
                else f"{self.total} bytes do not fit into {self.max_parts} parts"
            )
        if self.total is None:
            return self._grown(number)
        fitting = -(-self.total // self.max_parts)
        rounded = -(-fitting // MIB) * MIB
        size = max(self.part_bytes, min(rounded, LARGEST_PART))
        return max(1, min(size, self.total - (number - 1) * size))

    def relayed(self, number: int) -> bool:
        """Whether part `number` is too large to be held in memory."""
        return self.size(number) > self.held_bytes

    def longest_unknown(self) -> int:
        """Most bytes that a body of undeclared size may have."""
        return sum(self._grown(number) for number in range(1, self.max_parts + 1))

    def _grown(self, number: int) -> int:
        tenths = 10 * (number - 1) // self.max_parts
        doublings = 0 if tenths < 1 else 1 if tenths < 2 else 2 if tenths < 4 else 3
        return min(self.part_bytes << doublings, self.held_bytes)
