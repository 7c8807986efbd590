"""What a serving system is asked to do: when requests arrive and how long they are.

Knows neither files (``traces``) nor distributions (``generator``), and no pages beyond their size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

#: Tokens named by one Mooncake hash id.
HASH_BLOCK_TOKENS = 512

_Scalar = TypeVar("_Scalar", bound=np.generic)


@dataclass(frozen=True, eq=False)
class Workload:
    """Requests as a struct of arrays, in order of arrival.

    Parameters
    ----------
    name : str
        Where the requests come from; printed with every figure.
    arrival : float64[n]
        Seconds since the first request; never decreasing.
    prompt_tokens, output_tokens : int64[n]
        Tokens a request brings and tokens generated for it, each at least 1.
    hash_ids : int64[m], optional
        Content ids of all prompts' 512-token blocks, request after request (Mooncake).
    hash_offsets : int64[n + 1], optional
        Request ``i`` owns ``hash_ids[hash_offsets[i]:hash_offsets[i + 1]]``.

    Raises
    ------
    ArgumentError
        If the arrays disagree in length or hold what a workload cannot.
    """

    name: str
    arrival: Float64
    prompt_tokens: Int64
    output_tokens: Int64
    hash_ids: Int64 | None = None
    hash_offsets: Int64 | None = None

    def __post_init__(self) -> None:
        arrival = _frozen(self.arrival, np.float64)
        prompt, output = (_frozen(x, np.int64) for x in (self.prompt_tokens, self.output_tokens))
        if arrival.ndim != 1 or not arrival.shape == prompt.shape == output.shape:
            raise ArgumentError(
                "arrival, prompt_tokens and output_tokens must be 1-D of one length, got shapes "
                f"{arrival.shape}, {prompt.shape} and {output.shape}"
            )
        if arrival.size == 0:
            raise ArgumentError(f"workload {self.name!r} has no requests")
        if not np.isfinite(arrival).all() or (np.diff(arrival) < 0).any() or arrival[0] < 0:
            raise ArgumentError("arrival must be finite, not negative and never decreasing")
        if prompt.min() < 1 or output.min() < 1:
            raise ArgumentError("every request needs at least 1 prompt and 1 output token")
        for name, array in (("arrival", arrival), ("prompt_tokens", prompt)):
            object.__setattr__(self, name, array)
        object.__setattr__(self, "output_tokens", output)

    def __len__(self) -> int:
        return int(self.arrival.size)

    @property
    def final_tokens(self) -> Int64:
        """Length of every request when it is complete, int64[n]."""
        return self.prompt_tokens + self.output_tokens

    @property
    def mean_resident_tokens(self) -> float:
        """Mean tokens a running request holds, weighted by the steps it runs.

        A request of ``p`` prompt and ``o`` output tokens holds ``p + o / 2`` on average for ``o``
        steps, so long outputs count more: ``sum(o * (p + o / 2)) / sum(o)``.
        """
        p, o = self.prompt_tokens.astype(np.float64), self.output_tokens.astype(np.float64)
        return float((o * (p + o / 2)).sum() / o.sum())

    def first(self, num_requests: int) -> Workload:
        """Return the first requests (all, if there are fewer)."""
        if num_requests < 1:
            raise ArgumentError(f"num_requests must be at least 1, got {num_requests}")
        hashes, offsets = self.hash_ids, self.hash_offsets
        if hashes is not None and offsets is not None:
            offsets = offsets[: num_requests + 1]
            hashes = hashes[: offsets[-1]]
        return Workload(
            self.name,
            self.arrival[:num_requests],
            self.prompt_tokens[:num_requests],
            self.output_tokens[:num_requests],
            hashes,
            offsets,
        )

    def at_rate(self, requests_per_second: float) -> Workload:
        """Return the same requests with arrival times stretched to another mean rate.

        Parameters
        ----------
        requests_per_second : float
            The new mean rate, ``(n - 1) / last arrival``; infinity puts every arrival at 0.
        """
        if not requests_per_second > 0:
            raise ArgumentError(f"requests_per_second must be positive, got {requests_per_second}")
        span = float(self.arrival[-1])
        factor = (len(self) - 1) / requests_per_second / span if span else 1.0
        return replace(self, arrival=self.arrival * factor)

    def block_keys(self, index: int, page_size: int) -> list[bytes] | None:
        """Return the keys of a prompt's whole pages, None if its content is not known.

        A page is a part of a block of ``HASH_BLOCK_TOKENS``. The id of a block stands for all its
        tokens, so the parts of a last, partial block are named by it as well.

        Parameters
        ----------
        index : int
            The request.
        page_size : int
            Tokens of a page; divides ``HASH_BLOCK_TOKENS``.
        """
        if self.hash_ids is None or self.hash_offsets is None:
            return None
        parts, rest = divmod(HASH_BLOCK_TOKENS, page_size)
        if rest:
            raise ArgumentError(
                f"blocks of {HASH_BLOCK_TOKENS} tokens do not divide into pages of {page_size}"
            )
        blocks = self.hash_ids[self.hash_offsets[index] : self.hash_offsets[index + 1]]
        whole = int(self.prompt_tokens[index]) // page_size
        # Ids are below 2**63, so that a key needs its nine bytes.
        return [
            (block * parts + part).to_bytes(9, "little")
            for block in blocks.tolist()
            for part in range(parts)
        ][:whole]

    @property
    def rate(self) -> float:
        """Mean arrivals per second; infinity if all requests arrive at once."""
        span = float(self.arrival[-1])
        return (len(self) - 1) / span if span else float("inf")


def page_utilisation(workload: Workload, page_size: int) -> float:
    """Return the share of allocated slots that hold a token once every request is complete.

    ``sum(tokens) / sum(ceil(tokens / page_size) * page_size)``: the waste that remains is the
    partly filled last page of each request.

    Parameters
    ----------
    workload : Workload
        Requests at their final length.
    page_size : int
        Tokens in a page.
    """
    if page_size < 1:
        raise ArgumentError(f"page_size must be at least 1, got {page_size}")
    tokens = workload.final_tokens
    return float(tokens.sum() / (-(-tokens // page_size) * page_size).sum())


def length_statistics(
    tokens: Int64, percentiles: Iterable[float] = (50, 99)
) -> dict[str, float | int]:
    """Return the mean, some percentiles (linear interpolation) and the maximum of lengths."""
    figures: dict[str, float | int] = {"mean": float(tokens.mean())}
    figures |= {f"p{p:g}": float(np.percentile(tokens, p)) for p in percentiles}
    return figures | {"max": int(tokens.max())}


def _frozen(array: npt.ArrayLike, dtype: type[_Scalar]) -> npt.NDArray[Any]:
    # A private copy that cannot be written: a workload is shared by the runs of many formats.
    copy = np.array(array, dtype=dtype)
    copy.setflags(write=False)
    return copy
