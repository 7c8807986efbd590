"""Where bytes come from: a mapped file, or chunks as they arrive."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from ..errors import ArgumentTypeError, WireMalformed, WireTruncated

Buffer = bytes | bytearray | memoryview


class Source(Protocol):
    """A sequence of bytes that is read once, from front to back."""

    @property
    def offset(self) -> int:
        """Bytes taken so far."""
        ...

    def take(self, size: int, field: str) -> memoryview:
        """Return the next ``size`` bytes; ``WireTruncated`` naming ``field`` if there are fewer."""
        ...

    def expect_end(self) -> None:
        """Raise ``WireMalformed`` if anything is left."""
        ...


class MappedSource:
    """Bytes that lie in memory already: a mapped file. Nothing is copied.

    Parameters
    ----------
    data : memoryview
        All of them.
    """

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.offset = 0

    def take(self, size: int, field: str) -> memoryview:
        """Return a view of the next bytes."""
        left = len(self.data) - self.offset
        if size > left:
            raise WireTruncated(field, self.offset, f"expected {size} bytes, {left} are left")
        self.offset += size
        return self.data[self.offset - size : self.offset]

    def expect_end(self) -> None:
        """Raise if bytes follow."""
        left = len(self.data) - self.offset
        if left:
            raise WireMalformed("end", self.offset, f"expected no more bytes, {left} follow")


class ChunkSource:
    """Bytes from an iterable of chunks, however they are cut.

    Memory grows with what arrives, never with what a count promises.

    Parameters
    ----------
    chunks : iterable of bytes-like
        The chunks; empty ones are skipped.
    """

    def __init__(self, chunks: Iterable[Buffer]) -> None:
        self._chunks = iter(chunks)
        self._rest = memoryview(b"")
        self.offset = 0

    def take(self, size: int, field: str) -> memoryview:
        """Return the next bytes, joined where a chunk ends inside."""
        if size > len(self._rest):
            joined = bytearray(self._rest)
            while len(joined) < size:
                chunk = self._next()
                if chunk is None:
                    raise WireTruncated(
                        field,
                        self.offset,
                        f"expected {size} bytes, the stream ends {len(joined)} in",
                    )
                joined += chunk
            self._rest = memoryview(joined)
        taken, self._rest = self._rest[:size], self._rest[size:]
        self.offset += size
        return taken

    def expect_end(self) -> None:
        """Raise if bytes follow."""
        if len(self._rest) or self._next() is not None:
            raise WireMalformed("end", self.offset, "expected no more bytes, more follow")

    def _next(self) -> memoryview | None:
        """Return the next chunk that is not empty, None at the end."""
        for chunk in self._chunks:
            if not isinstance(chunk, bytes | bytearray | memoryview):
                raise ArgumentTypeError(f"chunks must be bytes, got {type(chunk).__name__}")
            flat = memoryview(chunk).cast("B")
            if len(flat):
                return flat
        return None
