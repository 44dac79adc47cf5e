"""The process that decodes images and videos; `data.media.decoder` starts it and sends it requests.

After its imports it may open no file and no socket, write no file and take no more than a set
address space: whatever a forged file makes a decoder do, it can only die.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from data.errors import MediaError
from data.media.images import decode_image, prepare
from data.media.sampling import FrameSampling
from data.media.video_frames import decode_video
from data.worker_process import Answer, message, run

# A 16x16 GIF of one frame.
TEST_CLIP = (
    "47494638376110001000810000000000ffffff0000000000002c00000000100010004008290001081c48b060c10008111a3c9830c0c2871023426ce8"
    "50a2c58b18334e6c2891a2c68f2043020808003b"
)
TEST_LIMITS = {"max_pixels": 256, "sampling": FrameSampling(), "max_clip_bytes": 768}


class MediaServer:
    """Answers requests; images also where the video decoder cannot be imported."""

    def __init__(self) -> None:
        """Import all that decoding needs."""
        self._pictures = prepare()
        self._no_decoder = ""
        try:
            import decord

            decord.logging.set_level(decord.logging.QUIET)
        except Exception as error:
            # A broken native library raises OSError, an older NumPy AttributeError.
            self._no_decoder = message(error)

    def check(self) -> None:
        """Decode one file of each kind."""
        for content in self._pictures:
            decode_image(content, max_pixels=1 << 10)
        if not self._no_decoder:
            try:
                decode_video(bytearray.fromhex(TEST_CLIP), **TEST_LIMITS)  # type: ignore[arg-type]
            except Exception as error:
                self._no_decoder = message(error)

    def answer(self, request: Mapping[str, Any], content: bytearray) -> Answer:
        """Return shape, times and pixels, or why there are none."""
        try:
            if request["kind"] == "image":
                pixels = decode_image(content, request["limits"]["max_pixels"])
                return {"shape": pixels.shape}, pixels.data.cast("B")
            if self._no_decoder:
                detail = (
                    f"the decoder does not start ({self._no_decoder}); install it with: pip "
                    "install decord2"
                )
                return {"reason": "no_decoder", "detail": detail}, b""
            limits = request["limits"]
            sampling = FrameSampling(**limits["sampling"])
            pixels, timestamps, seconds = decode_video(content, **{**limits, "sampling": sampling})
        except MediaError as error:
            return {"reason": error.reason, "detail": str(error)}, b""
        except MemoryError:
            return {
                "reason": "oversized",
                "detail": "decoding it needs more memory than the worker may take; shrink it",
            }, b""
        except Exception as error:
            # The decoder raises its own types, StopIteration and bare assertions, and says when and
            # in which source file.
            detail = re.sub(r"\[\d\d:\d\d:\d\d\] \S+: ", "", message(error))
            return {
                "reason": "unreadable",
                "detail": f"unreadable: {detail}; convert or remove the file",
            }, b""
        return {
            "shape": pixels.shape,
            "timestamps": timestamps,
            "seconds_per_frame": seconds,
        }, pixels.data.cast("B")


if __name__ == "__main__":
    run(MediaServer)
