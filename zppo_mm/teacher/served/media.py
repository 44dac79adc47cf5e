"""Questions as messages of an OpenAI-compatible server, media as data URLs."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from data.media.opening import Frames
from data.messages import Part, placed
from data.question import MediaRef, Turn
from data.text import clean_text
from zppo_mm.config.schema import TeacherConfig
from zppo_mm.special_tokens import break_special_tokens
from zppo_mm.teacher.served.chat_api import Messages

JPEG_QUALITY = 95
VIDEO_TYPES = {
    "mp4": "mp4",
    "m4v": "mp4",
    "mov": "quicktime",
    "webm": "webm",
    "mkv": "x-matroska",
    "avi": "x-msvideo",
    "gif": "gif",
}


class Media(Protocol):
    """Where media come from."""

    def open(self, ref: MediaRef) -> Frames:
        """Return the pixels that the student sees too; raises MediaError."""
        ...

    def read(self, ref: MediaRef) -> bytes:
        """Return a file as it is, within the size limit; raises MediaError."""
        ...


class MessageWriter:
    """Makes messages of texts and media.

    Args:
        config: How video is sent, and in which image format.
        media: Opens them; `None` if no message has any.
    """

    def __init__(self, config: TeacherConfig, media: Media | None = None) -> None:
        self._config = config
        self._media = media

    def messages(
        self, text: str, media: Sequence[MediaRef] = (), earlier: Sequence[Turn] = ()
    ) -> Messages:
        """Return a conversation, each content a plain text where it has no media, else parts.

        Args:
            text: Of the last message, the user's.
            media: In the order of the texts.
            earlier: Messages before it.

        Raises:
            MediaError: A medium cannot be opened.
        """
        turns = placed([*earlier, Turn("user", text)], [ref.kind for ref in media])
        return [{"role": role, "content": self._content(parts, media)} for role, parts in turns]

    def _content(
        self, parts: Sequence[Part], media: Sequence[MediaRef]
    ) -> str | list[Mapping[str, Any]]:
        content: list[Mapping[str, Any]] = []
        for part in parts:
            if isinstance(part, int):
                content += self._parts(media[part])
                continue
            # The server would read a special token as such; broken it is plain text, as it is for
            # a model in this process.
            text = break_special_tokens(clean_text(part))
            if len(parts) == 1:
                return text
            content.append({"type": "text", "text": text})
        return content

    def _parts(self, ref: MediaRef) -> list[Mapping[str, Any]]:
        assert self._media is not None, "a message with media, but nowhere to open them"
        if ref.kind == "video" and self._config.video == "file":
            return [
                _url_part("video_url", f"video/{_video_type(ref.extension)}", self._media.read(ref))
            ]
        frames = self._media.open(ref)
        images = [
            _url_part("image_url", f"image/{self._config.media_format}", self._encoded(pixels))
            for pixels in frames.pixels
        ]
        if ref.kind == "image":
            return images
        times = ", ".join(f"{seconds:.2f}" for seconds in frames.timestamps)
        return [
            {"type": "text", "text": f"A video as {len(images)} frames, at {times} seconds:"},
            *images,
        ]

    def _encoded(self, pixels: npt.NDArray[np.uint8]) -> bytes:
        """Return `[height, width, 3]` as a file."""
        buffer = io.BytesIO()
        options: dict[str, Any] = (
            {"quality": JPEG_QUALITY} if self._config.media_format == "jpeg" else {}
        )
        Image.fromarray(pixels).save(buffer, format=self._config.media_format.upper(), **options)
        return buffer.getvalue()


def _url_part(name: str, mime: str, content: bytes) -> Mapping[str, Any]:
    return {"type": name, name: {"url": f"data:{mime};base64,{base64.b64encode(content).decode()}"}}


def _video_type(extension: str) -> str:
    ending = extension.rpartition(".")[2].lower()
    return VIDEO_TYPES.get(ending, ending)
