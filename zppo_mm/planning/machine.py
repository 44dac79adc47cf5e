"""What a machine can do: rates of a kind of GPU from a YAML file, given or measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zppo_mm.config.checks import check_values
from zppo_mm.config.keys import key, section
from zppo_mm.config.load import load_settings
from zppo_mm.errors import ConfigError

FOLDER = Path(__file__).with_name("machines")


@dataclass(kw_only=True)
class PassRates:
    """How near one kind of pass through the network comes to the machine's rates."""

    matmul_efficiency: float = key(0.4, "Share of `matmul_flops` in products.", above=0, at_most=2)
    bandwidth_efficiency: float = key(
        0.6, "Share of `memory_bandwidth` in everything else.", above=0, at_most=20
    )
    layer_seconds: float = key(
        1e-4, "Time that a layer takes however little there is to do.", at_least=0
    )


@dataclass(kw_only=True)
class ServerRates(PassRates):
    """The same of a vLLM server that samples, on one GPU."""

    matmul_efficiency: float = key(0.5, "Share of `matmul_flops` in products.", above=0, at_most=2)
    layer_seconds: float = key(
        0.0,
        "Time that a layer takes however little there is to do. 0: not measured, so that a run "
        "with `rollout.engine=vllm` is not planned.",
        at_least=0,
    )


@dataclass(kw_only=True)
class MachineRates:
    """Rates of one GPU, or of one rank on a machine without."""

    name: str = key("", "Name of the machine.")
    memory_gib: float = key(80.0, "Memory of a GPU.", above=0)
    usable_fraction: float = key(0.8, "Share of it that an estimate may fill.", above=0, at_most=1)
    gpus_per_node: int = key(8, "GPUs of a node.", at_least=1)
    element_bytes: int = key(2, "Bytes of a number in the network's type.", at_least=2, at_most=4)
    matmul_flops: float = key(1e15, "Floating-point operations a second in products.", above=0)
    memory_bandwidth: float = key(3e12, "Bytes a second to and from its memory.", above=0)
    node_bandwidth: float = key(
        4e11, "Bytes a second to the other GPUs of the node, in one direction.", above=0
    )
    network_bandwidth: float = key(
        4e10, "Bytes a second to GPUs of other nodes, in one direction.", above=0
    )
    host_bandwidth: float = key(4e10, "Bytes a second to the memory of the host.", above=0)
    message_seconds: float = key(3e-5, "Time of a collective without content.", at_least=0)
    media_per_second: float = key(
        20.0, "Images, or frames of a video, that a rank opens and cuts into patches.", above=0
    )
    answers_per_second: float = key(
        58000.0, "Responses that a process grades by rules, without algebra.", above=0
    )
    algebra_per_second: float = key(
        24.0, "Responses that one of `reward.num_workers` compares by algebra.", above=0
    )
    shares_prompts: bool = key(False, "Whether training shares prompts there.")
    train: PassRates = section(PassRates)
    decode: PassRates = section(PassRates)
    vllm: ServerRates = section(ServerRates)


def load_machine(name: str) -> MachineRates:
    """Return the rates of a bundled machine or of a file.

    Args:
        name: `H100-80GB`, or the path of a YAML file.

    Raises:
        ConfigError: There is no such machine or file, or anything in it is wrong.
    """
    bundled = {path.stem.upper(): path for path in sorted(FOLDER.glob("*.yaml"))}
    path = bundled.get(name.upper(), Path(name))
    if not path.is_file():
        raise ConfigError(
            f"--gpu: nothing is known of this machine, got {name!r}, expected "
            f"{', '.join(bundled)} or a YAML file of rates; on one such GPU, "
            "`python tools/plan_run.py --calibrate FILE` measures products, memory, a layer's time "
            "in sampling and in training, media and grading, and under torchrun collectives"
        )
    rates = load_settings(MachineRates, path)
    check_values(rates, str(path))
    return rates
