"""The configuration of a run as dataclasses. Imports no torch, so that `--help` and checks are
quick.

`zppo_mm.config.load` merges YAML and `key.sub=value` into it and writes it back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from zppo_mm.config.keys import key, section
from zppo_mm.config.monitoring import EvaluationConfig as EvaluationConfig
from zppo_mm.config.monitoring import ObservabilityConfig as ObservabilityConfig
from zppo_mm.config.monitoring import ParityConfig as ParityConfig
from zppo_mm.config.network import LORA_TARGETS as LORA_TARGETS
from zppo_mm.config.network import LoraConfig as LoraConfig
from zppo_mm.config.network import ModelConfig as ModelConfig
from zppo_mm.config.network import ParallelConfig as ParallelConfig
from zppo_mm.config.remote import RemoteConfig as RemoteConfig
from zppo_mm.config.reward import RewardConfig as RewardConfig
from zppo_mm.config.rollout import RolloutConfig as RolloutConfig
from zppo_mm.config.teacher import TeacherConfig as TeacherConfig
from zppo_mm.config.training import CheckpointConfig as CheckpointConfig
from zppo_mm.config.training import TrainConfig as TrainConfig
from zppo_mm.methods import METHODS, SWITCHED, Kind

Number = TypeVar("Number", int, float)
SERVED_IMPORTANCE_CAP = 2.0
"""Cap of importance weights, unless another is set, where another network than the trained one
samples; that of verl and TRL.
"""


@dataclass(kw_only=True)
class SourceConfig:
    """One source of questions: a folder of shards, or table files."""

    path: str = key(
        "",
        "Folder with `*.tar` shards; or a file, a folder or a pattern (`data/train-*.parquet`) of "
        "`*.jsonl`, `*.parquet` or `*.arrow` files; relative to the working directory, or an "
        "address such as `s3://bucket/folder`.",
    )
    weight: float = key(
        1.0,
        "Relative share of the questions that come from this source: of weights 2 and 1, two "
        "thirds come from the first, whatever the sizes.",
        above=0,
    )
    columns: dict[str, str] = key(
        {},
        "Columns of table files by part of a question, such as `{question: prompt, image: "
        "picture}`; `ignore` names those whose media are left out.",
    )
    answer_type: str = key(
        "",
        "Answer type of rows of table files that name none. Empty: `choice` with choices, `math` "
        "without.",
    )
    media_root: str = key(
        "",
        "Folder, or its address, that media paths in table files start from and do not leave. "
        "Empty: the folder of the file.",
    )


def _from_folder(off: Number, meaning: str) -> Number:
    """Declare a setting of media that the model's folder has too."""
    return key(
        off,
        f"{meaning} 0: from the model folder.",
        at_least=0,
        may_change_on_resume="consent",
    )


@dataclass(kw_only=True)
class DataConfig:
    """Questions and their media."""

    train: list[SourceConfig] = key(
        [],
        "Training sources, each with `path` and `weight`, and `columns` for table files. Empty: "
        "the bundled digit questions of the chosen modality.",
    )
    held_out: list[SourceConfig] = key(
        [],
        "Held-out sources for evaluation. Empty: the bundled ones.",
        may_change_on_resume="consent",
    )
    max_prompt_tokens: int = key(
        4096,
        "Maximum length of a plain prompt. Longer questions are skipped and counted.",
        at_least=1,
        may_change_on_resume="consent",
        also_called=("max_prompt_length",),
    )
    image_min_pixels: int = _from_folder(
        0, "Minimum pixels of an image. A smaller one is enlarged."
    )
    image_max_pixels: int = _from_folder(0, "Maximum pixels of an image. A larger one is shrunk.")
    video_max_pixels: int = _from_folder(
        0,
        "Maximum pixels of the sampled frames of a video together (of each frame with "
        "Qwen2.5-VL). Larger frames are shrunk.",
    )
    video_frames_per_second: float = _from_folder(
        0.0, "Rate at which frames of a video are sampled."
    )
    video_min_frames: int = _from_folder(0, "Minimum frames of a video that has as many.")
    video_max_frames: int = _from_folder(
        0, "Maximum frames of one video. A longer video is sampled more sparsely."
    )
    max_media_bytes: int = key(
        256_000_000, "Maximum bytes of a media file.", at_least=1, may_change_on_resume="consent"
    )
    max_media_pixels: int = key(
        40_000_000,
        "Maximum pixels (width x height) of an image or a video frame.",
        at_least=1,
        may_change_on_resume="consent",
    )
    decode_timeout_seconds: float = key(
        30.0,
        "Maximum time to decode one image or video. Then its worker is killed and the sample is "
        "skipped.",
        above=0,
        may_change_on_resume=True,
    )
    num_decode_workers: int = key(
        1,
        "Decoding processes per rank, and as many again for each served teacher.",
        at_least=1,
        may_change_on_resume=True,
    )
    media_cache_bytes: int = key(
        8 << 30,
        "Maximum bytes of opened media that the ranks of one machine share in its memory "
        "(/dev/shm), in which each is opened once. No more than half of what is free there is "
        "taken. 0: each rank opens what it needs, and nothing is prefetched.",
        at_least=0,
        may_change_on_resume=True,
    )
    prefetch_media: bool = key(
        True,
        "Open the media of the next step's new questions while a step runs, as far as "
        "`media_cache_bytes` has room beside those of the step.",
        may_change_on_resume=True,
    )
    video_cache_dir: str = key(
        "",
        "Folder on a local disk of each machine that keeps the frames of videos, as the model "
        "sees them, over epochs and runs. Empty: none.",
        may_change_on_resume=True,
    )
    video_cache_gib: float = key(
        64.0, "Maximum size of that folder in GiB.", above=0, may_change_on_resume=True
    )
    max_bad_fraction: float = key(
        0.05,
        "The run stops when more than this fraction of the samples is bad (checked after 20 "
        "samples).",
        at_least=0,
        at_most=1,
        may_change_on_resume=True,
    )
    strict: bool = key(False, "Stop at the first bad sample.", may_change_on_resume=True)


@dataclass(kw_only=True)
class ZoneConfig:
    """What ZPPO and its baselines add to GRPO for hard questions."""

    bcq: bool = key(True, "Ask hard questions again with a correct and a wrong candidate (BCQ).")
    ncq: bool = key(True, "Ask hard questions again with the student's own wrong answers (NCQ).")
    hint: bool = key(
        False, "Ask hard questions again with a hint made from a correct teacher rollout."
    )
    prefix: bool = key(
        False, "Let the student continue the first tokens of a correct teacher rollout."
    )
    inject: bool = key(
        False, "Replace a wrong student rollout of a hard question by a correct teacher rollout."
    )
    replay: bool = key(True, "Replay hard questions until the student solves them.")
    tau: float = key(
        0.5,
        "A question is hard if the mean accuracy of its plain rollouts is below this.",
        at_least=0,
        at_most=1,
        may_change_on_resume="consent",
    )
    rho_replay: float = key(
        0.25,
        "Replayed questions per step, as a fraction of the new ones.",
        at_least=0,
        may_change_on_resume="consent",
    )
    rho_aug: float = key(
        0.25,
        "Maximum reformulated prompts per step (per round of dynamic sampling), as a fraction of "
        "new questions.",
        at_least=0,
        may_change_on_resume="consent",
    )
    prefix_fraction: float = key(
        0.4,
        "Fraction of a teacher rollout's tokens that forms a prefix.",
        above=0,
        below=1,
        may_change_on_resume="consent",
    )
    max_sampling_rounds: int = key(
        1,
        "Dynamic sampling: maximum rounds of new questions, until `train.num_new_questions` of "
        "them have a non-trivial group. Questions whose groups are all trivial, reformulated ones "
        "included, are left out of the update. 1: off.",
        at_least=1,
        may_change_on_resume="consent",
    )
    buffer_capacity: int = key(
        10_000,
        "Maximum number of questions in the replay buffer (B_max).",
        at_least=1,
        may_change_on_resume="consent",
    )
    templates: str = key(
        "",
        "Folder of prompts in place of the bundled ones: examples/own_prompts.",
        may_change_on_resume="consent",
    )

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of groups that are switched on, in the order of `KINDS`."""
        return tuple(kind for kind in SWITCHED if getattr(self, kind.name))

    @property
    def uses_teacher(self) -> bool:
        """Whether any of them is made of teacher rollouts."""
        return any(kind.uses_teacher for kind in self.kinds)

    @property
    def asks_pre_capped(self) -> bool:
        """Whether the teacher is asked only about the hard questions that the pre-cap keeps."""
        asking = [kind for kind in self.kinds if kind.uses_teacher]
        return bool(asking) and all(kind.asks_pre_capped for kind in asking)


@dataclass(kw_only=True)
class AlgorithmConfig:
    """Advantages and loss."""

    advantage_normalization: str = key(
        "nonzero",
        "Normalization of the advantages over the step: none, over non-trivial groups, or over all "
        "groups.",
        choices=("none", "nonzero", "all"),
    )
    clip_ratio_low: float = key(
        0.20, "The ratio is clipped at 1 minus this (eps_low).", at_least=0, below=1
    )
    clip_ratio_high: float = key(0.28, "The ratio is clipped at 1 plus this (eps_high).", above=0)
    clip_ratio_c: float = key(
        10.0, "Dual clip: upper bound of the ratio for negative advantages.", above=1
    )
    importance_level: str = key(
        "token",
        "Importance sampling: a token's loss is weighted by the ratio of probabilities under the "
        "trained network and under the sampler: that of the `token`, the product over its response "
        "(`sequence`), or their geometric mean (`geometric`). The old log-probs are then those of "
        "the trained network. `none`: off.",
        choices=("token", "sequence", "geometric", "none"),
    )
    importance_cap: float = key(
        0.0,
        "Largest importance weight (truncated importance sampling). 0: 2 with "
        "`rollout.engine=vllm`; off with `megatron`, whose log-probs are the trained network's.",
        at_least=0,
    )
    rejection_bound: float = key(
        0.0,
        "A response has no part in the loss if the geometric mean of its tokens' ratios, as in "
        "`importance_level`, is above this or below its inverse (`mismatch/rejected`). 0: off.",
        at_least=0,
    )
    rejection_token_bound: float = key(
        0.0,
        "The same if the ratio of any token is above this or below its inverse. 0: off.",
        at_least=0,
    )

    def largest_weight(self, engine: str) -> float:
        """Return the cap of importance weights with a sampling engine; 0 weights nothing."""
        if self.importance_level == "none":
            return 0.0
        return self.importance_cap or SERVED_IMPORTANCE_CAP * (engine != "megatron")


@dataclass(kw_only=True)
class DistillConfig:
    """Distillation instead of the policy gradient: the Jensen-Shannon divergence to the teacher's
    distribution at every response token.
    """

    source: str = key(
        "none",
        "Text on which to distill: `none` (no distillation), `teacher` (the teacher's correct "
        "rollouts) or `student` (the student's rollouts).",
        choices=("none", "teacher", "student"),
    )
    top_k: int = key(
        0,
        "Number of teacher log-probs per token. All other tokens count as one outcome. 0: the "
        "whole distribution.",
        at_least=0,
        may_change_on_resume="consent",
    )


@dataclass(kw_only=True)
class RunConfig:
    """A whole run."""

    name: str = key(
        "",
        "Name of the run's folder under `output_dir`. Empty: `<method>-<modality>`.",
        may_change_on_resume=True,
    )
    output_dir: str = key("runs", "Folder of the run folders.", may_change_on_resume=True)
    modality: str = key(
        "mixed", "Which bundled questions to use.", choices=("text", "image", "video", "mixed")
    )
    method: str = key(
        "zppo",
        "Method: a named setting of the keys listed with it. Explicitly set keys take precedence.",
        choices=tuple(METHODS),
    )
    seed: int = key(0, "Seed of the data stream, of sampling and of the reformulation.")
    data: DataConfig = section(DataConfig)
    remote: RemoteConfig = section(RemoteConfig)
    model: ModelConfig = section(ModelConfig)
    parallel: ParallelConfig = section(ParallelConfig, may_change_on_resume=True)
    rollout: RolloutConfig = section(RolloutConfig, may_change_on_resume="consent")
    teacher: TeacherConfig = section(TeacherConfig, may_change_on_resume="consent")
    fallback_teachers: list[TeacherConfig] = key(
        [],
        "Further teachers, each a section like `teacher`. Each is asked the questions that none "
        "before it solved.",
        may_change_on_resume="consent",
    )
    zone: ZoneConfig = section(ZoneConfig)
    reward: RewardConfig = section(RewardConfig, may_change_on_resume=True)
    algorithm: AlgorithmConfig = section(AlgorithmConfig, may_change_on_resume="consent")
    distill: DistillConfig = section(DistillConfig)
    train: TrainConfig = section(TrainConfig)
    lora: LoraConfig = section(LoraConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig, may_change_on_resume=True)
    evaluation: EvaluationConfig = section(EvaluationConfig, may_change_on_resume=True)
    parity: ParityConfig = section(ParityConfig, may_change_on_resume=True)
    observability: ObservabilityConfig = section(ObservabilityConfig, may_change_on_resume=True)
