"""Manifests for KubeRay against the schemas of Kubernetes, KubeRay and Ray, and against this project."""

import os
import re
import shlex
from importlib import metadata
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml
from ray.autoscaler._private.constants import AUTOSCALER_METRIC_PORT
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.dashboard.consts import DASHBOARD_METRIC_PORT
from ray.serve.schema import ServeDeploySchema

from jobs.cli.main import app
from jobs.submit import entry
from scalp_core.bundles.registry import ENVIRONMENT
from serving.auth.keys import VARIABLE
from serving.settings import ModelSettings, Settings, check_batching
from tests.contracts import IMAGE, UID
from tests.support.kuberay_fields import closed, mistakes

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "cluster" / "dashboards" / "prometheus-kuberay.yaml"
FILES = sorted((ROOT / "cluster" / "kuberay").glob("*.yaml"))
DOCUMENTS = [each for file in FILES for each in yaml.safe_load_all(file.read_text())]
RAY = [each for each in DOCUMENTS if each["apiVersion"] == "ray.io/v1"]
RAY_NAMES = [f"{each['kind']}-{each['metadata']['name']}" for each in RAY]
SPEC = {"RayCluster": (), "RayJob": ("rayClusterSpec",), "RayService": ("rayClusterConfig",)}
SERVICE = next(each for each in RAY if each["kind"] == "RayService")
JOBS = [each for each in RAY if each["kind"] == "RayJob"]
KUBERNETES = ("1.31", "1.37")  # the oldest and the newest that they must fit
CRDS = "SCALP_KUBERAY_CRDS"
every_ray = pytest.mark.parametrize("resource", RAY, ids=RAY_NAMES)


def cluster(resource):
    spec = resource["spec"]
    for key in SPEC[resource["kind"]]:
        spec = spec[key]
    return spec


def groups(resource):
    """Pod templates of head and workers."""
    return [cluster(resource)["headGroupSpec"], *cluster(resource)["workerGroupSpecs"]]


def pods(resource):
    """Every pod template, the submitter's too, and the autoscaler's container that joins the head."""
    templates = [each["template"] for each in groups(resource)]
    if submitter := resource["spec"].get("submitterPodTemplate"):
        templates.append(submitter)
    if options := cluster(resource).get("autoscalerOptions"):
        own = {
            key: options[key] for key in ("resources", "securityContext", "env", "envFrom") if key in options
        }
        spec = cluster(resource)["headGroupSpec"]["template"]["spec"]
        joined = [*spec["containers"], {"name": "autoscaler", "image": IMAGE} | own]
        templates.append({"spec": spec | {"containers": joined}})
    return templates


def containers(resource):
    return [each for template in pods(resource) for each in template["spec"]["containers"]]


def as_pod(template):
    name = {"name": "x"} | template.get("metadata", {})
    return {"apiVersion": "v1", "kind": "Pod", "metadata": name, "spec": template["spec"]}


def test_the_manifests_that_people_start_are_there():
    kinds = [each["kind"] for each in DOCUMENTS]
    assert sorted(kinds) == [
        "NetworkPolicy", "PodDisruptionBudget", "RayCluster", "RayJob", "RayJob", "RayService",
    ]  # fmt: skip
    for file in FILES:
        text = file.read_text()
        start = (
            f'sed "s|{IMAGE}|$IMAGE|" cluster/kuberay/{file.name} | kubectl apply -n scalp -f -'
            if IMAGE in text
            else f"kubectl apply -n scalp -f cluster/kuberay/{file.name}"
        )
        assert text.splitlines()[1] == f"#   {start}"


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_itself_accepts_every_pod_and_policy(version):
    for document in DOCUMENTS:
        if document not in RAY:
            kubernetes_validate.validate(document, version, strict=True)
            continue
        for template in pods(document):
            kubernetes_validate.validate(as_pod(template), version, strict=True)


def test_a_misspelled_field_of_a_pod_is_noticed():
    template = pods(SERVICE)[0]
    wrong = as_pod({"spec": template["spec"] | {"automountServiceAccountTokens": False}})
    with pytest.raises(kubernetes_validate.ValidationError, match="automountServiceAccountTokens"):
        kubernetes_validate.validate(wrong, KUBERNETES[-1], strict=True)


@every_ray
def test_the_fields_around_the_pods_are_kuberays(resource):
    assert list(mistakes(resource, resource["kind"])) == []


def test_a_misspelled_misplaced_or_mistyped_field_of_kuberay_is_noticed():
    job = JOBS[0]
    for spec, says in (
        ({"backOffLimit": 2}, ".spec.backOffLimit: unknown"),
        ({"rayVersion": "2.60.0"}, ".spec.rayVersion: unknown"),
        ({"backoffLimit": "2"}, ".spec.backoffLimit: '2'"),
        ({"submissionMode": "K8SJobMode"}, ".spec.submissionMode: K8SJobMode is none of"),
        ({"rayClusterSpec": {}}, ".spec.rayClusterSpec.headGroupSpec: missing"),
    ):
        (found,) = mistakes(job | {"spec": job["spec"] | spec}, "RayJob")
        assert found.startswith(says)


def crd_schema(crd):
    version = next(each for each in crd["spec"]["versions"] if each["name"] == "v1")
    return closed(version["schema"]["openAPIV3Schema"])


@pytest.mark.skipif(
    not os.environ.get(CRDS),
    reason=f"{CRDS} names no folder with the CRDs; for KIND in rayclusters rayjobs rayservices: "
    "kubectl get crd KIND.ray.io -o yaml > FOLDER/KIND.yaml",
)
@every_ray
def test_the_crds_of_a_cluster_accept_it(resource):
    found = [yaml.safe_load(file.read_text()) for file in Path(os.environ[CRDS]).glob("*.y*ml")]
    crd = next(each for each in found if each["spec"]["names"]["kind"] == resource["kind"])
    jsonschema.validate(resource, crd_schema(crd))


def test_a_crd_refuses_what_kubernetes_would_drop_in_silence():
    container = {"type": "object", "required": ["image"], "properties": {"image": {"type": "string"}}}
    spec = {
        "type": "object",
        "properties": {
            "containers": {"type": "array", "items": container},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        },
    }
    schema = {"type": "object", "properties": {"metadata": {"type": "object"}, "spec": spec}}
    crd = {"spec": {"versions": [{"name": "v1", "schema": {"openAPIV3Schema": schema}}]}}
    good = {"metadata": {"name": "x"}, "spec": {"containers": [{"image": "x"}], "labels": {"any": "thing"}}}
    jsonschema.validate(good, crd_schema(crd))
    for spec, says in (
        ({"container": []}, "'container' was unexpected"),
        ({"containers": [{"image": "x", "imge": "x"}]}, "'imge' was unexpected"),
        ({"containers": [{}]}, "'image' is a required property"),
    ):
        with pytest.raises(jsonschema.ValidationError, match=says):
            jsonschema.validate({"spec": spec}, crd_schema(crd))


@every_ray
def test_rays_autoscaler_reads_the_groups_as_they_are_meant(resource):
    spec = cluster(resource)
    config = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "x", "namespace": "x"}, "spec": spec}
    )
    head, *workers = config["available_node_types"].items()
    assert head[1]["resources"]["CPU"] == 0
    for name, group in workers:
        assert group["resources"]["CPU"] >= 1
        assert group["resources"].get("GPU", 0) == ("gpu" in name)
        assert group["min_workers"] <= group["max_workers"]
        assert group["max_workers"] > 0
    if spec.get("enableInTreeAutoscaling"):
        assert config["idle_timeout_minutes"] >= 1
        assert spec["autoscalerOptions"]["version"] == "v2"
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group.get("replicas", group["minReplicas"]) <= group["maxReplicas"]


def test_the_cluster_to_work_on_has_cpus_gpus_and_cheaper_gpus():
    (resource,) = (each for each in RAY if each["kind"] == "RayCluster")
    cpu, gpu, spot = cluster(resource)["workerGroupSpecs"]
    assert [each["groupName"] for each in (cpu, gpu, spot)] == ["cpu", "gpu", "gpu-spot"]
    assert preferred(spot) == [{"key": "karpenter.sh/capacity-type", "operator": "In", "values": ["spot"]}]
    assert not preferred(gpu)


def preferred(group):
    """Preferred nodes of a group, as affinity that falls back to others."""
    affinity = group["template"]["spec"].get("affinity", {}).get("nodeAffinity", {})
    assert set(affinity) <= {"preferredDuringSchedulingIgnoredDuringExecution"}
    assert "nodeSelector" not in group["template"]["spec"]
    return [
        expression
        for each in affinity.get("preferredDuringSchedulingIgnoredDuringExecution", [])
        for expression in each["preference"]["matchExpressions"]
    ]


def admits(expression, labels):
    """Whether Kubernetes would place a pod with this expression on a node with these labels."""
    assert expression["operator"] == "NotIn"
    return labels.get(expression["key"]) not in expression["values"]


@every_ray
def test_heads_are_not_on_spot_whoever_runs_the_nodes(resource):
    affinity = cluster(resource)["headGroupSpec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    for labels, good in (
        ({}, True),
        ({"karpenter.sh/capacity-type": "on-demand"}, True),
        ({"karpenter.sh/capacity-type": "spot"}, False),
        ({"eks.amazonaws.com/capacityType": "ON_DEMAND"}, True),
        ({"eks.amazonaws.com/capacityType": "SPOT"}, False),
        ({"cloud.google.com/gke-spot": "true"}, False),
    ):
        assert all(admits(each, labels) for each in term["matchExpressions"]) is good, labels


@every_ray
def test_pods_with_gpus_and_no_others_run_by_nvidias_runtime(resource):
    for group in groups(resource):
        spec = group["template"]["spec"]
        gpus = "nvidia.com/gpu" in spec["containers"][0]["resources"]["limits"]
        assert spec.get("runtimeClassName") == ("nvidia" if gpus else None)


@every_ray
def test_every_container_runs_the_image_as_nobody_with_nothing_to_gain(resource):
    assert {each["image"] for each in containers(resource)} == {IMAGE}
    for template in pods(resource):
        context = template["spec"]["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] == UID
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    for each in containers(resource):
        assert each["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": UID,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        }


@every_ray
def test_only_the_autoscaler_has_a_token_of_kubernetes(resource):
    head, *workers = groups(resource)
    autoscaled = cluster(resource).get("enableInTreeAutoscaling", False)
    assert head["template"]["spec"]["automountServiceAccountToken"] is autoscaled
    others = [each["template"] for each in workers]
    if submitter := resource["spec"].get("submitterPodTemplate"):
        others.append(submitter)
    assert not any(each["spec"]["automountServiceAccountToken"] for each in others)


@every_ray
def test_memory_and_gpus_are_what_is_requested_and_the_object_store_is_in_memory(resource):
    for each in containers(resource):
        requests, limits = each["resources"]["requests"], each["resources"]["limits"]
        assert limits == {name: amount for name, amount in requests.items() if name != "cpu"}
    for group in groups(resource):
        # KubeRay then mounts a /dev/shm as large as the memory; a smaller one sends Ray's objects to a disk.
        spec = group["template"]["spec"]
        assert "volumes" not in spec and "volumeMounts" not in spec["containers"][0]


@every_ray
def test_secrets_come_by_reference_and_every_node_has_those_it_needs(resource):
    assert cluster(resource)["authOptions"] == {"mode": "token", "secretName": "scalp-ray-token"}
    for group in groups(resource):
        ray = group["template"]["spec"]["containers"][0]
        plain = {each["name"]: each["value"] for each in ray["env"] if "value" in each}
        assert set(plain) == {ENVIRONMENT}
        assert plain[ENVIRONMENT].startswith("s3://")
        assert ray["envFrom"] == [{"secretRef": {"name": "scalp-s3"}}]
    for each in containers(resource):
        for variable in each.get("env", []):
            hidden = ("KEY", "TOKEN", "SECRET", "PASSWORD")
            assert not (any(word in variable["name"] for word in hidden) and "value" in variable)


@every_ray
def test_ray_is_the_locked_one(resource):
    assert cluster(resource)["rayVersion"] == metadata.version("ray")


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job["metadata"]["name"])
def test_the_jobs_are_commands_of_this_project_and_end(job):
    python, option, module, log_option, log, verb, *rest = shlex.split(job["spec"]["entrypoint"])
    assert (python, option, module, log_option) == ("python", "-m", entry.__name__, "--log")
    # A folder of the head's pod is gone with it.
    places = rest[: 2 if verb == "train" else 3]
    assert all(place.startswith(("s3://", "models://")) for place in places)
    assert log == f"{places[-1].rstrip('/')}/jobs/scalp-{verb}.log"
    typer.main.get_command(app).commands[verb].make_context(verb, rest)  # refuses what the verb does not take
    assert job["metadata"]["name"] == f"scalp-{verb}"
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert job["spec"]["ttlSecondsAfterFinished"] > 0
    # It would end work of days, and KubeRay does not try again after a deadline.
    assert "activeDeadlineSeconds" not in job["spec"]
    assert job["spec"]["backoffLimit"] > 0


def test_training_and_grading_find_their_gpus_when_they_begin():
    # A run is planned for the GPUs that it finds; KubeRay submits it when the fewest of each group are there.
    for job in JOBS:
        fewest = sum(
            each["minReplicas"] for each in cluster(job)["workerGroupSpecs"] if "gpu" in each["groupName"]
        )
        assert fewest >= 1
    train = next(job for job in JOBS if job["metadata"]["name"] == "scalp-train")
    most = sum(each["maxReplicas"] for each in cluster(train)["workerGroupSpecs"])
    assert train["spec"]["entrypoint"].endswith(f"--workers 1:{most}")


def test_the_endpoint_is_the_application_of_the_config_file():
    served = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])
    schema = ServeDeploySchema.model_validate(served)
    expected = yaml.safe_load((ROOT / "serving" / "config.yaml").read_text())
    args = expected["applications"][0]["args"]
    args["ingress"]["min_replicas"] = args["grader"]["min_replicas"] = 2
    assert served == expected
    settings = Settings.model_validate(schema.applications[0].args)
    (deployment,) = served["applications"][0]["deployments"]
    check_batching(
        ModelSettings.model_validate(deployment["user_config"]), settings.grader.max_ongoing_requests
    )


def test_the_grader_holds_what_all_ingresses_admit_and_later_replicas_have_the_same_model():
    config = yaml.safe_load((ROOT / "serving" / "config.yaml").read_text())
    (application,) = config["applications"]
    settings = Settings.model_validate(application["args"])
    most = settings.ingress.max_replicas * settings.limits.in_flight
    assert settings.grader.max_ongoing_requests > most
    (deployment,) = application["deployments"]
    assert re.fullmatch(r"models://\w+@\d+", deployment["user_config"]["bundle"])
    # Replicas listen at this address too, and HAProxy of another node must reach them.
    assert config["http_options"]["host"] == "0.0.0.0"  # noqa: S104


def test_the_endpoint_is_open_to_the_network_with_keys_alone():
    for group in groups(SERVICE):
        env = group["template"]["spec"]["containers"][0]["env"]
        (keys,) = (each for each in env if each["name"] == VARIABLE)
        assert keys["valueFrom"] == {"secretKeyRef": {"name": "scalp-keys", "key": "keys"}}  # not optional


def test_the_endpoint_survives_its_head_and_an_upgrade():
    options = cluster(SERVICE)["gcsFaultToleranceOptions"]
    assert set(options["redisPassword"]) == {"valueFrom"}
    assert cluster(SERVICE)["enableInTreeAutoscaling"] is True  # what an incremental upgrade needs
    upgrade = SERVICE["spec"]["upgradeStrategy"]
    assert upgrade["type"] == "NewClusterWithIncrementalUpgrade"
    steps = upgrade["clusterUpgradeOptions"]
    assert 0 < steps["stepSizePercent"] <= steps["maxSurgePercent"] <= 100
    assert cluster(SERVICE)["workerGroupSpecs"][0]["minReplicas"] >= 2


def test_all_ports_agree():
    metrics = {"metrics": 8080, "as-metrics": AUTOSCALER_METRIC_PORT, "dash-metrics": DASHBOARD_METRIC_PORT}
    ports = {"gcs-server": 6379, "dashboard": 8265} | metrics
    serve = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])["http_options"]["port"]
    for resource in RAY:
        served = {"serve": serve} if resource is SERVICE else {}
        head, *workers = (
            {
                port["name"]: port["containerPort"]
                for port in each["template"]["spec"]["containers"][0]["ports"]
            }
            for each in groups(resource)
        )
        assert head == ports | served
        assert all(each == {"metrics": ports["metrics"]} | served for each in workers)
    (policy,) = (each for each in DOCUMENTS if each["kind"] == "NetworkPolicy")
    let_in = [{port["port"] for port in rule.get("ports", [])} for rule in policy["spec"]["ingress"]]
    assert let_in == [set(), {8265, serve}, {8265}, {serve}, set(metrics.values())]
    assert all(rule["from"] for rule in policy["spec"]["ingress"])
    (scrape,) = yaml.safe_load(PROMETHEUS.read_text())["scrape_configs"]
    (names,) = (
        each["regex"] for each in scrape["relabel_configs"] if "port_name" in each["source_labels"][0]
    )
    assert set(names.split("|")) == set(metrics)
