"""What becomes of every key of config.json: it is read, it must have the value that is built, or it
does not touch the network.

transformers' configuration classes say which keys there are. A test holds these tables against them
and against what transformers' networks read, so that a key of a newer version is noticed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MEDIA_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
ROPE_SPELLINGS = ("rope_parameters", "rope_scaling")
"""Objects with rotary settings, as transformers 5 and those before it write them."""
ROPE_BESIDE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
"""Rotary settings that may stand beside such an object instead of in it."""
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
"""Must be in the file: transformers' defaults for them are those of one published model."""
LARGEST = 1 << 20
LARGEST_OF = {
    "num_hidden_layers": 1 << 12,
    "depth": 1 << 12,
    "vocab_size": 1 << 31,
    "max_position_embeddings": 1 << 31,
}
"""Sizes beyond these are mistakes; a network of them would be laid out for hours before a weight is
missed.
"""
TOWER_SIZES = (
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "patch_size",
    "temporal_patch_size",
    "spatial_merge_size",
    "num_position_embeddings",
    "window_size",
    "tokens_per_second",
)
"""Of vision_config, in the families that have them."""
READ = frozenset(
    {
        *SIZES,
        *ROPE_SPELLINGS,
        *ROPE_BESIDE,
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "layer_types",
        "full_attention_interval",
        "linear_conv_kernel_dim",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_num_key_heads",
        "linear_num_value_heads",
    }
)
"""Of the language model."""
BUILT: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "attn_output_gate": (True,),
    "output_gate_type": ("swish", "silu", None),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "use_sliding_window": (False, None),
    "sliding_window": (None,),
    "attention_chunk_size": (None,),
}
"""Settings of the language model that have one value here; a file without them has it too."""
BUILT_OUTSIDE: Mapping[str, tuple[Any, ...]] = {"transformers_weights": (None,)}
"""The same of the whole file: transformers would load other weights than those that are read
here.
"""
HARMLESS = frozenset(
    {
        "transformers_version",
        "architectures",
        "model_type",
        "dtype",
        "output_hidden_states",
        "return_dict",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
        "problem_type",
        "initializer_range",
        "use_cache",
        "pretraining_tp",
        # Says from which layer on a sliding window holds, and there is none.
        "max_window_layers",
        # Stop tokens are those of generation_config.json; the embedding's row of padding is a row
        # like any other.
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    }
)
"""Keys that transformers' classes have and that no forward pass depends on."""
READ_OUTSIDE = frozenset({"text_config", "vision_config", "tie_word_embeddings", *MEDIA_TOKENS})
"""Of a file with a vision tower, beside the language model's."""
_NEUTRAL: tuple[Any, ...] = (None, False, 0, 1, [], {})
FOREIGN: Mapping[str, tuple[Any, ...]] = dict.fromkeys(
    (
        "attention_multiplier",
        "attn_logit_softcapping",
        "embedding_multiplier",
        "final_logit_softcapping",
        "logit_scale",
        "logits_scaling",
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "no_rope_layers",
        "per_layer_config",
        "residual_multiplier",
        "scale_depth",
        "scale_emb",
        "use_qk_norm",
    ),
    _NEUTRAL,
)
"""Settings by which relatives of these families compute something else. A file that uses one is of
such a relative, whatever it calls itself."""


def same_value(one: Any, another: Any) -> bool:
    """Compare two values of a JSON file; whole numbers and others are alike, true and 1 are not."""
    if isinstance(one, bool) is not isinstance(another, bool):
        return False
    if isinstance(one, int | float) and isinstance(another, int | float):
        return math.isclose(one, another, rel_tol=1e-12)
    if isinstance(one, list | tuple) and isinstance(another, list | tuple):
        return len(one) == len(another) and all(map(same_value, one, another))
    return bool(one == another)
