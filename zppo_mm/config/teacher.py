"""Section of the configuration: who the teacher is, where it runs and how it is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zppo_mm.config.keys import key
from zppo_mm.config.network import FP8_FORMATS, PARAMS_DTYPES, TRANSFORMER_IMPLS


@dataclass(kw_only=True)
class TeacherConfig:
    """The frozen teacher."""

    model: str = key(
        "",
        "Hugging Face folder of the teacher. Empty: the bundled tiny teacher. With `endpoints`: "
        "the name of the served model.",
    )
    chat_template_kwargs: dict[str, Any] = key(
        {},
        "As `model.chat_template_kwargs`, for the teacher. Sent to servers in the field of that "
        "name, which vLLM and SGLang know.",
    )
    endpoints: list[str] = key(
        [],
        "Base URLs of OpenAI-compatible servers of the teacher, such as http://host:8000/v1. "
        "Empty: the model runs in this process.",
        may_change_on_resume=True,
    )
    num_ranks: int = key(
        0,
        "Number of ranks, the last of the job, that run only the teacher. 0: the student's ranks "
        "run both models in turn. Not with `endpoints`.",
        at_least=0,
        may_change_on_resume=True,
    )
    tensor_model_parallel_size: int = key(
        1,
        "As `parallel.tensor_model_parallel_size`, for a teacher on its own ranks.",
        at_least=1,
        may_change_on_resume=True,
        first_teacher_only=True,
    )
    pipeline_model_parallel_size: int = key(
        1,
        "As `parallel.pipeline_model_parallel_size`, for a teacher on its own ranks.",
        at_least=1,
        may_change_on_resume=True,
        first_teacher_only=True,
    )
    api_key_env: str = key(
        "",
        "Environment variable that holds the API key of the servers. Empty: no key is sent.",
        may_change_on_resume=True,
    )
    on_failure: str = key(
        "wait",
        "What to do if the teacher does not answer. `wait`: retry until `max_wait_seconds`, then "
        "stop with a checkpoint. `ncq_only`: after `num_retries`, continue without its answers. "
        "`stop`: after `num_retries`, stop with a checkpoint. If teacher ranks have ended, the run "
        "stops in any case.",
        choices=("wait", "ncq_only", "stop"),
        may_change_on_resume=True,
    )
    max_concurrency: int = key(
        32,
        "Maximum number of requests in flight at one server, over all ranks. Every replica has at "
        "least one.",
        at_least=1,
        may_change_on_resume=True,
    )
    connect_timeout_seconds: float = key(
        10.0, "Timeout for a connection to a server.", above=0, may_change_on_resume=True
    )
    read_timeout_seconds: float = key(
        600.0,
        "Maximum time without data from a server. A server that does not stream sends nothing "
        "until its answer is complete.",
        above=0,
        may_change_on_resume=True,
    )
    request_timeout_seconds: float = key(
        900.0, "Timeout for one whole request.", above=0, may_change_on_resume=True
    )
    num_retries: int = key(
        5,
        "Retries of a failed request. Unlimited with on_failure=wait.",
        at_least=0,
        may_change_on_resume=True,
    )
    backoff_seconds: float = key(
        1.0,
        "Maximum pause before the first retry. It doubles with each retry, up to a minute.",
        at_least=0,
        may_change_on_resume=True,
    )
    max_wait_seconds: float = key(
        3600.0,
        "Maximum time for the answer to a question, over all attempts.",
        above=0,
        may_change_on_resume=True,
    )
    video: str = key(
        "frames",
        "How a video is sent to a server: the sampled frames as images, or the whole file.",
        choices=("frames", "file"),
    )
    media_format: str = key(
        "png",
        "Format of images and frames sent to a server: `png` (lossless) or `jpeg` (smaller).",
        choices=("png", "jpeg"),
    )
    num_rollouts: int = key(4, "Teacher rollouts per hard question (G_T).", at_least=1)
    temperature: float = key(1.0, "Sampling temperature of the teacher.", at_least=0)
    max_response_tokens: int = key(12288, "Maximum length of a teacher response.", at_least=1)
    transformer_impl: str = key(
        "", "As `model.transformer_impl`. Empty: the student's.", choices=("", *TRANSFORMER_IMPLS)
    )
    params_dtype: str = key(
        "", "As `model.params_dtype`. Empty: the student's.", choices=("", *PARAMS_DTYPES)
    )
    fp8: str = key("", "As `model.fp8`, for the teacher alone. Empty: no FP8.", choices=FP8_FORMATS)
    compressor: str = key(
        "teacher",
        "How candidates are compressed and hints written. `teacher`: the teacher rewrites the "
        "response. `rule`: lines of the response are selected, for the bundled teacher.",
        choices=("teacher", "rule"),
        first_teacher_only=True,
    )
    compression_max_tokens: int = key(
        512, "Maximum tokens of a candidate.", at_least=1, first_teacher_only=True
    )
    compression_max_lines: int = key(
        5, "Maximum lines of a candidate.", at_least=1, first_teacher_only=True
    )
