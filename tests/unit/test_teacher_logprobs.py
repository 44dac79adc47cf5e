"""The log-probs that a served teacher sends with its answers, against its own network."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from data.question import Question
from tests.support.loopback_server import TinyModel, serve
from tests.support.pool_asking import served_teacher
from zppo_mm.bundled import TEACHER_DIR
from zppo_mm.config.schema import TeacherConfig
from zppo_mm.experience import NO_TOKEN, Rollout
from zppo_mm.rewards.verify import Verifier
from zppo_mm.teacher.served.pool import EndpointPool
from zppo_mm.teacher.served.tokens import TokenReader
from zppo_mm.zone.prompts import load_templates

# Float32 sums in generation with a cache and in one pass over the whole sequence.
TOLERANCE = 1e-4
NUM_TOP = 5
TEMPLATES = load_templates()
QUESTIONS = [Question(f"q{n}", f"What is {n} + 2?", (), str(n + 2), "math") for n in range(3)]


def ask(
    model: TinyModel, reader: TokenReader | None
) -> tuple[list[Rollout], list[dict[str, Any]], dict[str, int]]:
    """Return all rollouts, the requests and the counts."""
    config = TeacherConfig(model="tiny", num_rollouts=2, max_response_tokens=24)
    with serve(model) as server, Verifier() as verifier:
        pool = EndpointPool([server.url], "tiny", config)
        teacher = served_teacher(pool, config, verifier, model.encoder, tokens=reader)
        answers = teacher.submit(QUESTIONS, 1).wait()
        pool.close()
        return (
            [rollout for question in QUESTIONS for rollout in answers[question.id]],
            server.requests,
            pool.counts,
        )


def network_logprobs(model: TinyModel, question: Question, response: np.ndarray) -> torch.Tensor:
    """Return the network's log-probs at the positions of a response, `[response, vocabulary]`."""
    prompt, _ = model.encoder.encode(TEMPLATES.plain_text(question), question)
    ids = torch.from_numpy(np.concatenate([prompt.token_ids, response]))[None]
    with torch.no_grad():
        logits = model.network(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
    return torch.log_softmax(logits[len(prompt.token_ids) - 1 : -1], -1)


def test_sent_log_probs_are_those_of_the_network() -> None:
    model = TinyModel(TEACHER_DIR)
    chat = model.encoder.chat
    rollouts, requests, _ = ask(
        model, TokenReader(chat.token_bytes(), chat.stop_token_ids, NUM_TOP)
    )
    assert {request["top_logprobs"] for request in requests} == {NUM_TOP}
    assert len(rollouts) == 6
    for index, rollout in enumerate(rollouts):
        top = rollout.teacher_top
        assert top is not None
        expected = network_logprobs(model, QUESTIONS[index // 2], rollout.response_ids)
        assert rollout.finish_reason == "length" or rollout.response_ids[-1] in chat.stop_token_ids
        assert chat.decode(rollout.response_ids.tolist()) == rollout.text
        assert len(top.ids) == len(rollout.response_ids)
        known = top.ids != NO_TOKEN
        columns = torch.from_numpy(np.where(known, top.ids, 0))
        np.testing.assert_allclose(
            top.logprobs[known], expected.gather(1, columns).numpy()[known], atol=TOLERANCE
        )
        for row, ids, written in zip(expected, top.ids, rollout.response_ids, strict=True):
            assert set(row.topk(NUM_TOP).indices.tolist()) | {int(written)} == set(ids.tolist()) - {
                NO_TOKEN
            }


def test_without_distillation_none_are_asked_for() -> None:
    rollouts, requests, counts = ask(TinyModel(TEACHER_DIR), None)
    assert all("logprobs" not in request for request in requests)
    assert {rollout.teacher_top for rollout in rollouts} == {None}
    assert "out_of_vocabulary_tokens" not in counts


def test_tokens_that_the_student_does_not_have_leave_a_rollout_without() -> None:
    model = TinyModel(TEACHER_DIR)
    chat = model.encoder.chat
    first = chat.tokenize([ask(model, None)[0][0].text])[0]
    lacking = {
        spelling: token_id for spelling, token_id in chat.token_bytes().items() if token_id != first
    }
    rollouts, _, _ = ask(model, TokenReader(lacking, chat.stop_token_ids, NUM_TOP))
    with_it = [
        bool((np.array(chat.tokenize([rollout.text])) == first).any()) for rollout in rollouts
    ]
    assert any(with_it)
    assert [rollout.teacher_top is None for rollout in rollouts] == with_it
