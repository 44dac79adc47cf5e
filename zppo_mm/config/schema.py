"""The whole run as dataclasses. Imports no torch, so that `--help` and a config check are quick.

`zppo_mm.config.load` merges YAML and `key.sub=value` into it and writes it back.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from zppo_mm.config.network import LORA_TARGETS as LORA_TARGETS
from zppo_mm.config.network import LoraConfig as LoraConfig
from zppo_mm.config.network import ModelConfig as ModelConfig
from zppo_mm.config.network import ParallelConfig as ParallelConfig
from zppo_mm.config.teacher import TeacherConfig as TeacherConfig


@dataclass(kw_only=True)
class SourceConfig:
    """One folder of webdataset shards."""

    path: str = ""
    """Folder with `*.tar` shards and their index, relative to the working directory."""
    weight: float = 1.0
    """Relative share of this source in the stream."""


@dataclass(kw_only=True)
class DataConfig:
    """Questions and their media."""

    train: list[SourceConfig] = field(default_factory=list)
    """Training sources; empty means the bundled digit questions of the chosen modality."""
    held_out: list[SourceConfig] = field(default_factory=list)
    """Held-out sources for evaluation; empty means the bundled ones."""
    max_prompt_tokens: int = 4096
    """Longest plain prompt; longer questions are skipped and counted when the stream meets them."""
    video_frames_per_second: float = 2.0
    """Rate at which frames of a video are sampled."""
    video_max_frames: int = 64
    """Most frames of one video; a longer clip is sampled more sparsely."""
    max_media_bytes: int = 256_000_000
    """Largest media file that is opened."""
    max_media_pixels: int = 40_000_000
    """Most pixels (frame width x height) of an image or a video frame that is decoded."""
    decode_timeout_seconds: float = 30.0
    """Time after which a worker that decodes an image or a video is killed and the sample
    skipped.
    """
    num_decode_workers: int = 1
    """Worker processes for decoding, per rank; where teachers are served, as many again for each
    that is sent media.
    """
    max_bad_share: float = 0.05
    """The run stops when more than this share of the samples met is bad (checked from 20 samples
    on).
    """
    strict: bool = False
    """Stop at the first bad sample."""


@dataclass(kw_only=True)
class RolloutConfig:
    """How the student samples while it trains."""

    num_rollouts: int = 8
    """Student rollouts per prompt (G_S)."""
    max_response_tokens: int = 12288
    """Longest response."""
    temperature: float = 1.0
    """Sampling temperature; the log-probs of the loss are taken at it too."""
    top_p: float = 1.0
    """Nucleus mass; 1 keeps everything."""
    top_k: int = 0
    """Most likely tokens kept; 0 keeps everything."""
    max_batch_size: int = 128
    """Most sequences that one replica decodes at once."""


@dataclass(kw_only=True)
class ZoneConfig:
    """What is done about hard questions: what ZPPO adds to GRPO, and what others do."""

    bcq: bool = True
    """Ask hard questions again with one right and one wrong candidate."""
    ncq: bool = True
    """Ask hard questions again with the student's own wrong answers."""
    hint: bool = False
    """Ask hard questions again with an answer-free hint made of a correct teacher rollout."""
    prefix: bool = False
    """Have the student continue the beginning of a correct teacher rollout to a hard question."""
    inject: bool = False
    """Train on a correct teacher rollout to a hard question as if it were one of the student's."""
    replay: bool = True
    """Bring hard questions back from the prompt replay buffer until they are mastered."""
    tau: float = 0.5
    """A question is hard while its mean accuracy is below this."""
    rho_replay: float = 0.25
    """Replayed questions per step, as a fraction of new ones."""
    rho_aug: float = 0.25
    """Reformulated instances (BCQ, NCQ, hint, prefix) per step (per round of dynamic sampling), at
    most this fraction of new questions.
    """
    prefix_share: float = 0.4
    """Share of a teacher rollout's tokens that a prefix is."""
    max_sampling_rounds: int = 1
    """Dynamic sampling: most rounds of new questions until a step has num_new_questions with
    something to learn from; questions whose groups, reformulated ones too, are all trivial are left
    out of the update. 1 is off.
    """
    buffer_capacity: int = 10_000
    """Most questions in the buffer (B_max)."""
    templates: str = ""
    """Folder with any of bcq.txt, ncq.txt, hint.txt, candidate.txt and closing.txt; empty means the
    bundled ones.
    """


@dataclass(kw_only=True)
class AlgorithmConfig:
    """Advantages and loss."""

    advantage_normalization: str = "nonzero"
    """Second normalisation of advantages: none, nonzero (over non-trivial groups), all."""
    clip_ratio_low: float = 0.20
    """Lower clip range of the ratio."""
    clip_ratio_high: float = 0.28
    """Upper clip range of the ratio."""
    clip_ratio_c: float = 10.0
    """Dual clip: bound of the loss for negative advantages."""
    importance_cap: float = 0.0
    """Truncated importance sampling: the loss of a token is weighted by its probability under the
    trained network over the one that it was sampled with, at most this; old log-probs then come
    from the trained network. 0 is off.
    """


@dataclass(kw_only=True)
class DistillConfig:
    """Distillation in the place of the policy gradient: Jensen-Shannon divergence to the teacher's
    distribution at every token.
    """

    source: str = "none"
    """On whose text: `none` (no distillation), `teacher` (its correct rollouts), `student` (its own
    rollouts).
    """
    top_k: int = 0
    """Tokens whose teacher log-probs are used, all others together being one more outcome; 0 uses
    the whole distribution.
    """


@dataclass(kw_only=True)
class TrainConfig:
    """The loop and the optimizer."""

    train_iters: int = 200
    """Rollout steps."""
    max_hours: float = 0.0
    """Hours after which a start of the run ends in good order, to be continued by the same command;
    0 is without end.
    """
    stop_within_seconds: float = 300.0
    """Time that SIGTERM, SIGINT (Ctrl-C), SIGUSR1 or max_hours leaves for ending in good order;
    then the process ends as it is.
    """
    num_new_questions: int = 384
    """New questions per rollout step, over all ranks."""
    updates_per_step: int = 4
    """Gradient updates per rollout step (I); every token is used once."""
    micro_batch_tokens: int = 16384
    """Most tokens that one forward pass packs; a longer single sequence is passed alone."""
    share_prompts: str = "auto"
    """auto, always or never: pass the prompt of a group once per forward pass instead of once per
    rollout; auto where the layers can.
    """
    lr: float = 1e-6
    """Constant learning rate."""
    lr_warmup_updates: int = 0
    """Gradient updates over which the learning rate rises from 0."""
    adam_beta1: float = 0.9
    """AdamW's first beta."""
    adam_beta2: float = 0.999
    """AdamW's second beta."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """AdamW's weight decay."""
    clip_grad: float = 1.0
    """Largest gradient norm."""
    freeze: list[str] = field(default_factory=list)
    """Parts that do not train: any of vision, projector, language."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """Saving and resuming."""

    interval: int = 10
    """Steps between checkpoints; one is always saved at the end."""
    keep: int = 2
    """Checkpoints kept; older ones are removed after a newer one is complete."""
    resume: bool = True
    """Continue from the run folder's newest complete checkpoint."""


@dataclass(kw_only=True)
class EvaluationConfig:
    """Accuracy on held-out questions."""

    interval: int = 20
    """Steps between evaluations; there is always one before and one after. 0 turns those between
    off.
    """
    num_questions: int = 64
    """Held-out questions per evaluation, always the same ones; 0 means all."""
    num_rollouts: int = 1
    """Responses per question."""
    temperature: float = 0.6
    """0 is greedy."""
    top_p: float = 0.95
    """Nucleus mass."""
    top_k: int = 20
    """Most likely tokens kept."""
    min_p: float = 0.0
    """Least probability as a share of the most likely token's; 0 keeps everything."""
    presence_penalty: float = 1.5
    """Penalty on tokens already in the response."""


@dataclass(kw_only=True)
class ParityConfig:
    """Comparison of sampling, training and the source checkpoint before the first update."""

    mode: str = "stop"
    """What a disagreement does: `stop` ends the run, `warn` logs it and goes on; `none` compares
    nothing.
    """
    num_questions: int = 3
    """Questions of each modality in the data (text, image, video, mixed) that are asked."""
    max_response_tokens: int = 24
    """Longest response that is compared."""
    max_gap: float = 1e-3
    """float32: largest difference of a token's log-probs, in nats."""
    max_kl: float = 0.02
    """Anything coarser than float32: largest divergence of a modality's tokens, in nats per token.
    Rounding alone gives a real model 0.002, and up to 0.006 when estimated from a few dozen tokens.
    """
    compare_source: bool = True
    """Load the source checkpoint in transformers besides, where it fits into memory."""
    max_source_seconds: float = 120.0
    """Time after which the source checkpoint is asked no further question."""


@dataclass(kw_only=True)
class ObservabilityConfig:
    """What a run writes besides checkpoints."""

    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb_project: str = ""
    """Weights & Biases project; empty is off."""
    progress_bar: bool = True
    """Show a progress bar on rank 0."""
    report: bool = True
    """Write report.html with every checkpoint, one of which is at the end."""
    report_examples: int = 4
    """Questions shown in the report with their media and prompts."""


@dataclass(kw_only=True)
class RewardConfig:
    """Grading."""

    timeout_seconds: float = 5.0
    """Processor time for grading one answer in a worker that can be killed; an answer that needs
    more is left out.
    """
    budget_seconds: float = 60.0
    """Longest time for grading all answers of one call on a rank; those that are open then are left
    out.
    """
    num_workers: int = 2
    """Grading workers per rank."""
    judge: bool = True
    """Have a model judge questions of answer type `open`: served, or the teacher on its own ranks.
    Without, they are refused.
    """
    judge_endpoints: list[str] = field(default_factory=list)
    """Base URLs of the judge's servers; empty means teacher.endpoints. Key, time-outs and
    concurrency are the teacher's.
    """
    judge_model: str = ""
    """Name of the judge's model; empty means teacher.model."""
    judge_max_tokens: int = 512
    """Longest reply of the judge."""
    judge_max_wait_seconds: float = 300.0
    """Time after which a rollout is left out because the judge does not reply, all attempts
    together.
    """
    judge_template: str = ""
    """File with the judge's prompt; empty means the bundled one."""


@dataclass(kw_only=True)
class RunConfig:
    """A whole run."""

    name: str = ""
    """Name of the run's folder under `output_dir`; empty means `<method>-<modality>`."""
    output_dir: str = "runs"
    """Where run folders lie."""
    modality: str = "mixed"
    """Which bundled questions to use: text, image, video or mixed."""
    method: str = "zppo"
    """Preset: grpo, bcq, ncq, bcq_ncq, hint, prefix, inject, off_distill, on_distill, each also
    with `_replay`; zppo is bcq_ncq with replay. Keys given besides win.
    """
    seed: int = 0
    """Seed of the stream, the sampling and the zone."""
    data: DataConfig = field(default_factory=DataConfig)
    """Questions and their media."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Student and the network's implementation."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Megatron's parallel layout."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How the student samples."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The frozen teacher."""
    fallback_teachers: list[TeacherConfig] = field(default_factory=list)
    """Further teachers, each asked what all before it did not solve."""
    zone: ZoneConfig = field(default_factory=ZoneConfig)
    """What is done about hard questions."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """Grading."""
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    """Advantages and loss."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """Distillation in the place of the policy gradient."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop and the optimizer."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters on the language model, trained in place of its weights."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and resuming."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Accuracy on held-out questions."""
    parity: ParityConfig = field(default_factory=ParityConfig)
    """Comparison of sampling, training and the source checkpoint before the first update."""
    observability: ObservabilityConfig = field(default_factory=ObservabilityConfig)
    """What a run writes besides checkpoints."""
