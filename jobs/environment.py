"""Environment variables that scalp reads, and the exit codes of its commands, for docs/environment.md."""

from __future__ import annotations

VARIABLES: dict[str, dict[str, str]] = {
    "scalp": {
        "SCALP_MODELS": "registry of models, a folder or `s3://` prefix; `--registry` replaces it",
        "SCALP_SIGNERS": "file with public keys, local or `s3://`; with it, `models://NAME` needs a "
        "promotion that one of them signed",
        "SCALP_KEYS": "keys of the endpoint, one line per key as in the file of `--keys`; adds to that file",
        "SCALP_HAPROXY": "limits of HAProxy on a cluster: JSON with the fields of `front`",
        "SCALP_HAPROXY_GRPC": "where HAProxy accepts gRPC; `scalp serve --grpc-port` sets it",
        "SCALP_CONNECTION_SECONDS": "seconds in which the head of a request must arrive; default: 15",
        "SCALP_RAY_LOGS": "1 prints the logs of Ray and of its workers",
    },
    "Ray": {
        "RAY_ADDRESS": "cluster to join, such as `auto` or `HOST:6379`; unset: a local Ray, if one is needed",
        "RAY_API_SERVER_ADDRESS": "dashboard of the cluster for `scalp submit` and `scalp jobs`; `--address` "
        "replaces it",
        "RAY_AUTH_MODE": "`token`: Ray's processes require a token; a local Ray refuses other values",
        "RAY_AUTH_TOKEN": "token of the cluster",
        "RAY_AUTH_TOKEN_PATH": "file with the token; default: `~/.ray/auth_token`",
        "RAY_USE_TLS": "1: connections between nodes are encrypted",
        "RAY_TLS_CA_CERT": "certificate of the authority, with `RAY_USE_TLS`",
        "RAY_TLS_SERVER_CERT": "certificate of this node, with `RAY_USE_TLS`",
        "RAY_TLS_SERVER_KEY": "private key of this node, with `RAY_USE_TLS`",
        "RAY_SERVE_ENABLE_HA_PROXY": "1: HAProxy instead of Ray's Python proxy; `scalp serve` sets it",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "seconds in which a stopping replica still gets "
        "requests; default: 30",
        "RAY_SERVE_LOG_ENCODING": "`JSON`: the endpoint logs lines of JSON",
    },
    "S3": {
        "AWS_PROFILE": "profile of `~/.aws`",
        "AWS_ACCESS_KEY_ID": "access key; on AWS rather use a role",
        "AWS_SECRET_ACCESS_KEY": "secret of the access key",
        "AWS_SESSION_TOKEN": "token of short-lived credentials",
        "AWS_REGION": "region of the buckets",
        "AWS_DEFAULT_REGION": "region, if `AWS_REGION` is not set",
        "AWS_ENDPOINT_URL": "address of an S3 server other than Amazon's",
        "AWS_ENDPOINT_URL_S3": "the same; replaces `AWS_ENDPOINT_URL`",
        "AWS_CONFIG_FILE": "file in place of `~/.aws/config`",
        "AWS_SHARED_CREDENTIALS_FILE": "file in place of `~/.aws/credentials`",
    },
    "MLflow": {
        "MLFLOW_TRACKING_URI": "server of `scalp train --tracking mlflow`",
        "MLFLOW_EXPERIMENT_NAME": "name of the experiment; default: `scalp`",
    },
}
"""Meaning of each variable, by the program that defines it."""

EXIT_CODES = {
    0: "The command is done, also if it had nothing left to do.",
    1: "`scalp doctor`: a check failed. `scalp audit verify`: the log is damaged. Of other commands, a bug: "
    "the last lines are its traceback.",
    2: "A mistake or a problem, such as images without exactly one row. Standard error has two lines: "
    "`error:` with the problem, `hint:` with the fix.",
    130: "Ctrl-C. The same command resumes.",
    143: "SIGTERM: 128 plus the number of the signal. Of `scalp submit` and `scalp jobs logs`, also a "
    "stopped job.",
}
"""`scalp submit` and `scalp jobs logs` have the exit code of the job."""
