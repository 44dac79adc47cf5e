"""Wrong settings of the engine that samples in servers, which are named without repeating a key."""

from __future__ import annotations

import pytest

from zppo_mm.config.load import load_config
from zppo_mm.errors import ConfigError
from zppo_mm.serving.api_key import read_key

VLLM = "rollout.engine=vllm"
ADAPTERS = ("rollout.send_adapters=true", "lora.rank=8")
SERVER = "rollout.endpoints=['http://h:1']"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([SERVER], r"rollout\.engine: servers without a use, got 'megatron'"),
        (["rollout.servers=1"], r"rollout\.engine: servers without a use, got 'megatron'"),
        ([VLLM], r"rollout\.endpoints: no servers, got none with rollout\.engine='vllm'"),
        ([VLLM, SERVER, "rollout.top_p=0.9"], r"rollout\.top_p, rollout\.top_k: .*got 0\.9 and 0"),
        ([VLLM, SERVER, "rollout.top_k=5"], r"rollout\.top_p, rollout\.top_k: .*got 1 and 5"),
        ([VLLM, "rollout.endpoints=[h:1]"], r"rollout\.endpoints\[0\]: not an address"),
        (
            [VLLM, "rollout.endpoints=['http://u:geheim@h:1']"],
            r"holds more than an address.*that rollout\.api_key_env names",
        ),
        (
            [VLLM, "rollout.endpoints=['http://h:1','http://h:1']"],
            r"listed twice.*raise rollout\.max_concurrency",
        ),
        ([VLLM, SERVER, "rollout.api_key_env=sk-geheim"], r"rollout\.api_key_env: not a name"),
        (
            ["rollout.send_adapters=true", "lora.rank=8"],
            r"rollout\.send_adapters: .*got true with rollout\.engine='megatron', lora\.rank=8",
        ),
        ([VLLM, SERVER, "rollout.send_adapters=true"], r"rollout\.send_adapters: .*lora\.rank=0"),
        (
            [VLLM, SERVER, *ADAPTERS, "lora.also_train=[projector]"],
            r"rollout\.send_adapters: .*lora\.also_train=\['projector'\]",
        ),
        (["rollout.engine=sglang"], r"rollout\.engine: not a choice"),
    ],
)
def test_wrong_settings_are_named_and_no_key_repeated(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(None, options)
    assert "geheim" not in str(caught.value)


def test_evaluations_may_cut_the_distribution() -> None:
    config = load_config(None, [VLLM, SERVER, "evaluation.top_p=0.9", "evaluation.top_k=5"])
    assert config.rollout.endpoints == ["http://h:1"]


def test_a_key_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"rollout\.api_key_env: the environment has no NO_SUCH"):
        read_key("NO_SUCH_KEY", "rollout.api_key_env")
