"""Records into chunks: what is fetched by one request and held together. Pure."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

from .records import TensorRecord

CHUNK_BYTES = 32 << 20
WASTE_DIVISOR = 100  # gaps fetched along are at most 1/100 of the needed bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """The bytes [start, end) of a file, fetched and held together, and the records in them, in the consumer's order."""

    file: str
    start: int
    end: int
    records: tuple[TensorRecord, ...]

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


def plan_chunks(
    records: Sequence[TensorRecord],
    *,
    chunk_bytes: int = CHUNK_BYTES,
    max_gap_bytes: int = 0,
    alone: Container[str] = (),
) -> list[Chunk]:
    """The chunks that bring `records`, in order.

    Neighbours in the order that are neighbours in a file too, with at most `max_gap_bytes` between them, share a chunk
    of at most `chunk_bytes`; all gaps together are at most 1 % of the needed bytes. A larger record is a chunk alone,
    and so is one whose key is in `alone`: its memory can then be kept without keeping that of others.
    """
    gap_budget = sum(record.size_bytes for record in records) // WASTE_DIVISOR
    chunks: list[Chunk] = []
    members: list[TensorRecord] = []

    def flush() -> None:
        if members:
            first, last = members[0], members[-1]
            chunks.append(Chunk(file=first.file, start=first.start, end=last.end, records=tuple(members)))
            members.clear()

    for record in records:
        if members and (record.key in alone or members[-1].key in alone):
            flush()
        if members:
            gap = record.start - members[-1].end
            fits = record.end - members[0].start <= chunk_bytes
            if record.file == members[0].file and 0 <= gap <= min(max_gap_bytes, gap_budget) and fits:
                gap_budget -= gap
            else:
                flush()
        members.append(record)
    flush()
    return chunks
