"""The page in headless Chromium: on a cluster as it lives, and with views made up for what a small one doesn't have."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
import urllib.parse
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
import ray
import torch

import shardlift
from shardlift.cluster.gateway_options import GatewayOptions
from shardlift.cluster.lookout import Lookout
from shardlift.cluster.page import COOKIE, FILES, Page
from shardlift.proto.v1 import registry_pb2
from shardlift.proto.v1.errors import InvalidRequestError
from shardlift.proto.v1.tls import TLS
from tests.support import checkpoints
from tests.support.browser import CHROMIUM, Tab, browser_tab, extent, pixels
from tests.support.certificates import Authority
from tests.support.cluster import ADDRESSES, RunningCluster
from tests.support.gateway import started
from tests.support.quantization import nf4

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")
GIB = 1 << 30
EVIL = "<img src=x onerror=window.hacked=1>"


class MadeUp(Lookout):
    """Shows what it is told to."""

    def __init__(self, view: registry_pb2.ClusterView) -> None:
        self.shown = view
        self.looks = 0

    async def view(self, model: str = "") -> registry_pb2.ClusterView:
        self.looks += 1
        return self.shown


def stage(index: int, node: str, device: str, **fields: Any) -> registry_pb2.StageView:
    return registry_pb2.StageView(
        index=index, node=node, device=device, first_layer=10 * index, last_layer=10 * index + 9, **fields
    )


def made_up() -> registry_pb2.ClusterView:
    """Two nodes of two GPUs and a head; a model that runs, one that loads, one that is lost and bears an evil name."""
    gpus = [
        registry_pb2.DeviceView(device=f"cuda:{index}", total_bytes=80 * GIB, free_bytes=free * GIB, name="H100")
        for index, free in enumerate((30, 70))
    ]
    nodes = [registry_pb2.NodeView(node=name, alive=True, devices=gpus) for name in ("10.0.0.5", "10.0.0.6")]
    nodes += [registry_pb2.NodeView(node="10.0.0.4", alive=True, is_head=True), registry_pb2.NodeView(node="10.0.0.9")]
    room = {
        "resident_bytes": 20 * GIB,
        "kv_bytes": 5 * GIB,
        "kv_budget_bytes": 20 * GIB,
        "answers": True,
        "sessions": 3,
    }
    models = [
        registry_pb2.ModelView(
            name="llama",
            state=registry_pb2.MODEL_STATE_READY,
            path="org/llama",
            quantization="nf4",
            stages=[stage(0, "10.0.0.5", "cuda:0", **room), stage(1, "10.0.0.6", "cuda:0", **room)],
            sessions_running=3,
            sessions_waiting=2,
            max_sessions=3,
            tokens_per_second=214.7,
            reserved_tokens=1000,
            kv_tokens=4000,
        ),
        registry_pb2.ModelView(
            name="qwen",
            state=registry_pb2.MODEL_STATE_LOADING,
            path="org/qwen",
            load_seconds=42,
            stages=[
                stage(
                    0,
                    "10.0.0.5",
                    "cuda:1",
                    resident_bytes=10 * GIB,
                    progress=registry_pb2.StageProgress(
                        fetched_bytes=30 * GIB,
                        fetch_bytes=40 * GIB,
                        tensors=100,
                        tensors_loaded=70,
                        bytes_per_second=1.2e9,
                        seconds_left=95,
                    ),
                ),
                stage(1, "10.0.0.6", "cuda:1", resident_bytes=10 * GIB),
            ],
        ),
        registry_pb2.ModelView(
            name=EVIL,
            state=registry_pb2.MODEL_STATE_UNAVAILABLE,
            path="/x/<script>window.hacked=1</script>",
            reason=f"stage 0 is lost ({EVIL})",
            stages=[stage(0, "10.0.0.9", "cuda:0", resident_bytes=GIB)],
        ),
    ]
    events = [
        registry_pb2.ClusterEvent(unix_s=time.time() - 60, kind="load-failed", model=EVIL, text=EVIL, count=1),
        registry_pb2.ClusterEvent(unix_s=time.time(), kind="refused", model="llama", text="too many", count=12),
    ]
    return registry_pb2.ClusterView(unix_s=time.time(), nodes=nodes, models=models, events=events)


@pytest_asyncio.fixture
async def open_page() -> AsyncIterator[tuple[Page, MadeUp]]:
    lookout = MadeUp(made_up())
    page = Page(lookout, None)
    await page.start("127.0.0.1", 0)
    yield page, lookout
    await page.stop()


# -- in a browser -----------------------------------------------------------------------------------------------------


def the_model(name: str) -> str:
    return f"document.querySelector('[data-model=\"{name}\"]')"


def _all(selector: str, property_: str) -> str:
    return f"[...document.querySelectorAll('{selector}')].map((each) => each.{property_})"


async def assert_sound(tab: Tab, url: str) -> None:
    """Nothing went wrong in it, nothing came from elsewhere, nothing hangs over its edge."""
    assert tab.errors == []
    assert all(each.startswith((url, "data:")) for each in tab.requested), tab.requested
    assert await tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


@needs_chromium
@pytest.mark.parametrize(
    ("width", "height", "dark"),
    [(1440, 1000, False), (360, 740, True), (3840, 2160, True)],
    ids=["desk", "phone", "4K"],
)
async def test_it_shows_what_there_is(
    open_page: tuple[Page, MadeUp], tmp_path: Path, width: int, height: int, dark: bool
) -> None:
    page, _ = open_page
    async with browser_tab() as tab:
        await tab.open(page.url, width=width, height=height, dark=dark)
        await tab.wait_for("document.querySelectorAll('.model').length === 3")
        texts = await tab.evaluate(_all(".model", "textContent"))
        assert "tokens/s215" in texts[0]
        assert "ready" in texts[0]
        assert "3 of 3" in texts[0]
        assert "25 %" in texts[0]
        assert "30.0 GiB of 40.0 GiB fetched at 1.2 GB/s, 1 min 35 s left" in texts[1]
        assert "waiting for its worker" in texts[1]
        progress = "document.querySelector('progress')"
        assert await tab.evaluate(f"{progress}.value / {progress}.max") == 0.7
        # Names are text.
        assert EVIL in texts[2]
        assert await tab.evaluate("window.hacked === undefined && document.querySelectorAll('img').length === 0")
        devices = await tab.evaluate(_all("[data-device]", "dataset.device"))
        assert devices == [f"10.0.0.{node}/cuda:{index}" for node in (5, 6) for index in (0, 1)]
        bar = '[data-device="10.0.0.5/cuda:0"] .bar'
        label = await tab.evaluate(f"document.querySelector('{bar}').getAttribute('aria-label')")
        assert label == (
            "llama stage 0: 20.0 GiB weights, 5.00 GiB of 20.0 GiB keys and values; others: 10.0 GiB; "
            "30.0 GiB of 80.0 GiB free"
        )
        events = await tab.evaluate(_all(".events li", "textContent"))
        assert "too many (12 times)" in events[0], "the latest first"
        assert len(events) == 2
        # What a person sees of it: a quarter of the bar in the model's colour, an eighth in that of the others.
        image = pixels(await tab.photograph(tmp_path / "bar.png", of=bar))
        colours = [await tab.evaluate(_colour_of(f"{bar} .{kind}")) for kind in ("weights", "other")]
        middle = image[image.shape[0] - 4]
        shares = [(middle == colour).all(axis=-1).mean() for colour in colours]
        assert shares == pytest.approx([1 / 4, 1 / 8], abs=0.02)
        heading = pixels(await tab.photograph(tmp_path / "heading.png", of="h2"))
        assert (heading[0, -1].astype(int).sum() < 3 * 60) == dark
        assert extent(await tab.photograph(tmp_path / "page.png")) == (width, height)
        await assert_sound(tab, page.url)


def _colour_of(selector: str) -> str:
    return f"getComputedStyle(document.querySelector('{selector}')).backgroundColor.match(/\\d+/g).map(Number)"


@needs_chromium
async def test_it_follows_and_says_when_the_gateway_is_gone(open_page: tuple[Page, MadeUp]) -> None:
    page, lookout = open_page
    async with browser_tab() as tab:
        await tab.open(page.url)
        await tab.wait_for("document.querySelector('#status.live') && document.querySelectorAll('.model').length === 3")
        lookout.shown = registry_pb2.ClusterView()
        await tab.wait_for("document.querySelector('#models').textContent.includes('shardlift load')")
        await page.stop()
        await tab.wait_for("document.querySelector('#status.lost')")
        assert await tab.evaluate("document.querySelector('#status').textContent.includes('trying again')")


@needs_chromium
async def test_beyond_loopback_the_browser_asks_for_the_token() -> None:
    page = Page(MadeUp(made_up()), "the token")
    await page.start("127.0.0.1", 0)
    try:
        async with browser_tab() as tab:
            await tab.open(page.url)
            assert (await tab.evaluate("location.pathname")) == "/login"

            async def enter(token: str) -> None:
                await tab.evaluate(f"document.querySelector('#token').value = '{token}'; document.forms[0].submit()")

            await enter("wrong")
            await tab.wait_for("location.hash === '#wrong' && document.querySelector('#wrong')?.checkVisibility()")
            await enter("the token")
            await tab.wait_for("location.pathname === '/' && document.querySelectorAll('.model').length === 3")
            assert await tab.evaluate("document.cookie") == "", "no script reads the cookie"
            assert tab.errors == []
    finally:
        await page.stop()


@needs_chromium
@pytest.mark.ray
async def test_a_clusters_page_follows_a_model_from_its_load_to_its_end(
    cluster: RunningCluster, tmp_path: Path
) -> None:
    folder = checkpoints.tiny("llama", tmp_path / "llama", dtype="bfloat16", max_position_embeddings=50_000)
    url = ray.get(ray.get_actor("controller", namespace="shardlift").page.remote())
    with shardlift.connect(cluster.gateway) as client:
        async with browser_tab() as tab:
            await tab.open(url)
            await tab.wait_for("document.querySelectorAll('[data-node]').length")
            assert await tab.evaluate(_all("[data-node]", "dataset.node")) == ADDRESSES
            loading = asyncio.create_task(
                asyncio.to_thread(client.load, str(folder), name="seen", num_stages=3, quantization_config=nf4())
            )
            card = the_model("seen")
            await tab.wait_for(f"{card}?.querySelector('.state.loading')", timeout_s=120)
            model = await loading
            await tab.wait_for(f"{card}?.querySelector('.state.ready')")
            labels = await tab.evaluate(_all(".bar", "ariaLabel"))
            assert [label.partition(":")[0] for label in labels] == [f"seen stage {index}" for index in range(3)]
            with model.stream(torch.arange(5, 17)[None], max_new_tokens=40_000) as stream:
                next(stream)
                await tab.wait_for(f"{card}.textContent.includes('sessions1 of 64')")
                await tab.wait_for(f"!{card}.querySelector('dd').textContent.startsWith('0')")
                await tab.photograph(tmp_path / "cluster.png")
            await tab.wait_for(f"{card}.textContent.includes('sessions0 of 64')")
            await asyncio.to_thread(model.unload)
            await tab.wait_for(f"!{card}")
            kinds = await tab.evaluate(
                "[...document.querySelectorAll('.events li')].filter((each) => each.querySelector('.of').textContent"
                " === 'seen').map((each) => each.querySelector('.kind').textContent)"
            )
            assert kinds == ["unloaded", "load ready", "load started"]
            await assert_sound(tab, url)
        told = client.cluster()
    assert [node.devices[0].free_bytes for node in told.nodes] == [node.devices[0].total_bytes for node in told.nodes]


# -- over HTTP --------------------------------------------------------------------------------------------------------


async def test_who_may_look() -> None:
    page = Page(MadeUp(made_up()), "the token")
    await page.start("127.0.0.1", 0)
    state = f"{page.url}state"
    try:
        async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as http:

            async def status(url: str, **options: Any) -> int:
                async with http.get(url, allow_redirects=False, **options) as answer:
                    assert "the token" not in str(answer.headers)
                    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
                    return answer.status

            assert await status(state) == 401
            assert await status(f"{page.url}page.js") == 401
            assert await status(f"{page.url}nothing", headers={"Authorization": "Bearer the token"}) == 404
            assert await status(state, headers={"Authorization": "Bearer wrong"}) == 401
            assert await status(state, headers={"Authorization": "Bearer the token"}) == 200
            assert await status(state, cookies={COOKIE: "the token"}) == 401, "the cookie isn't the token"
            assert await status(f"{page.url}?token=wrong") == 303
            async with http.get(f"{page.url}?token=the%20token", allow_redirects=False) as answer:
                assert (answer.status, answer.headers["Location"]) == (303, "/")
                cookie = answer.cookies[COOKIE]
            assert cookie["httponly"]
            assert cookie["samesite"] == "Strict"
            assert await status(state, cookies={COOKIE: cookie.value}) == 200
            assert await status(state, headers={"Authorization": f"Bearer {cookie.value}"}) == 401
            async with http.post(f"{page.url}login", data={"token": "x" * 10_000}) as answer:
                assert answer.status == 413
    finally:
        await page.stop()


async def raw(url: str, head: str, body: bytes = b"") -> tuple[int, str]:
    """Status and whole text of the answer to a request that no client would make."""
    split = urllib.parse.urlsplit(url)
    reader, writer = await asyncio.open_connection(split.hostname, split.port)
    lines = f"{head}\r\nHost: {split.netloc}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    writer.write(lines.encode("latin-1") + body)
    answer = (await asyncio.wait_for(reader.read(), 10)).decode("latin-1")
    writer.close()
    await writer.wait_closed()
    return int(answer.split()[1]), answer


@pytest.mark.parametrize(
    ("head", "body", "status"),
    [
        ("GET /state HTTP/1.1\r\nAuthorization: Bearer \xff\xfe", b"", 401),
        ("GET /state HTTP/1.1\r\nAuthorization: Bearer geh\xc3\xb6rig", b"", 401),
        (f"GET /state HTTP/1.1\r\nCookie: {COOKIE}=\xff", b"", 401),
        (f'GET /state HTTP/1.1\r\nCookie: {COOKIE}="\\377"', b"", 401),
        ("GET /?token=%FF%ED%A0%80 HTTP/1.1", b"", 303),
        ("POST /login HTTP/1.1\r\nContent-Type: multipart/form-data", b"token=x", 400),
        ("POST /login HTTP/1.1\r\nContent-Type: multipart/form-data; boundary=x", b"nothing of the kind", 400),
        ("POST /login HTTP/1.1\r\nContent-Type: multipart/form-data; boundary=x", b"--x\r\n\r\nno name\r\n--x--", 400),
        ("POST /login HTTP/1.1\r\nContent-Type: application/x-www-form-urlencoded; charset=bogus", b"token=x", 400),
        ("POST /login HTTP/1.1\r\nContent-Type: application/x-www-form-urlencoded", b"token=\xff", 400),
        ("POST /login HTTP/1.1\r\nContent-Type: application/x-www-form-urlencoded", b"token=%FF", 303),
        ("POST /login HTTP/1.1\r\nContent-Type: image/png", b"token=x", 303),
        (
            "POST /login HTTP/1.1\r\nContent-Encoding: gzip\r\nContent-Type: application/x-www-form-urlencoded",
            b"no gzip",
            400,
        ),
    ],
)
async def test_what_nobody_means_is_refused_in_order(
    head: str, body: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    page = Page(MadeUp(made_up()), "the token")
    await page.start("127.0.0.1", 0)
    try:
        got, answer = await raw(page.url, head, body)
    finally:
        await page.stop()
    assert got == status, answer
    assert "Content-Security-Policy: default-src 'none'" in answer
    assert "X-Content-Type-Options: nosniff" in answer
    assert "Traceback" not in answer
    assert caplog.text == ""


FORM = (
    b"POST /login HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: 99\r\n\r\nt"
)


@pytest.mark.parametrize(
    ("sent", "status"),
    [(b"", b""), (b"GET / HTTP/1.1\r\nHost: x\r\n", b""), (b"\x16\x03\x01", b"HTTP/1.0 400"), (FORM, b"HTTP/1.1 408")],
)
async def test_who_asks_nothing_whole_is_not_waited_for(
    sent: bytes, status: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shardlift.cluster.page._PATIENCE_S", 0.3)
    page = Page(MadeUp(made_up()), "the token")
    await page.start("127.0.0.1", 0)
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", urllib.parse.urlsplit(page.url).port)
        writer.write(sent)
        assert (await asyncio.wait_for(reader.read(12), 5)) == status
        writer.close()
        # One that asks keeps its place, as long as it goes on.
        reader, writer = await asyncio.open_connection("127.0.0.1", urllib.parse.urlsplit(page.url).port)
        for _ in range(6):
            writer.write(b"HEAD /login HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
            await asyncio.sleep(0.1)
        writer.close()
    finally:
        await page.stop()
    assert caplog.text == ""


async def test_who_leaves_in_the_middle_of_a_form_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    page = Page(MadeUp(made_up()), "the token")
    await page.start("127.0.0.1", 0)
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", urllib.parse.urlsplit(page.url).port)
        writer.write(FORM)
        await writer.drain()
        await asyncio.sleep(0.1)
        writer.transport.abort()
        await asyncio.sleep(0.2)
    finally:
        await page.stop()
    assert caplog.text == ""


async def test_what_fails_within_is_told_to_the_log_alone(
    open_page: tuple[Page, MadeUp], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    page, lookout = open_page

    async def broken(model: str = "") -> registry_pb2.ClusterView:
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr(lookout, "view", broken)
    async with aiohttp.ClientSession() as http, http.get(f"{page.url}state") as answer:
        assert answer.status == 500
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "secret" not in await answer.text()
    assert "a secret of the inside" in caplog.text


async def test_without_a_token_it_is_for_this_machine_alone(open_page: tuple[Page, MadeUp]) -> None:
    page, _ = open_page
    async with aiohttp.ClientSession() as http:
        named = {"localhost:1": 200, "127.0.0.1": 200, "[::1]:5": 200, "evil.example": 403, "": 403}
        for host, expected in named.items():
            async with http.get(f"{page.url}state", headers={"Host": host}) as answer:
                assert answer.status == expected, host


async def test_a_port_that_is_taken_is_told(open_page: tuple[Page, MadeUp]) -> None:
    page, lookout = open_page
    with pytest.raises(InvalidRequestError, match="another program has it; choose another with --page-port"):
        await Page(lookout, None).start("127.0.0.1", int(page.url.rstrip("/").rpartition(":")[2]))


async def test_a_gateway_whose_page_has_no_port_says_so() -> None:
    """What `up` then tells; it serves all the same."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with started(GatewayOptions(port=port - 1)) as (gateway, address):
            assert address == f"127.0.0.1:{port - 1}"
            assert gateway.page.url == ""
            (said,) = gateway.warnings
            assert said.startswith(f"there is no page: port {port} of 127.0.0.1 can't be listened on")
            assert said.endswith("choose another with --page-port")
    async with started(GatewayOptions(page_port=0)) as (gateway, _):
        assert gateway.page.url
        assert gateway.warnings == []


# -- over TLS ---------------------------------------------------------------------------------------------------------


def browser_of(authority: Authority, own: TLS | None = None) -> ssl.SSLContext:
    """A client that believes `authority`, with its `own` certificate if it has one."""
    context = ssl.create_default_context(cafile=authority.file)
    if own is not None:
        assert own.cert is not None
        context.load_cert_chain(own.cert, own.key)
    return context


async def status_of(url: str, context: ssl.SSLContext) -> int:
    async with (
        aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as http,
        http.get(f"{url}state", ssl=context, headers={"Authorization": "Bearer the token"}) as answer,
    ):
        return answer.status


async def shown(url: str, context: ssl.SSLContext) -> bytes:
    """The certificate that a new connection is shown."""
    split = urllib.parse.urlsplit(url)
    _, writer = await asyncio.open_connection(split.hostname, split.port, ssl=context)
    found: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    await writer.wait_closed()
    return found


def certificate(tls: TLS) -> bytes:
    assert tls.cert is not None
    return ssl.PEM_cert_to_DER_cert(Path(tls.cert).read_text())


async def test_over_tls_it_shows_the_gateways_certificate(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    server = authority.issue("server")
    page = Page(MadeUp(made_up()), "the token", TLS(cert=server.cert, key=server.key))
    url = await page.start("127.0.0.1", 0)
    try:
        assert url.startswith("https://127.0.0.1:")
        assert await status_of(url, browser_of(authority)) == 200
        assert await shown(url, browser_of(authority)) == certificate(server)
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await status_of(url, browser_of(Authority(tmp_path / "stranger")))
        with pytest.raises(aiohttp.ClientError):
            await status_of(url.replace("https", "http"), browser_of(authority))
        # The cookie must not leave TLS either.
        async with (
            aiohttp.ClientSession() as http,
            http.get(f"{url}?token=the%20token", ssl=browser_of(authority), allow_redirects=False) as answer,
        ):
            assert answer.cookies[COOKIE]["secure"]
    finally:
        await page.stop()


async def test_a_new_certificate_counts_for_the_next_connection(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    authority = Authority(tmp_path / "ca")
    server = authority.issue("server")
    assert server.key is not None
    page = Page(MadeUp(made_up()), "the token", TLS(cert=server.cert, key=server.key))
    url = await page.start("127.0.0.1", 0)
    try:
        first = certificate(server)
        assert await shown(url, browser_of(authority)) == first
        # The key is still another certificate's: the old pair stands. Then it is whole.
        key = Path(server.key).read_bytes()
        authority.issue("server")
        whole = Path(server.key).read_bytes()
        Path(server.key).write_bytes(key)
        assert await shown(url, browser_of(authority)) == first
        assert "can't be read again" in caplog.text
        Path(server.key).write_bytes(whole)
        second = certificate(server)
        assert second != first
        assert await shown(url, browser_of(authority)) == second
        assert await status_of(url, browser_of(authority)) == 200
    finally:
        await page.stop()


async def test_with_clients_certificates_a_browser_needs_one(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    page = Page(MadeUp(made_up()), "the token", authority.issue("server"))
    url = await page.start("127.0.0.1", 0)
    try:
        assert await status_of(url, browser_of(authority, authority.issue("client"))) == 200
        stranger = Authority(tmp_path / "stranger").issue("client")
        authority.issue("server")  # for which everything is read anew
        for own in (None, stranger):
            with pytest.raises((aiohttp.ClientError, ssl.SSLError)):
                await status_of(url, browser_of(authority, own))
        assert await status_of(url, browser_of(authority, authority.issue("client"))) == 200
    finally:
        await page.stop()


def test_the_files_fetch_nothing_from_elsewhere() -> None:
    for file in FILES.iterdir():
        text = file.read_text(encoding="utf-8")
        assert "http:" not in text.replace("http://www.w3.org", ""), file.name
        assert "https:" not in text, file.name
        assert "innerHTML" not in text
