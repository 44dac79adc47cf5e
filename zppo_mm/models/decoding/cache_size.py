"""How much memory the decoding cache takes, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

from zppo_mm.errors import ConfigError
from zppo_mm.models.families.architecture import Architecture
from zppo_mm.models.layers.cache import SLOTS_PER_BLOCK

STATE_BYTES = 4
"""DeltaNet states are float32."""
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class CacheSize:
    """Bytes of the decoding cache on one GPU of every pipeline stage.

    Attributes:
        block_bytes: Of one block, per stage.
        row_bytes: DeltaNet states of one row, per stage.
        slots_per_block: Tokens of a block.
    """

    block_bytes: tuple[int, ...]
    row_bytes: tuple[int, ...]
    slots_per_block: int

    @staticmethod
    def of(
        architecture: Architecture,
        tensor: int,
        pipeline: int,
        element_bytes: int,
        slots_per_block: int = SLOTS_PER_BLOCK,
    ) -> CacheSize:
        """Count what the layers of each stage keep.

        Args:
            architecture: Of the network.
            tensor: Tensor-parallel ranks.
            pipeline: Pipeline stages.
            element_bytes: Of a key's element.
            slots_per_block: Tokens of a block.
        """
        per_stage = architecture.num_layers // pipeline
        stages = [
            architecture.layer_types[first : first + per_stage]
            for first in range(0, architecture.num_layers, per_stage)
        ]
        slot = 2 * architecture.num_query_groups // tensor * architecture.head_dim * element_bytes
        heads = architecture.linear_num_value_heads // tensor
        state = heads * architecture.linear_key_head_dim * architecture.linear_value_head_dim
        channels = (
            2 * architecture.linear_num_key_heads * architecture.linear_key_head_dim
            + architecture.linear_num_value_heads * architecture.linear_value_head_dim
        ) // tensor
        row = state * STATE_BYTES + architecture.linear_conv_kernel_dim * channels * element_bytes
        return CacheSize(
            tuple(stage.count("full_attention") * slot * slots_per_block for stage in stages),
            tuple(stage.count("linear_attention") * row for stage in stages),
            slots_per_block,
        )

    def blocks_of(self, num_tokens: int) -> int:
        """Return the blocks that hold so many tokens."""
        return -(-num_tokens // self.slots_per_block)

    def num_blocks(self, budget: int, num_rows: int) -> int | None:
        """Return the blocks that fit the stage with the least room; `None` if blocks take nothing.

        Args:
            budget: Bytes for the cache on each GPU.
            num_rows: Rows whose states it holds as well; the result is below 0 if these do not fit.
        """
        return min(
            (
                (budget - num_rows * row) // block
                for block, row in zip(self.block_bytes, self.row_bytes, strict=True)
                if block
            ),
            default=None,
        )

    def num_bytes(self, num_blocks: int, num_rows: int) -> int:
        """Return the bytes on the fullest stage."""
        return max(
            num_blocks * block + num_rows * row
            for block, row in zip(self.block_bytes, self.row_bytes, strict=True)
        )

    def needed_bytes(self, num_rows: int, prompt_tokens: int, new_tokens: int) -> int:
        """Return the bytes on the fullest stage with one prompt and response of these lengths.

        Args:
            num_rows: Most rows of the batch.
            prompt_tokens: Of the prompt.
            new_tokens: Of the response.
        """
        return self.num_bytes(self.blocks_of(prompt_tokens) + self.blocks_of(new_tokens), num_rows)

    def check(self, budget: int, num_rows: int, prompt_tokens: int, new_tokens: int) -> None:
        """Check that the longest sequence fits by itself: then every other one can wait.

        Args:
            budget: Bytes for the cache on each GPU.
            num_rows: Most rows of the batch.
            prompt_tokens: Of the longest prompt.
            new_tokens: Of the longest response.

        Raises:
            ConfigError: It does not fit.
        """
        needed = self.needed_bytes(num_rows, prompt_tokens, new_tokens)
        if needed > budget:
            raise ConfigError(
                "rollout.cache_memory_gib: too little for one sequence, got "
                f"{budget / GIB:.3g} GiB for a prompt of {prompt_tokens} and a response of "
                f"{new_tokens} tokens, and states of {num_rows} rows, expected "
                f"{needed / GIB:.3g} GiB at least; raise it, or lower rollout.max_batch_size, "
                "rollout.max_response_tokens or data.max_prompt_tokens"
            )
