"""Rates of the machine at hand: products, memory, collectives, media, grading, and how near passes
of small networks come to them.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import torch
from omegaconf import OmegaConf
from PIL import Image

from data.atomic_files import write_atomically
from data.media.images import decode_image
from data.question import Question
from encoders.config import ProcessorConfig
from encoders.processor import process_image
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.models.decoding.cache_size import GIB
from zppo_mm.parallel import groups as parallel
from zppo_mm.planning.machine import MachineRates, PassRates
from zppo_mm.planning.measured import (
    Timed,
    fastest,
    reference_architecture,
    timed_decoding,
    timed_update,
)
from zppo_mm.rewards.verify import Verifier
from zppo_mm.rewards.workers import GradingPool

IMAGE_SIDE = 1120
"""Pixels; its square is the paper's largest image."""
_REDUCED = 1 << 24
_ANSWERS, _POLYNOMIALS = 500, 20
_PROCESSOR = ProcessorConfig(
    patch_size=16,
    temporal_patch_size=2,
    merge_size=2,
    image_min_pixels=1,
    image_max_pixels=IMAGE_SIDE**2,
    video_min_pixels=1,
    video_max_pixels=IMAGE_SIDE**2,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
)


def calibrate() -> MachineRates:
    """Measure this machine; under torchrun the collectives too.

    Without a GPU, and with one thread, all times are CPU times of this process.
    """
    parallel.initialize(ParallelConfig(), seed=0)
    on_gpu = torch.cuda.is_available()
    dtype = "bfloat16" if on_gpu else "float32"
    rates = MachineRates(
        name=torch.cuda.get_device_name() if on_gpu else "this CPU",
        memory_gib=_memory(),
        gpus_per_node=max(torch.cuda.device_count(), 1),
        element_bytes=2 if on_gpu else 4,
        matmul_flops=_matmul_flops(dtype, 8192 if on_gpu else 1024),
        memory_bandwidth=_bandwidth(1 << (30 if on_gpu else 26)),
        media_per_second=_media_per_second(),
        answers_per_second=answers_per_second(_ANSWERS),
        algebra_per_second=algebra_per_second(_POLYNOMIALS),
        shares_prompts=not on_gpu,
    )
    if parallel.world_size() > 1:
        message, bandwidth = _collective()
        rates = replace(
            rates,
            message_seconds=message,
            node_bandwidth=bandwidth,
            network_bandwidth=bandwidth,
        )
    rates = replace(
        rates, train=fit(timed_updates(dtype), rates), decode=fit(timed_decodings(dtype), rates)
    )
    parallel.shutdown()
    return rates


def timed_updates(dtype: str) -> list[Timed]:
    """Return updates of two networks in packs of two sizes."""
    return [
        timed_update(reference_architecture(width, layers), dtype, samples, tokens, 2048)
        for width, layers in ((192, 4), (448, 8))
        for samples, tokens in ((4, 64), (16, 128), (8, 512))
    ]


def timed_decodings(dtype: str) -> list[Timed]:
    """Return sampling of two networks, with batches and contexts of two sizes."""
    return [
        timed_decoding(reference_architecture(width, layers), dtype, batch, prompt, 24)
        for width, layers in ((192, 4), (448, 8))
        for batch, prompt in ((4, 16), (64, 16), (64, 256), (16, 256))
    ]


def fit(timed: Sequence[Timed], rates: MachineRates) -> PassRates:
    """Return the rates of passes that come nearest to the measured seconds, by relative error; none
    is negative.

    Args:
        timed: Measurements.
        rates: The machine's own.
    """
    seconds = np.array([each.seconds for each in timed])
    columns = np.array(
        [
            [
                each.work.layers,
                each.work.flops / rates.matmul_flops,
                each.work.traffic / rates.memory_bandwidth,
            ]
            for each in timed
        ]
    )
    cost = _least_squares(columns / seconds[:, None])
    limits = (1e-9, 1 / 2.0, 1 / 20.0)
    layer, product, traffic = (max(own, low) for own, low in zip(cost, limits, strict=True))
    return PassRates(
        matmul_efficiency=float(1 / product),
        bandwidth_efficiency=float(1 / traffic),
        layer_seconds=float(layer),
    )


def _least_squares(columns: npt.NDArray[np.float64]) -> list[float]:
    """Return the factors, none negative, with which the columns come nearest to 1. With three of
    them, every choice of those that are not 0 can be tried.
    """
    count = columns.shape[1]
    best, error = [0.0] * count, float("inf")
    for size in range(1, count + 1):
        for chosen in combinations(range(count), size):
            part = columns[:, chosen]
            factors = np.linalg.lstsq(part, np.ones(len(part)), rcond=None)[0]
            found = float(((part @ factors - 1) ** 2).sum())
            if (factors >= 0).all() and found < error:
                best, error = [0.0] * count, found
                for column, factor in zip(chosen, factors.tolist(), strict=True):
                    best[column] = factor
    return best


def write_rates(rates: MachineRates, path: Path) -> str:
    """Write a file of rates that `--gpu` reads, and return what it says."""
    text = "# Measured by tools/plan_run.py --calibrate.\n" + OmegaConf.to_yaml(
        OmegaConf.structured(rates)
    )
    write_atomically(path, text)
    return text


def _memory() -> float:
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / GIB
    return psutil.virtual_memory().total / GIB


def _matmul_flops(dtype: str, size: int) -> float:
    one = torch.ones(size, size, dtype=getattr(torch, dtype), device=parallel.device())
    return 2 * size**3 / fastest(lambda: one @ one)


def _bandwidth(size: int) -> float:
    """Return the bytes a second of a copy, read and written."""
    source = torch.ones(size // 4, device=parallel.device())
    target = torch.empty_like(source)
    return 2 * size / fastest(lambda: target.copy_(source))


def _media_per_second() -> float:
    """Open an image as a run does, and cut it into patches."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 255, (IMAGE_SIDE // 8, IMAGE_SIDE // 8, 3), dtype=np.uint8)
    large = Image.fromarray(pixels).resize((IMAGE_SIDE, IMAGE_SIDE))
    file = io.BytesIO()
    large.save(file, "JPEG")
    content = file.getvalue()
    return 1 / fastest(
        lambda: process_image(decode_image(content, IMAGE_SIDE**2)[0], _PROCESSOR), num_rounds=2
    )


def answers_per_second(count: int) -> float:
    """Grade fractions in two spellings by rules, no two of them alike."""
    items = [
        (
            Question("", "", (), f"\\frac{{{number}}}{{{number + 1}}}", "math"),
            f"\\boxed{{\\dfrac{{{number}}}{{{number + 1}}}}}",
        )
        for number in range(count)
    ]
    with Verifier() as verifier:
        return count / fastest(lambda: verifier.verify_all(items))


def algebra_per_second(count: int) -> float:
    """Compare polynomials by algebra in one worker, by the clock on the wall."""
    pool = GradingPool(timeout_seconds=60.0, num_workers=1, budget_seconds=600.0)
    try:
        pool.compare_all([("x+1", "1+x")])  # starts the worker
        pairs = [(f"(x+{n})^2", f"x^2+{2 * n}x+{n**2}") for n in range(1, count + 1)]
        started = time.perf_counter()
        pool.compare_all(pairs)
        return count / (time.perf_counter() - started)
    finally:
        pool.close()


def _collective() -> tuple[float, float]:
    """Return the seconds of a small all-reduce over all ranks and the bytes a second of a large
    one, by the clock on the wall: ranks wait.
    """

    def seconds(count: int) -> float:
        content = torch.ones(count, device=parallel.device())
        return fastest(lambda: parallel.sum_over_ranks(content), now=_wall_clock)

    short, long, ranks = seconds(1), seconds(_REDUCED), parallel.world_size()
    moved = 2 * _REDUCED * torch.float32.itemsize * (ranks - 1) / ranks
    return short, moved / max(long - short, 1e-9)


def _wall_clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
