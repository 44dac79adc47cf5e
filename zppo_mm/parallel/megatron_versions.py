"""Where the megatron-core versions that this project runs with differ: 0.16.1, the newest for
Python 3.11, to 0.19.2.

Everything else imports what differs from here. Each function checks what the installed version
has, never its number, and names the version that changed it. megatron-core is imported inside
the functions, because `allow_missing_triton` has to come first.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import sys
import types
from collections.abc import Iterator
from typing import Any


def allow_missing_triton() -> None:
    """Let newer megatron-core import without triton, which torch's CPU builds do not bring along.

    From 0.19 on `import megatron.core` imports triton through one MoE kernel module that dense
    models never call. An empty module in its name is enough; an empty triton would break torch's
    own look-ups.
    """
    name = "megatron.core.transformer.moe.ops.paged_stash"
    if importlib.util.find_spec("triton") is not None or name in sys.modules:
        return

    def missing(attribute: str) -> None:
        if attribute.startswith("__"):
            raise AttributeError(attribute)

    empty = types.ModuleType(name)
    empty.__dict__["__getattr__"] = missing
    sys.modules[name] = empty


def gpt_model(*arguments: Any, **options: Any) -> Any:
    """Build megatron-core's `GPTModel` with its own arguments.

    0.19 announces its end with every one that is built and names `HybridModel` as successor. It
    stays until its removal: the successor's decoder makes its last norm from Transformer Engine
    whatever the specification says, so it cannot be built without that package, and it counts
    attention and MLP as layers of their own, so no checkpoint of before would fit.
    docs/architecture.md says how to change over. A user can do nothing about the notice, so it is
    hidden.
    """
    from megatron.core.models.gpt import GPTModel

    with _without_log_line("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"):
        return GPTModel(*arguments, **options)


def data_parallel_model(*arguments: Any) -> Any:
    """Wrap a model in megatron-core's `DistributedDataParallel`.

    0.19 asks for the layout of the distributed optimizer's buffers and warns each
    time; it computes the same one itself.
    """
    from megatron.core.distributed import DistributedDataParallel

    with _without_log_line(
        "megatron.core.distributed.distributed_data_parallel",
        "DistributedDataParallel: full_param_layout not provided",
    ):
        return DistributedDataParallel(*arguments)


def mlp_specification(linear_fc1: Any, linear_fc2: Any, ffn_hidden_size: int) -> Any:
    """Return what a layer builds its MLP from: a bound builder from 0.19 on, a `ModuleSpec`
    before.
    """
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    submodules = MLPSubmodules(linear_fc1=linear_fc1, linear_fc2=linear_fc2)
    if hasattr(MLP, "as_mlp_submodule"):
        return functools.partial(
            MLP.as_mlp_submodule, submodules=submodules, ffn_hidden_size=ffn_hidden_size
        )
    return ModuleSpec(
        module=MLP, params={"ffn_hidden_size": ffn_hidden_size}, submodules=submodules
    )


def split_sharded_tensor(tensor: Any, sections: list[int], names: list[str], axis: int) -> Any:
    """Return a checkpoint entry that keeps the parts of a fused tensor under names of their own.

    Args:
        tensor: Megatron's `ShardedTensor` of the whole.
        sections: Length of every part along the axis.
        names: Ending of every part's name.
        axis: Along which the parts are concatenated.
    """
    try:
        from megatron.core.ssm.utils import _split_tensor_factory
    except ImportError:  # in another module before 0.19
        from megatron.core.ssm.gated_delta_net import _split_tensor_factory
    return _split_tensor_factory(tensor, sections, names, axis)


@contextlib.contextmanager
def _without_log_line(logger_name: str, start: str) -> Iterator[None]:
    """Drop the log lines of one logger that begin like this."""

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(start)

    logger = logging.getLogger(logger_name)
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)
