"""Distillation: the student's distribution at every response token is pulled towards the frozen
teacher's.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from zppo_mm.algorithms.divergence import (
    Divergence,
    TopTokens,
    jensen_shannon,
    top_jensen_shannon,
    top_tokens,
)
from zppo_mm.algorithms.row_loss import OutputRows
from zppo_mm.errors import ConfigError
from zppo_mm.experience import Microbatch
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.training.objective import (
    ObjectiveTerms,
    PerForwardToken,
    loss_rows,
    predicting_hidden,
    stacked,
)


def check_networks(
    student: VisionLanguageModel, teacher: VisionLanguageModel, share_prompts: str
) -> None:
    """Check that the teacher can run the student's micro-batches and that their logits can be
    compared.

    Args:
        student: What is trained.
        teacher: Frozen, on the same ranks.
        share_prompts: As `train.share_prompts`.

    Raises:
        ConfigError: The vocabularies differ in size, or the student shares prompts and the teacher
            cannot.
    """
    sizes = [network.architecture.vocab_size for network in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"distill.source: teacher and student have different vocabularies, got {sizes[0]} "
            f"tokens of the student and {sizes[1]} of the teacher, expected as many; use a teacher "
            "of the student's family, or a method that shows the teacher's text"
        )
    if student.shares_prompts and not teacher.shares_prompts and share_prompts != "never":
        raise ConfigError(
            "train.share_prompts: the teacher's layers cannot share prompts, got "
            f"{share_prompts!r} with distillation, expected 'never' with this teacher; set it"
        )


class DistillationObjective:
    """The Jensen-Shannon divergence to the teacher, on any responses."""

    metrics = (PerForwardToken("policy/entropy"), PerForwardToken("distill/agreement"))
    needs_advantages = False

    def __init__(
        self,
        teacher: VisionLanguageModel | None,
        top_k: int,
        temperature: float,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Keep the teacher.

        Args:
            teacher: Frozen, in one pipeline stage, on the student's tensor ranks and with its
                vocabulary; it runs each micro-batch whole, on every context rank. `None` if the
                samples carry its log-probs.
            top_k: Its most likely tokens that are kept apart; 0 means all. Samples that carry
                log-probs have theirs.
            temperature: Of both distributions.
            group: Ranks that share the vocabulary.
        """
        self._teacher = teacher
        self._top_k = top_k
        self._temperature = temperature
        self._group = group

    @property
    def needs_teacher_top(self) -> bool:
        """Whether samples must carry the teacher's log-probs."""
        return self._teacher is None

    def __call__(self, rows: OutputRows, microbatch: Microbatch) -> ObjectiveTerms:
        """Return the divergence, and how often both have the same most likely token."""
        indices, rows = loss_rows(rows, microbatch)
        teacher = None
        if self._teacher is not None and len(indices):
            teacher = teacher_rows(self._teacher, microbatch)

        def terms(student: torch.Tensor, chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
            if teacher is not None:
                found = self._from_logits(student, teacher.logits(chunk))
            else:
                found = self._from_samples(student, indices[chunk], microbatch)
            loss = (found.jsd * microbatch.token_weights[indices[chunk]]).sum()
            count = torch.tensor(float(len(student)), device=loss.device)
            return loss, stacked((loss, count, found.entropies.sum(), found.agreements.sum()))

        return ObjectiveTerms(*rows.sum(terms))

    def _from_logits(self, student: torch.Tensor, teacher: torch.Tensor) -> Divergence:
        if not self._top_k:
            return jensen_shannon(student, teacher, self._group, self._temperature)
        top = top_tokens(teacher, self._top_k, self._group, self._temperature)
        return top_jensen_shannon(student, top, self._group, self._temperature)

    def _from_samples(
        self, student: torch.Tensor, tokens: torch.Tensor, microbatch: Microbatch
    ) -> Divergence:
        if not len(tokens):
            return jensen_shannon(student, student, None)
        assert microbatch.teacher_ids is not None, "samples with loss carry the teacher's log-probs"
        assert microbatch.teacher_logprobs is not None, "ids and log-probs come together"
        carried = TopTokens(microbatch.teacher_ids[tokens], microbatch.teacher_logprobs[tokens])
        return top_jensen_shannon(student, carried, self._group, self._temperature)


@torch.no_grad()
def teacher_rows(teacher: VisionLanguageModel, microbatch: Microbatch) -> OutputRows:
    """Return the teacher's rows that predict the loss tokens."""
    hidden = predicting_hidden(teacher, microbatch)
    return loss_rows(OutputRows(hidden, teacher.output_weight()), microbatch)[1]
