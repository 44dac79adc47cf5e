"""Memory of this process."""

from __future__ import annotations

import os
import resource
import sys

import psutil

from zppo_mm.observability.metrics import Max, StepMetrics


def process_memory() -> StepMetrics:
    """Return this process's memory, to be merged over ranks by their maximum."""
    metrics = StepMetrics()
    metrics.add("system/rss_bytes", Max(psutil.Process(os.getpid()).memory_info().rss))
    # Linux counts the peak in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    metrics.add(
        "system/rss_peak_bytes", Max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    )
    return metrics
