"""Webdataset shards: write them, and read any sample again by (shard, key)."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import overload

from data.errors import DataError, SampleError, shown
from data.question import MediaRef, Question
from data.sample import ShardSample, is_usable_key, media_kind, parse_question
from data.shard_names import EXPECTED_SHARDS, OWN_LEFTOVER, UNFINISHED_SUFFIX, list_shards
from data.tar_index import (
    Member,
    TarIndex,
    check_header,
    load_index,
    scan_tar,
    sidecar_path,
    split_name,
    write_sidecar,
)
from data.tar_members import BLOCK, open_regular, read_at

MAX_SHARD_BYTES = 1 << 30
"""A shard with this much media is closed early: its samples are in memory until it is written."""
MAX_OPEN_SHARDS = 256
MAX_QUESTION_BYTES = 1 << 24
KEY = re.compile(r"[^\s./][^\s.]*\Z")


def write_shards(
    folder: str | Path,
    samples: Iterable[ShardSample],
    samples_per_shard: int = 1000,
    *,
    overwrite: bool = False,
) -> list[Path]:
    """Write samples as shard-000000.tar, … with an index beside each; the same samples give the
    same bytes.

    Args:
        folder: Where the shards go; made if it is missing.
        samples: Samples in their order.
        samples_per_shard: Most samples of one shard.
        overwrite: Remove shards that lie in the folder instead of refusing.

    Returns:
        Paths of the shards written.

    Raises:
        DataError: The folder has shards already or cannot be written, a key is not allowed or is
            met twice, an extension is no media file's, a question is no JSON, or a shard may hold
            none.
    """
    if samples_per_shard < 1:
        raise DataError(
            f"{folder}: no samples per shard, got {samples_per_shard}, expected at least 1; "
            "correct it"
        )
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        present, unread = list_shards(target)
        if present and not overwrite:
            got = f"got {present[0].name}, expected none"
            raise DataError(
                f"{target}: the folder has shards already, {got}; name another folder or overwrite"
            )
        for name, problem in unread.items():
            if not OWN_LEFTOVER.fullmatch(name):
                raise DataError(problem)
            (target / name).unlink()  # of a writer that was killed
        written = _write_aside(target, samples, samples_per_shard)
        # A folder that is left half done from here on holds unfinished shards, so nobody reads it.
        for shard in present:
            sidecar_path(shard).unlink(missing_ok=True)
            shard.unlink()
        for shard in written:
            sidecar_path(_aside(shard)).replace(sidecar_path(shard))
            _aside(shard).replace(shard)
    except OSError as error:
        advice = "make room there, or name another folder"
        raise DataError(f"{target}: the shards cannot be written ({error}); {advice}") from error
    return written


def _write_aside(
    folder: Path, samples: Iterable[ShardSample], samples_per_shard: int
) -> list[Path]:
    """Write all shards with their indexes aside, or none, and return their names to be."""
    written: list[Path] = []
    try:
        for number, batch in enumerate(_batches(folder, samples, samples_per_shard)):
            written.append(folder / f"shard-{number:06d}.tar")
            _write_shard(_aside(written[-1]), batch)
    except BaseException:
        for shard in written:
            _aside(shard).unlink(missing_ok=True)
            sidecar_path(_aside(shard)).unlink(missing_ok=True)
        raise
    return written


def _aside(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}{UNFINISHED_SUFFIX}")


def _batches(
    folder: Path, samples: Iterable[ShardSample], samples_per_shard: int
) -> Iterator[list[ShardSample]]:
    """Yield the samples of each shard."""
    seen: set[str] = set()
    batch: list[ShardSample] = []
    num_bytes = 0
    for sample in samples:
        _check_sample(folder, sample, seen)
        batch.append(sample)
        num_bytes += sum(len(content) for _, content in sample.media)
        if len(batch) == samples_per_shard or num_bytes >= MAX_SHARD_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _check_sample(folder: Path, sample: ShardSample, seen: set[str]) -> None:
    where = f"{folder}:{shown(sample.key)}"
    if not KEY.fullmatch(sample.key) or not is_usable_key(sample.key):
        expected = "printable text without dots, spaces and a leading slash"
        got = f"got {shown(sample.key)!r}"
        raise DataError(f"{folder}: key is not allowed, {got}, expected {expected}; rename it")
    if sample.key in seen:
        raise DataError(
            f"{folder}: key is used twice, got {sample.key!r}; give every sample its own"
        )
    seen.add(sample.key)
    for extension, _ in sample.media:
        named = split_name(f"{sample.key}.{extension}")
        if media_kind(extension) is None or named != (sample.key, extension):
            got = f"got {shown(extension)!r}, expected jpg, 0.png, mp4 or the like, in lower case"
            raise DataError(f"{where}: extension is no media file's, {got}; convert it")


def _write_shard(path: Path, samples: Sequence[ShardSample]) -> None:
    """Write one shard and its index."""
    checksums = {}
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for sample in samples:
            for extension, data in (("json", _question_json(path, sample)), *sample.media):
                info = tarfile.TarInfo(f"{sample.key}.{extension}")
                info.size = len(data)
                info.mode = 0o644
                archive.addfile(info, io.BytesIO(data))
                checksums[sample.key, extension] = zlib.crc32(data)
    index = scan_tar(path)
    with_checksums = {
        key: tuple(replace(each, crc32=checksums[key, each.extension]) for each in members)
        for key, members in index.samples.items()
    }
    write_sidecar(path, replace(index, samples=with_checksums))


def _question_json(shard: Path, sample: ShardSample) -> bytes:
    try:
        fields = dict(sample.question)
        return json.dumps(fields, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        where, detail = f"{shard.parent}:{shown(sample.key)}", shown(str(error))
        raise DataError(
            f"{where}: the question cannot be written as JSON ({detail}); correct it"
        ) from error


class ShardReader:
    """Reads any member of any shard by (shard, key); safe to use from several threads."""

    def __init__(self) -> None:
        self._indexes: dict[str, TarIndex] = {}
        self._descriptors: dict[str, int] = {}

    def index(self, shard: str) -> TarIndex:
        """Return the index of a shard, loaded at the first use.

        Raises:
            DataError: The shard is missing or no tar archive.
        """
        index = self._indexes.get(shard)
        if index is None:
            index = self._indexes[shard] = load_index(Path(shard))
        return index

    def question(self, shard: str, key: str) -> Question:
        """Return the question of one sample.

        Raises:
            SampleError: The sample breaks a rule of the format.
            DataError: The shard or the key is missing.
        """
        members = self._members(shard, key)
        content = None
        for member in members:
            if member.extension != "json":
                # The name decides whether the question has a picture.
                self._read_checked(shard, key, member, 0)
            elif member.size <= MAX_QUESTION_BYTES:
                content = self._read(shard, key, member)
            else:
                got = f"got {member.size} bytes, expected at most {MAX_QUESTION_BYTES}"
                message = f"{shard}:{shown(key)}: KEY.json is too large, {got}; shorten it"
                raise SampleError("bad_json", message)
        if content is None:
            got = shown(", ".join(member.extension for member in members))
            got = f"got members {got}, expected json"
            message = f"{shard}:{shown(key)}: the sample has no question, {got}; add it"
            raise SampleError("missing_json", message)
        return parse_question(shard, key, content, [member.extension for member in members])

    def media_bytes(self, ref: MediaRef) -> bytes:
        """Return the content of a media file, undecoded.

        Raises:
            DataError: The shard, the key or the file is missing.
        """
        return self._read(ref.shard, ref.key, self._member(ref))

    def media_size(self, ref: MediaRef) -> int:
        """Return the size of a media file in bytes without reading it."""
        return self._member(ref).size

    def close(self) -> None:
        """Close the shards held open; the next read opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def _member(self, ref: MediaRef) -> Member:
        for member in self._members(ref.shard, ref.key):
            if member.extension == ref.extension:
                return member
        where, expected = f"{ref.shard}:{shown(ref.key)}", shown(ref.extension)
        raise SampleError(
            "missing_media", f"{where}: media file is missing, expected {expected}; add it"
        )

    def _members(self, shard: str, key: str) -> tuple[Member, ...]:
        members = self.index(shard).samples.get(key)
        if members is None:
            advice = "the shard was changed since, restore it"
            raise DataError(f"{shard}: no sample of that key, got {shown(key)!r}; {advice}")
        return members

    def _read(self, shard: str, key: str, member: Member) -> bytes:
        """Return the content of a member whose header and checksum are those of the index."""
        content = self._read_checked(shard, key, member, member.size)
        if member.crc32 is not None and (found := zlib.crc32(content)) != member.crc32:
            got = f"got checksum {found}, expected {member.crc32} as in the index"
            where = f"{shard}:{shown(key)}.{shown(member.extension)}"
            raise DataError(f"{where}: the content is damaged, {got}; copy the shard anew")
        return content

    def _read_checked(self, shard: str, key: str, member: Member, size: int) -> bytes:
        """Return the first `size` bytes of a member after a look at its header."""
        start = member.offset - BLOCK
        descriptor = self._descriptors.get(shard)
        if descriptor is not None:
            content = read_at(shard, descriptor, BLOCK + size, start)
        else:
            descriptor = open_regular(shard)
            try:
                content = read_at(shard, descriptor, BLOCK + size, start)
            finally:
                # Beyond the limit a shard is opened for each read: closing one here could take it
                # from another thread.
                if (
                    len(self._descriptors) >= MAX_OPEN_SHARDS
                    or self._descriptors.setdefault(shard, descriptor) != descriptor
                ):
                    os.close(descriptor)
        where = f"{shard}:{shown(key)}.{shown(member.extension)}"
        check_header(where, content[:BLOCK], key, member, is_plain=self.index(shard).is_plain)
        if len(content) != BLOCK + size:
            got = f"got {len(content) - BLOCK} of {size} bytes"
            raise DataError(f"{where}: the shard ends inside the file, {got}; copy it anew")
        return content[BLOCK:]


class SampleKeys(Sequence[tuple[str, str]]):
    """All `(shard, key)` of a folder in fixed order, without a list of pairs in memory."""

    def __init__(self, keys: dict[str, list[str]]) -> None:
        self._shards = list(keys)
        self._keys = list(keys.values())
        self._ends = list(accumulate(map(len, self._keys)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> tuple[str, str]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[str, str]]: ...
    def __getitem__(self, index: int | slice) -> tuple[str, str] | list[tuple[str, str]]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"SampleKeys: index {index} of {len(self)} samples")
        shard = bisect_right(self._ends, position)
        keys = self._keys[shard]
        return self._shards[shard], keys[position - self._ends[shard] + len(keys)]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for shard, keys in zip(self._shards, self._keys, strict=True):
            for key in keys:
                yield shard, key


class ShardFolder:
    """One source: all shards of a folder, in the order of their names."""

    def __init__(self, path: str | Path, reader: ShardReader | None = None) -> None:
        """Load the indexes.

        Args:
            path: The folder. It is kept as given inside media references, so that these fit after a
                restart from the same working directory.
            reader: Shared between the sources of a run.

        Raises:
            DataError: The folder is missing or has no shard, a file looks like a shard and cannot
                be read, or a shard is no whole tar archive or not what its index says.
        """
        self.path = Path(path)
        self.reader = reader or ShardReader()
        paths, unread = list_shards(self.path)
        if unread:
            raise DataError(next(iter(unread.values())))
        if not paths:
            raise DataError(f"{self.path}: no shards, got an empty folder, {EXPECTED_SHARDS}")
        shards = [str(path) for path in paths]
        self._keys = SampleKeys({shard: list(self.reader.index(shard).samples) for shard in shards})
        self.shards: tuple[str, ...] = tuple(shards)

    def keys(self) -> SampleKeys:
        """Return `(shard, key)` of every sample in fixed order."""
        return self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def question(self, shard: str, key: str) -> Question:
        """Return the question of one sample; see `ShardReader.question`."""
        return self.reader.question(shard, key)

    def media_bytes(self, ref: MediaRef) -> bytes:
        """Return the content of a media file; see `ShardReader.media_bytes`."""
        return self.reader.media_bytes(ref)

    def fingerprint(self) -> str:
        """Return a digest of shard names, sizes and keys: another one means that the data were
        changed.
        """
        digest = hashlib.blake2b(digest_size=16)
        for shard in self.shards:
            index = self.reader.index(shard)
            digest.update(f"{Path(shard).name}\0{index.tar_size}\0".encode())
            digest.update("\0".join(index.samples).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()
