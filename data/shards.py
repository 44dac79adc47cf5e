"""Webdataset shards: write them, and read any sample again by (shard, key)."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import overload

from data.errors import DataError, SampleError
from data.question import MediaRef, Question
from data.sample import ShardSample, media_kind, parse_question
from data.tar_index import BLOCK, Member, TarIndex, header_name, load_index, scan_tar, sidecar_path, write_sidecar

SHARD_PATTERN = "*.tar"
MAX_SHARD_BYTES = 1 << 30
"""A shard with this much media is closed early: its samples are in memory until it is written."""
MAX_OPEN_SHARDS = 256
KEY = re.compile(r"[^\s./][^\s.]*\Z")


def write_shards(
    folder: str | Path, samples: Iterable[ShardSample], samples_per_shard: int = 1000, *, overwrite: bool = False
) -> list[Path]:
    """Write samples as shard-000000.tar, … with an index beside each; the same samples give the same bytes.

    Args:
        folder: Where the shards go; made if it is missing.
        samples: Samples in their order.
        samples_per_shard: Most samples of one shard.
        overwrite: Remove shards that lie in the folder instead of refusing.

    Returns:
        Paths of the shards written.

    Raises:
        DataError: The folder has shards already, a key is not allowed or is met twice, or an extension is no media file's.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    present = sorted(target.glob(SHARD_PATTERN))
    if present and not overwrite:
        raise DataError(f"{target}: the folder has shards already, got {present[0].name}, expected none; name another folder or overwrite")
    for shard in present:
        sidecar_path(shard).unlink(missing_ok=True)
        shard.unlink()
    written: list[Path] = []
    seen: set[str] = set()
    batch: list[ShardSample] = []
    num_bytes = 0
    for sample in samples:
        _check_sample(target, sample, seen)
        batch.append(sample)
        num_bytes += sum(len(content) for _, content in sample.media)
        if len(batch) == samples_per_shard or num_bytes >= MAX_SHARD_BYTES:
            written.append(_write_shard(target / f"shard-{len(written):06d}.tar", batch))
            batch, num_bytes = [], 0
    if batch:
        written.append(_write_shard(target / f"shard-{len(written):06d}.tar", batch))
    return written


def _check_sample(folder: Path, sample: ShardSample, seen: set[str]) -> None:
    if not KEY.fullmatch(sample.key):
        raise DataError(f"{folder}: key is not allowed, got {sample.key!r}, expected no dot, no space and no leading slash; rename it")
    if sample.key in seen:
        raise DataError(f"{folder}: key is used twice, got {sample.key!r}; give every sample its own")
    seen.add(sample.key)
    for extension, _ in sample.media:
        if media_kind(extension) is None or extension != extension.lower() or "/" in extension:
            expected = "jpg, 0.png, mp4 or the like, in lower case"
            raise DataError(f"{folder}:{sample.key}: extension is no media file's, got {extension!r}, expected {expected}; convert it")


def _write_shard(path: Path, samples: Sequence[ShardSample]) -> Path:
    """Write one shard aside, rename it, then write its index."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with tarfile.open(aside, "w", format=tarfile.GNU_FORMAT) as archive:
        for sample in samples:
            content = json.dumps(dict(sample.question), ensure_ascii=False, sort_keys=True).encode()
            for extension, data in (("json", content), *sample.media):
                info = tarfile.TarInfo(f"{sample.key}.{extension}")
                info.size = len(data)
                info.mode = 0o644
                archive.addfile(info, io.BytesIO(data))
    aside.replace(path)
    write_sidecar(path, scan_tar(path))
    return path


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
        for member in members:
            if member.extension == "json":
                content = self._read(shard, key, member)
                return parse_question(shard, key, content, (member.extension for member in members))
        got = ", ".join(member.extension for member in members)
        raise SampleError("missing_json", f"{shard}:{key}: the sample has no question, got members {got}, expected json; add it")

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
        raise SampleError("missing_media", f"{ref.shard}:{ref.key}: media file is missing, expected {ref.extension}; add it")

    def _members(self, shard: str, key: str) -> tuple[Member, ...]:
        members = self.index(shard).samples.get(key)
        if members is None:
            raise DataError(f"{shard}: no sample of that key, got {key!r}; the shard was changed since, restore it")
        return members

    def _read(self, shard: str, key: str, member: Member) -> bytes:
        start = member.offset - BLOCK
        wanted = BLOCK + member.size
        descriptor = self._descriptors.get(shard)
        if descriptor is not None:
            content = _pread(descriptor, wanted, start)
        else:
            descriptor = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
            try:
                content = _pread(descriptor, wanted, start)
            finally:
                # Beyond the limit a shard is opened for each read: closing one here could take it from another thread.
                if len(self._descriptors) >= MAX_OPEN_SHARDS or self._descriptors.setdefault(shard, descriptor) != descriptor:
                    os.close(descriptor)
        name = f"{key}.{member.extension}"
        plain = name.isascii() and len(name) <= 100  # longer and other names lie in an extended header
        if len(content) != wanted or (plain and header_name(content[:BLOCK]).lower() != name.lower()):
            raise DataError(f"{shard}:{name}: the index does not fit the shard, which was changed; remove {shard}.idx.json and start again")
        return content[BLOCK:]


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    content = os.pread(descriptor, size, offset)
    if len(content) == size or not content:
        return content
    # One call reads at most 2 GiB, and network file systems may return less.
    parts = [content]
    while (missing := size - sum(map(len, parts))) > 0 and (more := os.pread(descriptor, missing, offset + size - missing)):
        parts.append(more)
    return b"".join(parts)


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
            path: The folder. It is kept as given inside media references, so that these fit after a restart from the same
                working directory.
            reader: Shared between the sources of a run.

        Raises:
            DataError: The folder is missing, has no shard, or a shard is no tar archive.
        """
        self.path = Path(path)
        self.reader = reader or ShardReader()
        shards = sorted(str(shard) for shard in self.path.glob(SHARD_PATTERN))
        if not shards:
            got = "an empty folder" if self.path.is_dir() else "no folder"
            raise DataError(f"{self.path}: no shards, got {got}, expected *.tar; write some with tools/make_shards.py")
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
        """Return a digest of shard names, sizes and keys: another one means that the data were changed."""
        digest = hashlib.blake2b(digest_size=16)
        for shard in self.shards:
            index = self.reader.index(shard)
            digest.update(f"{Path(shard).name}\0{index.tar_size}\0".encode())
            digest.update("\0".join(index.samples).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()
