"""The section of a run's configuration that says who the teacher is, where it runs and how it is
asked.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class TeacherConfig:
    """The frozen teacher."""

    model: str = ""
    """Hugging Face folder of the teacher; empty means the bundled tiny teacher. With endpoints,
    the served model's name.
    """
    endpoints: list[str] = field(default_factory=list)
    """Base URLs of OpenAI-compatible servers of the teacher, such as http://host:8000/v1; empty
    means a model in this process.
    """
    num_ranks: int = 0
    """The last ranks of the job that run the teacher alone; 0 has the student's ranks run both in
    turn. Not with endpoints.
    """
    tensor_model_parallel_size: int = 1
    """As parallel.tensor_model_parallel_size, for a teacher on its own ranks."""
    pipeline_model_parallel_size: int = 1
    """As parallel.pipeline_model_parallel_size, for a teacher on its own ranks."""
    api_key_env: str = ""
    """Environment variable that holds the servers' key; empty sends none."""
    on_failure: str = "wait"
    """When a served teacher does not answer: `wait` (retry until max_wait_seconds, then stop with a
    checkpoint), `ncq_only` (go on without its answers after num_retries), `stop` (stop with a
    checkpoint after num_retries). On its own ranks nothing is tried again.
    """
    max_concurrency: int = 32
    """Most requests in flight at one server, over all ranks; every replica has at least one."""
    connect_timeout_seconds: float = 10.0
    """Time for a connection to a server."""
    read_timeout_seconds: float = 600.0
    """Longest silence of a server; one that does not stream is silent until its answer is whole."""
    request_timeout_seconds: float = 900.0
    """Time for one request to a server as a whole."""
    num_retries: int = 5
    """Further attempts of a request that failed; without end under on_failure=wait."""
    backoff_seconds: float = 1.0
    """Longest pause before the first further attempt; it doubles with each one, up to a minute."""
    max_wait_seconds: float = 3600.0
    """Time after which a question counts as not answered, all attempts together."""
    video: str = "frames"
    """How a server gets a video: `frames` (the sampled frames as images) or `file` (the whole
    file).
    """
    media_format: str = "png"
    """File format of images and frames sent to a server: png (lossless) or jpeg (smaller)."""
    num_rollouts: int = 4
    """Teacher rollouts per hard question (G_T)."""
    temperature: float = 1.0
    """Sampling temperature of the teacher."""
    max_response_tokens: int = 12288
    """Longest teacher response."""
    transformer_impl: str = ""
    """As model.transformer_impl; empty means the student's."""
    params_dtype: str = ""
    """As model.params_dtype; empty means the student's."""
    fp8: str = ""
    """As model.fp8, for the teacher alone; empty is off."""
    compressor: str = "rule"
    """Who compresses candidates and writes hints: `rule` (cuts what is there) or `teacher`
    (rewrites it).
    """
    compression_max_tokens: int = 512
    """Most tokens of a candidate."""
    compression_max_lines: int = 5
    """Most lines of a candidate."""
