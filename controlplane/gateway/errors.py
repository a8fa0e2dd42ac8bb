"""Errors of /v1 in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}` plus status and headers.

One that is worth another try says when: in Retry-After, and as `retry_after_ms` in the object, which is all that a
client sees of an error that ends a stream.

Raised anywhere in the gateway, rendered once by the app (before the first byte) or by the stream (after it).
The sentences name the field or limit at fault and the remedy, and never carry a prompt, an answer or a key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from workers.contract import WireError

Headers = tuple[tuple[bytes, bytes], ...]

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable",
    504: "timeout_error",
}
# The openai SDK tries a 409 again by itself, and two clients would take a request from each other in turn.
NO_RETRY: Headers = ((b"x-should-retry", b"false"),)
_encode = msgspec.json.Encoder().encode


class ApiError(Exception):
    """A refusal or failure the client is told of. `retry_after_s` becomes Retry-After (whole seconds, up)."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        type_: str | None = None,
        retry_after_s: float | None = None,
        headers: Headers = (),
        details: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(code)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.type = type_ or _TYPES.get(status, "server_error")
        self.retry_after_s = retry_after_s
        self.headers = headers
        self.details = details or {}  # further members of the object

    def members(self) -> dict[str, object]:
        """Of the object that tells it."""
        error: dict[str, object] = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
            **self.details,
        }
        if self.retry_after_s is not None:
            error["retry_after_ms"] = self._retry_ms(self.retry_after_s)
        return error

    def body(self) -> bytes:
        """The JSON body."""
        return _encode({"error": self.members()})

    def response_headers(self) -> Headers:
        """Headers besides content type and length."""
        if self.retry_after_s is None:
            return self.headers
        retry_ms = self._retry_ms(self.retry_after_s)
        return (
            *self.headers,
            (b"retry-after", b"%d" % -(-retry_ms // 1000)),
            (b"retry-after-ms", b"%d" % retry_ms),
        )

    @staticmethod
    def _retry_ms(retry_after_s: float) -> int:
        return max(1, math.ceil(retry_after_s * 1000))


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """400 that names the field."""
    return ApiError(400, code, message, param=param)


def unavailable(code: str, message: str, retry_after_s: float = 1.0) -> ApiError:
    """503: nothing is wrong with the request, try again."""
    return ApiError(503, code, message, retry_after_s=retry_after_s)


def from_wire(error: WireError) -> ApiError:
    """What a replica or the control worker decided. A status that is no HTTP error becomes 500."""
    status = error.status if 400 <= error.status <= 599 else 500
    retry_after_s = 1.0 if status == 503 else None
    headers = NO_RETRY if status == 409 else ()
    return ApiError(
        status, error.code, error.message, param=error.param, retry_after_s=retry_after_s, headers=headers
    )


class ClientGone(Exception):  # noqa: N818 - a state of the world, not a mistake
    """The client closed the connection: nobody is left to answer."""
