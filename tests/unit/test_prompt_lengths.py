"""`make_shards.py lint --config` measures prompts as the run does."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.media.opening import MediaOpener
from data.sample import ShardSample
from data.shard_writer import write_shards
from data.shards import ShardFolder
from tests.support.shard_samples import png
from tests.support.tools import load_tool
from tests.unit.test_data_video import encode, grey_frames
from zppo_mm.bundled import STUDENT_DIR
from zppo_mm.config.load import load_config
from zppo_mm.rollout.processor import processor_overrides
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.run.prompt_lengths import PromptLengths
from zppo_mm.zone.prompts import load_templates


def sample(index: int, text: str, media: list[tuple[str, bytes]]) -> ShardSample:
    fields = {"id": f"q{index}", "question": text, "answer": "1", "answer_type": "math"}
    return ShardSample(f"{index:06d}", fields, media)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short question, a long one, one with a picture and one with a clip."""
    folder = tmp_path_factory.mktemp("shards")
    samples = [
        sample(0, "How many?", []),
        sample(1, "How many? " * 100, []),
        sample(2, "How many?", [("png", png())]),
        sample(3, "How many?", [("mp4", encode(grey_frames(20)))]),
    ]
    write_shards(folder, samples)
    return folder


def lengths(shards: Path, *options: str) -> dict[str, int]:
    """Return the length of every prompt, opened and encoded as in a run."""
    config = load_config(None, list(options))
    folder, measured = ShardFolder(shards), PromptLengths(config)
    opener = MediaOpener(measured.media_limits)
    templates = load_templates()
    encoder = PromptEncoder(
        STUDENT_DIR,
        lambda ref: opener.open_ref(ref, folder.reader),
        overrides=processor_overrides(config.data),
    )
    found = {}
    for key in list(folder.keys()):
        question = folder.question(*key)
        prompt, _ = encoder.encode(templates.plain_text(question), question)
        media = {ref: opener.open_ref(ref, folder.reader) for ref in question.media}
        found[question.id] = len(prompt.token_ids)
        assert measured.num_tokens(question, media) == found[question.id]
    opener.close()
    return found


def test_lengths_are_those_of_the_run_and_follow_the_keys(shards: Path) -> None:
    found = lengths(shards)
    fewer = lengths(shards, "data.video_min_frames=2", "data.video_max_frames=2")
    larger = lengths(shards, "data.image_min_pixels=65536")
    assert {name for name in found if fewer[name] < found[name]} == {"q3"}
    assert {name for name in found if larger[name] > found[name]} == {"q2"}


def test_lint_counts_long_prompts_apart_from_problems(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = max(length for name, length in lengths(shards).items() if name != "q1")
    config = tmp_path / "run.yaml"
    config.write_text(f"data:\n  max_prompt_tokens: {limit}\n")
    main = load_tool("make_shards").main
    assert main(["lint", str(shards), "--config", str(config)]) == 0, "no problem"
    line, summary = capsys.readouterr().out.splitlines()
    assert "000001: too_long: " in line
    assert f"tokens, more than {limit}" in line
    assert summary == f"4 samples, 0 problems; 1 prompts over {limit} tokens"
    config.write_text(f"data:\n  max_prompt_tokens: {limit - 1}\n")
    assert main(["lint", str(shards), "--config", str(config)]) == 0
    assert capsys.readouterr().out.endswith(f"; 2 prompts over {limit - 1} tokens\n")
    with pytest.raises(SystemExit):
        main(["lint", str(shards), "--config", str(config), "--no-decode"])
    assert "leave out --no-decode" in capsys.readouterr().err
