"""The page: what the gateway knows of its cluster, for a browser. Static files, and JSON that one of them asks for.

It tells names, places and failures, so it wants the gateway's token wherever that does: as `Authorization: Bearer`, or
once in a form (or `?token=`), for which the browser gets a cookie. The cookie is not the token: who reads it can look,
and not load.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import hmac
import ipaddress
import logging
import os
import ssl
import urllib.parse
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from aiohttp import web
from aiohttp.web_protocol import RequestHandler
from google.protobuf.json_format import MessageToDict

from ..proto.v1.errors import InvalidRequestError, one_line
from ..proto.v1.tls import TLS
from .lookout import Lookout

logger = logging.getLogger(__name__)

FILES = Path(__file__).parent / "static"
COOKIE = "shardlift-page"
_TYPES = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript", "login.html": "text/html"}
# Without the token, for they tell nothing.
_OPEN = ("/page.css", "/login")
_MOST_FORM_BYTES = 4096
# For a connection's first request to come whole, for what follows it, and between one request and the next.
_PATIENCE_S = 20.0
# What strangers send that is no HTTP is no news.
_server_logger = logging.getLogger(f"{__name__}.http")
_server_logger.setLevel(logging.CRITICAL)
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Page:
    """Serves it from `start` to `stop`. token: that everybody needs; None where only this machine reaches it.

    tls: the gateway's, for the page too; files that change count for connections that come after.
    """

    def __init__(self, lookout: Lookout, token: str | None, tls: TLS | None = None) -> None:
        self._lookout = lookout
        self._tls = tls
        self._token = None if token is None else token.encode()
        self._cookie = None if token is None else _cookie_of(token)
        self._runner: web.AppRunner | None = None
        self._listening: asyncio.Server | None = None
        # Connections over which nothing whole has come yet.
        self._silent: set[object] = set()
        self.url = ""

    async def start(self, host: str, port: int) -> str:
        """Listens; gives its URL. Raises InvalidRequestError where it can't."""
        app = web.Application(middlewares=[self._guard], client_max_size=_MOST_FORM_BYTES)
        app.router.add_get("/", partial(_file, "index.html"))
        app.router.add_get("/page.css", partial(_file, "page.css"))
        app.router.add_get("/page.js", partial(_file, "page.js"))
        app.router.add_get("/state", self._state)
        app.router.add_get("/login", partial(_file, "login.html"))
        app.router.add_post("/login", self._login)
        runner = web.AppRunner(
            app,
            access_log=None,
            handle_signals=False,
            shutdown_timeout=1.0,
            keepalive_timeout=_PATIENCE_S,
            logger=_server_logger,
        )
        await runner.setup()
        assert runner.server is not None
        server = runner.server
        loop = asyncio.get_running_loop()

        def connected() -> asyncio.Protocol:
            handler = server()
            self._silent.add(handler)
            loop.call_later(_PATIENCE_S, self._give_up, handler)
            return handler

        try:
            context = None if self._tls is None else _server_context(self._tls)
            patience_s = None if context is None else _PATIENCE_S
            self._listening = await loop.create_server(
                connected, host, port, ssl=context, ssl_handshake_timeout=patience_s
            )
        except (OSError, OverflowError) as error:
            await runner.cleanup()
            why = "another program has it" if getattr(error, "errno", 0) == errno.EADDRINUSE else one_line(error, 200)
            raise InvalidRequestError(
                f"port {port} of {host} can't be listened on for the page: {why}; choose another with --page-port"
            ) from None
        self._runner = runner
        bound = self._listening.sockets[0].getsockname()[1]
        self.url = f"http{'s' * (self._tls is not None)}://{f'[{host}]' if ':' in host else host}:{bound}/"
        return self.url

    def _give_up(self, handler: RequestHandler) -> None:
        """Ends a connection that has held its place for long, and asked nothing."""
        if handler in self._silent:
            self._silent.discard(handler)
            handler.force_close()

    async def stop(self) -> None:
        if self._listening is not None:
            self._listening.close()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _state(self, request: web.Request) -> web.Response:
        view = await self._lookout.view()
        return web.json_response(
            MessageToDict(view, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        )

    async def _login(self, request: web.Request) -> web.StreamResponse:
        try:
            form = await asyncio.wait_for(request.post(), _PATIENCE_S)
        except asyncio.TimeoutError:
            raise web.HTTPRequestTimeout(reason="the form didn't come whole") from None
        except (ValueError, LookupError, OSError, web.RequestPayloadError) as error:
            # What claims to be of several parts or compressed and isn't, or in a character set that nobody knows; or
            # whose sender has gone.
            raise web.HTTPBadRequest(reason="the form can't be read") from error
        return self._let_in(str(form.get("token", "")), "/")

    def _let_in(self, token: str, to: str) -> web.StreamResponse:
        """Sends the browser on with a cookie, or back to the form."""
        if self._token is None or self._cookie is None:
            return _redirect("/")
        if not hmac.compare_digest(_bytes(token.strip()), self._token):
            return _redirect("/login#wrong")
        response = _redirect(to)
        secure = self._tls is not None
        response.set_cookie(COOKIE, self._cookie, httponly=True, secure=secure, samesite="Strict", path="/")
        return response

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self._silent.discard(request.protocol)
        response = await self._guarded(request, handler)
        response.headers.update(_HEADERS)
        return response

    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if self._token is None:
                # A site that resolves to this machine must not read it through its visitor's browser.
                if not _names_this_machine(request.headers.get("Host", "")):
                    return web.Response(status=403, text="this page is for its own machine: ask for it by an address\n")
            elif "token" in request.query and request.method == "GET":
                # Not to stay in the address, nor in what is noted of it.
                return self._let_in(request.query["token"], "/")
            elif request.path not in _OPEN and not self._knows(request):
                if request.path == "/":
                    return _redirect("/login")
                return web.Response(status=401, text="the page wants the gateway's token\n")
            return await handler(request)
        except web.HTTPException as error:
            return web.Response(status=error.status, text=f"{error.reason}\n")
        except Exception:
            logger.exception("the page failed")
            return web.Response(status=500, text="the gateway's log says why\n")

    def _knows(self, request: web.Request) -> bool:
        assert self._token is not None
        assert self._cookie is not None
        given = _bytes(request.headers.get("Authorization", ""))
        cookie = _bytes(request.cookies.get(COOKIE, ""))
        by_header = hmac.compare_digest(given, b"Bearer " + self._token)
        by_cookie = hmac.compare_digest(cookie, self._cookie.encode())
        return by_header or by_cookie


def _bytes(text: str) -> bytes:
    """Of what came in a header or form: bytes that are no UTF-8 stand in it as surrogates."""
    return text.encode("utf-8", "surrogatepass")


def _redirect(to: str) -> web.Response:
    return web.Response(status=303, headers={"Location": to})


async def _file(name: str, request: web.Request) -> web.StreamResponse:
    return web.Response(body=(FILES / name).read_bytes(), content_type=_TYPES[name], charset="utf-8")


def _cookie_of(token: str) -> str:
    return hmac.new(token.encode(), b"shardlift page", hashlib.sha256).hexdigest()


def _names_this_machine(host: str) -> bool:
    """Whether a Host header is localhost or an address: no name that somebody else could have pointed here."""
    try:
        name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _server_context(tls: TLS) -> ssl.SSLContext:
    """Of a server whose files are read again for a connection when they have changed."""

    def stamp() -> tuple[int, ...]:
        return tuple(os.stat(path).st_mtime_ns for path in (tls.cert, tls.key, tls.ca) if path is not None)

    seen = [stamp()]
    listening = _context_of(tls)
    current = [listening]

    def renew(connection: ssl.SSLObject, name: str | None, of: ssl.SSLContext) -> None:
        try:
            if (now := stamp()) != seen[0]:
                # Another, whole one: what is read into one that is in use leaves it without a key where it fails.
                current[0] = _context_of(tls)
                seen[0] = now
        except (OSError, ssl.SSLError) as error:
            # Half written, perhaps: the old one still stands.
            logger.warning("the page's certificate can't be read again: %s", one_line(error, 200))
        connection.context = current[0]

    listening.sni_callback = renew
    return listening


def _context_of(tls: TLS) -> ssl.SSLContext:
    """As the files are now."""
    assert tls.cert is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A key that wants a password would ask for it on a terminal.
    context.load_cert_chain(tls.cert, tls.key, password="")
    if tls.ca is not None:
        context.load_verify_locations(tls.ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context
