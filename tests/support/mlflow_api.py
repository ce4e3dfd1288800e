"""MLflow's REST API, as far as a client that logs a run needs it, with MLflow's file store.

MLflow's server is not among what the client's package needs, so tests bring this in its place.
"""

import json
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos import service_pb2 as api
from mlflow.store.tracking.file_store import FileStore
from mlflow.utils.proto_json_utils import message_to_json, parse_dict

ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts/"


def _answer(store: FileStore, path: str, asked: dict) -> object:
    def read(message: object) -> object:
        parse_dict(asked, message)
        return message

    match path:
        case "experiments/get-by-name":
            found = store.get_experiment_by_name(asked["experiment_name"])
            if found is None:
                raise MlflowException(
                    "no such experiment", error_code=api.databricks__pb2.RESOURCE_DOES_NOT_EXIST
                )
            return api.GetExperimentByName.Response(experiment=found.to_proto())
        case "experiments/create":
            return api.CreateExperiment.Response(experiment_id=store.create_experiment(asked["name"]))
        case "experiments/get":
            return api.GetExperiment.Response(
                experiment=store.get_experiment(asked["experiment_id"]).to_proto()
            )
        case "runs/create":
            run = store.create_run(asked["experiment_id"], "", asked["start_time"], [], asked["run_name"])
            return api.CreateRun.Response(run=run.to_proto())
        case "runs/get":
            return api.GetRun.Response(run=store.get_run(asked["run_id"]).to_proto())
        case "runs/update":
            message = read(api.UpdateRun())
            info = store.update_run_info(message.run_id, message.status, message.end_time, None)
            return api.UpdateRun.Response(run_info=info.to_proto())
        case "runs/log-batch":
            message = read(api.LogBatch())
            kinds = ((Metric, message.metrics), (Param, message.params), (RunTag, message.tags))
            store.log_batch(message.run_id, *([kind.from_proto(one) for one in some] for kind, some in kinds))
            return api.LogBatch.Response()
        case "metrics/get-history":
            history = store.get_metric_history(asked["run_id"], asked["metric_key"])
            return api.GetMetricHistory.Response(metrics=[metric.to_proto() for metric in history])
    raise AssertionError(path)


@contextmanager
def mlflow_server(folder: Path, port: int, key: str = "") -> Iterator[MlflowClient]:
    """Serves what is in `folder`; gives a client that reads it there, past the server.

    Artifacts that are sent to it lie in `folder/files`. With a `user:password` in `key`, it wants that.
    """
    wanted = f"Basic {b64encode(key.encode()).decode()}" if key else None
    root = str(folder / "store")
    store = FileStore(root, artifact_root_uri="mlflow-artifacts:/")

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            url = urlsplit(self.path)
            if wanted and self.headers.get("Authorization") != wanted:
                self._send(401, "You are not authenticated.")
                return
            try:
                if self.command == "PUT":
                    file = folder / "files" / url.path.removeprefix(ARTIFACTS)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(body)
                    self._send(200, "{}")
                    return
                asked = json.loads(body) if body else dict(parse_qsl(url.query))
                answer = _answer(store, url.path.removeprefix("/api/2.0/mlflow/"), asked)
                self._send(200, message_to_json(answer))
            except MlflowException as error:
                self._send(error.get_http_status_code(), error.serialize_as_json())

        def _send(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

        do_GET = do_POST = do_PUT = _handle  # noqa: N815

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield MlflowClient(root)
        finally:
            server.shutdown()
