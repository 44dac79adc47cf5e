"""Loads weights into a running vLLM server; an extension of its workers
(`--worker-extension-cls zppo_vllm_worker.WeightLoader`).

It runs in the server's environment, which has another transformers and no Megatron, so it imports
torch, safetensors and vLLM alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

METHOD = "load_zppo_weights"
ADAPTER_METHOD = "compare_zppo_adapter"
"""Called by `POST /collective_rpc`."""
_UNPACKED = ("norm.weight", "embed_tokens.weight", "lm_head.weight")
"""Ends of the names of tensors that servers keep as they are on any device; linear layers are fused
and packed.
"""
_WORDS_PER_BLOCK = 1024
_MAX_MESSAGE = 500


class WeightLoader:
    """Mixed into vLLM's workers, whose attributes it uses.

    Attributes:
        model_runner: The worker's.
        vllm_config: The server's configuration.
    """

    model_runner: Any
    vllm_config: Any
    _frozen: tuple[str, dict[str, Any]] | None = None

    def load_zppo_weights(self, path: str, is_frozen: bool = False) -> dict[str, Any]:
        """Load the weights of a safetensors file in place.

        Args:
            path: The file, keys as in the folder that the server was started from.
            is_frozen: Whether nothing else is loaded later, so that a file which this worker has
                already is not loaded again.

        Returns:
            `checksums` of the tensors as they were read, by key, `dtype` of the server's model, and
            `num_compared`, tensors that were found again in the model; or `error`. An error that
            was raised would end the server.
        """
        from vllm.config import set_current_vllm_config

        if is_frozen and self._frozen is not None and self._frozen[0] == path:
            return self._frozen[1]
        self._frozen = None
        checksums: dict[str, str] = {}
        try:
            with safe_open(path, framework="pt") as file, set_current_vllm_config(self.vllm_config):
                self.model_runner.reload_weights(weights_iterator=_read(file, checksums))
                self._pack_output_layer()
                num_compared = self._compare(file)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"[:_MAX_MESSAGE]}
        reply = {
            "checksums": checksums,
            "dtype": str(self.vllm_config.model_config.dtype).removeprefix("torch."),
            "num_compared": num_compared,
        }
        self._frozen = (path, reply) if is_frozen else None
        return reply

    def compare_zppo_adapter(self, path: str, scaling: float) -> dict[str, Any]:
        """Compare the adapters that this worker has loaded with their file.

        Args:
            path: The file, as PEFT writes it.
            scaling: Of what the adapters add, which is multiplied into their B's.

        Returns:
            `checksums` of the tensors of the file, by key, and `num_compared`; or `error`.
        """
        try:
            manager = self.model_runner.lora_manager._adapter_manager
            [adapter] = manager.list_adapters().values()
            own = [checksum(tensor) for tensor in _matrices(adapter.loras.values())]
            checksums, expected = {}, []
            with safe_open(path, framework="pt") as file:
                for key in sorted(file.keys()):
                    tensor = file.get_tensor(key)
                    checksums[key] = checksum(tensor)
                    tensor = tensor.to(self.vllm_config.lora_config.lora_dtype)
                    expected.append(checksum(tensor * scaling if ".lora_B." in key else tensor))
            if sorted(own) != sorted(expected):
                raise ValueError(f"other adapters than those of {path}")
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"[:_MAX_MESSAGE]}
        return {"checksums": checksums, "num_compared": len(own)}

    def _pack_output_layer(self) -> None:
        """Rebuild the copy that CPU kernels have of an output layer. Reloading leaves the one of an
        output layer that is tied to the embedding as it was.
        """
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return
        for module in self.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead):
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)

    def _compare(self, file: Any) -> int:
        """Compare the tensors that the model has as they were read; returns how many these are.

        Raises:
            ValueError: One has other values, or there is none.
        """
        model = self.model_runner.get_model()
        parameters = dict(model.named_parameters())
        modules = dict(model.named_modules())
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        num_compared = 0
        for key in sorted(file.keys()):
            name = mapper.map_name(key) if mapper is not None else key
            owner = str(name).rpartition(".")[0]
            if f"{owner}.base_layer" in modules:  # it may take adapters
                owner, name = f"{owner}.base_layer", f"{owner}.base_layer.weight"
            parameter = parameters.get(name)
            if parameter is None or not key.endswith(_UNPACKED):
                continue
            tensor = file.get_tensor(key)
            # A vocabulary is divided over the workers, and may be padded.
            shard = getattr(modules[owner], "shard_indices", None)
            if shard is not None:
                tensor = tensor[shard.org_vocab_start_index : shard.org_vocab_end_index]
            rows = parameter[: tensor.shape[0]]
            if rows.shape != tensor.shape:
                raise ValueError(
                    f"{name} has the shape {tuple(parameter.shape)}, "
                    f"expected the rows of {key}, {tuple(tensor.shape)}"
                )
            if not torch.equal(rows, tensor.to(rows.device, rows.dtype)):
                raise ValueError(f"{name} has other values than {key} of the file")
            num_compared += 1
        if not num_compared:
            raise ValueError("no tensor of the file was found in the model")
        return num_compared


def _matrices(loras: Any) -> Iterator[torch.Tensor]:
    """Yield the A's and B's of adapters; those of linears that are fused are in lists."""
    for lora in loras:
        for matrix in (lora.lora_a, lora.lora_b):
            parts = matrix if isinstance(matrix, list | tuple) else [matrix]
            yield from (part for part in parts if part is not None)


def _read(file: Any, checksums: dict[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a file, and keep their checksums."""
    for key in sorted(file.keys()):
        tensor = file.get_tensor(key)
        checksums[key] = checksum(tensor)
        yield key, tensor


def checksum(tensor: torch.Tensor) -> str:
    """Return a checksum of a tensor's bytes as 16 hexadecimal digits, at the speed of memory.

    Words of 8 bytes are added up in blocks, and blocks with their numbers as weights, modulo 2^64:
    any change of a single word shows, and so do blocks that are not in their place.
    """
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    num_words = content.numel() // 8
    words = content[: num_words * 8].view(torch.int64)
    num_blocks = num_words // _WORDS_PER_BLOCK
    blocks = words[: num_blocks * _WORDS_PER_BLOCK].reshape(num_blocks, _WORDS_PER_BLOCK).sum(1)
    weights = torch.arange(1, num_blocks + 1, device=content.device)
    rest = words[num_blocks * _WORDS_PER_BLOCK :]
    total = int((blocks * weights).sum()) + int(rest.sum()) * (num_blocks + 1)
    for byte in content[num_words * 8 :].tolist():
        total = total * 257 + byte
    return f"{total & (2**64 - 1):016x}"


FOLDER = Path(__file__).parent
"""To be on a server's PYTHONPATH."""
