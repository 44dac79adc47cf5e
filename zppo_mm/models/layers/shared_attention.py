"""Attention of one token per sequence, where sequences share prompts.

The keys of a prompt are read once for all its sequences, whose queries become the tokens
of one; each sequence's own keys are read apart. A softmax over both is the mean of two
softmaxes, weighted by their sums of exponentials. Only the CPU's kernel
returns these sums; elsewhere each sequence gets a copy of its prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

MIN_SAVED_SLOTS = 2000
"""What sharing has to save, in keys read by one sequence, to be worth its calls."""
COST_OF_PROMPT, COST_OF_SEQUENCE = 0.7, 0.3
"""A prompt's key read by n sequences together costs about 0.7 + 0.3 n of one that is read alone
(benchmarks/decode_attention.py).
"""


def is_worth_sharing(owners: Sequence[int], slots: int, device: torch.device) -> bool:
    """Return whether reading prompts once takes less time than reading a copy per sequence.

    Args:
        owners: The prompt of each sequence.
        slots: Tokens of the longest prompt.
        device: The network's.
    """
    if device.type != "cpu":
        return False
    sizes = Counter(owners).values()
    saved = len(owners) - len(sizes) * (COST_OF_PROMPT + COST_OF_SEQUENCE * max(sizes))
    return saved * slots >= MIN_SAVED_SLOTS


def prompt_mask(
    lengths: Sequence[int], slots: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor | None:
    """Return `[prompts, 1, 1, slots]`, minus infinity before a prompt begins, else 0; `None` if all
    begin at slot 0.

    Prompts end together, at the slot that the longest one ends at.
    """
    if len(set(lengths)) == 1:
        return None
    empty = (
        torch.arange(slots, device=device)
        < torch.tensor([max(lengths) - length for length in lengths], device=device)[:, None]
    )
    return torch.zeros(empty.shape, device=device, dtype=dtype).masked_fill_(empty, float("-inf"))[
        :, None, None
    ]


@dataclass(frozen=True, slots=True)
class PromptGroups:
    """Which sequences of a batch share which prompt.

    Attributes:
        rows: `[prompts * width]` int64, the sequences of each prompt; groups smaller than the
            widest are filled with any sequence.
        inverse: `[batch]` int64, the index of each sequence in `rows`.
        num_prompts: Prompts, each with at least one sequence.
        mask: See `prompt_mask`.
    """

    rows: torch.Tensor
    inverse: torch.Tensor
    num_prompts: int
    mask: torch.Tensor | None

    @staticmethod
    def build(
        owners: Sequence[int], lengths: Sequence[int], device: torch.device, dtype: torch.dtype
    ) -> PromptGroups:
        """Arrange a batch.

        Args:
            owners: The prompt of each sequence, `[batch]`.
            lengths: Tokens of each prompt.
            device: The network's.
            dtype: The network's.
        """
        members: list[list[int]] = [[] for _ in lengths]
        for row, owner in enumerate(owners):
            members[owner].append(row)
        width = max(map(len, members))
        rows = [row for group in members for row in group + [0] * (width - len(group))]
        inverse = [0] * len(owners)
        for owner, group in enumerate(members):
            for slot, row in enumerate(group):
                inverse[row] = owner * width + slot
        arranged, back = (
            torch.tensor(indices, dtype=torch.int64, device=device) for indices in (rows, inverse)
        )
        return PromptGroups(
            arranged, back, len(lengths), prompt_mask(lengths, max(lengths), device, dtype)
        )

    def gather(self, queries: torch.Tensor) -> torch.Tensor:
        """Bring `[batch, groups, heads, head_dim]` to `[prompts, groups, width * heads,
        head_dim]`.
        """
        _, groups, heads, dim = queries.shape
        rows = queries.index_select(0, self.rows).view(self.num_prompts, -1, groups, heads, dim)
        return rows.transpose(1, 2).reshape(self.num_prompts, groups, -1, dim)

    def scatter(self, values: torch.Tensor, heads: int) -> torch.Tensor:
        """Bring `[prompts, groups, width * heads, channels]` back to `[batch, groups, heads,
        channels]`.
        """
        prompts, groups, _, channels = values.shape
        rows = (
            values.view(prompts, groups, -1, heads, channels)
            .transpose(1, 2)
            .reshape(-1, groups, heads, channels)
        )
        return rows.index_select(0, self.inverse)


def attend(
    queries: torch.Tensor,
    prompt: tuple[torch.Tensor, torch.Tensor],
    own: tuple[torch.Tensor, torch.Tensor],
    prompts: PromptGroups,
) -> torch.Tensor:
    """Attend to the prompts and to the sequences' own tokens.

    Args:
        queries: `[batch, groups, heads, head_dim]`, the query heads of one KV head.
        prompt: Keys and values of the prompts, each `[prompts, groups, slots, head_dim]`.
        own: Keys and values of the sequences' tokens after their prompts, each `[batch, groups,
            tokens, head_dim]`, at least one token.
        prompts: Which sequences share which prompt.

    Returns:
        `[batch, groups, heads, head_dim]`.
    """
    heads = queries.shape[2]
    from_prompt, prompt_sum = softmax_read(prompts.gather(queries), *prompt, prompts.mask)
    from_own, own_sum = softmax_read(queries, *own, None)
    weight = torch.sigmoid(own_sum[..., None] - prompts.scatter(prompt_sum[..., None], heads))
    return torch.lerp(prompts.scatter(from_prompt, heads).float(), from_own.float(), weight).to(
        queries.dtype
    )


def softmax_read(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend, and return the log-sum-exp of the scores too.

    Args:
        queries: `[batch, groups, tokens, head_dim]`.
        keys: `[batch, groups, slots, head_dim]`.
        values: Like `keys`.
        mask: `[batch, 1, 1, slots]`, added to the scores; `None` adds nothing.

    Returns:
        What was read, like `queries`, and the logarithm of each softmax's sum of exponentials,
        float32 `[batch, groups, tokens]`.
    """
    whole = None if mask is None else mask.expand(-1, *queries.shape[1:3], -1)
    # The kernel behind scaled_dot_product_attention; the public function does not return the sums.
    read, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, keys, values, attn_mask=whole
    )
    return read, sums
