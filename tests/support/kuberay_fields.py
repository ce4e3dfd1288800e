"""Schema of KubeRay's resources (ray.io/v1) without their pods, and a check that rejects other fields.

Made by hand from KubeRay's documentation of its version 1.7, and only as far as anybody here may need it: a
field that is missing is looked up there and added. Names, types, choices and what is required were compared
with the Go types that KubeRay's CRDs are generated from (ray-operator/apis/ray/v1/*_types.go) on 2026-11-27.
Pods are checked by Kubernetes' own schemas.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

NUMBER = (int, float)
NAMES = dict[str, str]
OF_KUBERNETES = object()  # checked by its own schemas

FIELDS: dict[str, dict[str, Any]] = {
    "RayCluster": {"apiVersion": str, "kind": str, "metadata": OF_KUBERNETES, "spec": "RayClusterSpec"},
    "RayJob": {"apiVersion": str, "kind": str, "metadata": OF_KUBERNETES, "spec": "RayJobSpec"},
    "RayService": {"apiVersion": str, "kind": str, "metadata": OF_KUBERNETES, "spec": "RayServiceSpec"},
    "RayClusterSpec": {
        "rayVersion": str,
        "authOptions": "AuthOptions",
        "enableInTreeAutoscaling": bool,
        "autoscalerOptions": "AutoscalerOptions",
        "gcsFaultToleranceOptions": "GcsFaultToleranceOptions",
        "tlsOptions": "TLSOptions",
        "headServiceAnnotations": NAMES,
        "headGroupSpec": "HeadGroupSpec",
        "workerGroupSpecs": ["WorkerGroupSpec"],
        "managedBy": str,
        "suspend": bool,
    },
    "AuthOptions": {"mode": {"token", "disabled"}, "secretName": str},
    "TLSOptions": {"enabled": bool},
    "AutoscalerOptions": {
        "version": {"v1", "v2"},
        "idleTimeoutSeconds": int,
        "upscalingMode": {"Default", "Aggressive", "Conservative"},
        "image": str,
        "imagePullPolicy": str,
        "resources": OF_KUBERNETES,
        "securityContext": OF_KUBERNETES,
        "env": OF_KUBERNETES,
        "envFrom": OF_KUBERNETES,
        "volumeMounts": OF_KUBERNETES,
    },
    "GcsFaultToleranceOptions": {
        "redisAddress": str,
        "redisUsername": "RedisCredential",
        "redisPassword": "RedisCredential",
        "externalStorageNamespace": str,
    },
    "RedisCredential": {"value": str, "valueFrom": OF_KUBERNETES},
    "HeadGroupSpec": {
        "rayStartParams": NAMES,
        "template": OF_KUBERNETES,
        "serviceType": {"ClusterIP", "NodePort", "LoadBalancer"},
        "headService": OF_KUBERNETES,
        "enableIngress": bool,
        "labels": NAMES,
        "resources": NAMES,
    },
    "WorkerGroupSpec": {
        "groupName": str,
        "replicas": int,
        "minReplicas": int,
        "maxReplicas": int,
        "numOfHosts": int,
        "idleTimeoutSeconds": int,
        "rayStartParams": NAMES,
        "template": OF_KUBERNETES,
        "labels": NAMES,
        "resources": NAMES,
    },
    "RayJobSpec": {
        "entrypoint": str,
        "entrypointNumCpus": NUMBER,
        "entrypointNumGpus": NUMBER,
        "entrypointResources": str,
        "runtimeEnvYAML": str,
        "jobId": str,
        "metadata": NAMES,
        "submissionMode": {"K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"},
        "submitterPodTemplate": OF_KUBERNETES,
        "submitterConfig": "SubmitterConfig",
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "activeDeadlineSeconds": int,
        "backoffLimit": int,
        "suspend": bool,
        "clusterSelector": NAMES,
        "rayClusterSpec": "RayClusterSpec",
    },
    "SubmitterConfig": {"backoffLimit": int},
    "RayServiceSpec": {
        "serveConfigV2": str,
        "rayClusterConfig": "RayClusterSpec",
        "upgradeStrategy": "UpgradeStrategy",
        "serveService": OF_KUBERNETES,
        "excludeHeadPodFromServeSvc": bool,
        "rayClusterDeletionDelaySeconds": int,
    },
    "UpgradeStrategy": {
        "type": {"NewCluster", "NewClusterWithIncrementalUpgrade", "None"},
        "clusterUpgradeOptions": "ClusterUpgradeOptions",
    },
    "ClusterUpgradeOptions": {
        "gatewayClassName": str,
        "maxSurgePercent": int,
        "stepSizePercent": int,
        "intervalSeconds": int,
    },
}
REQUIRED = {
    "RayClusterSpec": {"headGroupSpec"},
    "HeadGroupSpec": {"template"},
    "WorkerGroupSpec": {"groupName", "minReplicas", "maxReplicas", "template"},
    "RayServiceSpec": {"rayClusterConfig"},
    "ClusterUpgradeOptions": {"gatewayClassName", "stepSizePercent", "intervalSeconds"},
}


def mistakes(value: Any, expected: Any, at: str = "") -> Iterator[str]:
    """Yield the unknown, missing and mistyped fields of a resource."""
    if expected is OF_KUBERNETES:
        return
    if isinstance(expected, str):
        if not isinstance(value, dict):
            yield f"{at}: no mapping"
            return
        for name in REQUIRED.get(expected, set()) - set(value):
            yield f"{at}.{name}: missing"
        for name, field in value.items():
            if name in FIELDS[expected]:
                yield from mistakes(field, FIELDS[expected][name], f"{at}.{name}")
            else:
                yield f"{at}.{name}: unknown"
    elif isinstance(expected, list):
        for index, each in enumerate(value):
            yield from mistakes(each, expected[0], f"{at}[{index}]")
    elif expected is NAMES:
        if not all(isinstance(text, str) for pair in value.items() for text in pair):
            yield f"{at}: not all strings"
    elif isinstance(expected, set):
        if value not in expected:
            yield f"{at}: {value} is none of {sorted(expected)}"
    elif not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        yield f"{at}: {value!r}"


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Close the OpenAPI schema of a CRD to unknown fields, which Kubernetes drops silently."""
    inside: dict[str, Any] = {}
    if "properties" in schema:
        inside["properties"] = {name: closed(each) for name, each in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            inside["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            inside[key] = closed(schema[key])
    return schema | inside
