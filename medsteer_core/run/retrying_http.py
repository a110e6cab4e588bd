"""HTTP to a server that may be busy, restarting or behind a shaky network: what may pass by itself is tried again.

Standard library only. Redirects are not followed, so that a token in a header reaches the given address and no other.
"""

from __future__ import annotations

import http.client
import json
import random
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..errors import MedSteerError
from .workflow import ServerRefused, ServerUnreachable

T = TypeVar("T")
PASSING_STATUSES = (408, 429, 500, 502, 503, 504)
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_request):
        return None


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)


@dataclass(frozen=True)
class RetryingHttp:
    """Requests to the server at `address` (such as `http://127.0.0.1:8188`).

    timeout: seconds for each answer. retries: how often a request is repeated. headers: sent with every request.
    on_retry: hears a sentence before each repetition.
    """

    address: str
    timeout: float = 60.0
    retries: int = 5
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    on_retry: Callable[[str], None] | None = field(default=None, repr=False)

    def get(self, path: str) -> bytes:
        """The answer to GET. Raises ServerUnreachable after the last try, ServerRefused for a status of 300 to 499."""
        return self.retried(lambda: self.once(path))

    def post(self, path: str, payload: Mapping | bytes, kind: str = "application/json") -> bytes:
        """The answer to POST, for requests that may arrive twice; raises as `get` does."""
        return self.retried(lambda: self.once(path, payload, kind))

    def once(self, path: str, payload: Mapping | bytes | None = None, kind: str = "application/json") -> bytes:
        """One request (POST where there is a payload), not repeated. Raises what urllib and http.client raise."""
        body = payload if payload is None or isinstance(payload, bytes) else json.dumps(payload).encode()
        headers = {**self.headers, **({"Content-Type": kind} if body is not None else {})}
        request = urllib.request.Request(self.address + path, body, headers)
        with _OPENER.open(request, timeout=self.timeout) as answer:
            return answer.read()

    def retried(self, attempt: Callable[[], T]) -> T:
        """What `attempt` returns, tried again after pauses that double and differ from client to client."""
        begun = time.monotonic()
        for number in range(self.retries + 1):
            try:
                return attempt()
            except (OSError, http.client.HTTPException) as error:
                raise_unless_passing(error, self.address)
                reason = reason_of(error)
            if number == self.retries:
                break
            # Between half and the whole: a hundred clients of a server that comes back do not ask at the same moment.
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**number) * random.uniform(0.5, 1.0)
            if self.on_retry:
                self.on_retry(f"no answer from {self.address} ({reason}); trying again in {pause:.1f} s")
            time.sleep(pause)
        tries = f"{self.retries + 1} tries in {time.monotonic() - begun:.0f} s" if self.retries else "one try"
        raise ServerUnreachable(f"no ComfyUI answers at {self.address}: {reason} ({tries})")


def raise_unless_passing(error: Exception, address: str) -> None:
    """Return when asking again may help; raise ServerRefused or ServerUnreachable when it cannot."""
    if isinstance(error, urllib.error.HTTPError) and error.code not in PASSING_STATUSES:
        raise ServerRefused(address, error.code, error.read(100_000)) from None
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, ssl.SSLCertVerificationError):
        raise ServerUnreachable(
            f"the certificate of {address} is not trusted: {cause.verify_message}. If it is your own server's, name "
            "its certificate (PEM) in the environment variable SSL_CERT_FILE, or reach the server through ssh -L."
        ) from None


def reason_of(error: Exception) -> str:
    """A failed request's reason in a few words."""
    if isinstance(error, urllib.error.HTTPError):
        return f"status {error.code} {error.reason}"
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return "timed out"
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


def checked_address(address: str) -> str:
    """A server's address without a slash at its end; MedSteerError unless it is http://HOST or https://HOST.

    A port and a path before ComfyUI's own (behind a proxy) may follow.
    """
    wanted = "http://HOST:PORT or https://HOST was expected, such as http://127.0.0.1:8188."
    try:
        parts = urllib.parse.urlsplit(address)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.username
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment or not address.isprintable() or " " in address:
        raise MedSteerError(f"{address!r} is no address of a server; {wanted}")
    return address.rstrip("/")


def answered(body: bytes, address: str) -> Any:
    """An answer's JSON; ServerUnreachable when it is none, as from another program than ComfyUI."""
    try:
        return json.loads(body)
    except ValueError:
        raise ServerUnreachable(f"{address} answers, but not as a ComfyUI would. Check the address.") from None


def form(fields: Mapping[str, str], file_field: str, name: str, content: bytes) -> tuple[str, bytes]:
    """A multipart/form-data body with one file: its content type and its bytes (RFC 7578)."""
    mark = uuid.uuid4().hex
    text = "".join(
        f'--{mark}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n' for key, value in fields.items()
    )
    text += f'--{mark}\r\nContent-Disposition: form-data; name="{file_field}"; filename="{name}"\r\n'
    text += "Content-Type: application/octet-stream\r\n\r\n"
    return f"multipart/form-data; boundary={mark}", text.encode() + content + f"\r\n--{mark}--\r\n".encode()


def decoded(body: bytes) -> dict[str, Any]:
    """An answer that should be a JSON object; what is none stands under `error`."""
    try:
        answer = json.loads(body)
    except ValueError:
        answer = body.decode(errors="replace")[:500]
    return answer if isinstance(answer, dict) else {"error": answer}
