"""Servers at addresses of all kinds: behind a path, on IPv6, with TLS, beside proxies, restarting, on a taken port."""

import http.server
import json
import shutil
import socket
import ssl
import subprocess
import threading
from contextlib import contextmanager

import pytest

from medsteer_core.errors import MedSteerError
from medsteer_core.run.client import ComfyClient
from medsteer_core.run.retrying_http import checked_address
from medsteer_core.run.workflow import ServerUnreachable


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, dict(self.headers)))
        if self.server.failures:
            self.server.failures -= 1
            self.send_error(503)
            return
        body = json.dumps({"system": {"path": self.path}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def served(host="127.0.0.1", certificate=None, failures=0):
    class Server(http.server.ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    server = Server((host, 0), Answers)
    server.asked, server.failures = [], failures
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server, server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def stats(address, **options):
    return ComfyClient(checked_address(address), 5.0, options.pop("retries", 0), {}, None, **options).system_stats()


def test_a_path_before_comfyuis_own_is_kept():
    with served() as (server, port):
        assert stats(f"http://127.0.0.1:{port}/lab/comfy/")["system"]["path"] == "/lab/comfy/system_stats"
    assert len(server.asked) == 1


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_an_ipv6_address_is_reached():
    with served("::1") as (_server, port):
        assert "system" in stats(f"http://[::1]:{port}")


def test_proxies_of_the_environment_are_not_asked(monkeypatch):
    with served() as (_server, port):
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
        assert "system" in stats(f"http://127.0.0.1:{port}")


def test_a_server_that_is_restarting_is_asked_again(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    with served(failures=3) as (server, port):
        assert "system" in stats(f"http://127.0.0.1:{port}", retries=5)
        assert len(server.asked) == 4


def test_a_certificate_of_ones_own_is_named_with_what_to_do_and_works_where_it_is_known(tmp_path, monkeypatch):
    assert shutil.which("openssl"), "openssl makes the certificate of this test"
    key, certificate = tmp_path / "key.pem", tmp_path / "own.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    with served(certificate=(certificate, key)) as (_server, port):
        with pytest.raises(ServerUnreachable, match="is not trusted.*SSL_CERT_FILE"):
            stats(f"https://127.0.0.1:{port}")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert "system" in stats(f"https://127.0.0.1:{port}")


def test_a_port_on_which_nobody_listens_says_so():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ServerUnreachable, match=f"no ComfyUI answers at http://127.0.0.1:{port}: Connection refused"):
        stats(f"http://127.0.0.1:{port}")


@pytest.mark.parametrize(
    "address", ["127.0.0.1:8188", "ftp://a", "http://", "http://a:x", "http://u:p@a", "http://a b"]
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(MedSteerError, match="no address of a server"):
        checked_address(address)
