"""Sources, models and the copy of a run behind `s3://`, from a server on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.errors import DataError
from data.remote_files import RemoteFiles
from data.sources.opening import open_source
from data.toy.digits_shards import build_digit_shards
from tests.support.running import lines, run, transcript
from tests.support.source_files import FORMS, make_shards, rows_of, write_form, write_pictures
from zppo_mm.bundled import STUDENT_DIR

pytestmark = pytest.mark.s3

BUCKET = "questions"
NUM_ROWS = 12
STEPS = 3


@pytest.fixture(scope="module")
def store() -> Iterator[Any]:
    """A client of a server with an empty bucket, which every s3fs of these tests finds."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "of-a-test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket=BUCKET)
        yield client
    server.stop()


def upload(store: Any, folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            store.upload_file(str(path), BUCKET, str(path.relative_to(folder)))


@pytest.fixture(scope="module")
def folder(store: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same questions in every form, also in the bucket."""
    folder = tmp_path_factory.mktemp("forms")
    rows = rows_of(write_pictures(folder, NUM_ROWS))
    for form in FORMS:
        write_form(form, folder, rows)
    make_shards(folder, rows)
    upload(store, folder)
    return folder


@pytest.mark.parametrize(
    "path", ["questions.jsonl", "urls.jsonl", "structs", "lists", "saved", "stream.arrow", "shards"]
)
def test_a_source_in_a_bucket_is_the_local_one(folder: Path, tmp_path: Path, path: str) -> None:
    columns = {"image": "image,image_2"} if path == "structs" else None
    files = RemoteFiles(tmp_path, 1 << 30)
    source = open_source(f"s3://{BUCKET}/{path}", columns=columns, files=files)
    local = open_source(folder / path, columns=columns)
    assert source.fingerprint() == local.fingerprint()
    for mine, theirs in zip(source.keys(), local.keys(), strict=True):
        question, other = source.question(*mine), local.question(*theirs)
        assert question.id == other.id
        contents = [local.media_bytes(ref) for ref in other.media]
        assert [source.media_bytes(ref) for ref in question.media] == contents
    assert files.counts["retried"] == 0


def test_a_changed_object_is_noticed(store: Any, folder: Path, tmp_path: Path) -> None:
    upload(store, _copied(folder / "shards", tmp_path / "up" / "changing"))
    source = open_source(f"s3://{BUCKET}/changing", files=RemoteFiles(tmp_path / "cache", 1 << 30))
    name = "shard-000001.tar"
    content = (folder / "shards" / name).read_bytes()
    store.put_object(Bucket=BUCKET, Key=f"changing/{name}", Body=content[:-1] + b"x")
    key = next(key for key in source.keys() if key[0].endswith(name))  # noqa: SIM118
    with pytest.raises(DataError, match=f"s3://{BUCKET}/changing/{name}: the object was changed"):
        source.question(*key)
    with pytest.raises(DataError, match="s3://nobucket/set: no such object"):
        open_source("s3://nobucket/set", files=RemoteFiles(tmp_path / "cache", 1 << 30))


def texts(folder: Path, step: int) -> list[list[str]]:
    """Return what a run has sampled in a step, by group."""
    return [
        [rollout["text"] for rollout in group["rollouts"]] for group in transcript(folder, step)
    ]


def _copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target.parent


def test_a_run_on_a_bucket_is_the_run_on_local_files_also_resumed(
    store: Any, tmp_path: Path
) -> None:
    local = tmp_path / "local"
    build_digit_shards(local / "digits", "image", "train", 14, seed=0)
    shutil.copytree(STUDENT_DIR, local / "student")
    upload(store, local)
    options = ("modality=image", "parity.mode=none", f"train.train_iters={STEPS}")
    here = run(
        tmp_path,
        "here",
        f"data.train=[{{path: {local}/digits}}]",
        f"model.student={local}/student",
        *options,
    )
    away = (
        f"data.train=[{{path: 's3://{BUCKET}/digits'}}]",
        f"model.student=s3://{BUCKET}/student",
        f"remote.cache_folder={tmp_path}/cache",
        *options,
    )
    run(tmp_path, "away", *away, f"train.train_iters={STEPS - 1}")
    resumed = run(tmp_path, "away", *away)
    for step in range(1, STEPS + 1):
        assert texts(here, step) == texts(resumed, step)
    steps = lines(resumed / "metrics.jsonl")
    assert steps[0]["remote/fetched"] == 2, "a shard and its index"
    assert steps[-1]["remote/fetched"] == 0, "they are in the cache"


def test_a_run_goes_on_from_its_copy_on_another_machine(store: Any, tmp_path: Path) -> None:
    options = ("modality=text", "parity.mode=none", "checkpoint.interval=1")
    here = run(tmp_path / "here", "run", *options, f"train.train_iters={STEPS}")
    away = (*options, f"checkpoint.mirror=s3://{BUCKET}/runs/")
    run(tmp_path / "away", "run", *away, f"train.train_iters={STEPS - 1}")
    shutil.rmtree(tmp_path / "away")
    second = run(tmp_path / "away", "run", *away, f"train.train_iters={STEPS}")
    for step in range(1, STEPS + 1):
        assert texts(here, step) == texts(second, step)
    steps = lines(second / "metrics.jsonl")
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert [line["mirror/failures"] for line in steps] == [0] * STEPS
    assert "is fetched from s3://" in (second / "run.log").read_text()
    listed = store.list_objects_v2(Bucket=BUCKET, Prefix="runs/run/")["Contents"]
    stored = {entry["Key"].removeprefix("runs/run/"): entry["Size"] for entry in listed}
    for kind in ("checkpoints", "transcripts", "hf"):
        files = [path for path in (second / kind).rglob("*") if path.is_file()]
        sizes = {str(path.relative_to(second)): path.stat().st_size for path in files}
        assert sizes == {name: size for name, size in stored.items() if name.startswith(kind)}
