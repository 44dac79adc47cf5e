"""An OpenAI-compatible server of the standard library around a real tiny model: what it answers,
the model sampled.

with serve(TEACHER_DIR) as server:
    server.url, server.replies
"""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from data.media.opening import Frames, MediaLimits, MediaOpener
from data.question import MediaRef, Question
from tests.support.serving import serving
from zppo_mm.rollout.prompt import PromptEncoder


@dataclass
class TinyModel:
    """A Hugging Face folder that answers chat requests; one at a time."""

    folder: Path
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.network: Any = AutoModelForImageTextToText.from_pretrained(
            str(self.folder), dtype=torch.float32
        ).eval()
        self.opener = MediaOpener(MediaLimits())
        self.media: list[Frames] = []
        self.encoder = PromptEncoder(self.folder, lambda ref: self.media[int(ref.key)])
        self.spellings = {
            token_id: spelling for spelling, token_id in self.encoder.chat.token_bytes().items()
        }

    def answer(
        self, request: dict[str, Any], num_choices: int
    ) -> tuple[list[tuple[str, str, Any]], int, int]:
        """Return text, finish reason and log-probs of each choice, and the prompt's and the
        choices' tokens.
        """
        with self.lock, torch.inference_mode():
            text, self.media = read_content(request["messages"][-1]["content"], self.opener)
            inputs = self.model_inputs(text)
            self.encoder.forget_media()
            torch.manual_seed(request.get("seed", 0))
            greedy = not request["temperature"]
            sampling = (
                {"do_sample": False}
                if greedy
                else {"do_sample": True, "temperature": request["temperature"], "top_k": 0}
            )
            stops = self.encoder.stop_token_ids
            generated = self.network.generate(
                **inputs,
                max_new_tokens=request["max_tokens"],
                num_return_sequences=1 if greedy else num_choices,
                eos_token_id=list(stops),
                pad_token_id=stops[0],
                output_logits=True,
                return_dict_in_generate=True,
                **sampling,
            )
            output, logits = generated.sequences, torch.stack(generated.logits, 1)
        num_prompt = inputs["input_ids"].shape[1]
        choices, num_tokens = [], 0
        rows = [(row, logits[index]) for index, row in enumerate(output[:, num_prompt:].tolist())]
        for row, scores in rows * (num_choices // len(output)):
            end = next((index + 1 for index, token in enumerate(row) if token in stops), len(row))
            num_tokens += end
            reported = (
                self.logprobs(row[:end], scores[:end], request["top_logprobs"])
                if request.get("logprobs")
                else None
            )
            choices.append(
                (
                    self.encoder.decode(row[:end]),
                    "stop" if row[end - 1] in stops else "length",
                    reported,
                )
            )
        return choices, num_prompt, num_tokens

    def logprobs(self, ids: list[int], logits: torch.Tensor, k: int) -> dict[str, Any]:
        """Return the log-probs of an answer's tokens and of the k most likely ones at each
        position.
        """
        logprobs = torch.log_softmax(logits.float(), -1)

        def entry(index: int, token: int) -> dict[str, Any]:
            # The network has rows that its tokenizer has no token for.
            spelling = self.spellings.get(token, b"<unused>")
            text = spelling.decode("utf-8", errors="replace")
            return {
                "token": text,
                "bytes": list(spelling),
                "logprob": float(logprobs[index, token]),
            }

        top = logprobs.topk(k).indices.tolist()
        return {
            "content": [
                {
                    **entry(index, token),
                    "top_logprobs": [entry(index, other) for other in top[index]],
                }
                for index, token in enumerate(ids)
            ]
        }

    def model_inputs(self, text: str) -> dict[str, Any]:
        """Return transformers' arguments for a text about `media`."""
        refs = tuple(
            MediaRef("video" if len(frames.pixels) > 1 else "image", "", str(i), "png")
            for i, frames in enumerate(self.media)
        )
        prompt, vision = self.encoder.encode(text, Question("q", text, refs, "", "open"))
        ids = torch.from_numpy(prompt.token_ids)[None]
        config = self.network.config
        types = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": types,
        }
        for kind, patches, grids in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            items = [item for item in vision if item.kind == kind]
            if items:
                inputs[patches] = torch.from_numpy(np.concatenate([item.patches for item in items]))
                inputs[grids] = torch.tensor([item.grid for item in items])
        return inputs


def read_content(
    content: str | Sequence[dict[str, Any]], opener: MediaOpener
) -> tuple[str, list[Frames]]:
    """Return the text of a message and its media, from data URLs."""
    if isinstance(content, str):
        return content, []
    texts, media = [], []
    for part in content:
        if part["type"] == "text":
            texts.append(part["text"])
            continue
        header, _, encoded = part[part["type"]]["url"].partition(",")
        file = base64.b64decode(encoded)
        if part["type"] == "image_url":
            assert header in ("data:image/png;base64", "data:image/jpeg;base64")
            media.append(
                Frames(np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))[None], (0.0,))
            )
        else:
            assert header == "data:video/mp4;base64"
            media.append(opener.open(file, "video"))
    return "\n".join(texts), media


class LoopbackServer(ThreadingHTTPServer):
    """Serves `/v1/chat/completions` and `/v1/models`.

    Attributes:
        model: Answers.
        served_name: The model's name.
        honours_n: Whether one request may have several choices.
        latency_seconds: Least time of an answer; short models answer sooner than a large one would.
        api_key: Bearer token that is asked for; empty takes any.
        replies: Texts of all choices sent, by the id of the reply.
        requests: Bodies of all requests.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(
        self, model: TinyModel, served_name: str = "tiny", honours_n: bool = True, port: int = 0
    ) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.model = model
        self.served_name = served_name
        self.honours_n = honours_n
        self.latency_seconds = 0.0
        self.api_key = ""
        self.replies: dict[str, list[str]] = {}
        self.requests: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: LoopbackServer

    def do_GET(self) -> None:
        self.send(
            200, {"object": "list", "data": [{"id": self.server.served_name, "object": "model"}]}
        )

    def do_POST(self) -> None:
        started = time.monotonic()
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        if (
            self.server.api_key
            and self.headers.get("Authorization") != f"Bearer {self.server.api_key}"
        ):
            self.send(401, {"error": {"message": f"wrong key {self.headers.get('Authorization')}"}})
        elif self.path != "/v1/chat/completions" or request.get("model") != self.server.served_name:
            self.send(
                404, {"error": {"message": f"The model {request.get('model')!r} does not exist."}}
            )
        else:
            self.complete(request, started)

    def complete(self, request: dict[str, Any], started: float) -> None:
        choices, num_prompt, num_completion = self.server.model.answer(
            request, request.get("n", 1) if self.server.honours_n else 1
        )
        reply = {
            "id": f"chatcmpl-{len(self.server.replies)}-{request.get('seed')}"
            f"-{time.monotonic_ns()}",
            "object": "chat.completion",
            "model": self.server.served_name,
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": text},
                    "logprobs": reported,
                    "finish_reason": reason,
                }
                for index, (text, reason, reported) in enumerate(choices)
            ],
            "usage": {
                "prompt_tokens": num_prompt,
                "completion_tokens": num_completion,
                "total_tokens": num_prompt + num_completion,
            },
        }
        self.server.replies[reply["id"]] = [text for text, *_ in choices]
        time.sleep(max(0.0, started + self.server.latency_seconds - time.monotonic()))
        self.send(200, reply)

    def send(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def serve(model: TinyModel, **options: Any) -> Iterator[LoopbackServer]:
    """Serve in a thread until the block ends."""
    with serving(LoopbackServer(model, **options)) as server:
        yield server
