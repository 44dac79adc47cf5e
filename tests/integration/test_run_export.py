"""The trained folder answers in transformers as the trained Megatron model does."""

from __future__ import annotations

from pathlib import Path

from tests.support.launch import run_ranks
from tests.support.running import run
from zppo_mm.bundled import STUDENT_DIR
from zppo_mm.rollout.processor import read_processor

NUM_QUESTIONS = 6
MAX_NEW_TOKENS = 48


def answers_of_both(folder: str) -> list[tuple[list[int], list[int]]]:
    """Return greedy tokens of the newest checkpoint on Megatron and of `hf/` in transformers, for
    held-out questions with video.
    """
    import torch
    from transformers import Qwen3_5ForConditionalGeneration

    from zppo_mm.config.load import load_config
    from zppo_mm.parallel import groups as parallel
    from zppo_mm.rollout.engine import GenerationRequest, SamplingParams
    from zppo_mm.rollout.megatron_engine import MegatronEngine
    from zppo_mm.run.build import build_run
    from zppo_mm.run_folder import RunFolder
    from zppo_mm.training import checkpoint

    reference = Qwen3_5ForConditionalGeneration.from_pretrained(str(Path(folder) / "hf")).eval()
    config = load_config(Path(folder) / "config.yaml")
    parallel.initialize(config.parallel, config.seed)
    parts = build_run(config)
    assert checkpoint.load_latest(RunFolder(Path(folder)).checkpoints, parts.policy) is not None
    encoder = parts.encoders[0]
    greedy = SamplingParams(
        temperature=0.0, max_new_tokens=MAX_NEW_TOKENS, stop_token_ids=encoder.stop_token_ids
    )
    pairs = []
    for question in parts.held_out.questions[:NUM_QUESTIONS]:
        prompt, vision = encoder.encode(parts.templates.plain_text(question), question)
        ours = MegatronEngine(parts.policy.model, config.seed).generate(
            [GenerationRequest(prompt, vision, 1, ("test",))], greedy
        )
        ids = torch.from_numpy(prompt.token_ids)[None]
        with torch.inference_mode():
            theirs = reference.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=2 * (ids == encoder.chat.video_token_id).long(),
                pixel_values_videos=torch.from_numpy(vision[0].patches),
                video_grid_thw=torch.tensor([vision[0].grid]),
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                eos_token_id=list(encoder.stop_token_ids),
                pad_token_id=encoder.stop_token_ids[0],
            )
        pairs.append((ours[0][0].response_ids.tolist(), theirs[0, ids.shape[1] :].tolist()))
    parts.close()
    return pairs


def test_the_exported_folder_answers_as_the_trained_model(tmp_path: Path) -> None:
    folder = run(tmp_path, "export", "modality=video", "train.train_iters=2", "train.lr=3e-4")
    [pairs] = run_ranks(answers_of_both, 1, str(folder))
    assert len(pairs) == NUM_QUESTIONS
    assert all(len(ours) > 1 for ours, _ in pairs)
    assert [ours for ours, _ in pairs] == [theirs for _, theirs in pairs]


def export_again(folder: str, target: str) -> None:
    """Export the newest checkpoint as tools/convert_checkpoint.py does."""
    from zppo_mm.config.schema import ParallelConfig
    from zppo_mm.conversion.exporting import export_folder
    from zppo_mm.parallel import groups as parallel

    parallel.initialize(ParallelConfig(), 0)
    export_folder(Path(folder), Path(target), ParallelConfig())


def test_the_exported_folder_has_the_limits_that_were_trained_with(tmp_path: Path) -> None:
    keys = {"image_max_pixels": 65536, "video_max_frames": 4, "video_frames_per_second": 3.0}
    folder = run(
        tmp_path,
        "limits",
        "modality=video",
        "train.train_iters=1",
        *(f"data.{name}={value}" for name, value in keys.items()),
    )
    exported, again = Path(folder) / "hf", tmp_path / "again"
    run_ranks(export_again, 1, str(folder), str(again))
    trained = read_processor(STUDENT_DIR, keys)
    assert trained is not None
    assert trained.video_max_frames == 4
    for path in (exported, again):
        assert read_processor(path) == trained
        same = {
            each.name
            for each in STUDENT_DIR.iterdir()
            if each.suffix != ".safetensors"
            and (path / each.name).read_bytes() == each.read_bytes()
        }
        assert {each.name for each in STUDENT_DIR.iterdir()} - same == {
            "model.safetensors",
            "preprocessor_config.json",
            "video_preprocessor_config.json",
        }
