"""Turn JSON lines and media files into shards, or check shards: `make_shards.py lint FOLDER`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter

from data.convert import convert_jsonl
from data.errors import DataError
from data.health import SampleHealth
from data.lint import lint
from data.media import MediaLimits, MediaOpener

CONVERT_HELP = """Turn JSON lines and media files into webdataset shards with an index.

Each line: {"id": …, "question": …, "answer": …, "answer_type": "math" | "choice" | "open",
"choices": […], "source": …, "media": ["path", …]}.
Choices, source, media and id may be left out; the answer to a choice question is its letter. docs/data.md has the details.
To check shards: make_shards.py lint FOLDER (see make_shards.py lint --help)."""


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which media can be opened."""
    limits = MediaLimits()
    parser.add_argument("--no-decode", action="store_true", help="do not open images and videos, check the questions only")
    parser.add_argument("--max-media-bytes", type=int, default=limits.max_bytes, help="largest media file (default %(default)s)")
    parser.add_argument("--max-media-pixels", type=int, default=limits.max_pixels, help="most pixels of a frame (default %(default)s)")
    parser.add_argument(
        "--decode-timeout-seconds", type=float, default=limits.decode_timeout_seconds, help="time for one video (default %(default)s)"
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
        )
    )


def run_lint(argv: list[str]) -> int:
    """List all problems; exit status 1 if there are any."""
    parser = argparse.ArgumentParser(prog="make_shards.py lint", description="List every problem of the shards in some folders.")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folders of shards used in one run; ids must not repeat over them")
    add_limits(parser)
    arguments = parser.parse_args(argv)
    opener = opener_of(arguments)
    num_samples, problems = lint(arguments.folders, opener)
    if opener is not None:
        opener.close()
    for problem in problems:
        print(f"{problem.where}: {problem.reason}: {problem.message}")
    counts = ", ".join(f"{reason} {count}" for reason, count in sorted(Counter(problem.reason for problem in problems).items()))
    print(f"{num_samples} samples, {len(problems)} problems{': ' + counts if counts else ''}")
    return 1 if problems else 0


def run_convert(argv: list[str]) -> int:
    """Write shards; bad samples are skipped, named and counted."""
    parser = argparse.ArgumentParser(prog="make_shards.py", description=CONVERT_HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="INPUT.jsonl", help="one question per line")
    parser.add_argument("out_dir", metavar="OUT_DIR", help="folder for the shards")
    parser.add_argument("--media-root", metavar="DIR", help="what relative media paths start from (default: the folder of INPUT.jsonl)")
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="most samples of one shard (default %(default)s)")
    parser.add_argument("--max-bad-share", type=float, default=0.05, metavar="SHARE", help="stop above this share (default %(default)s)")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad sample")
    parser.add_argument("--overwrite", action="store_true", help="replace shards that lie in OUT_DIR")
    add_limits(parser)
    arguments = parser.parse_args(argv)
    opener = opener_of(arguments)
    health = SampleHealth(arguments.max_bad_share, arguments.strict)
    try:
        shards = convert_jsonl(
            arguments.input,
            arguments.out_dir,
            media_root=arguments.media_root,
            opener=opener,
            health=health,
            samples_per_shard=arguments.samples_per_shard,
            overwrite=arguments.overwrite,
        )
    finally:
        if opener is not None:
            opener.close()
    counts = ", ".join(f"{reason} {count}" for reason, count in sorted(health.counts.items()))
    print(f"{health.num_good} samples in {len(shards)} shards, {health.num_bad} skipped{': ' + counts if counts else ''}")
    return 0


def main(argv: list[str]) -> int:
    """Run one of the two commands; a data error is one line and exit status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        return run_lint(argv[1:]) if argv[:1] == ["lint"] else run_convert(argv)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
