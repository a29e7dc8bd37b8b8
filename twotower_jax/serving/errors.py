"""What a client is told when something cannot be done: OpenAI's error JSON."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

_LONGEST = 1000  # Characters of a message: it may quote what the client sent.
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error.

    Args:
      status: of HTTP.
      message: what is wrong and what to do; names the field.
      param: the field.
      code: a word for programs.
      headers: of the answer.
      close: end the connection, because the rest of a body may still come.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        close: bool = False,
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.message = message if len(message) <= _LONGEST else f"{message[:_LONGEST]} …"
        self.headers = dict(headers or {}) | ({"connection": "close"} if close else {})

    def content(self) -> dict[str, Any]:
        """The JSON object."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return Response(to_json(self.content()), self.status, self.headers, "application/json")


def to_json(value: Any) -> bytes:
    """JSON without spaces. What is not ASCII is escaped: a message may quote half of a surrogate pair."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")
