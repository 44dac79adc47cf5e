"""The patches for machines without CUDA leave everybody else's torch alone."""

from __future__ import annotations

import pickle

import pytest
import torch

from tests.support.running import run_python
from zppo_mm.parallel import megatron_cpu

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="nothing is patched where CUDA is"
)


def test_installing_twice_is_installing_once() -> None:
    assert megatron_cpu.install()
    zeros = torch.zeros
    assert megatron_cpu.install()
    assert torch.zeros is zeros


def test_cuda_tensors_are_made_on_the_cpu() -> None:
    megatron_cpu.install()
    assert torch.zeros(2, device="cuda", pin_memory=True).device.type == "cpu"
    assert torch.ones(1, device=torch.cuda.current_device()).device.type == "cpu"


def test_a_device_block_still_governs_factories() -> None:
    megatron_cpu.install()
    with torch.device("meta"):
        assert torch.empty(2).device.type == "meta"
        assert torch.arange(3).device.type == "meta"


def test_type_names_stay_true_outside_the_optimizer() -> None:
    megatron_cpu.install()
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64


def test_compiled_functions_run_eagerly() -> None:
    megatron_cpu.install()
    seen = []

    @torch.compile
    def plain(x: torch.Tensor) -> torch.Tensor:
        seen.append(type(x))
        return x + 1

    plain(torch.zeros(1))
    plain(torch.zeros(1))
    # A compiled function runs its Python body once, while it is traced.
    assert len(seen) == 2


@pytest.mark.medium
def test_a_rank_starts_without_the_compiler_and_what_only_rank_zero_needs() -> None:
    heavy = "{'matplotlib', 'scipy', 'sklearn', 'torch._inductor.compile_fx'}"
    done = run_python("-c", f"import sys, zppo_mm.train; print(sorted({heavy} & set(sys.modules)))")
    assert done.stdout == "[]\n", done.stderr


def test_factories_can_be_pickled_and_scripted() -> None:
    megatron_cpu.install()

    def plain(x: torch.Tensor) -> torch.Tensor:
        return x + torch.zeros(2)

    assert pickle.loads(pickle.dumps(torch.zeros)) is torch.zeros
    assert torch.jit.script(plain)(torch.ones(2)).tolist() == [1, 1]
