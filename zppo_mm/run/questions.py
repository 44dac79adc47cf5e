"""A run's questions: the stream that it trains on, and those of its evaluations."""

from __future__ import annotations

import logging

from data.files import LocalFiles
from data.health import SampleHealth
from data.source import Source
from data.sources.opening import open_source
from data.sources.tables import check_default_ids
from data.stream import QuestionStream
from zppo_mm.bundled.questions import bundled_sources
from zppo_mm.config.schema import RunConfig, SourceConfig
from zppo_mm.rewards.verify import Verifier
from zppo_mm.rollout.held_out import HeldOut, held_out_questions
from zppo_mm.run.remote import open_files

logger = logging.getLogger(__name__)


def build_stream(
    config: RunConfig, health: SampleHealth, files: LocalFiles | None = None
) -> QuestionStream:
    """Return the run's training questions from the first on, its bad samples counted by `health`;
    every rank calls this.

    Args:
        config: The run.
        health: Counts bad samples.
        files: Open the sources; by default files of their own.

    Raises:
        DataError: A data source cannot be used.
    """
    sources = config.data.train or bundled_sources(config, "train")
    files = files or open_files(config.remote)
    folders = [(configured_source(source, config, files), source.weight) for source in sources]
    check_default_ids([folder for folder, _ in folders])
    return QuestionStream(folders, config.seed, health)


def sample_health(config: RunConfig) -> SampleHealth:
    """Return what counts a run's bad samples, of training or of evaluation."""
    return SampleHealth(config.data.max_bad_fraction, config.data.strict)


def configured_source(source: SourceConfig, config: RunConfig, files: LocalFiles) -> Source:
    """Open a source of the configuration; questions that the run cannot grade are bad samples.

    Raises:
        DataError: It cannot be used.
    """
    return open_source(
        source.path,
        columns=source.columns,
        answer_type=source.answer_type,
        media_root=source.media_root,
        answer_types=config.reward.answer_types,
        files=files,
    )


def build_held_out(config: RunConfig, verifier: Verifier, files: LocalFiles) -> HeldOut:
    """Return the questions of every evaluation; without held-out data of their own, a user's
    questions are not evaluated.
    """
    if config.data.train and not config.data.held_out:
        logger.warning(
            "data.held_out is empty: this run trains without evaluation; name a folder of held-out "
            "shards to have one"
        )
        return HeldOut()
    sources = config.data.held_out or bundled_sources(config, "held_out")
    folders = [configured_source(source, config, files) for source in sources]
    check_default_ids(folders)
    health = sample_health(config)
    chosen = held_out_questions(
        folders, config.evaluation.num_questions, config.seed, health, verifier.can_grade
    )
    if chosen.num_skipped:
        logger.warning(
            "left out %d of %d held-out questions: %s",
            chosen.num_skipped,
            len(chosen) + chosen.num_skipped,
            health.counts | health.left_out,
        )
    return chosen
