"""transformers' own processors as an oracle of images, videos and prompts.

    results = ask_transformers(cases)

They run in a process of their own, because they need torchvision, which is no dependency: without
it, the four of its functions that they call are computed here with Pillow, as transformers' Pillow
processors compute them.
"""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

CLONE_ROOT = Path(__file__).resolve().parents[2]
SECONDS = 280


@dataclass(frozen=True)
class Case:
    """One prompt.

    Attributes:
        folder: Of the model.
        text: With a bare placeholder for every medium.
        images: Files.
        videos: Files.
    """

    folder: Path
    text: str
    images: tuple[Path, ...] = ()
    videos: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Processed:
    """What transformers makes of a case, in its own names; or why it refuses it.

    Attributes:
        values: Arrays and lists by name.
        refusal: Message of its error.
        is_exact: Whether pixels were resized by Pillow.
    """

    values: dict[str, Any] = field(default_factory=dict)
    refusal: str = ""
    is_exact: bool = True


def ask_transformers(cases: Sequence[Case]) -> list[Processed]:
    """Return what transformers makes of each case."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.processor_oracle"],
        input=pickle.dumps(list(cases)),
        capture_output=True,
        cwd=CLONE_ROOT,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    answered: list[Processed] = pickle.loads(done.stdout)
    return answered


def _answer(case: Case, is_exact: bool) -> Processed:
    from PIL import Image
    from transformers import AutoProcessor
    from transformers.video_utils import load_video

    processor = AutoProcessor.from_pretrained(case.folder)
    # The processor of Qwen2.5-VL samples only if it is asked to, and at no rate of its own.
    sampling = {"do_sample_frames": True, "fps": processor.video_processor.fps or 2}
    videos, metadata = [], []
    for path in case.videos:
        frames, about = load_video(str(path), backend="decord")
        videos.append(frames)
        metadata.append({"total_num_frames": len(frames), "fps": about.fps})
    try:
        made = processor(
            text=[case.text],
            images=[Image.open(path) for path in case.images] or None,
            videos=videos or None,
            video_metadata=metadata or None,
            **sampling,
        )
    except (ValueError, ZeroDivisionError) as error:
        return Processed(refusal=str(error) or type(error).__name__)
    values = {name: np.asarray(value) for name, value in made.items()}
    return Processed(values, is_exact=is_exact)


def _stand_in() -> None:
    """Put a module in the place of torchvision."""
    import torch
    from PIL import Image

    class InterpolationMode(Enum):
        NEAREST = "nearest"
        NEAREST_EXACT = "nearest-exact"
        BILINEAR = "bilinear"
        BICUBIC = "bicubic"
        BOX = "box"
        HAMMING = "hamming"
        LANCZOS = "lanczos"

    def resize(image: Any, size: Sequence[int], interpolation: Any, antialias: bool) -> Any:
        """Resize bytes `[..., channels, height, width]`."""
        assert antialias
        assert interpolation is InterpolationMode.BICUBIC
        assert image.dtype == torch.uint8
        pictures = image.reshape(-1, *image.shape[-3:]).permute(0, 2, 3, 1).numpy()
        made = [
            np.asarray(Image.fromarray(each).resize((size[1], size[0]), Image.Resampling.BICUBIC))
            for each in pictures
        ]
        resized = torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2)
        return resized.reshape(*image.shape[:-2], *size)

    def normalize(image: Any, mean: Any, std: Any, inplace: bool = False) -> Any:
        mean, std = (torch.as_tensor(each)[:, None, None] for each in (mean, std))
        return (image - mean) / std

    def grayscale_to_rgb(image: Any) -> Any:
        return image if image.shape[-3] != 1 else image.expand(*image.shape[:-3], 3, -1, -1)

    names = ("torchvision", "transforms", "transforms.functional", "transforms.v2")
    paths = [
        names[0],
        *(f"torchvision.{name}" for name in (*names[1:], "transforms.v2.functional")),
    ]
    modules = {path: ModuleType(path) for path in [*paths, "torchvision.io"]}
    for path, module in modules.items():
        module.__spec__ = importlib.util.spec_from_loader(path, loader=None)
        module.__path__ = []  # type: ignore[attr-defined]
        above, _, name = path.rpartition(".")
        if above:
            setattr(modules[above], name, module)
    modules["torchvision"].__version__ = "0.28.0"  # type: ignore[attr-defined]
    modules["torchvision"].__file__ = __file__
    modules["torchvision.transforms"].InterpolationMode = InterpolationMode  # type: ignore[attr-defined]
    modules["torchvision.transforms.functional"].pil_to_tensor = None  # type: ignore[attr-defined]
    for function in (resize, normalize, grayscale_to_rgb, InterpolationMode):
        setattr(modules["torchvision.transforms.v2.functional"], function.__name__, function)
    sys.modules.update(modules)


def main() -> None:
    """Answer the cases on standard input."""
    is_missing = importlib.util.find_spec("torchvision") is None
    if is_missing:
        _stand_in()
    cases = pickle.load(sys.stdin.buffer)
    sys.stdout.buffer.write(pickle.dumps([_answer(case, is_missing) for case in cases]))


if __name__ == "__main__":
    # Pickled classes are those of the module, not of the program.
    from tests.support import processor_oracle

    processor_oracle.main()
