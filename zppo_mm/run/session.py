"""From the process groups to the built run and back, and how the end of a run is reported."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager

from data.errors import DataError
from zppo_mm.config.schema import RunConfig
from zppo_mm.errors import ZppoError
from zppo_mm.interruption import EXIT_CODE, Interruption, RunStopped
from zppo_mm.parallel import failures
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.failures import RankFailureError
from zppo_mm.parallel.liveness_barrier import open_liveness_barrier
from zppo_mm.parallel.partition import JobPartition, PartitionLink
from zppo_mm.run.build import build_run
from zppo_mm.run.hangs import finding_hangs
from zppo_mm.run.parts import Run
from zppo_mm.run.prepare import claimed
from zppo_mm.run_folder import RunFolder

logger = logging.getLogger(__name__)

# Writing to an open file names no file.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)


@contextmanager
def open_run(
    config: RunConfig,
    folder: RunFolder,
    partition: JobPartition | None,
    link: PartitionLink | None,
    interruption: Interruption,
    restart: bool = False,
) -> Iterator[Run]:
    """Make the process groups, claim the run's folder and build the run; every rank of the student
    enters the block.

    With `restart` the folder's earlier run is moved aside first.

    After an error the process groups are left without the other ranks: a process that ends with
    them could be aborted, with another exit code than the error's.
    """
    parallel.initialize(config.parallel, config.seed, partition)
    failures.end_with_launcher()
    stopped: RunStopped | None = None
    try:
        with (
            failures.translate_collective_errors(),
            open_liveness_barrier(config.parallel, partition, interruption) as barrier,
            claimed(folder, restart),
            finding_hangs(config.parallel, folder.stacks, partition),
            closing(build_run(config, link, barrier, interruption, folder)) as run,
        ):
            try:
                yield run
            except RunStopped as error:
                stopped = error
        # Nobody ends before all are done: a launcher ends the others as soon as one has.
        parallel.shutdown()
    finally:
        parallel.leave()
    if stopped is not None:
        raise stopped


def exit_code(error: Exception, folder: RunFolder) -> int:
    """Return the exit code of a run that has not come to its end, and log one line about it.

    Args:
        error: What ended the run.
        folder: The run's.

    Returns:
        1 after an error that the user can fix, `EXIT_CODE` where the same command goes on,
        `RANK_FAILURE_EXIT_CODE` where it may, because another process failed.

    Raises:
        Exception: The error itself, if it is neither.
    """
    if isinstance(error, RunStopped):
        if os.environ.get("RANK", "0") == "0":
            logger.info("%s", error)
        return EXIT_CODE
    if isinstance(error, ZppoError | DataError):
        logger.error("%s", error)
        return failures.RANK_FAILURE_EXIT_CODE if isinstance(error, RankFailureError) else 1
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _DISK_ERRORS):
        logger.error(
            "%s: a file of the run cannot be used, got %s, expected room and permission; check the "
            "disk, then the same command continues",
            folder,
            error,
        )
        return 1
    raise error
