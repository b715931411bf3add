"""The Kubernetes manifests: pods by Kubernetes' own schemas, the rest by KubeRay's fields and Ray's autoscaler.

Whoever has the files of a KubeRay release names their folder in ``KUBERAY_CRDS``, and all of it is checked by those.
"""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from tests.conftest import REPOSITORY
from tests.deploy.published_schemas import published_schema, strict

from emolab.cluster import GROWS_TO

FOLDER = REPOSITORY / "deploy" / "kuberay"
KUBERNETES = "1.33"

# The fields of KubeRay's API ray.io/v1 (release 1.5 and later) that manifests like these use, as its reference names
# and types them. Pod templates are left to Kubernetes' own schemas.
_COUNT = {"type": "integer", "minimum": 0}
_TEXT_MAP = {"type": "object", "additionalProperties": {"type": "string"}}
_GROUP = {"rayStartParams": _TEXT_MAP, "template": {"type": "object", "required": ["spec"]}}


def _strict(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


_CLUSTER = _strict(
    {
        "rayVersion": {"type": "string"},
        "authOptions": _strict({"mode": {"enum": ["disabled", "token"]}}),
        "enableInTreeAutoscaling": {"type": "boolean"},
        "autoscalerOptions": _strict(
            {
                "idleTimeoutSeconds": _COUNT,
                "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
                "version": {"enum": ["v1", "v2"]},
                "securityContext": {"type": "object"},
                "resources": {"type": "object"},
            }
        ),
        "headGroupSpec": _strict(
            _GROUP | {"serviceType": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]}}, "template"
        ),
        "workerGroupSpecs": {
            "type": "array",
            "items": _strict(
                _GROUP
                | {"groupName": {"type": "string"}, "replicas": _COUNT, "minReplicas": _COUNT, "maxReplicas": _COUNT},
                "groupName",
                "template",
                "minReplicas",
                "maxReplicas",
            ),
        },
    },
    "headGroupSpec",
)
_JOB = _strict(
    {
        "entrypoint": {"type": "string"},
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        "submitterPodTemplate": {"type": "object", "required": ["spec"]},
        "shutdownAfterJobFinishes": {"type": "boolean"},
        "ttlSecondsAfterFinished": _COUNT,
        "activeDeadlineSeconds": _COUNT,
        "backoffLimit": _COUNT,
        "rayClusterSpec": _CLUSTER,
    },
    "entrypoint",
    "rayClusterSpec",
)
_RESOURCE = {"apiVersion": {"const": "ray.io/v1"}, "metadata": {"type": "object", "required": ["name", "namespace"]}}
SCHEMAS = {
    "RayCluster": _strict(_RESOURCE | {"kind": {"const": "RayCluster"}, "spec": _CLUSTER}, "kind", "spec", "metadata"),
    "RayJob": _strict(_RESOURCE | {"kind": {"const": "RayJob"}, "spec": _JOB}, "kind", "spec", "metadata"),
}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


def pods_of(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    cluster = cluster_of(manifest)
    yield cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["template"]
    if "submitterPodTemplate" in manifest["spec"]:
        yield manifest["spec"]["submitterPodTemplate"]


MANIFESTS = ["ray-cluster.yaml", "ray-job.yaml"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_has_kuberays_fields_and_no_others(name: str) -> None:
    manifest = read(name)
    schema = SCHEMAS[manifest["kind"]]
    jsonschema.validate(manifest, schema)
    cluster_of(manifest)["workerGroupSpec"] = []
    with pytest.raises(jsonschema.ValidationError, match="workerGroupSpec"):
        jsonschema.validate(manifest, schema)


@pytest.mark.skipif("KUBERAY_CRDS" not in os.environ, reason="KUBERAY_CRDS names no folder with KubeRay's CRD files")
@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_keeps_to_the_schema_that_kuberay_publishes(name: str) -> None:
    manifest = read(name)
    version = manifest["apiVersion"].removeprefix("ray.io/")
    schema = published_schema(Path(os.environ["KUBERAY_CRDS"]), manifest["kind"], version)
    jsonschema.validate(manifest, schema)
    head, group = cluster_of(manifest)["headGroupSpec"], cluster_of(manifest)["workerGroupSpecs"][0]
    container = head["template"]["spec"]["containers"][0]
    for place, field, value, complaint in (
        (cluster_of(manifest), "workerGroupSpec", [], "workerGroupSpec"),
        (container, "resource", {}, "resource"),
        (group, "minReplicas", "none", "none"),
    ):
        kept = dict(place)
        place[field] = value
        with pytest.raises(jsonschema.ValidationError, match=complaint):
            jsonschema.validate(manifest, schema)
        place.clear()
        place.update(kept)


def test_a_published_schema_is_as_strict_as_the_api_server() -> None:
    """By a definition of our own that has what KubeRay's have: nested fields, maps, quantities, open ends."""
    quantity = {"anyOf": [{"type": "integer"}, {"type": "string"}], "pattern": "^[0-9]+(Gi)?$"}
    published = {
        "type": "object",
        "required": ["name"],
        "properties": {
            "name": {"type": "string", "description": "x"},
            "limits": {"type": "object", "additionalProperties": quantity | {"x-kubernetes-int-or-string": True}},
            "items": {"type": "array", "items": {"type": "object", "properties": {"count": {"type": "integer"}}}},
            "port": {"type": "integer", "format": "int32"},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            "open": {"type": "object", "properties": {}, "x-kubernetes-preserve-unknown-fields": True},
            "gone": {"type": "string", "nullable": True},
        },
    }
    schema = strict(published)
    good = {"name": "a", "limits": {"cpu": 2, "memory": "8Gi"}, "items": [{"count": 1}], "labels": {"x": "y"}}
    jsonschema.validate(good | {"open": {"any": ["thing"]}, "gone": None, "port": 8265}, schema)
    for wrong in (
        {"unknown": 1},
        {"limits": {"memory": "8GB"}},
        {"limits": {"cpu": 0.5}},
        {"items": [{"cuont": 1}]},
        {"labels": {"x": 1}},
        {"port": 2**31},
        {"name": None},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(good | wrong, schema)


@pytest.mark.parametrize("name", MANIFESTS)
def test_its_pods_are_valid_kubernetes(name: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for template in pods_of(read(name)):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": template.get("metadata", {}), "spec": template["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        template["spec"]["containers"][0]["resource"] = {}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_the_storage_and_the_wall_are_valid_kubernetes() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    documents = list(yaml.safe_load_all((FOLDER / "storage.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["Namespace", "PersistentVolumeClaim", "NetworkPolicy"]
    for document in documents:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    claims = {volume["persistentVolumeClaim"]["claimName"] for name in MANIFESTS for volume in shared_volumes(name)}
    assert claims == {documents[1]["metadata"]["name"]}


def shared_volumes(name: str) -> list[dict[str, Any]]:
    volumes = [volume for pod in pods_of(read(name)) for volume in pod["spec"].get("volumes", [])]
    return [volume for volume in volumes if "persistentVolumeClaim" in volume]


@pytest.mark.parametrize("name", MANIFESTS)
def test_rays_autoscaler_reads_the_cluster_as_it_is_meant(name: str) -> None:
    manifest = read(name)
    resource = {"metadata": manifest["metadata"], "spec": cluster_of(manifest)}
    kinds = _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]
    for group in cluster_of(manifest)["workerGroupSpecs"]:
        kind = kinds[group["groupName"]]
        assert (kind["min_workers"], kind["max_workers"]) == (group["minReplicas"], group["maxReplicas"])
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert kind["resources"]["CPU"] == int(limits["cpu"])
        assert kind["resources"].get("GPU", 0) == int(limits.get("nvidia.com/gpu", 0))
    assert kinds["headgroup"]["resources"]["CPU"] == int(
        cluster_of(manifest)["headGroupSpec"]["rayStartParams"]["num-cpus"]
    )


def test_jobs_are_told_what_the_autoscaler_may_add() -> None:
    manifest = read("ray-cluster.yaml")
    kinds = _derive_autoscaling_config_from_ray_cr(manifest)["available_node_types"]
    head = cluster_of(manifest)["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    [said] = [variable["value"] for variable in head if variable["name"] == GROWS_TO]
    told = {(group["nodes"], group["cpus"], group.get("gpus", 0)) for group in yaml.safe_load(said)}
    groups = [kind for name, kind in kinds.items() if name != "headgroup"]
    assert told == {(k["max_workers"], k["resources"]["CPU"], k["resources"].get("GPU", 0)) for k in groups}


@pytest.mark.parametrize("name", MANIFESTS)
def test_no_node_starts_without_a_token_or_as_root(name: str) -> None:
    manifest = read(name)
    cluster = cluster_of(manifest)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    for template in pods_of(manifest):
        assert template["spec"]["securityContext"]["runAsUser"] == 1000
        for container in template["spec"]["containers"]:
            context = container["securityContext"]
            assert context["runAsNonRoot"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            for variable in container.get("env", []):
                assert variable["name"] in {"OMP_NUM_THREADS", GROWS_TO} or "secretKeyRef" in variable["valueFrom"]


def test_the_job_starts_what_exists() -> None:
    words = shlex.split(read("ray-job.yaml")["spec"]["entrypoint"])
    assert words[0] == "python"
    assert (REPOSITORY / words[1]).is_file()
    from emolab.configuration import parse
    from emolab.tuning.settings import TuneSettings

    settings, _ = parse(TuneSettings, words[2:], description="")
    assert settings.output == "/shared/runs"
    assert settings.prepare is not None
    assert settings.prepare.output == settings.data
