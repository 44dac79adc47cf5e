"""Planning and packing of gradient updates."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError, MediaError
from data.question import MediaRef, Question
from encoders.processor import VisionInput
from tests.support.training_plans import LAYOUTS, PATCHES, Layout, SquareMedia, plan
from zppo_mm.experience import TrainingSample
from zppo_mm.randomness import generator
from zppo_mm.training.batching import build_batches, plan_batches
from zppo_mm.training.packing import pack

CPU = torch.device("cpu")


def make_sample(
    uid: str,
    prompt: int,
    response: int,
    advantage: float = 1.0,
    num_images: int = 0,
    first_id: int = 100,
) -> TrainingSample:
    tokens = prompt + response
    mask = np.array([0.0] * prompt + [1.0] * response, dtype=np.float32)
    media = tuple(MediaRef("image", "shard.tar", uid, f"{i}.png") for i in range(num_images))
    return TrainingSample(
        uid=uid,
        question=Question(id=uid, text="", media=media, answer="1", answer_type="math"),
        token_ids=np.arange(first_id, first_id + tokens),
        positions=np.tile(np.arange(tokens), (3, 1)),
        loss_mask=mask,
        old_logprobs=-mask,
        advantages=advantage * mask,
        grids=((1, 2, 2),) * num_images,
    )


@st.composite
def steps(draw: st.DrawFn) -> list[TrainingSample]:
    groups = draw(
        st.lists(
            st.lists(
                st.tuples(st.integers(1, 30), st.integers(0, 40), st.booleans(), st.integers(0, 3)),
                min_size=1,
                max_size=5,
            ),
            max_size=9,
        )
    )
    return [
        make_sample(f"{number}", prompt, response, float(counts), num_images, 1000 * number)
        for number, group in enumerate(groups)
        for prompt, response, counts, num_images in group
    ]


@settings(max_examples=60, deadline=None)
@given(samples=steps(), layout=LAYOUTS, patches=PATCHES)
def test_no_token_is_lost_or_doubled(
    samples: list[TrainingSample], layout: Layout, patches: int
) -> None:
    _, num_replicas, budget = layout
    made = plan(samples, *layout, patches=patches)
    assert len(made.minibatch_of) == len(samples)
    for update, replicas in enumerate(made.microbatches):
        members = [i for i, owner in enumerate(made.minibatch_of) if owner == update]
        assert made.num_loss_tokens[update] == sum(samples[i].num_loss_tokens for i in members)
        passed = [i for replica in replicas for microbatch in replica for i in microbatch]
        assert sorted(passed) == [i for i in members if np.any(samples[i].advantages != 0)]
        for microbatch in (m for replica in replicas for m in replica):
            own = [samples[i] for i in microbatch]
            assert len(own) == 1 or sum(sample.num_tokens for sample in own) <= budget
            assert len(own) == 1 or sum(sample.num_patches for sample in own) <= patches
        totals = [
            sum(samples[i].num_tokens for microbatch in replica for i in microbatch)
            for replica in replicas
        ]
        assert max(totals) - min(totals) <= max((samples[i].num_tokens for i in passed), default=0)
    batches = [
        build_batches(made, samples, replica=r, media=None, device=CPU) for r in range(num_replicas)
    ]
    packed = Counter(
        int(t)
        for part in batches
        for batch in part
        for mb in batch.microbatches
        if mb.uids
        for t in mb.token_ids
    )
    assert packed == Counter(
        int(t) for s in samples if np.any(s.advantages != 0) for t in s.token_ids
    )


@settings(max_examples=60, deadline=None)
@given(num_groups=st.integers(1, 30), num_minibatches=st.integers(1, 8))
def test_groups_stay_whole_and_updates_are_equal(num_groups: int, num_minibatches: int) -> None:
    samples = [make_sample(f"{group}", 2, 2) for group in range(num_groups) for _ in range(3)]
    made = plan(samples, num_minibatches)
    if num_groups < num_minibatches:
        sizes = Counter(made.minibatch_of).values()
        assert len(sizes) == min(num_minibatches, len(samples))
    else:
        owners = {
            sample.uid: owner for sample, owner in zip(samples, made.minibatch_of, strict=True)
        }
        assert [owners[sample.uid] for sample in samples] == list(made.minibatch_of)
        sizes = Counter(owners.values()).values()
        assert len(sizes) == num_minibatches
    assert max(sizes) - min(sizes) <= 1


def test_the_shuffle_depends_on_the_step_alone() -> None:
    samples = [make_sample(f"{group}", 2, 2) for group in range(16)]
    assert plan(samples) == plan(samples)
    assert plan(samples).minibatch_of == plan(samples, num_replicas=4, budget=5).minibatch_of
    assert plan(samples).minibatch_of != plan(samples, step=4).minibatch_of


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("budget", [1600, 400])
def test_a_replica_opens_the_media_of_its_part_of_the_questions(
    share_prompts: bool, budget: int
) -> None:
    """8 replicas, 576 questions: each opens 72, whether or not prompts are shared and a group fits
    into a micro-batch.
    """
    lengths = np.random.default_rng(0)
    samples = []
    for question in range(576):
        prompt = int(lengths.integers(5, 90))
        samples += [
            make_sample(str(question), prompt, 1 + int(lengths.lognormal(3.2, 1.0)))
            for _ in range(8)
        ]
    made = plan(samples, 4, 8, budget, share_prompts=share_prompts)
    for replica in range(8):
        packs = [members for update in made.microbatches for members in update[replica]]
        opened = {samples[index].uid for members in packs for index in members}
        # Few groups are divided, so that the tokens of two replicas differ by at most the longest
        # sample.
        assert len(opened) <= 76, len(opened)


def test_trivial_samples_count_but_are_not_passed() -> None:
    samples = [make_sample("0", 3, 5), make_sample("1", 3, 7, advantage=0.0)]
    made = plan(samples, num_minibatches=1, num_replicas=1)
    assert made.microbatches == ((((0,),),),)
    assert made.num_loss_tokens == (12,)
    assert made.num_skipped == 1
    full = plan_batches(
        samples,
        num_minibatches=1,
        num_replicas=1,
        micro_batch_tokens=60,
        random=generator(0),
        skip_zero_advantage=False,
    )
    assert full.microbatches == ((((0, 1),),),)
    assert full.num_loss_tokens == (12,)


def test_a_micro_batch_ends_at_its_patches() -> None:
    # Images of four patches: 12, 8, 4, 4 and none. What takes most of a micro-batch comes first,
    # and each goes into the first one that has room for its tokens and its patches.
    shapes = [(9, 3), (8, 2), (7, 1), (6, 1), (5, 0)]
    samples = [
        make_sample(str(number), prompt, 1, num_images=images)
        for number, (prompt, images) in enumerate(shapes)
    ]
    ((found,),) = plan(samples, 1, 1, 60, patches=8).microbatches
    # 12 are too many and alone; 8 and none; 4 + 4.
    assert found == ((0,), (1, 4), (2, 3))
    ((unlimited,),) = plan(samples, 1, 1, 60).microbatches
    assert unlimited == ((0, 1, 2, 3, 4),)
    # Where tokens end it first: 10 + 9, 8 + 7 + 6.
    ((by_tokens,),) = plan(samples, 1, 1, 21, patches=100).microbatches
    assert by_tokens == ((0, 1), (2, 3, 4))


def test_packing_lays_sequences_end_to_end() -> None:
    packed = pack(
        [make_sample("0", 2, 1, first_id=10), make_sample("1", 1, 2, first_id=20)],
        media=None,
        device=CPU,
    )
    assert packed.token_ids.tolist() == [10, 11, 12, 20, 21, 22]
    assert packed.positions.tolist() == [[0, 1, 2, 0, 1, 2]] * 3
    assert packed.cu_seqlens.tolist() == [0, 3, 6]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.loss_mask.tolist() == [0, 0, 1, 0, 1, 1]
    assert packed.old_logprobs.tolist() == [0, 0, -1, 0, -1, -1]
    assert packed.uids == ("0", "1")


def test_a_replica_without_samples_gets_one_idle_micro_batch() -> None:
    samples = [make_sample("0", 2, 3)]
    made = plan(samples, num_minibatches=1, num_replicas=2)
    (batch,) = build_batches(made, samples, replica=1, media=SquareMedia(), device=CPU)
    (idle,) = batch.microbatches
    assert idle.cu_seqlens.tolist() == [0, len(idle.token_ids)]
    assert idle.uids == ()
    assert idle.loss_mask.sum() == 0
    assert idle.patches is None
    assert batch.num_loss_tokens == 3


def test_pixels_are_opened_when_asked_for_and_only_with_a_source() -> None:
    samples = [
        make_sample("1", 2, 3, num_images=2),
        make_sample("2", 2, 3),
        make_sample("3", 2, 3, num_images=1),
    ]
    made = plan(samples, num_minibatches=1, num_replicas=1)
    media = SquareMedia()
    (batch,) = build_batches(made, samples, replica=0, media=media, device=CPU)
    assert media.opened == []
    (packed,) = batch.microbatches
    assert packed.patches is not None
    assert packed.patches[:, 0].tolist() == [1.0] * 8 + [3.0] * 4
    assert packed.grids is not None
    assert packed.grids.tolist() == [[1, 2, 2]] * 3
    (later_stage,) = build_batches(made, samples, replica=0, media=None, device=CPU)[0].microbatches
    assert later_stage.patches is None
    assert later_stage.grids is not None


def test_media_that_changed_since_the_prompt_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"media of question '7' have changed, got grids \(\(1, 2, 4\),\)"
    ):
        pack([make_sample("7", 2, 3, num_images=1)], media=SquareMedia((1, 2, 4)), device=CPU)


class FailingMedia(SquareMedia):
    """Fails `times` times, then opens."""

    def __init__(self, reason: str, times: int) -> None:
        super().__init__()
        self.reason = reason
        self.times = times

    def vision_inputs(self, question: Question) -> list[VisionInput]:
        inputs = super().vision_inputs(question)
        if len(self.opened) <= self.times:
            raise MediaError(self.reason, "the decoder was killed")
        return inputs


@pytest.mark.parametrize("reason", ["timeout", "decoder_died"])
def test_a_decoder_that_failed_once_is_asked_again(
    reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    media = FailingMedia(reason, times=1)
    packed = pack([make_sample("7", 2, 3, num_images=1)], media=media, device=CPU)
    assert packed.patches is not None
    assert packed.patches[:, 0].tolist() == [7.0] * 4
    assert media.opened == ["7", "7"]
    assert f"question 7 again after {reason}" in caplog.text


@pytest.mark.parametrize(("reason", "times", "tries"), [("timeout", 2, 2), ("unreadable", 1, 1)])
def test_media_that_stay_closed_end_the_run(reason: str, times: int, tries: int) -> None:
    media = FailingMedia(reason, times)
    with pytest.raises(DataError, match="the decoder was killed"):
        pack([make_sample("7", 2, 3, num_images=1)], media=media, device=CPU)
    assert len(media.opened) == tries


def test_no_samples_give_no_update() -> None:
    made = plan([])
    assert made.microbatches == ()
    assert build_batches(made, [], replica=0, media=None, device=CPU) == []
