"""Prefix groups: a prompt with some of its responses, which share one forward pass over the prompt;
their balance over replicas and their bins, the micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import sub

from zppo_mm.experience import TrainingSample

Indices = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Samples that share one forward pass over their prompt.

    Attributes:
        uid: Group of the samples, whose media the replica that has them opens.
        owner: What the samples have in common: their uid, or the sample itself where prompts are
            not shared.
        prompt_tokens: Of the one prompt.
        num_patches: Of the prompt's media.
        response_tokens: By sample index.
    """

    uid: str
    owner: str | int
    prompt_tokens: int
    num_patches: int
    response_tokens: dict[int, int]

    @property
    def num_tokens(self) -> int:
        """Tokens of the forward pass, the prompt's counted once."""
        return self.prompt_tokens + sum(self.response_tokens.values())

    @property
    def longest_sample(self) -> int:
        """Tokens of the prompt and the longest response."""
        return self.prompt_tokens + max(self.response_tokens.values())

    def keep(self, indices: Iterable[int]) -> PrefixGroup:
        """Return the prefix group with some of its samples."""
        return replace(
            self, response_tokens={index: self.response_tokens[index] for index in indices}
        )

    def fits(self, other: PrefixGroup, max_tokens: int) -> bool:
        """Return whether the two have their prompt in common and together at most `max_tokens`."""
        return (
            self.owner == other.owner
            and self.num_tokens + other.num_tokens - self.prompt_tokens <= max_tokens
        )

    def join(self, other: PrefixGroup) -> PrefixGroup:
        """Return one prefix group of the two."""
        return replace(self, response_tokens=self.response_tokens | other.response_tokens)


def make_prefix_groups(
    samples: Sequence[TrainingSample], members: Iterable[int], max_tokens: int, share_prompts: bool
) -> list[PrefixGroup]:
    """Form prefix groups: whole groups as far as they fit a micro-batch, or single samples where
    prompts are not shared.

    Args:
        samples: Of the whole step.
        members: Indices of those to form prefix groups of.
        max_tokens: Most tokens of a prefix group of several samples.
        share_prompts: Whether samples of one uid, whose prompts are equal, share one copy of it.
    """
    prefix_groups: dict[str | int, PrefixGroup] = {}
    for index in members:
        sample = samples[index]
        owner = sample.uid if share_prompts else index
        response = {index: sample.num_tokens - sample.num_prompt_tokens}
        alone = PrefixGroup(
            sample.uid, owner, sample.num_prompt_tokens, sample.num_patches, response
        )
        prefix_groups[owner] = prefix_groups[owner].join(alone) if owner in prefix_groups else alone
    return [
        prefix_group.keep(bin)
        for prefix_group in prefix_groups.values()
        for bin in fill(
            {index: (length,) for index, length in prefix_group.response_tokens.items()},
            (max_tokens - prefix_group.prompt_tokens,),
        )
    ]


def balance(
    prefix_groups: Sequence[PrefixGroup], num_replicas: int, max_tokens: int
) -> list[list[PrefixGroup]]:
    """Spread whole groups over replicas: the largest first, always to the replica with the fewest
    tokens.

    A group is divided, and its media opened by two replicas, only where the totals of two would
    otherwise differ by more than the longest sample; so they never do. As long as the longest
    sample is shorter than that difference, moving any one of the heavier replica's samples leaves
    both below what the heavier had, so this ends.

    Args:
        prefix_groups: What to spread.
        num_replicas: Data-parallel size.
        max_tokens: Up to which parts of a group that meet on a replica become one prefix group
            again.
    """
    replicas: list[list[PrefixGroup]] = [[] for _ in range(num_replicas)]
    totals = [0] * num_replicas
    by_uid: dict[str, list[PrefixGroup]] = {}
    for prefix_group in prefix_groups:
        by_uid.setdefault(prefix_group.uid, []).append(prefix_group)
    # The sort is stable: those of one size come in the order of their samples.
    for same in sorted(by_uid.values(), key=_num_tokens, reverse=True):
        lightest = min(range(num_replicas), key=totals.__getitem__)
        replicas[lightest] += same
        totals[lightest] += _num_tokens(same)
    longest = max((prefix_group.longest_sample for prefix_group in prefix_groups), default=0)
    while (difference := max(totals) - min(totals)) > longest:
        heaviest, lightest = totals.index(max(totals)), totals.index(min(totals))
        largest = max(replicas[heaviest], key=lambda prefix_group: prefix_group.num_tokens)
        replicas[heaviest].remove(largest)
        kept, moved = _divide(largest, (difference - largest.prompt_tokens) // 2)
        for prefix_group in kept:
            _add(replicas[heaviest], prefix_group, max_tokens)
        _add(replicas[lightest], moved, max_tokens)
        totals = [_num_tokens(replica) for replica in replicas]
    return replicas


def _num_tokens(prefix_groups: Iterable[PrefixGroup]) -> int:
    return sum(prefix_group.num_tokens for prefix_group in prefix_groups)


def _divide(prefix_group: PrefixGroup, room: int) -> tuple[list[PrefixGroup], PrefixGroup]:
    """Return what stays of a prefix group, if anything, and what goes: the longest responses that
    have room, or the shortest one.
    """
    by_length = sorted(
        prefix_group.response_tokens,
        key=lambda index: (-prefix_group.response_tokens[index], index),
    )
    moved = []
    for index in by_length:
        if prefix_group.response_tokens[index] <= room:
            room -= prefix_group.response_tokens[index]
            moved.append(index)
    moved = moved or by_length[-1:]
    kept = [index for index in by_length if index not in moved]
    return [prefix_group.keep(kept)] if kept else [], prefix_group.keep(moved)


def _add(replica: list[PrefixGroup], prefix_group: PrefixGroup, max_tokens: int) -> None:
    """Add to a replica; parts of a group that fit a micro-batch together become one, so that no
    prompt is counted twice in it.
    """
    for number, other in enumerate(replica):
        if other.fits(prefix_group, max_tokens):
            replica[number] = other.join(prefix_group)
            return
    replica.append(prefix_group)


def fill_microbatches(
    prefix_groups: Sequence[PrefixGroup], max_tokens: int, max_patches: int
) -> tuple[Indices, ...]:
    """Return the sample indices of few micro-batches that together hold the prefix groups, each
    within both limits or with one prefix group.
    """
    bins = fill(
        {
            number: (prefix_group.num_tokens, prefix_group.num_patches)
            for number, prefix_group in enumerate(prefix_groups)
        },
        (max_tokens, max_patches),
    )
    # In sample order, the rollouts of a group are adjacent and share their media in the source's
    # cache.
    return tuple(
        sorted(
            tuple(
                sorted(index for number in bin for index in prefix_groups[number].response_tokens)
            )
            for bin in bins
        )
    )


def fill(sizes: Mapping[int, tuple[int, ...]], limits: tuple[int, ...]) -> list[list[int]]:
    """Pack things into few bins: the largest first, always into the first that has room.

    Args:
        sizes: By index, the tokens and whatever else is limited.
        limits: Room of a bin for each of these; what is larger is alone in one.
    """

    def fraction(index: int) -> float:
        """Return how much of a bin it takes, by what it takes most of."""
        return max(size / max(limit, 1) for size, limit in zip(sizes[index], limits, strict=True))

    bins: list[list[int]] = []
    rooms: list[tuple[int, ...]] = []
    for index in sorted(sizes, key=lambda i: (-fraction(i), i)):
        for number, room in enumerate(rooms):
            left = tuple(map(sub, room, sizes[index]))
            if min(left) >= 0:
                bins[number].append(index)
                rooms[number] = left
                break
        else:
            bins.append([index])
            rooms.append(tuple(map(sub, limits, sizes[index])))
    return bins
