"""Runs a script on storage that refuses writes for a while.

`python tests/support/failing_storage.py BEGIN,PART,COUNT … -- SCRIPT [ARGUMENT …]`: from the first
file on whose path holds BEGIN, the next COUNT times that a file whose path holds PART is opened to
be written are errors of the disk.
"""

from __future__ import annotations

import errno
import os
import re
import runpy
import sys
from typing import Any


class FailingStorage:
    """An audit hook.

    Attributes:
        begin: Part of the path whose opening begins it.
        part: Part of the paths that are refused then.
        left: How many more of them.
    """

    def __init__(self, begin: str, part: str, count: int) -> None:
        self.begin, self.part, self.left = begin, part, count
        self._has_begun = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], str):
            return
        path, mode, flags = arguments
        self._has_begun = self._has_begun or self.begin in path
        writes = re.search("[wax+]", mode or "") or flags & (os.O_WRONLY | os.O_RDWR)
        if self._has_begun and self.left and writes and self.part in path:
            self.left -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)


if __name__ == "__main__":
    split = sys.argv.index("--")
    for words in sys.argv[1:split]:
        begin, part, count = words.split(",")
        sys.addaudithook(FailingStorage(begin, part, int(count)))
    sys.argv = sys.argv[split + 1 :]
    runpy.run_path(sys.argv[0], run_name="__main__")
