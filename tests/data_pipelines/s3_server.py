"""An S3-compatible server in a process of its own: moto's, with data that outlive it.

Each sub-folder of a folder is a bucket, each file in it an object. They are read when the server starts, before it answers, so
that a server which was killed and started again has the same objects at the same address.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "NO_PROXY": "127.0.0.1",
}
"""What clients need beside S3_ENDPOINT_URL; whatever a developer's own account says is kept out."""


class S3Server:
    """The process, from `start` to `kill`.

    Args:
        folder: of the buckets.
        log: what the server prints, a line a request, is appended here.
    """

    def __init__(self, folder: Path, log: Path):
        self.folder, self.log = folder, log
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.begin()
        self.wait()

    def begin(self) -> None:
        """Starts the process, which answers some seconds later."""
        command = [sys.executable, __file__, str(self.port), str(self.folder)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def wait(self) -> None:
        """Until it answers."""
        end = time.monotonic() + 60
        while True:
            try:
                return socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                if time.monotonic() > end or self.process.poll() is not None:
                    raise RuntimeError(f"the S3 server has not started: {self.log.read_text()[-2000:]}") from None
                time.sleep(0.05)

    def halt(self) -> None:
        """It holds its connections and accepts more, but answers nothing."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Undoes `halt`."""
        os.kill(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """It refuses connections from now on."""
        self.process.kill()
        self.process.wait()

    def check_credentials(self, check: bool) -> None:
        """Whether requests need the keys of a user that its IAM knows; at first they don't."""
        body, headers = b"0" if check else b"inf", {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/moto-api/reset-auth", body, headers)).close()

    def downloads(self) -> list[str]:
        """The paths of all objects sent so far."""
        return [line.split('"')[1].split()[1] for line in self.log.read_text().splitlines() if '"GET /' in line]


class Relay:
    """Stands between clients and a server, so that the same address can stop answering in several ways.

    Args:
        port: of the server.
    """

    def __init__(self, port: int):
        self.upstream, self.how = port, "relays"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def become(self, how: str) -> None:
        """From now on it "refuses" connections, "is silent" on them, or "drips" a byte now and then."""
        self.how = how
        if how == "refuses":
            self.close()

    def close(self) -> None:
        """Ends all connections."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, server = self._listener.accept()[0], socket.create_connection(("127.0.0.1", self.upstream))
                self._connections += [client, server]
                threading.Thread(target=self._requests, args=(client, server), daemon=True).start()
                threading.Thread(target=self._answers, args=(server, client), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while request := client.recv(65536):
                if self.how == "relays":
                    server.sendall(request)
                if self.how == "drips":
                    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n")
                    while True:
                        client.sendall(b"x")
                        time.sleep(0.1)

    def _answers(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while answer := server.recv(65536):
                client.sendall(answer)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def serve(port: int, folder: Path) -> None:
    """Fills moto's S3 from a folder and serves it."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server
    from werkzeug.test import Client

    app = DomainDispatcherApplication(create_backend_app)
    client, host = Client(app), f"http://127.0.0.1:{port}"
    for bucket in folder.iterdir():
        client.put(f"/{bucket.name}", base_url=host)
        for file in bucket.rglob("*"):
            if file.is_file():
                answer = client.put(f"/{file.relative_to(folder)}", data=file.read_bytes(), base_url=host)
                assert answer.status_code == 200, answer.data
    make_server("127.0.0.1", port, app, threaded=True).serve_forever()


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]))
