"""Time of a step with a served teacher beside that of a step without one, for several latencies of
the teacher.

    python benchmarks/teacher_overlap.py [--modality text] [--latencies 0 0.5 0.9]
    [--steps 12] [key=v …]

The teacher is a server on this machine that knows every answer and takes its time without using the
processor, for any number of questions at once, so that what it costs is waiting alone. Without
teacher is `ncq_replay`: as many prompts under the same caps, and nobody to wait for. Latencies are
fractions of its plain rollout phase; 0 answers at once. `grpo_replay`, which reformulates nothing,
shows what ZPPO costs. The bundled student's responses are shorter than its prompts; with
`--response-tokens N` it knows no stop token, and all have N tokens. All runs are started, and then
take turns step by step, the others stopped meanwhile, so that a machine that slows down slows all
alike. A step is a turn by the clock without evaluation; the first, in which the buffer is empty,
does not count. Seconds are medians, ratios those of all counted turns together, tokens and groups
means per step.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from data.media.store import MediaStore
from data.shards import ShardFolder
from zppo_mm.bundled import STUDENT_DIR
from zppo_mm.bundled.questions import bundled_sources
from zppo_mm.config.load import load_config
from zppo_mm.run.build import student_folder
from zppo_mm.run.shared import media_limits
from zppo_mm.teacher.served.media import MessageWriter
from zppo_mm.zone.prompts import load_templates

POLL_SECONDS = 0.002
CLONE = Path(__file__).resolve().parents[1]
ALONE = ("ncq_replay", "grpo_replay")
SIZE = ("train.num_new_questions=64", "rollout.max_batch_size=64", "train.updates_per_step=4")
QUIET = (
    "parity.mode=none",
    "evaluation.num_questions=1",
    "observability.report=false",
    "observability.progress_bar=false",
)


class KnowingServer(ThreadingHTTPServer):
    """Answers chat completions from a table of prompts after `latency_seconds`."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, answers: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = answers
        self.latency_seconds = 0.0


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: KnowingServer

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = self.server.answers.get(digest(request["messages"][-1]["content"]), "0")
        time.sleep(self.server.latency_seconds)
        message = {"role": "assistant", "content": f"<think>known</think>\\boxed{{{answer}}}"}
        choices = [
            {"index": index, "message": message, "finish_reason": "stop"}
            for index in range(request.get("n", 1))
        ]
        body = json.dumps(
            {"choices": choices, "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def digest(content: object) -> str:
    """Return what a message is recognised by."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def endless_student(folder: Path) -> Path:
    """Write a copy of the bundled student whose stop token is a media placeholder, which is never
    sampled.
    """
    shutil.copytree(STUDENT_DIR, folder)
    placeholder = json.loads((folder / "config.json").read_text())["image_token_id"]
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(
        json.dumps({**settings, "eos_token_id": placeholder})
    )
    return folder


@contextmanager
def serve(modality: str) -> Iterator[KnowingServer]:
    """Serve the bundled questions' answers until the block ends."""
    templates = load_templates()
    config = load_config(None, [f"modality={modality}"])
    media = MediaStore(media_limits(config.data, student_folder(config.model)))
    writer = MessageWriter(config.teacher, media)
    answers = {}
    for source in bundled_sources(config, "train"):
        folder = ShardFolder(source.path)
        for shard, key in list(folder.keys()):
            question = folder.question(shard, key)
            answers[digest(writer.content(templates.plain_text(question), question.media))] = (
                question.answer
            )
    media.close()
    server = KnowingServer(answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()


class Run:
    """A training run that goes on for one step at a time, from the first turn on.

    Attributes:
        rows: Metrics of the steps so far; `seconds/step` is the turn's time by the clock, without
            evaluation.
    """

    def __init__(self, folder: Path, name: str, steps: int, options: list[str]) -> None:
        program = str(CLONE / "tools" / "train_zppo.py")
        command = [
            sys.executable,
            program,
            f"name={name}",
            f"output_dir={folder}",
            f"train.train_iters={steps}",
            *SIZE,
            *QUIET,
            *options,
        ]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "PYTHONPATH": str(CLONE),
        }
        # Its decoding workers must stop with it.
        self._start = partial(
            subprocess.Popen[bytes],
            command,
            env=environment,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._metrics = folder / name / "metrics.jsonl"
        self.rows: list[dict[str, float]] = []

    def turn(self) -> None:
        """Run until the next step's metrics are written.

        Raises:
            RuntimeError: The run ended instead.
        """
        started = time.monotonic()
        self._process = self._process or self._start()
        os.killpg(self._process.pid, signal.SIGCONT)
        while not (
            self._metrics.exists() and self._metrics.read_bytes().count(b"\n") > len(self.rows)
        ):
            if self._process.poll() is not None:
                raise RuntimeError(
                    f"{self._metrics.parent.name} ended with exit status "
                    f"{self._process.returncode}; run it alone to see why"
                )
            time.sleep(POLL_SECONDS)
        taken = time.monotonic() - started
        os.killpg(self._process.pid, signal.SIGSTOP)
        row = json.loads(self._metrics.read_text().splitlines()[len(self.rows)])
        self.rows.append({**row, "seconds/step": taken - row.get("seconds/evaluation", 0.0)})

    def end(self) -> None:
        """Break the run off."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def seconds(self, phase: str) -> list[float]:
        """Return a phase's seconds in all counted steps."""
        return [row.get(f"seconds/{phase}", 0.0) for row in self.rows[1:]]


def prepare(
    folder: Path, url: str, known: argparse.Namespace, options: list[str]
) -> dict[tuple[str, float], Run]:
    """Return a run per method and setting, by name and latency."""
    given = {(method, 0.0): [f"method={method}"] for method in ALONE}
    for latency in known.latencies:
        endpoint = [
            "teacher.max_concurrency=256",
            f"teacher.endpoints=[{url}]",
            "teacher.model=known",
        ]
        given[f"zppo-{latency:g}", latency] = ["method=zppo", *endpoint]
    # The last step, which ends with a checkpoint, is not reached.
    return {
        key: Run(folder, key[0], known.steps + 1, [*own, *options]) for key, own in given.items()
    }


def main() -> None:
    """Run all latencies in turns and print one line each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--modality", default="text")
    parser.add_argument("--latencies", nargs="+", type=float, default=[0.0, 0.5, 0.9])
    parser.add_argument("--response-tokens", type=int, default=0)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("options", nargs="*", metavar="key=value")
    known = parser.parse_intermixed_args()
    options = [f"modality={known.modality}", *known.options]
    runs: dict[tuple[str, float], Run] = {}
    with serve(known.modality) as server, tempfile.TemporaryDirectory() as scratch:
        if known.response_tokens:
            student = endless_student(Path(scratch) / "student")
            options = [
                f"model.student={student}",
                f"rollout.max_response_tokens={known.response_tokens}",
                *options,
            ]
        try:
            runs = prepare(
                Path(scratch), f"http://127.0.0.1:{server.server_address[1]}/v1", known, options
            )
            for _ in range(known.steps):
                for (_, latency), run in runs.items():
                    phase = runs[ALONE[0], 0.0].seconds("plain_rollout")
                    server.latency_seconds = latency * statistics.median(phase) if phase else 0.0
                    run.turn()
        finally:
            for run in runs.values():
                run.end()
    show(runs)


def show(runs: dict[tuple[str, float], Run]) -> None:
    """Print one line per run."""
    phases = ("plain_rollout", "teacher", "reformulated_rollout", "update", "step")
    head = [
        "run",
        "answers after",
        *phases,
        *(f"step / {method}" for method in ALONE),
        "sampled tokens",
        "groups with gradient",
    ]
    print(f"| {' | '.join(head)} |")
    print("|---" * len(head) + "|")
    for (name, _), run in runs.items():
        answered = statistics.median(row.get("teacher/answer_seconds", 0.0) for row in run.rows[1:])
        values = [answered, *(statistics.median(run.seconds(phase)) for phase in phases)]
        others = [runs[method, 0.0].seconds("step") for method in ALONE]
        ratios = [sum(run.seconds("step")) / sum(other) for other in others]
        tokens = statistics.mean(row["rollout/tokens"] for row in run.rows[1:])
        groups = statistics.mean(
            row["advantage/nontrivial_groups"]
            * sum(count for key, count in row.items() if key.startswith("batch/groups/"))
            for row in run.rows[1:]
        )
        print(
            f"| {name} | {' | '.join(f'{value:.2f}' for value in [*values, *ratios])} | "
            f"{tokens:.0f} | {groups:.1f} |"
        )


if __name__ == "__main__":
    main()
