"""Build a corpus: draw, check, write, report."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.errors import DataError, ReasonedError, SampleError
from data.imports.benchmarks import load_media
from data.imports.row_view import RowView
from data.media_folder import MediaFolder
from data.sample import ShardSample
from data.shard_writer import write_shards
from zppo_mm.config.schema import RunConfig
from zppo_mm.corpus.drawing import KEPT, Candidate, Counts, Draw
from zppo_mm.corpus.prompts import PromptCheck
from zppo_mm.corpus.questions import read_draft
from zppo_mm.corpus.recipe import CorpusRecipe
from zppo_mm.corpus.report import CorpusReport, remove_report, write_report
from zppo_mm.corpus.source_files import SourceFile, list_files

logger = logging.getLogger(__name__)

Media = Sequence[tuple[str, bytes]]


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
    builder = _Builder(
        recipe,
        list_files(recipe, roots),
        PromptCheck(config, recipe.min_image_side),
        config.data.max_media_bytes,
    )
    try:
        # The writer refuses a folder with shards before anything is read.
        write_shards(out_dir, builder.samples(out_dir), overwrite=overwrite)
    finally:
        builder.check.close()
    report = CorpusReport.of(recipe, builder.counts)
    write_report(out_dir, report)
    return report


@dataclass(frozen=True, slots=True)
class _Builder:
    """Turns rows into samples, and counts what becomes of every row."""

    recipe: CorpusRecipe
    files: Sequence[SourceFile]
    check: PromptCheck
    max_media_bytes: int
    counts: Counts = field(default_factory=Counts)

    def samples(self, out_dir: Path) -> Iterator[ShardSample]:
        """Yield the samples of the corpus, in rounds: each takes as many candidates as are lacking.

        At the end it removes the report of shards that are about to be replaced.
        """
        draw = Draw(self.recipe, self.files, self.counts)
        lacking = {name: tier.cap for tier in self.recipe.tiers for name in tier.subsets}
        number = 0
        while wanted := self._wanted(draw, lacking):
            for index in sorted(wanted):
                for fields, media in self._good(self.files[index], wanted[index]):
                    lacking[fields["source"]] -= 1
                    yield ShardSample(f"{number:09d}", fields, media)
                    number += 1
        for candidate in draw.left:
            self._count(self.files[candidate.file], candidate, "over_cap")
        if not number:
            report = CorpusReport.of(self.recipe, self.counts)
            raise DataError(f"corpus: no sample is left, expected at least one:\n{report.text()}")
        remove_report(out_dir)

    def _wanted(self, draw: Draw, lacking: Mapping[str, int]) -> dict[int, dict[int, Candidate]]:
        """Return the next candidates by file and row."""
        wanted: dict[int, dict[int, Candidate]] = defaultdict(dict)
        for subset in sorted(lacking):
            for candidate in draw.take(subset, lacking[subset]):
                wanted[candidate.file][candidate.number] = candidate
        return wanted

    def _good(
        self, file: SourceFile, wanted: Mapping[int, Candidate]
    ) -> Iterator[tuple[dict[str, Any], Media]]:
        """Yield fields and media of the candidates of a file that a run can ask."""
        logger.info("corpus: reading %d samples of %s", len(wanted), file.path)
        for number, view in file.rows([*file.source.columns.used()], sorted(wanted)):
            candidate = wanted[number]
            try:
                fields, media = self._sample(file, candidate, view)
                self.check.check(ShardSample(f"{number:09d}", fields, media))
            except ReasonedError as error:
                logger.info("corpus: dropped as %s: %s", error.reason, error)
                self._count(file, candidate, error.reason)
                continue
            self._count(file, candidate, KEPT)
            self.counts.answer_types[file.source.name, fields["answer_type"]] += 1
            yield fields, media

    def _sample(
        self, file: SourceFile, candidate: Candidate, view: RowView | SampleError
    ) -> tuple[dict[str, Any], Media]:
        """Return the fields and media of a row.

        Raises:
            ReasonedError: The row or its images cannot be used.
        """
        if isinstance(view, SampleError):
            raise view
        draft = read_draft(view, self.recipe, file.source)
        images = view.media(("image", "image"))
        if not images or draft.num_markers not in (0, len(images)):
            raise SampleError(
                "missing_media",
                f"{view.where}: images do not fit the text, got {len(images)}, expected "
                f"{draft.num_markers or 'at least one'}",
            )
        folder = MediaFolder(file.root, self.max_media_bytes)
        media = load_media(view.where, folder, images)
        canonical = file.source.subsets[candidate.subset]
        fields = {
            "id": f"{canonical}/{candidate.digest.hex()}",
            **draft.fields(),
            "source": canonical,
            "origin": f"{file.source.name}/{file.name}:{view.number}",
            "media": [extension for extension, _ in media],
        }
        return fields, media

    def _count(self, file: SourceFile, candidate: Candidate, fate: str) -> None:
        self.counts.fates[file.source.name, candidate.subset, fate] += 1
