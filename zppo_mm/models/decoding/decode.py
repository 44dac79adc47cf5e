"""Prefill and one-token steps, with the parameters of the training network but a loop of its own.

At one token per sequence the time goes into calls, not arithmetic: megatron-core's modules would
make several hundred small ones per layer. This loop reads the same parameters and makes about
fifty.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from zppo_mm.models.decoding.plan import DecodePlan, build_plan
from zppo_mm.models.layers.cache import Admission, DecodeCache
from zppo_mm.models.layers.packing import build_layout
from zppo_mm.models.vision_language import VisionLanguageModel


# Megatron keeps one buffer for the gathers of sequence parallelism; made in inference mode,
# training could never write to it again.
@torch.inference_mode(mode=False)
@torch.no_grad()
def prefill(
    model: VisionLanguageModel,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    cu_seqlens: torch.Tensor,
    patches: torch.Tensor | None,
    grids: torch.Tensor | None,
    cache: DecodeCache,
    admissions: Sequence[Admission] | None = None,
) -> torch.Tensor | None:
    """Run packed prompts and keep keys, values and DeltaNet states; every rank of a replica calls
    it.

    Args:
        model: This rank's stage.
        token_ids: `[tokens]` int64.
        positions: `[3, tokens]` int64.
        cu_seqlens: `[sequences + 1]` int32.
        patches: `[patches, patch elements]` of all media in pack order; only the first stage uses
            them.
        grids: `[media, 3]` int64.
        cache: Afterwards it holds their rows too.
        admissions: Per sequence, what of it is prompt and how many rows go on from it; by default
            all of it, and one.

    Returns:
        Float32 logits of each sequence's next token, `[sequences, vocabulary / tensor size]`, on
        the last stage; `None` on the others.
    """
    last = cu_seqlens[1:].long() - 1
    if admissions is None:
        # No two of them share their blocks.
        admissions = [Admission(object(), length) for length in cu_seqlens.diff().tolist()]
    training = model.training
    model.eval()
    token_ids, positions, cu_seqlens = model.pad_tokens(token_ids, positions, cu_seqlens)
    layout = build_layout(cu_seqlens, cache)
    cache.begin(cu_seqlens, admissions, model.config.params_dtype)
    if cache.plan is None:
        cache.plan = build_plan(model)
    plan: DecodePlan = cache.plan
    if not model.pre_process:
        shards = model.config.tensor_model_parallel_size if model.config.sequence_parallel else 1
        model.set_input_tensor(
            _receive(
                token_ids.new_empty(
                    (len(token_ids) // shards, 1, plan.hidden_size), dtype=plan.dtype
                )
            )
        )
    hidden = model.run_stage(token_ids, positions, layout, patches, grids)
    model.train(training)
    if not model.post_process:
        _send(hidden)
        return None
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    return plan.logits(hidden.squeeze(1).index_select(0, last), normalised=True)


@torch.inference_mode()
def decode(
    model: VisionLanguageModel, token_ids: torch.Tensor, positions: torch.Tensor, cache: DecodeCache
) -> torch.Tensor | None:
    """Run one token of every sequence in the cache; every rank of a replica calls it.

    Args:
        model: This rank's stage.
        token_ids: `[batch]` int64, the tokens chosen from the last logits.
        positions: `[3, batch]` int64.
        cache: Filled by `prefill`, grown by one token here.

    Returns:
        Float32 logits of each sequence's next token, `[batch, vocabulary / tensor size]`, on the
        last stage; `None` on the others.
    """
    assert len(token_ids) == cache.batch_size, "one token per sequence of the cache"
    plan: DecodePlan = cache.plan
    cache.extend(token_ids.device)
    if model.pre_process:
        hidden = model.language_model.embedding.word_embeddings(token_ids[None]).squeeze(0)
    else:
        hidden = _receive(token_ids.new_empty((len(token_ids), plan.hidden_size), dtype=plan.dtype))
    hidden = plan.run(hidden, model.rotary.table(positions), cache)
    cache.step += 1
    if not model.post_process:
        _send(hidden)
        return None
    return plan.logits(hidden, normalised=False)


def _send(hidden: torch.Tensor) -> None:
    dist.send(
        hidden.contiguous(),
        parallel_state.get_pipeline_model_parallel_next_rank(),
        parallel_state.get_pipeline_model_parallel_group(),
    )


def _receive(buffer: torch.Tensor) -> torch.Tensor:
    dist.recv(
        buffer,
        parallel_state.get_pipeline_model_parallel_prev_rank(),
        parallel_state.get_pipeline_model_parallel_group(),
    )
    return buffer
