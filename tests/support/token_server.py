"""A token server whose JWTs the real `docker-registry` accepts.

    with TokenServer(folder, users={"carrier": "pigeon-4711"}) as tokens:
        with running(folder / "registry", token=tokens) as registry: ...

Invariant: what was asked is recorded in `asked`, what was given out in `issued`; a token says
nothing but what was asked for, and only a user of the server may push.
"""

from __future__ import annotations

import base64
import binascii
import json
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

if TYPE_CHECKING:
    from pathlib import Path

SERVICE = "stowray-tests"
ISSUER = "token-server"
# docker-registry 2.8 lets a token live so much longer than it says.
LEEWAY_SECONDS = 60.0


@dataclass(frozen=True)
class Asked:
    """One request for a token."""

    method: str
    user: str | None
    scopes: tuple[str, ...]
    service: str
    headers: dict[str, str]


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class TokenServer:
    """Issues tokens over plain HTTP on loopback; signed with a key that the registry trusts."""

    def __init__(
        self,
        folder: Path,
        *,
        users: dict[str, str],
        anonymous: bool = False,
        life_seconds: float = 300.0,
    ) -> None:
        self.users = users
        self.anonymous = anonymous
        self.life_seconds = life_seconds  # at the registry; the answer always says 300
        self.asked: list[Asked] = []
        self.issued: list[str] = []
        self.bundle = folder / "token-root.pem"
        self._lock = threading.Lock()
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._certificate = self._self_signed()
        self.bundle.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    @property
    def realm(self) -> str:
        return f"http://{self.host}/token"

    def config(self) -> str:
        """The registry's configuration."""
        return (
            f"auth: {{token: {{realm: '{self.realm}', service: {SERVICE}, issuer: {ISSUER}, "
            f"rootcertbundle: {self.bundle}}}}}"
        )

    def issue(self, user: str, scopes: tuple[str, ...], life_seconds: float | None = None) -> str:
        """Return a token for what `scopes` say."""
        now = time.time()
        life = self.life_seconds if life_seconds is None else life_seconds
        access = []
        for scope in scopes:
            kind, _, rest = scope.partition(":")
            name, _, actions = rest.rpartition(":")
            access.append({"type": kind, "name": name, "actions": actions.split(",")})
        chain = [base64.b64encode(self._certificate.public_bytes(serialization.Encoding.DER))]
        header = {"typ": "JWT", "alg": "ES256", "x5c": [entry.decode() for entry in chain]}
        claims = {
            "iss": ISSUER,
            "sub": user,
            "aud": SERVICE,
            "exp": int(now + life - LEEWAY_SECONDS),
            "nbf": int(now - 300),
            "iat": int(now - 300),
            "jti": f"{now}",
            "access": access,
        }
        signed = ".".join(_base64url(json.dumps(part).encode()) for part in (header, claims))
        signature = self._key.sign(signed.encode(), ec.ECDSA(hashes.SHA256()))
        r, s = utils.decode_dss_signature(signature)
        token = f"{signed}.{_base64url(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"
        with self._lock:
            self.issued.append(token)
        return token

    def _self_signed(self) -> x509.Certificate:
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, ISSUER)])
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    def _answer(
        self, method: str, query: dict[str, list[str]], headers: dict[str, str]
    ) -> tuple[int, dict[str, Any]]:
        user: str | None = None
        scheme, _, value = headers.get("Authorization", "").partition(" ")
        if method == "POST":
            user, password = (query.get(name, [""])[0] for name in ("username", "password"))
            known = self.users.get(user) == password
            scopes = tuple(query.get("scope", [""])[0].split())
        else:
            scopes = tuple(query.get("scope", []))
            known = self.anonymous
            if scheme == "Basic":
                try:
                    user, _, password = base64.b64decode(value).decode().partition(":")
                except (binascii.Error, UnicodeDecodeError):
                    return 400, {}
                known = self.users.get(user) == password
        with self._lock:
            asked = Asked(method, user, scopes, query.get("service", [""])[0], headers)
            self.asked.append(asked)
        if not known:
            return 401, {"errors": [{"code": "UNAUTHORIZED", "message": "wrong login"}]}
        return 200, {"token": self.issue(user or "", scopes), "expires_in": 300}


def _handler(server: TokenServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            query = parse_qs(body if self.command == "POST" else urlsplit(self.path).query)
            status, answer = server._answer(self.command, query, dict(self.headers.items()))
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = _serve  # noqa: N815
        do_POST = _serve  # noqa: N815

    return Handler
