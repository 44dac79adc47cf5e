"""Checks of the network against transformers that run on any layout; each rank computes the oracle
itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from tests.support import tiny_families, tiny_qwen
from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.models.decoding.decode import decode, prefill
from zppo_mm.models.families.architecture import load_architecture
from zppo_mm.models.layers.cache import Admission, DecodeCache
from zppo_mm.models.provider import build_model
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel import groups as parallel
from zppo_mm.weights.mapping import cut, fuse_tensors, load_hf_weights, parameter_mappings

# Float32 sums in another order; the largest difference seen is 2e-5 on logits of scale 3.
MAX_LOGIT_DIFFERENCE = 1e-4
# Relative to the largest entry of each gradient; the largest seen is 3e-5, on the decay rates,
# whose gradients nearly cancel.
MAX_GRADIENT_DIFFERENCE = 1e-3


def build(
    folder: Path, config: ParallelConfig, model: ModelConfig | None = None
) -> VisionLanguageModel:
    """Build and load this rank's stage."""
    network = build_model(load_architecture(folder), model or ModelConfig(), config)
    load_hf_weights(network, folder)
    return network


def gather_vocabulary(logits: torch.Tensor) -> torch.Tensor:
    """Return `[tokens, vocabulary]` from every tensor rank's shard."""
    shards = [torch.empty_like(logits) for _ in range(parallel.tensor_size())]
    dist.all_gather(shards, logits.detach().contiguous(), group=parallel.tensor_group())
    return torch.cat(shards, -1)


class _FromTensorRanks(torch.autograd.Function):
    """Gathers the vocabulary; every rank computes the same loss, so each keeps its shard of the
    gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        ctx.width = logits.shape[-1]
        return gather_vocabulary(logits)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        start = ctx.width * parallel.tensor_rank()
        return gradient[:, start : start + ctx.width].contiguous()


def loss_of(
    logits: torch.Tensor, token_ids: torch.Tensor, own: slice | None = None
) -> torch.Tensor:
    """Return a loss that weighs every token and every logit differently; `own` says which tokens of
    a pack the logits are.
    """
    own = own or slice(0, len(token_ids))
    weights = torch.cos(torch.arange(len(token_ids) * logits.shape[-1], dtype=torch.float32)).view(
        len(token_ids), -1
    )[own]
    return (F.log_softmax(logits, -1) * weights).sum() / 10 + F.cross_entropy(
        logits, token_ids[own], reduction="sum"
    ) / 10


def run_schedule(
    network: VisionLanguageModel, packs: list[dict[str, torch.Tensor | None]]
) -> list[torch.Tensor]:
    """Run micro-batches forward and backward through Megatron's schedule; returns the logits of the
    own tokens on the last stage.
    """
    collected: list[torch.Tensor] = []

    def loss(token_ids: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        logits = _FromTensorRanks.apply(output)
        collected.append(logits.detach())
        # The schedule divides by the number of micro-batches, and takes the loss for a mean over
        # the context ranks.
        return loss_of(logits, token_ids, network.own_tokens(len(token_ids))) * len(
            packs
        ) / parallel.context_size(), {}

    def step(
        batches: Iterator[dict[str, Any]], model: VisionLanguageModel
    ) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        return model(**batch), partial(loss, batch["token_ids"])

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(packs),
        model=[network],
        num_microbatches=len(packs),
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )
    return collected


def reduce_gradients(network: VisionLanguageModel) -> None:
    """Do what Megatron's finalisation and the training code do with gradients of replicated
    parameters.
    """
    for name, parameter in network.named_parameters():
        if parallel.context_size() > 1:
            dist.all_reduce(parameter.grad, group=parallel.context_group())
        by_name = "q_layernorm" in name or "k_layernorm" in name
        scattered = network.config.sequence_parallel and getattr(
            parameter, "sequence_parallel", False
        )
        if parallel.tensor_size() > 1 and (
            by_name or scattered or getattr(parameter, "sum_gradients_across_tp", False)
        ):
            dist.all_reduce(parameter.grad, group=parallel.tensor_group())
    ends = parallel.is_first_stage() or parallel.is_last_stage()
    if network.share_embeddings_and_output_weights and parallel.pipeline_size() > 1 and ends:
        dist.all_reduce(
            network.shared_embedding_or_output_weight().grad,
            group=parallel_state.get_embedding_group(),
        )


def gradient_differences(network: VisionLanguageModel, oracle: Any) -> dict[str, float]:
    """Return per parameter the largest difference of its gradient from the oracle's, relative to
    the oracle's largest entry.
    """
    gradients = {name: parameter.grad for name, parameter in oracle.named_parameters()}
    result = {}
    for mapping in parameter_mappings(network):
        wanted = [gradients[key] for key in mapping.keys]
        assert all(gradient is not None for gradient in wanted), mapping.keys
        assert mapping.parameter.grad is not None, mapping.name
        whole = fuse_tensors(wanted, mapping.rule, network.architecture)
        shard = cut(
            whole, mapping, network.architecture, parallel.tensor_rank(), parallel.tensor_size()
        )
        result[mapping.name] = float(
            (mapping.parameter.grad - shard).abs().max() / whole.abs().max()
        )
    return result


def check_training(network: VisionLanguageModel, oracle: Any, kinds: tuple[str, ...]) -> None:
    """Compare logits and summed gradients of one micro-batch per modality with transformers on
    separate sequences.
    """
    oracle.zero_grad()
    network.zero_grad()
    parts = [tiny_families.sequences(network.architecture.family, kind) for kind in kinds]
    packs = [tiny_qwen.pack(part) for part in parts]
    outputs = run_schedule(network, packs)
    reduce_gradients(network)
    for index, (part, pack) in enumerate(zip(parts, packs, strict=True)):
        wanted = tiny_families.oracle_logits(oracle, part)
        loss_of(wanted, pack["token_ids"]).backward()
        if parallel.is_last_stage():
            assert (
                outputs[index] - wanted[network.own_tokens(len(wanted))]
            ).abs().max() <= MAX_LOGIT_DIFFERENCE, kinds[index]
    differences = gradient_differences(network, oracle)
    worst = max(differences, key=differences.__getitem__)
    assert differences[worst] <= MAX_GRADIENT_DIFFERENCE, (worst, differences[worst])


def share_logits(logits: torch.Tensor | None, batch: int, vocabulary: int) -> torch.Tensor:
    """Give the last stage's logits to every rank of the replica."""
    whole = torch.empty(batch, vocabulary) if logits is None else gather_vocabulary(logits)
    dist.broadcast(
        whole,
        parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel.pipeline_group(),
    )
    return whole


def greedy(
    network: VisionLanguageModel, parts: list[tiny_qwen.Sequence], num_tokens: int, repeats: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode the most likely tokens of every sequence.

    Returns:
        Tokens `[sequences * repeats, num_tokens]` and the logits that chose them, `[sequences *
        repeats, num_tokens, vocabulary]`.
    """
    cache = DecodeCache(num_blocks=64, max_rows=32)
    pack = tiny_qwen.pack(parts)
    vocabulary = network.architecture.vocab_size
    admissions = [
        Admission(number, len(part.token_ids), repeats) for number, part in enumerate(parts)
    ]
    logits = share_logits(
        prefill(network, **pack, cache=cache, admissions=admissions), len(parts), vocabulary
    )
    index = torch.arange(len(parts)).repeat_interleave(repeats)
    logits = logits[index]
    positions = torch.tensor([part.next_position for part in parts])[index]
    tokens, chosen = [], []
    for step in range(num_tokens):
        # Placeholders need features, so they are never chosen.
        tokens.append(logits[:, : tiny_qwen.IMAGE].argmax(-1))
        chosen.append(logits)
        if step + 1 < num_tokens:
            logits = share_logits(
                decode(network, tokens[-1], (positions + step).expand(3, -1), cache),
                len(index),
                vocabulary,
            )
    return torch.stack(tokens, 1), torch.stack(chosen, 1)


def oracle_greedy(oracle: Any, part: tiny_qwen.Sequence, num_tokens: int) -> list[int]:
    """Return transformers' greedy continuation of one sequence."""
    inputs = tiny_families.oracle_inputs(oracle, part)
    if "position_ids" in inputs:
        return _greedy_with_positions(oracle, inputs, part.next_position, num_tokens)
    special = list(range(tiny_qwen.IMAGE, tiny_qwen.VOCABULARY))
    output = oracle.generate(
        **inputs,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        suppress_tokens=special,
    )
    return output[0, len(part.token_ids) :].tolist()


@torch.no_grad()
def _greedy_with_positions(
    oracle: Any, inputs: dict[str, torch.Tensor], next_position: int, num_tokens: int
) -> list[int]:
    """Run the whole sequence again for every token: `generate` continues only at positions that it
    computed itself.
    """
    length = inputs["input_ids"].shape[1]
    for step in range(num_tokens):
        logits = oracle(**inputs, use_cache=False).logits[0, -1]
        token = logits[: tiny_qwen.IMAGE].argmax().view(1, 1)
        position = torch.full((3, 1, 1), next_position + step)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token], 1)
        inputs["position_ids"] = torch.cat([inputs["position_ids"], position], 2)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = F.pad(inputs["mm_token_type_ids"], (0, 1))
    return inputs["input_ids"][0, length:].tolist()
