"""What servers' replies have in common, whoever asks."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from tests.support.drawing_students import TableStudent
from tests.support.served_engines import LIMITS, PATIENT
from tests.support.vllm_server import serve_vllm
from zppo_mm.serving.fault import Fault
from zppo_mm.serving.pool import ServerPool
from zppo_mm.serving.servers import RequestOutcome


class Meeting:
    """A call whose reply can be read only while another's is. Implements `Call`."""

    path = "/other"
    max_reply_bytes = 1000
    is_greedy = False

    def __init__(self, barrier: threading.Barrier) -> None:
        self.barrier = barrier

    async def body(self, draw: int) -> bytes:
        return b"{}"

    def read(self, content: bytes) -> bytes:
        self.barrier.wait()
        return content

    def is_settled_by(self, fault: Fault, kinds: Mapping[str, int]) -> bool:
        return False


def test_a_long_reply_does_not_hold_up_the_others() -> None:
    barrier = threading.Barrier(2, timeout=10.0)
    with serve_vllm(TableStudent()) as server:
        pool = ServerPool([server.url], LIMITS, who="test")
        asked = [
            pool._start(pool._attempts(Meeting(barrier), RequestOutcome(), PATIENT))
            for _ in range(2)
        ]
        assert [each.result() for each in asked] == [b"{}", b"{}"]
        pool.close()
