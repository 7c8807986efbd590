"""A seeded workload with the statistics of one hour of real conversations.

Fitted to the Azure LLM inference trace 2023, conversation service (AzurePublicDataset,
``AzureLLMInferenceTrace_conv.csv``, CC-BY-4.0, published with Splitwise, ISCA 2024): 33 quantiles
of each length, placed where straight lines between them follow the distribution best; the rank
correlation of prompt and output; the number of arrivals in each five minutes and the burstiness
within. No row of the trace is contained here.
"""

from __future__ import annotations

import math

import numpy as np

from ..errors import ArgumentError
from .workload import Float64, Int64, Workload

#: Requests in the trace's hour.
NUM_REQUESTS = 19_366

#: (probability, tokens): knots of the prompt length's quantile function.
PROMPT_QUANTILES = (
    *((0.0, 2), (0.04, 181), (0.115, 215), (0.13, 242), (0.145, 369), (0.2, 387), (0.345, 412)),
    *((0.375, 428), (0.39, 456), (0.405, 791), (0.41, 863), (0.43, 946), (0.445, 979)),
    *((0.48, 1009), (0.66, 1102), (0.7, 1130), (0.735, 1165), (0.82, 1368), (0.83, 1508)),
    *((0.85, 1876), (0.9, 2734), (0.905, 2920), (0.91, 3291), (0.915, 3789), (0.92, 4073)),
    *((0.975, 4092), (0.985, 4110), (0.99, 4142), (0.995, 4831), (0.9975, 5404)),
    *((0.999, 6179), (0.9995, 6570), (1.0, 14050)),
)
#: (probability, tokens): knots of the output length's quantile function.
OUTPUT_QUANTILES = (
    *((0.0, 7), (0.02, 24), (0.035, 36), (0.055, 43), (0.155, 68), (0.225, 82), (0.375, 99)),
    *((0.43, 108), (0.455, 114), (0.49, 125), (0.535, 143), (0.595, 172), (0.62, 190)),
    *((0.635, 207), (0.64, 216), (0.655, 219), (0.66, 237), (0.67, 371), (0.705, 385)),
    *((0.73, 393), (0.79, 398), (0.895, 421), (0.9, 424), (0.93, 433), (0.95, 451)),
    *((0.96, 468), (0.97, 509), (0.98, 540), (0.99, 601), (0.995, 643), (0.9975, 719)),
    *((0.999, 954), (1.0, 1000)),
)
#: Correlation of the Gaussian copula, from Spearman's 0.0728 by ``2 sin(pi r / 6)``.
COPULA_CORRELATION = 0.0762
#: Arrivals in each five minutes of the hour (the last bin holds 202 s).
ARRIVALS_PER_5_MINUTES = (1445, 1422, 1557, 1561, 1884, 2239, 2229, 1839, 1701, 1424, 1297, 768)
SPAN_SECONDS = 3501.722
#: Weibull shape of the gaps between arrivals once the rate profile is divided out: 0.953 has the
#: trace's coefficient of variation, 1.05 (1 would be a Poisson process).
GAP_SHAPE = 0.953


def azure_conversation(num_requests: int = NUM_REQUESTS, seed: int = 0) -> Workload:
    """Generate requests like those of the Azure conversation hour.

    Lengths are drawn by stratified inversion: the ``k``-th smallest of ``n`` uniforms lies in
    ``[k / n, (k + 1) / n)``, so that mean and percentiles stay close to the fitted ones for every
    seed; which request gets which is random, coupled by a Gaussian copula. Arrival gaps are
    Weibull, warped in time so that the rate follows the hour's profile; after the hour the profile
    repeats.

    Parameters
    ----------
    num_requests : int
        Requests to generate; 19 366 span the hour, fewer span its first part.
    seed : int
        Of NumPy's PCG64; the same seed and count give the same workload.

    Returns
    -------
    Workload
    """
    if num_requests < 1:
        raise ArgumentError(f"num_requests must be at least 1, got {num_requests}")
    if seed < 0:
        raise ArgumentError(f"seed must not be negative, got {seed}")
    rng = np.random.Generator(np.random.PCG64(seed))
    # Box-Muller pairs, the second rotated to the wanted correlation.
    radius = np.sqrt(-2 * np.log1p(-rng.random(num_requests)))
    angle = 2 * math.pi * rng.random(num_requests)
    first, second = radius * np.cos(angle), radius * np.sin(angle)
    second = COPULA_CORRELATION * first + math.sqrt(1 - COPULA_CORRELATION**2) * second
    prompt = _lengths(PROMPT_QUANTILES, first, rng)
    output = _lengths(OUTPUT_QUANTILES, second, rng)
    arrival = _arrivals(num_requests, rng)
    return Workload(f"azure-conversation-like (seed {seed})", arrival, prompt, output)


def _lengths(
    knots: tuple[tuple[float, int], ...], normal: Float64, rng: np.random.Generator
) -> Int64:
    ranks = np.empty(normal.size, np.int64)
    ranks[np.argsort(normal, kind="stable")] = np.arange(normal.size)
    uniform = (ranks + rng.random(normal.size)) / normal.size
    probabilities, tokens = np.array(knots).T
    # Round to nearest: the knots are observed whole numbers.
    lengths: Int64 = np.rint(np.interp(uniform, probabilities, tokens)).astype(np.int64)
    return lengths


def _arrivals(num_requests: int, rng: np.random.Generator) -> Float64:
    # Operational time: request k arrives near k, whatever the rate is at that moment.
    gaps = (-np.log1p(-rng.random(num_requests))) ** (1 / GAP_SHAPE)
    count = np.cumsum(gaps / math.gamma(1 + 1 / GAP_SHAPE))
    count -= count[0]
    cumulative = np.cumsum((0, *ARRIVALS_PER_5_MINUTES))
    edges = np.append(np.arange(len(ARRIVALS_PER_5_MINUTES)) * 300.0, SPAN_SECONDS)
    hours, within = np.divmod(count, float(cumulative[-1]))
    seconds: Float64 = hours * SPAN_SECONDS + np.interp(within, cumulative, edges)
    return seconds
