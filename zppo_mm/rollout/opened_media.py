"""The media of questions, opened and patchified: once per process and step, or once per machine."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial

from data.errors import DataError, ReasonedError
from data.media.array_file import Stored
from data.media.clip_cache import ClipCache
from data.media.node_cache import NodeCache
from data.media.opening import Frames
from data.question import MediaRef, Question
from encoders.config import ProcessorConfig
from encoders.processor import VisionInput, patchify_video, process_image, resize_video

DEFAULT_CACHE_BYTES = 512 * 1024 * 1024


class PromptError(ReasonedError):
    """A question cannot be turned into a prompt; its reason is `unusable_media`, `placeholders`,
    `conversation`, `missing_media`, or the media opener's own.
    """


class OpenedMedia:
    """Opens and processes the media of questions for one model.

    They are kept while they are among the most recently used ones, so that a group, its BCQ and NCQ
    prompts and its training samples in the same step share the work; with a cache, all processes of
    the machine do.

    Args:
        open_media: Opens a media reference to pixels; a MediaError makes the question unusable, any
            other error is the run's.
        processor: How they are processed; `None` for a model that takes none.
        max_bytes: Most bytes of patches that this process keeps.
        cache: What the processes of this machine keep; `None` shares nothing.
        clips: Opens videos and keeps their frames on a disk; `None` keeps none.
    """

    def __init__(
        self,
        open_media: Callable[[MediaRef], Frames],
        processor: ProcessorConfig | None,
        max_bytes: int = DEFAULT_CACHE_BYTES,
        cache: NodeCache | None = None,
        clips: ClipCache | None = None,
    ) -> None:
        self._open = open_media
        self._processor = processor
        self._max_bytes = max_bytes
        self._cache = cache
        self._clips = clips
        self._kept: OrderedDict[tuple[MediaRef, ...], tuple[VisionInput, ...]] = OrderedDict()
        self._kept_bytes = 0

    def of(self, question: Question) -> tuple[VisionInput, ...]:
        """Return one input per media reference, in prompt order.

        Raises:
            PromptError: A medium cannot be opened or processed, or the model takes none.
        """
        if not question.media:
            return ()
        if question.media in self._kept:
            self._kept.move_to_end(question.media)
            return self._kept[question.media]
        inputs = tuple(self._input(reference, question) for reference in question.media)
        self._kept[question.media] = inputs
        self._kept_bytes += _num_bytes(inputs)
        while self._kept_bytes > self._max_bytes and len(self._kept) > 1:
            self._kept_bytes -= _num_bytes(self._kept.popitem(last=False)[1])
        return inputs

    def prefetch(self, question: Question) -> bool:
        """Open a question's media into the cache of this machine for the next step, unless they are
        there; may be called from any thread.

        Returns:
            Whether there was room.

        Raises:
            ReasonedError: One cannot be opened or processed.
        """
        cache, processor = self._cache, self._processor
        if cache is None or processor is None:
            return False
        return all(
            cache.prefetch(
                _key(reference, processor), partial(self._open_and_process, reference, processor)
            )
            for reference in question.media
        )

    def forget(self) -> None:
        """Drop what this process keeps; it is opened, or found in the cache, when it is asked for
        again.
        """
        self._kept.clear()
        self._kept_bytes = 0

    def _input(self, reference: MediaRef, question: Question) -> VisionInput:
        where = (
            f"prompt: question {question.id}: {reference.kind} "
            f"{reference.shard}:{reference.key}.{reference.extension}"
        )
        processor = self._processor
        if processor is None:
            message = (
                f"{where}: this model takes no media, got one, expected text only; use a "
                "vision-language model"
            )
            raise PromptError("unusable_media", message)
        make = partial(self._open_and_process, reference, processor)
        try:
            if self._cache is None:
                return _unpack(make())
            return _unpack(self._cache.get(_key(reference, processor), make))
        except ReasonedError as error:
            raise PromptError(error.reason, f"{where}: {error}") from error

    def _open_and_process(self, reference: MediaRef, processor: ProcessorConfig) -> Stored:
        try:
            if reference.kind == "image":
                return _pack(process_image(self._open(reference).pixels[0], processor))
            frames = self._resized(reference, processor)
            return _pack(
                patchify_video(
                    frames.pixels, frames.timestamps, processor, frames.seconds_per_frame
                )
            )
        except DataError:
            raise
        except ValueError as error:
            raise ReasonedError("unusable_media", str(error)) from error

    def _resized(self, reference: MediaRef, processor: ProcessorConfig) -> Frames:
        """Return the frames of a video as the model sees them."""
        resize = partial(resize_video, config=processor)
        if self._clips is not None:
            return self._clips.open(reference, _settings(processor), resize)
        frames = self._open(reference)
        return replace(frames, pixels=resize(frames.pixels))


def _key(reference: MediaRef, processor: ProcessorConfig) -> str:
    """Return the name of a processed medium; what its shard holds and which frames are taken stays
    the same during a run.
    """
    named = json.dumps([asdict(reference), asdict(processor)], sort_keys=True)
    return hashlib.blake2b(named.encode(), digest_size=16).hexdigest()


def _settings(processor: ProcessorConfig) -> str:
    return json.dumps(asdict(processor), sort_keys=True)


def _pack(item: VisionInput) -> Stored:
    header = {
        "kind": item.kind,
        "grid": item.grid,
        "timestamps": item.timestamps,
        "seconds_per_patch": item.seconds_per_patch,
    }
    return header, item.patches


def _unpack(stored: Stored) -> VisionInput:
    header, patches = stored
    return VisionInput(
        kind=header["kind"],
        patches=patches,
        grid=tuple(header["grid"]),
        timestamps=tuple(header["timestamps"]),
        seconds_per_patch=header["seconds_per_patch"],
    )


def _num_bytes(inputs: Sequence[VisionInput]) -> int:
    return sum(item.patches.nbytes for item in inputs)
