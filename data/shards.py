"""Webdataset shards: read any sample by (shard, key)."""

from __future__ import annotations

import hashlib
import zlib
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import overload

from data.errors import DataError, SampleError, shown
from data.files import LOCAL, LocalFiles, OpenFile
from data.question import ANSWER_TYPES, MediaRef, Question
from data.sample import parse_question
from data.shard_names import EXPECTED_SHARDS, list_shards
from data.tar_index import Member, TarIndex, check_header, load_index
from data.tar_members import BLOCK, read_at

MAX_OPEN_SHARDS = 256
MAX_QUESTION_BYTES = 1 << 24


class ShardReader:
    """Reads any member of any shard by (shard, key); safe to use from several threads.

    Args:
        answer_types: Those that can be graded; other questions are bad samples.
        files: Open the shards; by default those of this machine.
    """

    def __init__(
        self, answer_types: Collection[str] = ANSWER_TYPES, files: LocalFiles = LOCAL
    ) -> None:
        self._answer_types = answer_types
        self.files = files
        self._indexes: dict[str, TarIndex] = {}
        self._opened: dict[str, OpenFile] = {}

    def index(self, shard: str) -> TarIndex:
        """Return the index of a shard, loaded at the first use.

        Raises:
            DataError: The shard is missing or not a tar archive.
        """
        index = self._indexes.get(shard)
        if index is None:
            index = self._indexes[shard] = load_index(Path(shard), self.files)
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
        extensions = [member.extension for member in members]
        return parse_question(shard, key, content, extensions, self._answer_types)

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
        self._opened.clear()

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
            raise DataError(f"{where}: the content is damaged, {got}; copy the shard again")
        return content

    def _read_checked(self, shard: str, key: str, member: Member, size: int) -> bytes:
        """Return the first `size` bytes of a member after a check of its header."""
        start = member.offset - BLOCK
        held = self._held(shard)  # stays open as long as this name has it
        content = read_at(shard, held.descriptor, BLOCK + size, start)
        where = f"{shard}:{shown(key)}.{shown(member.extension)}"
        check_header(where, content[:BLOCK], key, member, is_plain=self.index(shard).is_plain)
        if len(content) != BLOCK + size:
            got = f"got {len(content) - BLOCK} of {size} bytes"
            raise DataError(f"{where}: the shard ends inside the file, {got}; copy it again")
        return content[BLOCK:]

    def _held(self, shard: str) -> OpenFile:
        held = self._opened.get(shard)
        if held is not None and self.files.is_current(held):
            return held
        opened = self.files.hold(shard)
        # Beyond the limit a shard is opened for each read.
        if opened.stays_open and (held or len(self._opened) < MAX_OPEN_SHARDS):
            self._opened[shard] = opened
        return opened


class SampleKeys(Sequence[tuple[str, str]]):
    """All `(shard, key)` of a source in fixed order, without a list of pairs in memory."""

    def __init__(self, keys: Mapping[str, Sequence[str]]) -> None:
        self._shards = list(keys)
        self._keys: list[Sequence[str]] = list(keys.values())
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
                be read, or a shard is not a complete tar archive or not what its index says.
        """
        self.path = Path(path)
        self.reader = reader or ShardReader()
        paths, unread = list_shards(self.path, self.reader.files)
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
