"""Spoilt input from outside, by the hundred thousand: configs, tables, checkpoints, requests to the review page.

    python -m tests.fuzz [--inputs 100000] [--seed 0]

Each is taken, or refused in one sentence (BadInput; of the page, an answer below 500, or that there is no such method
or version). Ends with status 1 at the first that is neither, and prints it.
"""

import argparse
import contextlib
import hashlib
import io
import random
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import yaml
from PIL import Image

from flywheel_fast import audit, checkpoint, config, review
from flywheel_fast.data.sources import DataConfig, load
from flywheel_fast.errors import BadInput
from flywheel_fast.trainer import Config
from tests import made_labels

TOKENS = [
    *(
        b"",
        b"\0",
        b"\n",
        b"\r\n",
        b" ",
        b"\t",
        b":",
        b",",
        b'"',
        b"'",
        b"-",
        b"[",
        b"]",
        b"{",
        b"}",
        b"&a ",
        b"*a",
        b"#",
    ),
    *(b"!!python/object/apply:os.system ['false']", b"${oc.env:HOME}", b"${name}", b"???", b"base: x.yaml\n", b"null"),
    *(
        b"1e999",
        b"nan",
        b"-1",
        b"99999999999999999999",
        b"../../",
        b"/etc/passwd",
        b"\xff",
        b"\xc3",
        "é".encode(),
        b"<<: ",
    ),
    *(
        b"GET ",
        b"POST ",
        b"HTTP/1.1",
        b"Host: evil\r\n",
        b"Content-Length: 99999999\r\n",
        b"Origin: http://evil\r\n",
        b"%00",
    ),
    *(b"cposix\nsystem\n", b"\x80\x02", b"PK\x03\x04", b"R.", b"/../"),
]
Take = Callable[[bytes], str]


def spoilt(content: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 3)):
        at, length = rng.randrange(len(content) + 1), rng.choice((0, 1, 1, 2, 5, 20, 100))
        part = content[at : at + length]
        new = rng.choice((b"", part * 2, part[::-1], rng.randbytes(length), *[rng.choice(TOKENS)] * 4))
        content = content[:at] + new + content[at + length :]
        if rng.random() < 0.05:
            content = content[:at]
    return content


@contextlib.contextmanager
def configs(folder: Path) -> Iterator[tuple[list[bytes], Take]]:
    path = folder / "config.yaml"

    def take(content: bytes) -> str:
        path.write_bytes(content)
        return type(config.load(Config, str(path))).__name__

    whole = config.as_dict(config.load(Config, "clothing1m"))
    parts = [{key: value} for key, value in whole.items()]  # reading takes a time by their length
    yield [*(yaml.safe_dump(part).encode() for part in parts), config.find("digits").read_bytes()], take


@contextlib.contextmanager
def tables(folder: Path) -> Iterator[tuple[list[bytes], Take]]:
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for number in range(4):
            Image.new("RGB", (8, 8)).save(folder / name / f"{number}.png")
    rows = [
        f"{name}/{number}.png,{name},{('train', 'test')[number == 3]}" for name in ("cat", "dog") for number in range(4)
    ]
    path = folder / "table.csv"

    def take(content: bytes) -> str:
        path.write_bytes(content)
        data = load(DataConfig("csv", str(path)))
        found = [*data.train.files, *data.test.files]
        assert all((folder / file).resolve().is_relative_to(folder.resolve()) for file in found), found
        return "data"

    yield ["\n".join(["file_name,label,split", *rows, ""]).encode()], take


@contextlib.contextmanager
def checkpoints(folder: Path) -> Iterator[tuple[list[bytes], Take]]:
    """Archives of which the checksum is right."""
    path, buffer = folder / "last.pt", io.BytesIO()
    torch.save({"weights": torch.arange(9.0), "history": [{"cycle": 1, "gamma": 0.5}], "steps": 3}, buffer)

    def take(content: bytes) -> str:
        path.write_bytes(content + checkpoint.MARK + hashlib.sha256(content).hexdigest().encode())
        return type(checkpoint.load(path)).__name__

    yield [buffer.getvalue()], take


@contextlib.contextmanager
def requests(folder: Path) -> Iterator[tuple[list[bytes], Take]]:
    audit.write_labels(made_labels.drawn(20, 3, folder), folder / "labels")
    (folder / "config.yaml").write_text("data: {reviews: null}\n")
    broken = []
    reviewing = review.Reviewing(folder)
    with review.Server(reviewing, folder) as server:
        server.handle_error = lambda *given: broken.append(sys.exception())
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host, token = f"127.0.0.1:{server.server_port}", server.token
        body = b'{"sample": 3, "decision": "pick", "label": 1}'
        head = f"POST /{token}/decide HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        seeds = [
            *(f"GET /{token}/{word} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode() for word in ("", "content", "small/3")),
            f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body,
            f"{head.replace('decide', 'undo')}Content-Length: 2\r\n\r\n{{}}".encode(),
        ]

        def take(content: bytes) -> str:
            with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
                with contextlib.suppress(ConnectionError):  # refused before all was sent
                    connection.sendall(content)
                    connection.shutdown(socket.SHUT_WR)
                answer = b""
                with contextlib.suppress(ConnectionError):
                    while part := connection.recv(1 << 16):
                        answer += part
            while broken and isinstance(broken[-1], ConnectionError):
                broken.pop()
            assert not broken, repr(broken)
            status = re.match(rb"HTTP/1\.[01] (\d)", answer)
            assert not status or status[1] < b"5" or b" 501 " in answer[:20] or b" 505 " in answer[:20], answer[:200]
            return status[1].decode() + "xx" if status else "closed"

        yield seeds, take
        server.shutdown()
    reviewing.close()
    assert len(review.reviews.read(reviewing.path).rows) >= 0  # what was decided can be read


KINDS = {"config": configs, "table": tables, "checkpoint": checkpoints, "request": requests}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    for kind, prepare in KINDS.items():
        rng, outcomes, began = random.Random(asked.seed), {}, time.monotonic()
        with tempfile.TemporaryDirectory() as folder, prepare(Path(folder)) as (seeds, take):
            for seed in seeds:
                take(seed)
            for number in range(asked.inputs // len(KINDS)):
                content = spoilt(rng.choice(seeds), rng)
                try:
                    outcome = take(content)
                except BadInput as error:
                    assert str(error), content
                    outcome = "refused"
                except BaseException:
                    print(f"{kind}: input {number} of seed {asked.seed}:\n{content!r}", flush=True)
                    raise
                outcomes[outcome] = outcomes.get(outcome, 0) + 1
        counts = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(outcomes.items()))
        print(
            f"{kind:<12} {sum(outcomes.values()):>7,} inputs in {time.monotonic() - began:.0f} s: {counts}", flush=True
        )


if __name__ == "__main__":
    main()
