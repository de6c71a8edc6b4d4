"""`flywheel-fast review`: a local page to decide which labels are right; each decision is on disk at once."""

import fcntl
import json
import os
import secrets
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flywheel_fast import plots
from flywheel_fast.audit import Labels, read_labels
from flywheel_fast.data import reviews
from flywheel_fast.data.reviews import Review
from flywheel_fast.errors import BadInput, Failure

SHEET = 24  # images of one pair of classes that are looked at together, at most
MOST = 50_000  # images of one sitting
SIDES = {"small": 192, "large": 640}  # pixels
MOST_BYTES = 4096  # of a decision as it comes


# -- the order ---------------------------------------------------------------------------------------------------------


def expected_change(labels: Labels) -> np.ndarray:  # [N] float32
    """How far a look at each sample is expected to move what training believes: 1 - suggested_prob.

    It is the probability, by the run's own estimate, that the posterior's class is not the true one: by so much of its
    mass a pinned label would move the target of the sample.
    """
    return 1 - labels.suggested_prob


def sheets(labels: Labels, change: np.ndarray | None = None) -> list[np.ndarray]:  # each [at most SHEET] int64
    """All samples in the order in which to look at them: what changes most first, in rounds of a fiftieth of them; of a
    round, those with one given and one suggested label together. `change` [N]: `expected_change` where None.

    By pairs alone the sure members of an unsure pair would come before the unsure ones of the next.
    """
    change = expected_change(labels) if change is None else change
    order = np.argsort(-change, kind="stable")
    size = max(4 * SHEET, len(order) // 50)
    found = []
    for start in range(0, len(order), size):
        part = order[start : start + size]
        pair = labels.given[part] * len(labels.classes) + labels.suggested[part]
        alike = [part[pair == one] for one in np.unique(pair)]
        cut = [samples[at : at + SHEET] for samples in alike for at in range(0, len(samples), SHEET)]
        found += sorted(cut, key=lambda sheet: -float(change[sheet].mean(dtype=np.float64)))
    return found


# -- the decisions -----------------------------------------------------------------------------------------------------


class Reviewing:
    """The labels of a run, and what has been decided of them, in memory and in its reviews.csv."""

    def __init__(self, run: Path):
        """Raises BadInput where the run has no labels, or its reviews are of other labels or being written to."""
        self.labels = read_labels(run / "labels")
        self.path = reviews_of(run)
        self.writing = threading.Lock()
        try:
            self.file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadInput(f"{self.path}: is under review already; end the other `flywheel-fast review`") from error
        except OSError as error:
            raise BadInput(f"{self.path}: cannot be written ({error.strerror})") from error
        if not os.fstat(self.file).st_size:
            self._append((",".join(reviews.COLUMNS) + "\n").encode())
        self.history = self._history()  # what no undo has taken back, in order

    def _history(self) -> list[Review]:
        rows, self.columns, whole = reviews.read(self.path)
        self._make_whole(whole)
        self.number = {file: i for i, file in enumerate(self.labels.files.tolist())}
        for review in rows:
            for what, name, known in (("file", review.file, self.number), ("class", review.label, self.labels.classes)):
                if name and name not in known:
                    raise BadInput(
                        f"{self.path}: row {review.line}: {name!r} is no {what} of this run; name its own run"
                    )
        return reviews.in_force(rows)

    def _make_whole(self, whole: int) -> None:
        """What a crash cut off was never acknowledged; the last row of an editor may lack its line's end."""
        if whole < os.fstat(self.file).st_size:
            os.ftruncate(self.file, whole)
        if os.pread(self.file, 1, whole - 1) != b"\n":
            self._append(b"\n")

    def standing(self) -> dict[int, tuple[str, int | None]]:
        """Sample -> its decision and class, where there is one."""
        return {self.number[review.file]: self._as_decided(review) for review in self.history}

    def _as_decided(self, review: Review) -> tuple[str, int | None]:
        return review.decision, self.labels.classes.index(review.label) if review.label else None

    def decide(self, sample: int, decision: str, label: int | None) -> tuple[str, int | None]:
        """Appends the decision; returns it with the class that it names. Raises ValueError where there is no such."""
        names, of = self.labels.classes, self.labels
        if type(sample) is not int or not 0 <= sample < len(of.given):
            raise ValueError("no such sample")
        if decision not in reviews.DECISIONS:
            raise ValueError("no such decision")
        given, suggested = int(of.given[sample]), int(of.suggested[sample])
        if decision in reviews.LABELLING:
            label = {"keep": given, "accept": suggested}.get(decision, label)
            if type(label) is not int or not 0 <= label < len(names):
                raise ValueError("no such class")
            decision = "keep" if label == given else "accept" if label == suggested else "pick"
        else:
            label = None
        name = "" if label is None else names[label]
        about = {"given": names[given], "suggested": names[suggested], "score": float(of.clean_prob[sample])}
        review = Review(str(of.files[sample]), decision, name, **about)
        with self.writing:
            self._append(reviews.as_line(review, self.columns))
            self.history.append(review)
        return decision, label

    def undo(self) -> int | None:
        """Takes back the last decision that stands; returns its sample."""
        with self.writing:
            if not self.history:
                return None
            self._append(reviews.as_line(Review(self.history[-1].file, "undo"), self.columns))
            return self.number[self.history.pop().file]

    def close(self) -> None:
        os.close(self.file)

    def _append(self, line: bytes) -> None:
        """On disk when it returns, or not there at all."""
        size = os.fstat(self.file).st_size
        try:
            if os.write(self.file, line) < len(line):
                raise OSError(None, "the disk is full")
            os.fsync(self.file)
        except OSError as error:
            os.ftruncate(self.file, size)
            raise Failure(f"{self.path}: cannot be written ({error.strerror}); earlier decisions are kept") from error


def reviews_of(run: Path) -> Path:
    """Where the reviews of a run are: those that it was trained with go on; else RUN/reviews.csv."""
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(
            f"{run}: is not the folder of a finished run ({error}); name one, such as runs/digits"
        ) from error
    return Path(config["data"].get("reviews") or run / "reviews.csv")


# -- the page ----------------------------------------------------------------------------------------------------------


def content(reviewing: Reviewing) -> dict:
    """What the page shows, as JSON: sheets of images, and what has been decided."""
    labels, shown, left = reviewing.labels, [], MOST
    for sheet in sheets(labels):
        if left <= 0:
            break
        left -= len(sheet)
        first = sheet[0]
        items = [[int(i), str(labels.files[i]), round(float(labels.clean_prob[i]), 4)] for i in sheet]
        shown.append({"given": int(labels.given[first]), "suggested": int(labels.suggested[first]), "items": items})
    return {
        "classes": labels.classes,
        "images": len(labels.given),
        "sheets": shown,
        "decided": {str(i): decided for i, decided in reviewing.standing().items()},
    }


class Server(ThreadingHTTPServer):
    """Serves one reviewing to whoever knows the address, on this machine alone."""

    daemon_threads = True

    def __init__(self, reviewing: Reviewing, run: Path, port: int = 0):
        self.reviewing, self.token = reviewing, secrets.token_urlsafe(16)
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined
        )
        nonce = secrets.token_urlsafe(16)
        self.rules = (
            "default-src 'none'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
            f"frame-ancestors 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'"
        )
        text = environment.get_template("review.html").render(run=run, path=reviewing.path, nonce=nonce)
        self.page = text.encode()
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise BadInput(
                f"--port {port}: cannot be used ({error.strerror}); leave it out, or name another"
            ) from error
        self.hosts = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}
        self.url = f"http://127.0.0.1:{self.server_port}/{self.token}/"


class Handler(BaseHTTPRequestHandler):
    """GET the page, its content, an image by its number; POST a decision or an undo. All below the token."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        words = self._words()
        if words == [""]:
            self._answer(self.server.page, "text/html; charset=utf-8", {"Content-Security-Policy": self.server.rules})
        elif words == ["content"]:
            self._json(content(self.server.reviewing))
        elif words and words[0] in SIDES and len(words) == 2 and words[1].isdecimal():
            self._image(int(words[1]), SIDES[words[0]])
        elif words is not None:
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")

    def do_POST(self) -> None:
        words, reviewing = self._words(), self.server.reviewing
        if words is None:
            return
        try:
            length = int(self.headers.get("Content-Length", ""))
            if not 0 <= length <= MOST_BYTES or self.headers.get("Content-Type") != "application/json":
                raise ValueError("a decision is a few bytes of JSON")
            asked = json.loads(self.rfile.read(length))
            if words == ["decide"]:
                sample = asked["sample"]
                decided = reviewing.decide(sample, asked["decision"], asked.get("label"))
            elif words == ["undo"]:
                sample = reviewing.undo()
                decided = None if sample is None else reviewing.standing().get(sample)
            else:
                return self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            return self._refuse(HTTPStatus.BAD_REQUEST, f"not understood: {error}")
        except Failure as error:
            return self._refuse(HTTPStatus.INSUFFICIENT_STORAGE, str(error))
        self._json({"sample": sample, "decided": decided})

    def _words(self) -> list[str] | None:
        """The path below the token; None, and refused, for those whom a browser or a guess has led here."""
        origin = self.headers.get("Origin")
        if self.headers.get("Host") not in self.server.hosts or (
            origin is not None and origin.removeprefix("http://") not in self.server.hosts
        ):
            return self._refuse(HTTPStatus.FORBIDDEN, "this address is for this machine alone")
        token, _, below = self.path.removeprefix("/").partition("/")
        if not secrets.compare_digest(token.encode(), self.server.token.encode()):
            return self._refuse(HTTPStatus.FORBIDDEN, "open the address that `flywheel-fast review` has printed last")
        return below.split("/")

    def _image(self, sample: int, side: int) -> None:
        labels = self.server.reviewing.labels
        picture = plots.thumbnail(labels.root / labels.files[sample], side) if sample < len(labels.files) else None
        if picture is None:
            return self._refuse(HTTPStatus.NOT_FOUND, "the picture cannot be read")
        self._answer(picture, "image/webp", {"Cache-Control": "private, max-age=86400"})

    def _json(self, value: object) -> None:
        self._answer(json.dumps(value).encode(), "application/json")

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self.close_connection = True  # what it may have sent besides is not read
        self._answer(why.encode(), "text/plain; charset=utf-8", status=status)

    def _answer(self, body: bytes, kind: str, more: dict[str, str] | None = None, status=HTTPStatus.OK) -> None:
        self.send_response(status)
        standard = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        for name, value in (standard | {"Content-Type": kind, "Content-Length": len(body)} | (more or {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments) -> None:
        """Silent: the terminal has the address to show."""


def serve(run: Path, port: int = 0) -> None:
    """Until Ctrl-C."""
    reviewing = Reviewing(run)
    with Server(reviewing, run, port) as server:
        print(f"review {run} at {server.url}", flush=True)
        print(f"Ctrl-C ends it; every decision is in {reviewing.path} at once", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
    reviewing.close()
    print(
        f"\n{len(reviewing.standing()):,} labels reviewed. To train on with them:\n"
        f"  flywheel-fast train --resume {run} data.reviews={reviewing.path}"
    )
