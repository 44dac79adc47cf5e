"""A real pretrained model of the Llama family, SmolLM2-135M-Instruct: folder, prompts, conversion,
greedy text, one training step.

Slow, and skipped where its packages are not installed; CONTRIBUTING.md has the commands.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.health import SampleHealth
from data.imports.convert import convert_jsonl
from data.media.opening import Frames
from data.question import MediaRef, Question
from data.toy.sums import write_sums
from tests.support.network_checks import build
from tests.support.running import CLONE, lines, run
from zppo_mm.bundled.smollm2 import build_smollm2, smollm2_file
from zppo_mm.config.load import load_config
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.errors import ModelError
from zppo_mm.parallel import groups as parallel
from zppo_mm.rollout.engine import GenerationRequest, SamplingParams
from zppo_mm.rollout.megatron_engine import MegatronEngine
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.run.build import build_run
from zppo_mm.run_folder import RunFolder
from zppo_mm.training import checkpoint
from zppo_mm.weights.hf_export import export_hf_weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PROMPTS = (
    "What is the capital of France?",
    "Name three colours.",
    "Which is right, 7 + 5 = \\boxed{12} or 7 + 5 = \\boxed{15}?",
    "Write  a short\n\npoem about the sea — <|im_end|> is not part of it.",
)
NUM_TOKENS = 32
# The model card's config.json.
PUBLISHED = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
    "Face<|im_end|>\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        smollm2_file()
    except ModelError as error:
        pytest.skip(str(error))
    path = tmp_path_factory.mktemp("smollm2") / "model"
    build_smollm2(path)
    return path


@pytest.fixture
def _one_rank() -> Iterator[None]:
    parallel.initialize(ParallelConfig(), seed=0)
    yield
    parallel.shutdown()


def open_nothing(reference: MediaRef) -> Frames:
    raise AssertionError(f"{reference} is no text")


def encoder_of(folder: Path) -> PromptEncoder:
    return PromptEncoder(folder, open_nothing)


def question(text: str) -> Question:
    return Question(id="q", text=text, media=(), answer="1", answer_type="math")


def sample_greedily(network: Any, folder: Path) -> list[list[int]]:
    """Return what our engine answers to the prompts."""
    encoder = encoder_of(folder)
    greedy = SamplingParams(
        temperature=0.0, max_new_tokens=NUM_TOKENS, stop_token_ids=encoder.stop_token_ids
    )
    requests = []
    for text in PROMPTS:
        prompt, vision = encoder.encode(text, question(text))
        requests.append(GenerationRequest(prompt, vision, 1, ("test",)))
    return [
        group[0].response_ids.tolist()
        for group in MegatronEngine(network, 0).generate(requests, greedy)
    ]


def oracle_greedily(folder: Path) -> list[list[int]]:
    """Return what transformers answers to our prompts' tokens, with its own stop token and
    generation settings.
    """
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    encoder = encoder_of(folder)
    answers = []
    for text in PROMPTS:
        ids = torch.from_numpy(encoder.encode(text, question(text))[0].token_ids)[None]
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NUM_TOKENS,
                do_sample=False,
            )
        answers.append(output[0, ids.shape[1] :].tolist())
    return answers


def test_the_folder_is_the_published_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in PUBLISHED} == PUBLISHED
    assert config["rope_parameters"] == {"rope_theta": 100000.0, "rope_type": "default"}
    weights = load_file(folder / "model.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) == 134_515_008
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert "lm_head.weight" not in weights
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 8192


def test_prompts_equal_the_tokenizers_own_with_its_system_message(folder: Path) -> None:
    encoder, tokenizer = encoder_of(folder), AutoTokenizer.from_pretrained(folder)
    assert encoder.stop_token_ids == (2,)
    for text in PROMPTS[:3]:
        prompt, vision = encoder.encode(text, question(text))
        messages = [{"role": "user", "content": text}]
        assert prompt.token_ids.tolist() == tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert prompt.text == f"{SYSTEM}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        assert vision == ()
    # A literal stop token in the question is text: only the system's and the user's message end.
    assert encoder.encode(PROMPTS[3], question("?"))[0].token_ids.tolist().count(2) == 2


def test_digits_are_tokens_of_their_own(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # SmolLM2 splits digits off before words are cut, so two spaces before a number stay together.
    assert tokenizer.tokenize("a  12 =\n\n7") == ["a", "ĠĠ", "1", "2", "Ġ=", "ĊĊ", "7"]


@pytest.mark.usefixtures("_one_rank")
def test_conversion_is_exact_and_greedy_text_equals_transformers(
    folder: Path, tmp_path: Path
) -> None:
    network = build(folder, ParallelConfig())
    ours = sample_greedily(network, folder)
    export_hf_weights(network, folder, tmp_path / "out")
    before, after = (
        load_file(folder / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(after[key].equal(before[key]) for key in before)
    assert ours == oracle_greedily(folder)
    assert "Paris" in encoder_of(folder).decode(ours[0])


def trained(done: Path) -> Any:
    """Return the network of a run's newest checkpoint."""
    parts = build_run(load_config(done / "config.yaml"))
    assert checkpoint.load_latest(RunFolder(done).checkpoints, parts.policy) is not None
    parts.close()
    return parts.policy.model


@pytest.mark.usefixtures("_one_rank")
def test_a_step_of_the_example_trains_and_exports(folder: Path, tmp_path: Path) -> None:
    """One ZPPO step on sums; the exported folder has other weights, and answers as the trained
    network does.
    """
    write_sums(tmp_path, 40, 4)
    for part in ("train", "held_out"):
        convert_jsonl(
            tmp_path / f"{part}.jsonl",
            tmp_path / part,
            opener=None,
            health=SampleHealth(max_bad_fraction=0.0, strict=True),
        )
    options = (
        f"model.student={folder}",
        f"teacher.model={folder}",
        f"data.train=[{{path: {tmp_path / 'train'}}}]",
        f"data.held_out=[{{path: {tmp_path / 'held_out'}}}]",
        f"zone.templates={CLONE / 'examples/smollm2_text/templates'}",
        "train.num_new_questions=4",
        "train.updates_per_step=1",
        "train.train_iters=1",
        "train.lr=1e-6",
        "rollout.temperature=0.6",
        "rollout.max_response_tokens=32",
        "teacher.max_response_tokens=32",
        "evaluation.num_questions=1",
        "observability.report=false",
        "parity.num_questions=1",
    )
    done = run(tmp_path, "step", *options)
    [metrics] = lines(done / "metrics.jsonl")
    assert math.isfinite(metrics["policy/loss"])
    assert metrics["policy/skipped_updates"] == 0
    # One update per step: the policy is still the one that sampled, but for the two ways to compute
    # its log-probs.
    assert metrics["policy/ratio"] == pytest.approx(1.0, abs=1e-3)
    [parity] = lines(done / "parity.jsonl")
    assert parity["findings"] == []
    assert [(each["modality"], each["source"] is not None) for each in parity["modalities"]] == [
        ("text", True)
    ]
    before, after = (
        load_file(folder / "model.safetensors"),
        load_file(done / "hf" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert any(not after[key].equal(before[key]) for key in before)
    ours = sample_greedily(trained(done), folder)
    assert ours == oracle_greedily(done / "hf")
    assert "Paris" in encoder_of(folder).decode(ours[0])
