"""The review page's web application. The only user of FastAPI and uvicorn.

It is for this machine alone: it binds to the loopback interface, wants the token that is in its
address, and refuses a request whose Host or Origin is another's (DNS rebinding, other sites'
pages). An image is asked for by its number in the review, never by a path, and is sent as a JPEG
made anew, never as the source's own bytes.
"""

from __future__ import annotations

import secrets
import socket
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from aesthetic_filter.calibrate import Target
from aesthetic_filter.errors import AestheticFilterError, MissingExtraError, OutputError, UsageError
from aesthetic_filter.pages import CHARTS, asset
from aesthetic_filter.pictures import Picture, Pictures, make_thumbnail
from aesthetic_filter.review.session import Session
from aesthetic_filter.sampling import Drawn
from aesthetic_filter.table import printable

try:
    import jinja2
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import HTMLResponse, JSONResponse
except ImportError:
    raise MissingExtraError("the review page needs FastAPI and uvicorn", "web") from None

LOOPBACK = "127.0.0.1"
OWN_NAMES = {"127.0.0.1", "localhost", "[::1]"}
"""What this machine may be called in a Host header. No other site can have one of these names."""

PREVIEW_SIDE, PREVIEW_QUALITY = 1280, 85
"""Pixels on the longest side of an image on the page, and quality of the JPEG."""

HELD = 256
"""Previews kept in memory, some 150 KB each."""

LOOK_AHEAD = 8
"""Images that are fetched before they are asked for."""

LONGEST_NAME = 80

POLICY = (
    "default-src 'none'; img-src 'self' data:; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",  # the address has the token
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

ASSETS = {
    "base.css": "text/css",
    "common.js": "text/javascript",
    "review.js": "text/javascript",
    CHARTS: "text/javascript",
}


class Previews:
    """Images of the review, fetched in the background, an archive read once for all of them."""

    def __init__(self, pictures: Pictures) -> None:
        self._pictures = pictures
        self._pool = ThreadPoolExecutor(2, "previews")
        self._lock = threading.Lock()
        self._found: OrderedDict[tuple[int, int], Future[Any]] = OrderedDict()

    def prepare(self, rows: Sequence[Drawn]) -> None:
        """Fetch these rows' images, if that is not under way already."""
        with self._lock:
            new: list[tuple[Drawn, Future[Any]]] = []
            for row in rows:
                place = (row.part, row.row)
                if place in self._found:
                    self._found.move_to_end(place)
                else:
                    self._found[place] = Future()
                    new.append((row, self._found[place]))
            while len(self._found) > max(HELD, len(rows)):
                self._found.popitem(last=False)
        for part in {row.part for row, _ in new}:
            self._pool.submit(self._fetch, [item for item in new if item[0].part == part])

    def _fetch(self, wanted: list[tuple[Drawn, Future[Any]]]) -> None:
        by_place = {(row.part, row.row): future for row, future in wanted}
        try:
            for row, picture in self._pictures.fetch([row for row, _ in wanted]):
                by_place[row.part, row.row].set_result(self._preview(picture))
        except Exception as error:
            for future in by_place.values():
                if not future.done():
                    future.set_result(str(error) or type(error).__name__)

    @staticmethod
    def _preview(picture: Picture) -> Any:
        return make_thumbnail(picture, PREVIEW_SIDE, PREVIEW_QUALITY)

    def get(self, row: Drawn) -> Any:
        """A row's preview (``clip.preprocess.Thumbnail``), or the reason why there is none (str).

        What failed is tried again the next time: a source may come back.
        """
        self.prepare([row])
        with self._lock:
            future = self._found[row.part, row.row]
        found = future.result()
        if isinstance(found, str):
            with self._lock:
                self._found.pop((row.part, row.row), None)
        return found

    def close(self) -> None:
        """Stop fetching."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def make_app(
    session: Session, previews: Previews, token: str, reviewer: str, title: str
) -> FastAPI:
    """The web application.

    Args:
        session: what is reviewed.
        previews: its images.
        token: without which nothing is answered.
        reviewer: whose name the page starts with.
        title: of the page.
    """
    app = FastAPI(title="aesthetic-filter review", docs_url=None, redoc_url=None, openapi_url=None)
    page = jinja2.Environment(
        loader=jinja2.PackageLoader("aesthetic_filter.pages", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    ).get_template("review.html")

    @app.middleware("http")
    async def guard(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        problem = refused(request, token)
        if problem:
            response: Response = JSONResponse({"error": problem}, 403)
        else:
            response = await call_next(request)
        for name, value in HEADERS.items():
            response.headers[name] = value
        return response

    @app.exception_handler(AestheticFilterError)
    def failed(_: Request, error: Exception) -> JSONResponse:
        code = 400 if isinstance(error, UsageError) and not isinstance(error, OutputError) else 507
        return JSONResponse({"error": printable(error)}, code)

    @app.get("/")
    def show() -> HTMLResponse:
        return HTMLResponse(page.render(title=title, token=token, reviewer=reviewer, charts=CHARTS))

    @app.get("/static/{name}")
    def static(name: str) -> Response:
        if name not in ASSETS:
            return JSONResponse({"error": "there is no such file"}, 404)
        return Response(asset(name), media_type=ASSETS[name])

    def described(key: int) -> dict[str, Any]:
        drawn = session.items[key]
        return {"key": key, "id": printable(drawn.image_id), "score": drawn.score}

    @app.post("/api/next")
    def hand_out(asked: dict[str, Any]) -> dict[str, Any]:
        name, count = _name(asked), _count(asked)
        keys = session.hand_out(name, count + LOOK_AHEAD)
        previews.prepare([session.items[key] for key in keys])
        return {"items": [described(key) for key in keys[:count]], "status": session.status(name)}

    @app.post("/api/label")
    def label(asked: dict[str, Any]) -> dict[str, Any]:
        name = _name(asked)
        session.answer(name, _key(asked), str(asked.get("value")))
        return {"status": session.status(name)}

    @app.post("/api/undo")
    def undo(asked: dict[str, Any]) -> dict[str, Any]:
        name = _name(asked)
        key = session.undo(name)
        item = None if key is None else described(key)
        return {"item": item, "status": session.status(name)}

    @app.post("/api/target")
    def aim(asked: dict[str, Any]) -> dict[str, Any]:
        try:
            session.target = Target(str(asked["measure"]), float(asked["value"]))
        except (KeyError, TypeError, ValueError):
            raise UsageError("a target is a measure and a number") from None
        return {"status": session.status(_name(asked))}

    @app.get("/image/{key}")
    def image(key: int) -> Response:
        if not 0 <= key < len(session.items):
            return JSONResponse({"error": "there is no such image in this review"}, 404)
        found = previews.get(session.items[key])
        if isinstance(found, str):
            return JSONResponse({"error": printable(found)}, 410)
        return Response(found.data, media_type="image/jpeg")

    return app


def refused(request: Request, token: str) -> str:
    """Why a request is not answered, or ""."""
    host = request.headers.get("host", "")
    if _host_name(host) not in OWN_NAMES:
        return "this page is for this machine alone"
    origin = request.headers.get("origin")
    if origin is not None and origin != f"http://{host}":
        return "another site's page may not ask this"
    if request.method not in ("GET", "HEAD") and not request.headers.get(
        "content-type", ""
    ).startswith("application/json"):
        return "a request has a JSON body"
    if request.url.path.startswith("/static/"):  # the same for everybody
        return ""
    given = request.headers.get("x-token") or request.query_params.get("token") or ""
    if not secrets.compare_digest(given.encode(), token.encode()):
        return "the token is missing or wrong: open the address that the command printed"
    return ""


def _host_name(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.rpartition(":")[0] if ":" in host else host


def _name(asked: dict[str, Any]) -> str:
    name = " ".join(str(asked.get("reviewer", "")).split())[:LONGEST_NAME]
    if not name:
        raise UsageError("say who you are: a label has a reviewer")
    return name


def _count(asked: dict[str, Any]) -> int:
    count = asked.get("count", 1)
    if not isinstance(count, int):
        raise UsageError("count is a whole number")
    return min(max(count, 1), 48)


def _key(asked: dict[str, Any]) -> int:
    key = asked.get("key")
    if not isinstance(key, int) or isinstance(key, bool):
        raise UsageError("there is no such image in this review")
    return key


def listen(port: int) -> socket.socket:
    """A socket on the loopback interface.

    Args:
        port: which; 0: any that is free.

    Raises:
        UsageError: the port is taken.
    """
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((LOOPBACK, port))
        made.listen()  # from now on a browser waits rather than being refused
    except OSError as error:
        made.close()
        raise UsageError(
            f"port {port} cannot be had ({error.strerror}); give another with --port, or 0 for any"
        ) from None
    return made


def serve(
    session: Session,
    pictures: Pictures,
    *,
    port: int,
    reviewer: str,
    title: str,
    on_ready: Callable[[str], None],
) -> None:
    """Serve the review page until it is interrupted.

    Args:
        session: the review.
        pictures: its images.
        port: where; 0: any that is free.
        reviewer: whose name the page starts with.
        title: of the page.
        on_ready: called with the page's address.

    Raises:
        UsageError: the port is taken.
    """
    previews = Previews(pictures)
    with listen(port) as listening:
        token = secrets.token_urlsafe(24)
        app = make_app(session, previews, token, reviewer, title)
        config = uvicorn.Config(app, log_level="error", access_log=False, lifespan="off")
        server = uvicorn.Server(config)
        number = listening.getsockname()[1]
        on_ready(f"http://{LOOPBACK}:{number}/?token={token}")
        try:
            server.run(sockets=[listening])
        finally:
            previews.close()
