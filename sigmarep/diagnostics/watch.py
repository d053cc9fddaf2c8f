"""A local server of the page of runs that go on. It answers one address, which has a secret in it, and serves no files.

What a page of another site could do is refused: requests under another host's name (DNS rebinding), with another origin, or
in a frame. The answer is made of the runs' metrics and settings alone, by the functions that make the report.
"""

import hmac
import http.server
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from sigmarep.diagnostics import page
from sigmarep.diagnostics.follow import Follower
from sigmarep.errors import BadInput, one_line

ADDRESS = "127.0.0.1"
# Names of this machine to itself, with any port: a tunnel may have another one.
HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.IGNORECASE)
SINCE = re.compile(r"since=(\d{1,12})")
SCRIPTS = (*page.SCRIPTS, "assets/live.js")
# The page may ask its own server, and nobody else.
POLICY = f"{page.POLICY}; connect-src 'self'"
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
# Seconds between looks at the files; after a look that took longer, this many times as long.
PAUSE, SHARE = 1.2, 5.0
# Seconds for which a silent client is waited for.
PATIENCE = 10.0


class Server(http.server.ThreadingHTTPServer):
    """A server of the page on 127.0.0.1.

    Args:
      follower: the page.
      port: 0 for any that is free.

    Attributes:
      address: the page's address.

    Raises:
      BadInput: the port is taken.
    """

    daemon_threads = True

    def __init__(self, follower: Follower, port: int):
        self.token = secrets.token_urlsafe(24)
        self._follower, self._lock, self._next_look = follower, threading.Lock(), 0.0
        try:
            super().__init__((ADDRESS, port), _Handler)
        except (OSError, OverflowError) as error:
            raise BadInput(f"--port {port}: cannot be used ({one_line(error)}); 0 takes any that is free") from None
        self.address = f"http://{ADDRESS}:{self.server_port}/{self.token}/"

    def page(self, since: int | None) -> str | None:
        """The page; for a browser that has version `since` only what has changed, None if nothing has."""
        with self._lock:
            if (start := time.monotonic()) >= self._next_look:
                self._follower.update()
                took = time.monotonic() - start
                self._next_look = start + took + max(PAUSE, min(SHARE * took, 2 * PAUSE))
            follower = self._follower
            if since is None:
                return page.document(follower.body, follower.data(0), SCRIPTS, POLICY)
            # A browser may have the page of an earlier server.
            if since == follower.version:
                return None
            return page.change(follower.body, follower.data(since if since < follower.version else 0))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error."""
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError):
            print(f"watch: {type(error).__name__}: {one_line(error)}", file=sys.stderr, flush=True)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "sigmarep", ""
    timeout = PATIENCE
    error_content_type, error_message_format = "text/plain; charset=utf-8", "%(code)d %(message)s\n"

    def do_GET(self) -> None:
        if problem := self._problem():
            self.send_error(*problem)
            return
        since = SINCE.fullmatch(self.path.partition("?")[2])
        text = self.server.page(int(since[1]) if since else None)
        content = b"" if text is None else text.encode("utf-8", "replace")
        self.send_response(204 if text is None else 200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_GET

    def _refuse(self) -> None:
        self.send_error(405, "only GET")

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = _refuse

    def _problem(self) -> tuple[int, str] | None:
        """Status and words for a request that is refused."""
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not HOST.fullmatch(hosts[0]):
            return 403, "another host"
        if any(origin != f"http://{hosts[0]}" for origin in self.headers.get_all("Origin") or []):
            return 403, "another origin"
        # A link in a notebook may be followed; nothing else comes from elsewhere.
        followed = (self.headers.get("Sec-Fetch-Mode"), self.headers.get("Sec-Fetch-Dest")) == ("navigate", "document")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") and not followed:
            return 403, "another site"
        # As it is: no path is decoded, joined or looked up.
        path = self.path.partition("?")[0]
        if not hmac.compare_digest(path.encode("utf-8", "replace"), f"/{self.server.token}/".encode()):
            return 404, "no such address"
        return None

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing: the terminal is the user's."""


def serve(folders: Sequence[str], *, most: int, port: int, say: Callable[[str], object] = print) -> None:
    """Serves the page of the runs in `folders` until the process is interrupted.

    Args:
      folders, most: see `Follower`.
      port: see `Server`.
      say: is given the lines for the user.

    Raises:
      BadInput: see `Follower` and `Server`.
    """
    with Server(Follower(folders, most=most), port) as server:
        say(f"watch: {server.address}")
        say(
            f"from another machine: ssh -L {server.server_port}:{ADDRESS}:{server.server_port} HOST, then the same address"
        )
        say("Ctrl-C ends it; the runs go on.")
        server.serve_forever(poll_interval=5.0)
