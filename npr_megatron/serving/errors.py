"""What a client is told when something cannot be served, in the shape its library reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

RETRY_AFTER_S = 1
"""What a client is told to wait before it asks an overloaded or starting server again."""


class ApiError(Exception):
    """An HTTP status and every problem behind it, one sentence each.

    Args:
        code: names the kind of problem for programs.
    """

    def __init__(self, status: int, code: str, problems: str | Sequence[str]) -> None:
        self.status = status
        self.code = code
        self.problems: tuple[str, ...] = (
            (problems,) if isinstance(problems, str) else tuple(problems)
        )
        super().__init__("\n".join(self.problems))

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response: when to come back, where that helps."""
        return {"Retry-After": str(RETRY_AFTER_S)} if self.status in (429, 503) else {}

    def body(self) -> dict[str, Any]:
        """Return ``{"error": {"message", "type", "param", "code", "problems"}}``."""
        is_clients = self.status < 500
        kind = "invalid_request_error" if is_clients else "server_error"
        return {
            "error": {
                "message": str(self),
                "type": "rate_limit_error" if self.status == 429 else kind,
                "param": None,
                "code": self.code,
                "problems": list(self.problems),
            }
        }
