"""Build a corpus: draw, check, write, report."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from data.errors import DataError, ReasonedError, SampleError
from data.imports.benchmarks import load_medium
from data.imports.row_view import RowView
from data.media.files import MediaFolder
from data.media.opening import MediaLimits
from data.sample import ShardSample
from data.shard_writer import write_shards
from zppo_mm.config.schema import RunConfig
from zppo_mm.corpus.drawing import Candidate, Counts, Draw, SourceFile, list_files
from zppo_mm.corpus.prompts import PromptCheck
from zppo_mm.corpus.questions import read_draft
from zppo_mm.corpus.recipe import CorpusRecipe
from zppo_mm.corpus.report import CorpusReport, remove_report, write_report

logger = logging.getLogger(__name__)


def build_corpus(
    recipe: CorpusRecipe,
    roots: Mapping[str, Path],
    out_dir: Path,
    config: RunConfig,
    *,
    overwrite: bool = False,
) -> CorpusReport:
    """Write the shards of a corpus and, after them, its report.

    The texts of all rows are read first. Then images are read, of as many candidates as a subset
    still lacks, until every subset has reached its cap or has no candidates left.

    Args:
        recipe: What is drawn.
        roots: Folder of every set.
        out_dir: Where shards and report go; as it was if anything fails.
        config: The run that will train on it.
        overwrite: Remove shards that lie there.

    Raises:
        DataError: A set cannot be read, or no sample is left.
        ConfigError: The student cannot be used.
    """
    files = list_files(recipe, roots)
    counts = Counts()
    check = PromptCheck(config, recipe.min_image_side)
    try:
        draw = Draw(recipe, files, counts)
        samples = _samples(recipe, files, draw, check, counts)
        if overwrite:
            remove_report(out_dir)
        shards = write_shards(out_dir, samples, overwrite=overwrite)
    finally:
        check.close()
    report = CorpusReport.of(recipe, counts)
    if not shards:
        raise DataError(f"corpus: no sample is left, expected at least one:\n{report.text()}")
    write_report(out_dir, report)
    return report


def _samples(
    recipe: CorpusRecipe,
    files: Sequence[SourceFile],
    draw: Draw,
    check: PromptCheck,
    counts: Counts,
) -> Iterator[ShardSample]:
    """Yield the samples of a corpus, in rounds: each takes as many candidates as are lacking."""
    lacking = {name: tier.cap for tier in recipe.tiers for name in tier.subsets}
    num_kept = 0
    while True:
        wanted: dict[int, dict[int, Candidate]] = defaultdict(dict)
        for subset in sorted(lacking):
            for candidate in draw.take(subset, lacking[subset]):
                wanted[candidate.file][candidate.number] = candidate
        if not wanted:
            break
        for index in sorted(wanted):
            file = files[index]
            logger.info("corpus: reading %d samples of %s", len(wanted[index]), file.path)
            for candidate, view in _rows(file, wanted[index]):
                name = (file.source.name, candidate.subset)
                try:
                    sample = _sample(recipe, file, candidate, view, num_kept)
                    check.check(sample)
                except ReasonedError as error:
                    logger.info("corpus: dropped as %s: %s", error.reason, error)
                    counts.fates[*name, error.reason] += 1
                    continue
                num_kept += 1
                lacking[file.source.subsets[candidate.subset]] -= 1
                counts.fates[*name, "kept"] += 1
                counts.answer_types[name[0], str(sample.question["answer_type"])] += 1
                yield sample
    for candidate in draw.left:
        counts.fates[files[candidate.file].source.name, candidate.subset, "over_cap"] += 1


def _rows(
    file: SourceFile, wanted: Mapping[int, Candidate]
) -> Iterator[tuple[Candidate, RowView | SampleError]]:
    for number, view in file.rows(list(file.source.columns.used()), sorted(wanted)):
        yield wanted[number], view


def _sample(
    recipe: CorpusRecipe,
    file: SourceFile,
    candidate: Candidate,
    view: RowView | SampleError,
    number: int,
) -> ShardSample:
    """Return a row as a sample.

    Raises:
        ReasonedError: The row or its images cannot be used.
    """
    if isinstance(view, SampleError):
        raise view
    draft = read_draft(view, recipe, file.source)
    folder = MediaFolder(file.root, MediaLimits().max_bytes)
    images = view.media(("image", "image"))
    if not images or draft.num_markers not in (0, len(images)):
        raise SampleError(
            "missing_media",
            f"{view.where}: images do not fit the text, got {len(images)}, expected "
            f"{draft.num_markers or 'at least one'}",
        )
    media = []
    for index, (kind, value) in enumerate(images):
        suffix, content = load_medium(view.where, folder, kind, value)
        media.append((suffix if len(images) == 1 else f"{index}.{suffix}", content))
        folder.check_total(view.where, media)
    canonical = file.source.subsets[candidate.subset]
    question = {
        "id": f"{canonical}/{candidate.digest.hex()}",
        **draft.fields(),
        "source": canonical,
        "origin": f"{file.source.name}/{file.name}:{view.number}",
        "media": [extension for extension, _ in media],
    }
    return ShardSample(f"{number:09d}", question, media)
