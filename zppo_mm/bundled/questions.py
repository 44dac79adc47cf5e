"""The bundled digit questions as data sources, built once per output folder."""

from __future__ import annotations

import hashlib
import logging
from functools import cache
from pathlib import Path

from data.atomic_files import new_folder
from data.toy import digits, digits_media, digits_shards
from data.toy.digits import Modality, Split
from data.toy.digits_shards import build_digit_shards
from zppo_mm.config.schema import RunConfig, SourceConfig
from zppo_mm.parallel import groups as parallel

logger = logging.getLogger(__name__)

NUM_QUESTIONS: dict[Split, int] = {"train": 1500, "held_out": 300}
QUESTIONS_SEED = 0
MODALITIES: dict[str, tuple[Modality, ...]] = {
    "text": ("text",),
    "image": ("image",),
    "video": ("video",),
    "mixed": ("text", "image", "video"),
}


def bundled_sources(config: RunConfig, split: Split) -> list[SourceConfig]:
    """Return the digit questions of the run's modality; rank 0 builds what is not there yet, every
    rank calls this.

    The questions are the same for every run, whatever its seed, so that runs can be compared.
    """
    folders = [
        bundled_folder(Path(config.output_dir), modality, split)
        for modality in MODALITIES[config.modality]
    ]
    if parallel.rank() == 0:
        for modality, folder in zip(MODALITIES[config.modality], folders, strict=True):
            if not folder.exists():
                _build(folder, modality, split)
    parallel.barrier()
    return [SourceConfig(path=str(folder)) for folder in folders]


def bundled_folder(output_dir: Path, modality: Modality, split: Split) -> Path:
    """Return where the shards of one modality and split lie; another generator has another folder,
    so that stale shards are not used.
    """
    return (
        output_dir
        / "digit_questions"
        / f"{modality}-{split}-{NUM_QUESTIONS[split]}-{_generator_version()}"
    )


@cache
def _generator_version() -> str:
    """Return a short digest of everything that the shards are made from: the seed and the source
    text of the generator.
    """
    digest = hashlib.blake2b(str(QUESTIONS_SEED).encode(), digest_size=4)
    for module in (digits, digits_media, digits_shards):
        assert module.__file__ is not None
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()


def _build(folder: Path, modality: Modality, split: Split) -> None:
    logger.info("building %d %s digit questions in %s", NUM_QUESTIONS[split], modality, folder)
    # Where another run is faster its folder stays: the same seed gives the same bytes.
    with new_folder(folder) as temporary:
        build_digit_shards(temporary, modality, split, NUM_QUESTIONS[split], QUESTIONS_SEED)
