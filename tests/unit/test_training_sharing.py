"""Planning and packing of gradient updates with shared prompts."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.question import MediaRef, Question
from tests.support.training_plans import LAYOUTS, PATCHES, Layout, SquareMedia, plan
from zppo_mm.experience import Microbatch, TrainingSample
from zppo_mm.training.batching import build_batches
from zppo_mm.training.packing import pack
from zppo_mm.training.prefix_groups import balance, make_prefix_groups

CPU = torch.device("cpu")
Shape = tuple[int, list[tuple[int, bool]], int]


def make_group(
    uid: str, prompt: int, responses: list[int], first_id: int = 0, num_images: int = 0
) -> list[TrainingSample]:
    """Return the samples of a group: prompt tokens count up from `first_id`, every response from a
    hundred further on.
    """
    samples = []
    media = tuple(MediaRef("image", "shard.tar", uid, f"{i}.png") for i in range(num_images))
    for number, response in enumerate(responses):
        mask = np.repeat(np.array([0, 1], dtype=np.float32), [prompt, response])
        start = first_id + 100 * (number + 1)
        samples.append(
            TrainingSample(
                uid=uid,
                question=Question(id=uid, text="", media=media, answer="1", answer_type="math"),
                token_ids=np.concatenate(
                    [np.arange(first_id, first_id + prompt), np.arange(start, start + response)]
                ),
                positions=np.tile(np.arange(prompt + response), (3, 1)),
                loss_mask=mask,
                old_logprobs=-mask,
                advantages=mask.copy(),
                grids=((1, 2, 2),) * num_images,
            )
        )
    return samples


@st.composite
def steps(draw: st.DrawFn) -> list[TrainingSample]:
    response = st.tuples(st.integers(1, 40), st.sampled_from([True, True, False]))
    groups: list[Shape] = draw(
        st.lists(
            st.tuples(
                st.integers(1, 60), st.lists(response, min_size=1, max_size=8), st.integers(0, 3)
            ),
            max_size=9,
        )
    )
    samples = []
    for number, (prompt, responses, num_images) in enumerate(groups):
        lengths = [length for length, _ in responses]
        made = make_group(f"{number}", prompt, lengths, 1000 * number, num_images)
        for sample, (_, counts) in zip(made, responses, strict=True):
            sample.advantages[:] *= counts
        samples += made
    return samples


def unique_tokens(samples: list[TrainingSample], pack_of: tuple[int, ...]) -> int:
    """Return the tokens of a micro-batch with every prompt counted once."""
    prompts = {samples[i].uid: samples[i].num_prompt_tokens for i in pack_of}
    return sum(prompts.values()) + sum(samples[i].num_loss_tokens for i in pack_of)


def unique_patches(samples: list[TrainingSample], pack_of: tuple[int, ...]) -> list[int]:
    """Return the patches of every prompt of a micro-batch that has any."""
    prompts = {samples[i].uid: samples[i].num_patches for i in pack_of}
    return [count for count in prompts.values() if count]


@settings(max_examples=150, deadline=None)
@given(samples=steps(), layout=LAYOUTS, patches=PATCHES)
def test_plans_are_whole_small_and_balanced(
    samples: list[TrainingSample], layout: Layout, patches: int
) -> None:
    budget = layout[-1]
    made = plan(samples, *layout, patches=patches, share_prompts=True)
    apart = plan(samples, *layout, patches=patches)
    assert (made.minibatch_of, made.num_loss_tokens, made.num_skipped) == (
        apart.minibatch_of,
        apart.num_loss_tokens,
        apart.num_skipped,
    )
    for update, replicas in enumerate(made.microbatches):
        passed = [i for replica in replicas for members in replica for i in members]
        assert sorted(passed) == [
            i
            for i, owner in enumerate(made.minibatch_of)
            if owner == update and np.any(samples[i].advantages)
        ]
        for members in (m for replica in replicas for m in replica):
            assert len(members) == 1 or unique_tokens(samples, members) <= budget
            media = unique_patches(samples, members)
            assert len(media) <= 1 or sum(media) <= patches
        totals = [
            sum(unique_tokens(samples, members) for members in replica) for replica in replicas
        ]
        assert max(totals) - min(totals) <= max((samples[i].num_tokens for i in passed), default=0)


@settings(max_examples=150, deadline=None)
@given(
    groups=st.lists(
        st.tuples(st.integers(1, 20), st.lists(st.integers(1, 40), min_size=1, max_size=12)),
        min_size=1,
        max_size=3,
    ),
    num_replicas=st.integers(2, 6),
    budget=st.integers(40, 400),
)
@pytest.mark.medium
def test_parts_of_a_group_that_fit_together_are_together(
    groups: list[tuple[int, list[int]]], num_replicas: int, budget: int
) -> None:
    samples = [
        s
        for number, (prompt, responses) in enumerate(groups)
        for s in make_group(f"{number}", prompt, responses, 1000 * number)
    ]
    parts = balance(
        make_prefix_groups(samples, range(len(samples)), budget, share_prompts=True),
        num_replicas,
        budget,
    )
    assert sorted(
        i for part in parts for prefix_group in part for i in prefix_group.response_tokens
    ) == list(range(len(samples)))
    for part in parts:
        assert not [one for one, other in combinations(part, 2) if one.fits(other, budget)]


@settings(max_examples=60, deadline=None)
@given(samples=steps(), num_replicas=st.integers(1, 3), budget=st.integers(1, 200))
def test_packs_hold_every_response_once_and_every_prompt_once_a_pack(
    samples: list[TrainingSample], num_replicas: int, budget: int
) -> None:
    made = plan(samples, 2, num_replicas, budget, share_prompts=True)
    needed = [sample for sample in samples if np.any(sample.advantages)]
    responses: Counter[int] = Counter()
    for replica in range(num_replicas):
        for batch in build_batches(made, samples, replica=replica, media=None, device=CPU):
            for microbatch in batch.microbatches:
                if not microbatch.uids:
                    continue
                carries_loss = microbatch.loss_mask != 0
                responses += Counter(microbatch.token_ids[carries_loss].tolist())
                wanted = [
                    t
                    for uid in microbatch.uids
                    for t in next(s for s in samples if s.uid == uid).token_ids[
                        : prompt_of(samples, uid)
                    ]
                ]
                assert Counter(microbatch.token_ids[~carries_loss].tolist()) == Counter(wanted)
                check_segments(microbatch)
    assert responses == Counter(int(t) for s in needed for t in s.token_ids[s.num_prompt_tokens :])


def prompt_of(samples: list[TrainingSample], uid: str) -> int:
    return next(sample.num_prompt_tokens for sample in samples if sample.uid == uid)


def check_segments(microbatch: Microbatch) -> None:
    """A child continues the positions of its parent, and belongs to the same group, whose tokens
    share their thousands.
    """
    bounds = microbatch.cu_seqlens.tolist()
    assert bounds[-1] == len(microbatch.token_ids) == microbatch.positions.shape[1]
    for child, parent in enumerate(microbatch.parents or ()):
        first = bounds[child]
        if parent < 0:
            assert microbatch.positions[0, first] == 0
            continue
        last = bounds[parent + 1] - 1
        assert microbatch.parents is not None
        assert microbatch.parents[parent] < 0
        assert microbatch.positions[0, first] == microbatch.positions[0, last] + 1
        assert microbatch.token_ids[first] // 1000 == microbatch.token_ids[last] // 1000
        assert microbatch.loss_mask[first] == 1


def test_groups_are_kept_whole_where_replicas_can_be_balanced_with_them() -> None:
    samples = [
        sample
        for number in range(8)
        for sample in make_group(f"{number}", 50, [10] * 8, 1000 * number)
    ]
    (replicas,) = plan(samples, 1, 4, 130, share_prompts=True).microbatches
    # A group has 50 + 8 * 10 tokens; a micro-batch has room for one.
    groups = sorted(members for replica in replicas for members in replica)
    assert groups == [tuple(range(start, start + 8)) for start in range(0, 64, 8)]
    assert [len(replica) for replica in replicas] == [2, 2, 2, 2]


def test_a_group_is_divided_over_replicas_that_have_no_other() -> None:
    samples = make_group("0", 40, [10] * 8)
    (replicas,) = plan(samples, 1, 2, 1000, share_prompts=True).microbatches
    # Together 40 + 80 tokens; as 40 + 40 on each, the replicas do not differ.
    assert [[len(members) for members in replica] for replica in replicas] == [[4], [4]]
    assert sorted(i for replica in replicas for members in replica for i in members) == list(
        range(8)
    )


def test_a_group_longer_than_a_micro_batch_is_divided() -> None:
    samples = make_group("0", 40, [30, 20, 20, 10, 10])
    (((first, second),),) = plan(samples, 1, 1, 90, share_prompts=True).microbatches
    # 40 + 30 + 20 and 40 + 20 + 10 + 10.
    assert sorted([unique_tokens(samples, first), unique_tokens(samples, second)]) == [80, 90]


def test_a_shared_prompt_takes_room_for_its_patches_once() -> None:
    samples = [
        sample
        for number, num_images in enumerate((2, 1, 3))
        for sample in make_group(f"{number}", 4, [3, 2], 1000 * number, num_images)
    ]
    # Images of four patches: 8 + 4 fit; 12 is a micro-batch by itself, also where 8 are allowed.
    ((found,),) = plan(samples, 1, 1, 1000, patches=12, share_prompts=True).microbatches
    assert found == ((0, 1, 2, 3), (4, 5))
    ((found,),) = plan(samples, 1, 1, 1000, patches=8, share_prompts=True).microbatches
    assert found == ((0, 1), (2, 3), (4, 5))


def test_packing_lays_a_shared_prompt_once() -> None:
    samples = [*make_group("0", 2, [1, 2]), *make_group("1", 1, [2], 1000)]
    packed = pack(samples, media=None, device=CPU, share_prompts=True)
    assert packed.token_ids.tolist() == [0, 1, 100, 200, 201, 1000, 1100, 1101]
    assert packed.positions.tolist() == [[0, 1, 2, 2, 3, 0, 1, 2]] * 3
    assert packed.cu_seqlens.tolist() == [0, 2, 3, 5, 8]
    assert packed.parents == (-1, 0, 0, -1)
    assert packed.loss_mask.tolist() == [0, 0, 1, 1, 1, 0, 1, 1]
    assert packed.old_logprobs.tolist() == [0, 0, -1, -1, -1, 0, -1, -1]
    assert packed.advantages.tolist() == [0, 0, 1, 1, 1, 0, 1, 1]
    assert packed.uids == ("0", "1")
    alone = pack(samples[1:], media=None, device=CPU, share_prompts=True)
    assert alone.parents is None
    assert alone.cu_seqlens.tolist() == [0, 4, 7]


def test_media_are_opened_once_for_all_rollouts_of_a_micro_batch() -> None:
    samples = [
        *make_group("1", 4, [3, 3, 3], 0, num_images=2),
        *make_group("2", 4, [3], 1000, num_images=1),
    ]
    media = SquareMedia()
    packed = pack(samples, media=media, device=CPU, share_prompts=True)
    assert media.opened == ["1", "2"]
    assert packed.patches is not None
    assert packed.patches[:, 0].tolist() == [1.0] * 8 + [2.0] * 4
    assert packed.grids is not None
    assert packed.grids.tolist() == [[1, 2, 2]] * 3


def test_samples_of_one_group_with_different_prompts_are_a_mistake() -> None:
    one, other = make_group("0", 3, [2]), make_group("0", 3, [2], 1000)
    with pytest.raises(AssertionError, match="the samples of 0 have different prompts"):
        pack([*one, *other], media=None, device=CPU, share_prompts=True)
