"""Turn JSON lines, or a benchmark's own file, and media files into shards; or check shards:
`make_shards.py lint FOLDER`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import DataError
from data.health import SampleHealth
from data.imports.benchmark_formats import PARTS, known_formats
from data.imports.benchmarks import convert_benchmark
from data.imports.convert import convert_jsonl
from data.lint import ReadableSource, lint
from data.media.opening import MediaLimits, MediaOpener
from data.media.sampling import FrameSampling
from data.question import ANSWER_TYPES
from data.remote_files import RemoteFiles
from data.sources.opening import check_no_table_options, open_source
from data.sources.remote import list_source
from data.sources.rows import RowRules
from data.text import clean_text
from zppo_mm.errors import ZppoError

if TYPE_CHECKING:
    from zppo_mm.run.prompt_lengths import PromptLengths

CHECKED_FRAMES = 64
"""Of a video, evenly spread; how many a run takes is up to its model folder."""
CONVERT_HELP = """Turn JSON lines or a Parquet file, and media files, into webdataset shards with an
index.

Each line: {"id": …, "question": …, "answer": …, "answer_type": "math" | "choice" | "open",
"choices": […], "source": …, "media": ["path", …], "metadata": …}.
Media may also be in image, images, video, videos. Only question (or messages) and answer must be
there.
The answer to a choice question is the letter or text of an option. Details: docs/data.md.

Other commands, each with its own --help:
  make_shards.py benchmark FILE OUT_DIR   convert a benchmark file
  make_shards.py lint FOLDER              check shards"""
BENCHMARK_HELP = """Turn a benchmark's file (JSON, JSON lines, CSV, TSV, Parquet) and the media
beside it into shards.

The format is recognised by its columns. Details: docs/evaluation.md."""


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which media can be opened."""
    limits = MediaLimits()
    parser.add_argument(
        "--no-decode",
        action="store_true",
        help="check only the questions, without opening images and videos",
    )
    for option, default, meaning in (
        ("--max-media-bytes", limits.max_bytes, "maximum bytes of a media file"),
        ("--max-media-pixels", limits.max_pixels, "maximum pixels of an image or frame"),
        (
            "--decode-timeout-seconds",
            limits.decode_timeout_seconds,
            "maximum time to decode one file",
        ),
    ):
        parser.add_argument(
            option, type=type(default), default=default, help=f"{meaning} (default: %(default)s)"
        )


def add_answer_types(parser: argparse.ArgumentParser) -> None:
    """Add the option that says which answer types the run has reward functions for."""
    parser.add_argument(
        "--answer-type",
        action="append",
        default=[],
        metavar="NAME",
        help="answer type of a reward function of your own, beside "
        f"{', '.join(ANSWER_TYPES)}; may be given several times",
    )


def opener_of(arguments: argparse.Namespace) -> MediaOpener | None:
    """Return what opens the media, none with `--no-decode`."""
    if arguments.no_decode:
        return None
    return MediaOpener(
        MediaLimits(
            max_bytes=arguments.max_media_bytes,
            max_pixels=arguments.max_media_pixels,
            decode_timeout_seconds=arguments.decode_timeout_seconds,
            sampling=FrameSampling(max_frames=CHECKED_FRAMES),
        )
    )


@contextmanager
def conversion_options(
    arguments: argparse.Namespace, health: SampleHealth
) -> Iterator[dict[str, Any]]:
    """Yield what both conversions take; the media workers end with the block."""
    opener = opener_of(arguments)
    names = ("out_dir", "media_root", "follow_links", "max_media_bytes", "overwrite")
    try:
        yield {
            "source": arguments.input,
            "opener": opener,
            "health": health,
            "answer_types": (*ANSWER_TYPES, *arguments.answer_type),
            **{name: getattr(arguments, name) for name in names},
        }
    finally:
        if opener is not None:
            opener.close()


def conversion_parser(prog: str, description: str, source: str) -> argparse.ArgumentParser:
    """Return a parser with what both conversions take."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", metavar=source, help="one question per line or row")
    parser.add_argument("out_dir", metavar="OUT_DIR", help="folder for the shards")
    parser.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.05,
        metavar="FRACTION",
        help="stop above this fraction of bad samples (default: %(default)s)",
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first bad sample")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace existing shards in OUT_DIR"
    )
    parser.add_argument(
        "--media-root",
        metavar="DIR",
        help="folder that media paths are relative to and may not leave (default: the file's)",
    )
    parser.add_argument(
        "--follow-links",
        action="store_true",
        help="allow links below the media root to lead out of it",
    )
    add_answer_types(parser)
    add_limits(parser)
    return parser


def add_format(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what the columns of a benchmark's file mean."""
    parser.add_argument(
        "--format",
        default="",
        choices=[*known_formats()],
        help="format of the file (default: recognised by its columns)",
    )
    parts = ", ".join(PARTS)
    parser.add_argument(
        "--fields",
        nargs="+",
        type=field,
        default=[],
        metavar="PART=COLUMN",
        help=f"column of {parts}",
    )


def add_rules(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what the columns of a table are."""
    parser.add_argument(
        "--columns",
        nargs="+",
        type=field,
        default=[],
        metavar="PART=COLUMN",
        help="columns of tables, as in data.train[].columns",
    )
    parser.add_argument(
        "--default-answer-type",
        default="",
        metavar="TYPE",
        help="of rows of tables that name none (default: choice with choices, else math)",
    )


def health_of(arguments: argparse.Namespace) -> SampleHealth:
    """Return what counts the samples of a file and judges their bad ones at its end."""
    return SampleHealth(
        arguments.max_bad_fraction, arguments.strict, option="--max-bad-fraction", at_end=True
    )


def field(text: str) -> tuple[str, str]:
    """Read one `PART=COLUMN`."""
    part, equals, column = text.partition("=")
    if not equals or not column:
        raise argparse.ArgumentTypeError(
            f"no field, got {text!r}, expected PART=COLUMN such as question=query"
        )
    return part, column


def skipped(health: SampleHealth) -> str:
    """Say how many samples were left out, and why."""
    counts = ", ".join(f"{reason} {count}" for reason, count in sorted(health.counts.items()))
    return f"{health.num_bad} skipped{': ' + counts if counts else ''}"


def run_lint(argv: list[str]) -> int:
    """List all problems; exit status 1 if there are any."""
    parser = argparse.ArgumentParser(
        prog="make_shards.py lint", description="List every problem of some sources."
    )
    parser.add_argument(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="all sources of one run, so that repeated ids are found: folders of shards, files or "
        "folders of *.jsonl, *.parquet, *.arrow, or addresses of such; with --config by default "
        "those that it names",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="configuration of the run: its media limits and reward functions are used, and "
        "prompts over its data.max_prompt_tokens are counted",
    )
    add_rules(parser)
    parser.add_argument(
        "--media-root", default="", metavar="DIR", help="folder that paths in tables start from"
    )
    add_answer_types(parser)
    add_limits(parser)
    arguments = parser.parse_args(argv)
    if arguments.config and arguments.no_decode:
        parser.error("--config needs the media; leave out --no-decode")
    if not (arguments.config or arguments.sources):
        parser.error("no sources; name them, or a run with --config")
    prompts = prompt_lengths(arguments.config) if arguments.config else None
    opener = opener_of(arguments) if prompts is None else MediaOpener(prompts.media_limits)
    known = (
        *(ANSWER_TYPES if prompts is None else prompts.answer_types),
        *arguments.answer_type,
    )
    files = remote_files(arguments.config)
    sources = linted_sources(arguments, known, files)
    num_samples, problems = lint(sources, opener, prompts, known, files)
    if opener is not None:
        opener.close()
    for problem in problems:
        print(clean_text(f"{problem.where}: {problem.reason}: {problem.message}"))
    bad = [problem for problem in problems if not problem.is_too_long]
    counts = ", ".join(
        f"{reason} {count}"
        for reason, count in sorted(Counter(problem.reason for problem in bad).items())
    )
    too_long = (
        f"; {len(problems) - len(bad)} prompts over {prompts.max_tokens} tokens" if prompts else ""
    )
    summary = f"{num_samples} samples, {len(bad)} problems{': ' + counts if counts else ''}"
    print(summary + too_long)
    return 1 if bad else 0


def linted_sources(
    arguments: argparse.Namespace, answer_types: Collection[str], files: RemoteFiles
) -> list[str | Path | ReadableSource]:
    """Return folders of shards, which lint reads shard by shard, and opened tables."""
    if not arguments.sources:
        from zppo_mm.config.load import load_config

        data = load_config(arguments.config).data
        given = [
            (source.path, source.columns, source.answer_type, source.media_root)
            for source in (*data.train, *data.held_out)
        ]
    else:
        options = (dict(arguments.columns), arguments.default_answer_type, arguments.media_root)
        given = [(path, *options) for path in arguments.sources]
    sources: list[str | Path | ReadableSource] = []
    for path, columns, answer_type, root in given:
        listing = list_source(path, files)
        if listing.tables is None:
            check_no_table_options(path, columns, answer_type, root)
            sources.append(listing.path)
            continue
        sources.append(
            open_source(
                path,
                columns=columns,
                answer_type=answer_type,
                media_root=root,
                answer_types=answer_types,
                files=files,
            )
        )
    return sources


def remote_files(config: str | None) -> RemoteFiles:
    """Return the way to addresses: that of a run, or with the default settings."""
    from zppo_mm.config.load import load_config
    from zppo_mm.config.remote import RemoteConfig
    from zppo_mm.run.remote import open_files

    return open_files(load_config(config).remote if config else RemoteConfig())


def prompt_lengths(file: str) -> PromptLengths:
    """Return what measures the prompts of a run."""
    # transformers is imported only where it is needed.
    from zppo_mm.config.load import load_config
    from zppo_mm.run.prompt_lengths import PromptLengths
    from zppo_mm.run.remote import fetched_models

    with fetched_models(load_config(file)) as config:
        return PromptLengths(config)


def run_convert(argv: list[str]) -> int:
    """Write shards; bad samples are skipped, named and counted."""
    parser = conversion_parser("make_shards.py", CONVERT_HELP, "INPUT")
    add_rules(parser)
    parser.add_argument(
        "--samples-per-shard",
        type=int,
        default=1000,
        metavar="N",
        help="maximum samples of one shard (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    health = health_of(arguments)
    rules = RowRules(dict(arguments.columns), arguments.default_answer_type)
    with conversion_options(arguments, health) as options:
        shards = convert_jsonl(
            **options, rules=rules, samples_per_shard=arguments.samples_per_shard
        )
    print(f"{health.num_good} samples in {len(shards)} shards, {skipped(health)}")
    return 0


def run_benchmark(argv: list[str]) -> int:
    """Write the shards of a benchmark; rows that cannot be used are skipped, named and counted."""
    parser = conversion_parser("make_shards.py benchmark", BENCHMARK_HELP, "FILE")
    add_format(parser)
    arguments = parser.parse_args(argv)
    health = health_of(arguments)
    with conversion_options(arguments, health) as options:
        conversion = convert_benchmark(
            **options, format_name=arguments.format, fields=dict(arguments.fields)
        )
    stripped = conversion.num_without_directives
    removed = f", format directives removed from {stripped} questions" if stripped else ""
    print(f"{health.num_good} samples read as {conversion.format}, {skipped(health)}{removed}")
    return 0


def main(argv: list[str]) -> int:
    """Run one of the commands; a data error is one line and exit status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        named = {"lint": run_lint, "benchmark": run_benchmark}.get(argv[0]) if argv else None
        return named(argv[1:]) if named else run_convert(argv)
    except (DataError, ZppoError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
