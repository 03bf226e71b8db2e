"""JSON over HTTP with the standard library, from a server that may do anything: hang, answer without end, or answer something else.

What goes wrong becomes a ``ServerError`` of one line. Next file: ``proof/ask.py``.
"""

from __future__ import annotations

import http.client
import json
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from minilora.errors import ConfigError, ServerError, printable

__all__ = ["Refused", "base_of", "call"]

_MOST = 8_000_000  # bytes of an answer
_SHOWN = 160  # signs of one, in a message
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Refused(ServerError):
    """The server answered with an error; ``status`` is its code."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def base_of(url: str) -> str:
    """The address of a server, without ``/v1`` and a slash at the end. Raises ``ConfigError`` for what is no such address."""
    try:
        parts = urllib.parse.urlsplit(url)
        good = (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.port != 0
            and not (parts.query or parts.fragment)
        )
        good = good and url.isascii() and url.isprintable() and " " not in url and parts.username is None
    except ValueError:
        good = False
    if not good:
        raise ConfigError(f"--server={url[:200]!r}: wanted an address such as http://127.0.0.1:8080")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def call(url: str, body: Any, seconds: float, key: str = "") -> Any:
    """What a server answers, as JSON values: to a POST of ``body``, or to a GET where that is None.

    Args:
        seconds: until the whole answer is there. key: sent as a bearer token, if it is not empty.

    Raises:
        Refused: the server answered with an error code, or sends elsewhere. ServerError: nobody answers, not in time, or no JSON.
    """
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(_raw(url, body, seconds, key))
        except Exception as error:
            found.append(error)

    # In a thread: a server that sends a byte now and then would keep any timeout of a socket from running out.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not found or isinstance(found[0], TimeoutError):
        raise ServerError(
            f"{url}: no whole answer within {seconds:g} s; is the server busy or loading? --timeout waits longer"
        )
    if isinstance(found[0], ServerError):
        raise found[0]
    if isinstance(found[0], Exception):
        raise ServerError(f"{url}: cannot be asked ({_reason(found[0])}); {_way(found[0])}")
    try:
        return json.loads(found[0].decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise ServerError(
            f"{url}: answers no JSON but {_start(found[0])}; wanted an OpenAI-compatible server"
        ) from None


def _no_number(name: str) -> Any:
    raise ValueError(name)


def _raw(url: str, body: Any, seconds: float, key: str) -> bytes:
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    proxies: dict[str, str] | None = {} if urllib.parse.urlsplit(url).hostname in _LOOPBACK else None
    opener = urllib.request.build_opener(_Stay, urllib.request.ProxyHandler(proxies))
    try:
        with opener.open(request, timeout=seconds) as answer:
            raw: bytes = answer.read(_MOST + 1)
            if len(raw) > _MOST:
                raise ServerError(f"{url}: answers more than {_MOST:,} bytes; wanted an OpenAI-compatible server")
            if (length := answer.headers.get("Content-Length")) and length.isdigit() and len(raw) < int(length):
                raise ServerError(
                    f"{url}: the answer breaks off after {len(raw):,} of {int(length):,} bytes; try again"
                )
            return raw
    except urllib.error.HTTPError as error:
        with error:
            said = error.read(20_000)
        raise Refused(f"{url}: HTTP {error.code}: {_complaint(said)}", error.code) from None


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows nobody elsewhere: what is verified is the server that was named."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _complaint(said: bytes) -> str:
    """The message in an error's body, in whichever of the usual places it is."""
    try:
        content: Any = json.loads(said)
    except (ValueError, RecursionError):
        return _start(said)
    for _ in range(3):
        if not isinstance(content, dict):
            break
        content = next((content[name] for name in ("error", "message", "detail") if name in content), "")
    return printable(str(content))[:_SHOWN] or "no reason given"


def _start(said: bytes) -> str:
    return repr(said[:_SHOWN].decode("utf-8", "replace")) if said else "nothing"


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {printable(cause.verify_message)[:_SHOWN]}"
    if isinstance(cause, http.client.IncompleteRead):
        return f"the answer breaks off after {len(cause.partial):,} bytes"
    return printable(str(getattr(cause, "strerror", None) or cause or type(error).__name__))[:_SHOWN]


def _way(error: Exception) -> str:
    """What to do about it."""
    cause = getattr(error, "reason", error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return "SSL_CERT_FILE=FILE in the environment trusts the certificate in that PEM file, as for every program of Python"
    if isinstance(cause, ssl.SSLError):
        return "does the server speak https there, or is it http?"
    return "is the server running there?"
