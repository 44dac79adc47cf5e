"""The bookkeeping of the cache's blocks: none is lost, none belongs to two."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo_mm.models.layers.blocks import BlockTable, Moves
from zppo_mm.models.layers.cache import Admission, DecodeCache

SLOTS, GROUPS, DIM, MAX_ROWS, MAX_BLOCKS = 3, 2, 4, 6, 24


@settings(deadline=None)
@given(st.data(), st.integers(0, 12))
def test_gaps_are_closed_by_the_last_ones(data: st.DataObject, size: int) -> None:
    gone = data.draw(st.lists(st.integers(0, size - 1), unique=True)) if size else []
    moves = Moves.closing_gaps(np.array(gone, np.int64), size)
    assert not set(moves.sources) & set(moves.targets)
    held = list(range(size))
    for target, source in zip(moves.targets, moves.sources, strict=True):
        held[target] = source
    assert sorted(held[: size - len(gone)]) == sorted(set(range(size)) - set(gone))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_block_has_one_owner_and_keeps_its_content(data: st.DataObject) -> None:
    """A list of blocks' contents follows the moves; each owner finds its own content in order."""
    table, memory, owners = BlockTable(), [""] * 100, []
    for event in range(12):
        action = data.draw(st.sampled_from(["add", "extend", "remove"]))
        if action == "add":
            owner = [f"{event}/{number}" for number in range(data.draw(st.integers(0, 3)))]
            owners.append(owner)
            for block, content in zip(table.add(len(owner)), owner, strict=True):
                memory[block] = content
        elif owners:
            chosen = sorted(data.draw(st.sets(st.integers(0, len(owners) - 1))))
            if action == "extend":
                for number, block in zip(chosen, table.extend(np.array(chosen, int)), strict=True):
                    owners[number].append(f"{event}/{number}")
                    memory[block] = owners[number][-1]
            else:
                rows, blocks = table.remove(np.array(chosen, int))
                for held, moves in ((owners, rows), (memory, blocks)):
                    for target, source in zip(moves.targets, moves.sources, strict=True):
                        held[target] = held[source]
                del owners[len(owners) - len(chosen) :]
        assert table.num_owners == len(owners)
        assert table.num_blocks == sum(map(len, owners))
        used = [table.table[number, :count].tolist() for number, count in enumerate(table.counts)]
        assert sorted(block for blocks in used for block in blocks) == list(range(table.num_blocks))
        assert [[memory[block] for block in blocks] for blocks in used] == owners
        assert all(table.owners[block] == n for n, blocks in enumerate(used) for block in blocks)


class Writer:
    """Fills a cache with keys that say whose they are, as an attention layer and a DeltaNet layer
    would.
    """

    def __init__(self) -> None:
        self.cache = DecodeCache(MAX_BLOCKS, MAX_ROWS, SLOTS)
        self.rows: list[tuple[str, list[float]]] = []
        self.prompts: dict[str, list[float]] = {}
        self.next = 0.0

    def values(self, count: int) -> list[float]:
        self.next += count
        return [self.next - count + number for number in range(count)]

    def prefill(self, name: str, num_prompt: int, num_own: int, num_rows: int) -> None:
        prompt, own = self.values(num_prompt), self.values(num_own)
        written = torch.tensor(prompt + own)
        lengths = torch.tensor([0, len(written)], dtype=torch.int32)
        self.cache.begin(lengths, [Admission(name, num_prompt, num_rows)], torch.float32)
        self.prompts.setdefault(name, prompt)
        key = written[:, None, None].expand(-1, GROUPS, DIM)
        self.cache.store_attention(1, key, -key)
        inputs = torch.full((1, 2, DIM), self.next)
        self.cache.store_linear(2, (0,), inputs, torch.full((1, GROUPS, DIM, DIM), self.next))
        self.rows += [(name, list(own), self.next) for _ in range(num_rows)]

    def step(self) -> None:
        self.cache.extend(torch.device("cpu"))
        new = torch.tensor([self.values(1)[0] for _ in self.rows])
        for (_, own, _), value in zip(self.rows, new.tolist(), strict=True):
            own.append(value)
        blocks, slots = self.cache.tail
        for held, sign in zip(self.cache.attention[1], (1, -1), strict=True):
            held[blocks, :, slots] = sign * new[:, None, None].expand(-1, GROUPS, DIM)
        self.cache.step += 1

    def release(self, chosen: list[int]) -> None:
        moves = self.cache.release(np.array(chosen, int))
        for target, source in zip(moves.targets, moves.sources, strict=True):
            self.rows[target] = self.rows[source]
        del self.rows[len(self.rows) - len(chosen) :]
        kept = {name for name, _, _ in self.rows}
        self.prompts = {name: held for name, held in self.prompts.items() if name in kept}

    def check(self) -> None:
        """Every row finds its prompt and its own tokens, nothing else, in the blocks it reads."""
        cache, reads = self.cache, self.cache.reads
        held = cache.attention[1][0, :, 0, :, 0].masked_fill(cache.empty < 0, -1.0)
        first, width = reads.first_prompt_block, reads.prompts.width
        results = reads.results.view(len(self.rows), -1).tolist()
        for row, (name, own, left) in enumerate(self.rows):
            blocks = []
            for part, result in enumerate(results[row]):
                if reads.no_part is not None and reads.no_part[row, part] < 0:
                    continue
                if result < len(reads.queries):
                    assert reads.queries[result] == row
                    blocks.append(result)
                else:
                    block, member = divmod(result - len(reads.queries), width)
                    queries = reads.prompts.queries.view(-1, GROUPS, width)[block, :, member]
                    assert queries.tolist() == [row * GROUPS + group for group in range(GROUPS)]
                    blocks.append(first + block)
            found = [value for block in blocks for value in held[block].tolist() if value >= 0]
            assert sorted(found) == sorted(self.prompts[name] + own)
            assert cache.linear[2].state[row].unique().tolist() == [left]
        used = MAX_BLOCKS - cache.num_free_blocks
        sizes = [*map(len, self.prompts.values()), *(len(own) for _, own, _ in self.rows)]
        assert used == sum(map(cache.blocks_of, sizes))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_rows_keep_their_tokens_while_others_come_and_go(data: st.DataObject) -> None:
    writer = Writer()
    for event in range(10):
        free_rows = MAX_ROWS - len(writer.rows)
        num_prompt = data.draw(st.integers(1, 7))
        names = [*writer.prompts, f"new {event}"]
        name = data.draw(st.sampled_from(names))
        num_prompt = len(writer.prompts.get(name, [0] * num_prompt))
        num_rows = data.draw(st.integers(1, 3))
        num_own = data.draw(st.integers(0, 4)) if num_rows == 1 else 0
        needed = writer.cache.blocks_of(num_prompt) + writer.cache.blocks_of(num_own)
        if num_rows <= free_rows and needed <= writer.cache.num_free_blocks:
            writer.prefill(name, num_prompt, num_own, num_rows)
        while writer.rows and writer.cache.num_missing_blocks > 0:
            writer.release([len(writer.rows) - 1])
        if not writer.rows:
            continue
        writer.step()
        writer.check()
        writer.release(sorted(data.draw(st.sets(st.integers(0, len(writer.rows) - 1)))))
        assert 0 <= writer.cache.num_free_blocks <= MAX_BLOCKS
