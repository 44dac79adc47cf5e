"""Sections of the configuration: the training loop with its optimizer, and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from zppo_mm.config.keys import key
from zppo_mm.config.network import TRAINABLE_PARTS


@dataclass(kw_only=True)
class TrainConfig:
    """The training loop and the optimizer."""

    train_iters: int = key(
        200,
        "Rollout steps.",
        at_least=1,
        may_change_on_resume=True,
        also_called=("max_steps", "num_steps", "total_steps", "total_training_steps"),
    )
    max_hours: float = key(
        0.0,
        "Hours after which the run ends with a checkpoint. The same command continues it. 0: no "
        "limit.",
        at_least=0,
        may_change_on_resume=True,
    )
    stop_within_seconds: float = key(
        300.0,
        "Maximum time to write a checkpoint and exit after SIGTERM, SIGINT (Ctrl-C), SIGUSR1, "
        "SIGHUP or `max_hours`.",
        above=0,
        may_change_on_resume=True,
    )
    num_new_questions: int = key(
        384,
        "New questions per rollout step, over all ranks.",
        at_least=1,
        may_change_on_resume="consent",
        also_called=("batch_size", "train_batch_size", "global_batch_size", "rollout_batch_size"),
    )
    updates_per_step: int = key(
        4,
        "Gradient updates per rollout step (I). Every token is used once.",
        at_least=1,
        may_change_on_resume="consent",
    )
    micro_batch_tokens: int = key(
        16384,
        "Maximum tokens of a micro-batch. A longer sequence is a micro-batch by itself.",
        at_least=1,
        may_change_on_resume=True,
    )
    micro_batch_patches: int = key(
        16384,
        "Maximum patches of images and videos in a micro-batch, and of the prompts that sampling "
        "computes at once, which bounds the memory of the vision tower; four patches are one "
        "token of Qwen's networks. A prompt with more is passed by itself.",
        at_least=1,
        may_change_on_resume=True,
    )
    share_prompts: str = key(
        "auto",
        "Shared-prefix training: the prompt of a group is computed once per micro-batch instead "
        "of once per rollout. `auto`: if the layers support it.",
        choices=("auto", "always", "never"),
        may_change_on_resume=True,
    )
    lr: float = key(
        1e-6,
        "Learning rate, the highest one where it rises or falls.",
        at_least=0,
        may_change_on_resume="consent",
        also_called=("learning_rate", "max_lr"),
    )
    lr_warmup_updates: int = key(
        0,
        "Gradient updates over which the learning rate rises from 0, on a straight line.",
        at_least=0,
        may_change_on_resume="consent",
        also_called=("warmup_steps", "lr_warmup_steps", "lr_warmup_iters", "num_warmup_steps"),
    )
    lr_decay_style: str = key(
        "constant",
        "How the learning rate goes on after the warm-up: `constant`, or down to `min_lr` on a "
        "straight line (`linear`) or along half a cosine wave (`cosine`).",
        choices=("constant", "linear", "cosine"),
        may_change_on_resume="consent",
        also_called=("lr_schedule", "lr_scheduler", "lr_scheduler_type", "warmup_style"),
    )
    min_lr: float = key(
        0.0,
        "Learning rate at the end of a decay, and after it.",
        at_least=0,
        may_change_on_resume="consent",
    )
    lr_decay_updates: int = key(
        0,
        "Gradient updates, those of the warm-up included, until the learning rate is `min_lr`. "
        "0: those of the whole run, `train_iters` times `updates_per_step`.",
        at_least=0,
        may_change_on_resume="consent",
        also_called=("lr_decay_steps", "lr_decay_iters"),
    )
    adam_beta1: float = key(
        0.9, "Beta 1 of AdamW.", at_least=0, below=1, may_change_on_resume="consent"
    )
    adam_beta2: float = key(
        0.999, "Beta 2 of AdamW.", at_least=0, below=1, may_change_on_resume="consent"
    )
    adam_eps: float = key(1e-8, "Epsilon of AdamW.", above=0, may_change_on_resume="consent")
    weight_decay: float = key(
        0.1, "Weight decay of AdamW.", at_least=0, may_change_on_resume="consent"
    )
    optimizer_state_dtype: str = key(
        "float32",
        "Data type of AdamW's moments between updates. In `bfloat16` they take half the memory, "
        "but with the default beta 2 the second moment cannot fall.",
        choices=("float32", "bfloat16"),
    )
    clip_grad: float = key(
        1.0,
        "Maximum gradient norm.",
        above=0,
        may_change_on_resume="consent",
        also_called=("max_grad_norm", "grad_clip", "max_norm"),
    )
    freeze: list[str] = key([], "Parts that are not trained.", choices=TRAINABLE_PARTS)

    @property
    def decay_updates(self) -> int:
        """Updates until a learning rate that falls is `min_lr`."""
        return self.lr_decay_updates or self.train_iters * self.updates_per_step


@dataclass(kw_only=True)
class CheckpointConfig:
    """Saving and resuming."""

    interval: int = key(
        10,
        "Steps between checkpoints. There is always one at the end.",
        at_least=1,
        also_called=("save_steps", "save_interval", "save_freq"),
    )
    keep: int = key(
        2,
        "Checkpoints kept. Older ones are removed when a newer one is complete.",
        at_least=1,
        also_called=("save_total_limit", "max_checkpoints"),
    )
    resume: bool = key(True, "Continue from the newest complete checkpoint of the run's folder.")
    staging_dir: str = key(
        "",
        "Folder of each machine that takes a checkpoint first, on the way to the run's folder. "
        "Then slow or stalled storage delays training only when two checkpoints wait for it, not "
        "one, and the copy in host memory is given up sooner. It needs room for the machine's part "
        "of two checkpoints. Empty: straight to the run's folder.",
    )
    mirror: str = key(
        "",
        "Address, such as `s3://bucket/runs`, that has a copy of the run's folder below it, under "
        "the folder's name: complete checkpoints, as many as are kept here, records and the "
        "exported model, uploaded while training goes on. A start whose folder has older "
        "checkpoints than the copy, or none, continues from the copy. Empty: none.",
    )
    max_failed_saves: int = key(
        3,
        "Saves that may fail one after another, on a full disk or storage that answers with "
        "errors, before the run ends. Until then it goes on, and the next save tries again. The "
        "first checkpoint of a run must succeed.",
        at_least=1,
    )
    allow_changes: list[str] = key(
        [],
        "Keys or sections that may have other values than in the checkpoint that a run continues "
        "from, such as `[train.lr, zone]`, of those marked *consent*. What changes is recorded in "
        "`changes.jsonl`.",
    )
