"""Print docs/metrics.md from `METRICS`: `python tools/make_metrics_page.py > docs/metrics.md`."""

from __future__ import annotations

from itertools import groupby

from zppo_mm.observability.metrics import METRICS
from zppo_mm.piped_output import ends_with_its_reader

_HEAD = """\
# Metrics

Every name that a line of `metrics.jsonl` can have, and what it means.
`*` stands for one last part: a kind of prompt, a reason, an accuracy in percent, a phase.
A mean over nothing is left out; a value that is not finite is `null`.
Trackers show the same names; in Prometheus `accuracy/plain` is `zppo_accuracy_plain`.

This page is printed from `METRICS` in `zppo_mm/observability/metrics.py` by
`python tools/make_metrics_page.py > docs/metrics.md`.
A test fails when it is stale.
"""


def metrics_page() -> str:
    """Return the page: one table per first part of the names."""
    parts = [_HEAD]
    for section, names in groupby(sorted(METRICS), key=lambda name: name.partition("/")[0]):
        rows = "\n".join(f"| `{name}` | {METRICS[name]} |" for name in names)
        parts.append(f"## {section}\n| name | meaning |\n|---|---|\n{rows}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    with ends_with_its_reader():
        print(metrics_page(), end="")
