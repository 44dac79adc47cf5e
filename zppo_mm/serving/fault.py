"""What keeps a usable reply from coming."""

from __future__ import annotations


class Fault(Exception):
    """One attempt failed.

    Attributes:
        kind: Fixed name to count by: connection, certificate, timeout, cut_off, too_large,
            bad_reply, http_<status>, and what the reader of the replies adds.
        detail: In words.
        retry_after_seconds: How long the server asks to be left alone.
        is_refusal: The message itself is at fault, and another attempt would fail as well.
        is_of_model: The server works, but the model gave no answer: another draw may bring one,
            waiting does not.
    """

    def __init__(
        self,
        kind: str,
        detail: str,
        retry_after_seconds: float | None = None,
        is_refusal: bool = False,
        is_of_model: bool = False,
    ) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail
        self.retry_after_seconds = retry_after_seconds
        self.is_refusal = is_refusal
        self.is_of_model = is_of_model

    def __reduce__(self) -> tuple[type[Fault], tuple[str, str, float | None, bool, bool]]:
        return type(self), (
            self.kind,
            self.detail,
            self.retry_after_seconds,
            self.is_refusal,
            self.is_of_model,
        )
