"""Output that is piped into a program which may stop reading, such as `head`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ends_with_its_reader() -> Iterator[None]:
    """Print in the block: when nobody reads any more the process ends at once, by SIGPIPE and
    without a word, as other programs in a pipe do.
    """
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        yield
        sys.stdout.flush()
    finally:
        signal.signal(signal.SIGPIPE, before)
