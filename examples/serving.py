"""Serve a model over HTTP, and change its weights while it serves.

The model recognises handwritten digits. Each connection has a thread, and two threads compute at
once. Updates, rollbacks and trials of other weights are requests, too:

    GET  /status                                         version of the live weights
    POST /predict {"picture": [64 numbers]}              the digit
    POST /weights {"checkpoint": "later"}                new weights for all requests
    POST /trial   {"checkpoint": "later", "every": 4}    ... for each fourth request
    POST /promote                                        the weights on trial, for all requests
    POST /undo                                           back, before the last change

The server listens on loopback. A server for others has to protect all but /predict.

usage: python examples/serving.py [--port PORT]

Without --port the example checks itself, in about ten seconds: clients send pictures all the time,
and each answer has to be that of the right weights. It needs ``pip install 'refitkit[demo]'``.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import random
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits

import refitkit

if TYPE_CHECKING:
    from collections.abc import Callable

THREADS = 2
"""Calls that are computed side by side, each with one thread of torch."""
LARGEST_REQUEST = 100_000


# -- the service ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """Weights that some requests try.

    Attributes:
        module: The module with these weights. It shares the code of the live one.
        every: One request of so many tries them.
    """

    module: refitkit.CompiledModule
    every: int


class Service:
    """A model with live weights, and with others on trial."""

    def __init__(self, module: refitkit.CompiledModule, checkpoints: Path) -> None:
        """Serve a module.

        Args:
            module: The module.
            checkpoints: Folder of the checkpoints that it may be given.
        """
        self._live, self._checkpoints = module, checkpoints
        self._trial: Trial | None = None
        self._undo: Callable[[], object] | None = None
        self._pipeline = refitkit.Pipeline()
        self._changes = threading.Lock()  # one change at a time; requests do not take it
        self._numbers = itertools.count()

    def predict(self, picture: list[float]) -> dict[str, Any]:
        """Recognise a digit."""
        trial = self._trial  # read once: another thread may end the trial
        tries = trial is not None and next(self._numbers) % trial.every == 0
        module = trial.module if trial is not None and tries else self._live
        # A call uses one set of weights from its start to its end.
        scores = module(torch.tensor([picture]))
        return {"digit": int(scores.argmax()), "by": "trial" if tries else "live"}

    def update(self, checkpoint: str) -> dict[str, Any]:
        """Give the live module new weights. Requests go on, and an error changes nothing."""
        with self._changes:
            result = self._pipeline.refit(self._live, self._path(checkpoint))
            self._undo = partial(result.undo)
        report = result.report
        return {
            "version": report.version,
            "milliseconds": 1e3 * report.seconds,
            "pause_milliseconds": 1e3 * (report.pause_seconds or 0.0),
        }

    def start_trial(self, checkpoint: str, every: int) -> dict[str, Any]:
        """Answer some requests with other weights."""
        with self._changes:
            module = self._pipeline.with_weights(self._live, self._path(checkpoint))
            self._trial = Trial(module, every)
        return self.status()

    def promote(self) -> dict[str, Any]:
        """Answer all requests with the weights on trial."""
        with self._changes:
            if self._trial is None:
                raise ValueError("nothing is on trial")
            self._undo = partial(setattr, self, "_live", self._live)
            self._live, self._trial = self._trial.module, None
        return self.status()

    def undo(self) -> dict[str, Any]:
        """Take the last update or promotion back."""
        with self._changes:
            if self._undo is None:
                raise ValueError("there is nothing to undo")
            self._undo()
            self._undo = None
        return self.status()

    def status(self) -> dict[str, Any]:
        """What serves."""
        return {"version": self._live.version, "trial": self._trial is not None}

    def _path(self, checkpoint: str) -> Path:
        if not checkpoint.isidentifier():  # a name, not a path
            raise ValueError(f"not the name of a checkpoint: {checkpoint!r}")
        return self._checkpoints / f"{checkpoint}.safetensors"


# -- HTTP -------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection, in a thread of its own."""

    protocol_version = "HTTP/1.1"

    def __init__(self, service: Service, *args: Any) -> None:
        """Answer for a service."""
        self._service = service
        super().__init__(*args)

    def do_GET(self) -> None:
        """Answer /status."""
        self._answer({"/status": self._service.status})

    def do_POST(self) -> None:
        """Answer everything else."""
        service = self._service
        self._answer(
            {
                "/predict": service.predict,
                "/weights": service.update,
                "/trial": service.start_trial,
                "/promote": service.promote,
                "/undo": service.undo,
            }
        )

    def _answer(self, routes: dict[str, Callable[..., dict[str, Any]]]) -> None:
        size = int(self.headers.get("Content-Length", 0))
        if size > LARGEST_REQUEST or self.path not in routes:
            self.close_connection = True  # the body is not read
            self.send_error(413 if self.path in routes else 404)
            return
        try:
            given = json.loads(self.rfile.read(size) or b"{}")
            status, answer = 200, routes[self.path](**given)
        except refitkit.RefitError as error:  # what is wrong with the weights or the inputs
            status, answer = 409, {"error": str(error)}
        except (TypeError, ValueError) as error:
            status, answer = 400, {"error": str(error)}
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


def serve(service: Service, port: int) -> ThreadingHTTPServer:
    """A server on loopback; ``serve_forever`` runs it."""
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, service))


# -- the model --------------------------------------------------------------------------------


def prepare(folder: Path) -> tuple[refitkit.CompiledModule, torch.Tensor, dict[str, list[int]]]:
    """Train, compile and load.

    Args:
        folder: Folder for the checkpoints ``early``, ``later`` and ``broken``, and the module.

    Returns:
        The module with the early weights; pictures, float32 of shape (500, 64), from 0 to 1; the
        digits that the trained model sees in them, by checkpoint.
    """
    torch.manual_seed(0)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    pictures = images.float() / 16
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    seen = {}
    for name, steps in (("early", 5), ("later", 200)):
        for _ in range(steps):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(pictures[500:]), labels[500:]).backward()
            optimizer.step()
        save_file(model.state_dict(), folder / f"{name}.safetensors")
        with torch.no_grad():
            seen[name] = [int(model(picture[None]).argmax()) for picture in pictures[:500]]
        if name == "early":
            program = torch.export.export(model, (pictures[:1],))
            refitkit.compile(program).save(folder / "digits.refitkit")
    broken = {name: torch.full_like(value, torch.nan) for name, value in model.state_dict().items()}
    save_file(broken, folder / "broken.safetensors")
    module = refitkit.load(folder / "digits.refitkit", num_models=THREADS)
    return module, pictures[:500], seen


# -- the check --------------------------------------------------------------------------------


class Client:
    """A connection to the server."""

    def __init__(self, port: int) -> None:
        """Connect."""
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def ask(self, method: str, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        """Send a request; return the status and the answer."""
        self._connection.request(method, path, json.dumps(body) if body else None)
        response = self._connection.getresponse()
        return response.status, json.loads(response.read())

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """Send a request that has to succeed; return the answer."""
        status, answer = self.ask("POST", path, **body)
        check(status == 200, f"{path} answers {status}: {answer}")  # noqa: PLR2004 - HTTP
        return answer

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


class Answer(NamedTuple):
    """One answer: the number of the picture, the digit in it, and ``live`` or ``trial``."""

    picture: int
    digit: int
    by: str


class Clients:
    """Threads that send pictures all the time, while a ``with`` block runs."""

    def __init__(self, port: int, pictures: torch.Tensor, count: int = 4) -> None:
        """Send nothing yet."""
        self._port, self._pictures = port, pictures.tolist()
        self._threads = [threading.Thread(target=self._send, args=(n,)) for n in range(count)]
        self._answers: list[list[Answer]] = [[] for _ in range(count)]
        self._stop = False

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        for thread in self._threads:
            thread.join()

    def _send(self, me: int) -> None:
        client, draw = Client(self._port), random.Random(me)  # noqa: S311 - no secret
        while not self._stop:
            number = draw.randrange(len(self._pictures))
            answer = client.post("/predict", picture=self._pictures[number])
            self._answers[me].append(Answer(number, answer["digit"], answer["by"]))
        client.close()

    def answers(self, count: int) -> list[Answer]:
        """At least so many answers of each client, to requests that it sends from now on."""
        starts = [len(some) + 1 for some in self._answers]  # the next one may be under way
        pairs = list(zip(self._answers, starts, self._threads, strict=True))
        while any(len(some) < start + count for some, start, _ in pairs):
            if not all(thread.is_alive() for _, _, thread in pairs):
                raise AssertionError("a client has stopped")
            time.sleep(0.01)
        return [answer for some, start, _ in pairs for answer in some[start:]]


def check(ok: bool, text: str) -> None:  # noqa: FBT001 - as assert
    """Raise unless something is right."""
    if not ok:
        raise AssertionError(text)


class Check:
    """Changes weights while clients send pictures, and checks the answers."""

    def __init__(self, admin: Client, clients: Clients, seen: dict[str, list[int]]) -> None:
        """Change nothing yet.

        Args:
            admin: Connection for changes.
            clients: Threads that send pictures.
            seen: The right answers, by checkpoint.
        """
        self._admin, self._clients, self._seen = admin, clients, seen

    def run(self) -> None:
        """Check updates, refusals, rollbacks and trials."""
        self._expect("early")
        print("the early weights serve")
        self._check_updates(10)
        self._check_refusal()
        self._admin.post("/weights", checkpoint="later")
        self._expect("later")
        self._admin.post("/undo")
        self._expect("early")
        print("an update was undone")
        self._check_trial()

    def _expect(self, checkpoint: str, count: int = 20) -> None:
        """Check that the answers are those of a checkpoint from now on."""
        self._check_answers(self._clients.answers(count), checkpoint)

    def _check_answers(self, answers: list[Answer], checkpoint: str) -> None:
        right = self._seen[checkpoint]
        wrong = [one for one in answers if one.digit != right[one.picture]]
        check(not wrong, f"these are not answers of the {checkpoint} weights: {wrong[:3]}")

    def _check_updates(self, count: int) -> None:
        for _ in range(count):
            for checkpoint in ("later", "early"):
                report = self._admin.post("/weights", checkpoint=checkpoint)
                self._expect(checkpoint, 2)
                check(report["pause_milliseconds"] == 0, f"a request had to wait: {report}")
        check(report["version"] == 2 * count, f"a wrong version after {2 * count}: {report}")
        print(f"{2 * count} updates while serving, the last in {report['milliseconds']:.1f} ms")

    def _check_refusal(self) -> None:
        status, answer = self._admin.ask("POST", "/weights", checkpoint="broken")
        check(status == 409, f"broken weights were not refused: {answer}")  # noqa: PLR2004 - HTTP
        self._expect("early")
        print(f"refused: {answer['error'].splitlines()[0]}")

    def _check_trial(self) -> None:
        self._admin.post("/trial", checkpoint="later", every=4)
        answers = self._clients.answers(50)
        tried = [one for one in answers if one.by == "trial"]
        self._check_answers(tried, "later")
        self._check_answers([one for one in answers if one.by == "live"], "early")
        few, many = 0.15 * len(answers), 0.35 * len(answers)
        check(few < len(tried) < many, f"{len(tried)} of {len(answers)} requests are no fourth")
        print("a fourth of the requests tried the later weights")
        self._admin.post("/promote")
        self._expect("later")
        self._admin.post("/undo")
        self._expect("early")
        print("a promotion was undone")


def main() -> None:
    """Serve on a port, or check the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", type=int, help="serve on this port until interrupted")
    port: int | None = parser.parse_args().port
    torch.set_num_threads(1)  # before anything is compiled or loaded
    with tempfile.TemporaryDirectory() as folder:
        module, pictures, seen = prepare(Path(folder))
        server = serve(Service(module, Path(folder)), port or 0)
        if port is not None:
            print(f"http://127.0.0.1:{port}")
            server.serve_forever()
        threading.Thread(target=server.serve_forever).start()
        try:
            admin = Client(server.server_port)
            with Clients(server.server_port, pictures) as clients:
                Check(admin, clients, seen).run()
            admin.close()
        finally:
            server.shutdown()
            server.server_close()
    print("all checks passed")


if __name__ == "__main__":
    main()
