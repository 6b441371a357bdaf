"""Every YAML a user is meant to copy is parsed and held to the schema of what reads it."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from ftray.cluster.bundle import command_line
from ftray.config.evaluate import EvalConfig
from ftray.config.job import JobConfig
from ftray.config.load import load
from ftray.config.recipe import Recipe
from ftray.config.serve import ServeConfig
from ftray.config.tune import TuneConfig
from ftray.core.errors import ConfigError
from ftray.core.spec import replace

ROOT = Path(__file__).parents[2]
KUBERNETES = "1.34"
CRDS = Path(os.environ.get("FTRAY_KUBERAY_CRDS") or ROOT.parent / "shared" / "kuberay-crds")


def _files(folder: str) -> list[Path]:
    found = sorted([*(ROOT / folder).rglob("*.yaml"), *(ROOT / folder).rglob("*.yml")])
    assert found or folder == "examples", f"no YAML in {folder}/"
    return found


def _named(paths: list[Path]) -> Any:
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


def _objects(path: Path) -> list[dict[str, Any]]:
    return [item for item in yaml.safe_load_all(path.read_text("utf-8")) if item is not None]


@pytest.fixture(autouse=True)
def _user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand where a user stands, with the keys' hashes that the files speak of."""
    monkeypatch.chdir(ROOT)
    for path in [*_files("examples"), *_files("k8s")]:
        for name in re.findall(r"\$\{(\w+_KEY_SHA256)\}", path.read_text("utf-8")):
            monkeypatch.setenv(name, "0" * 64)


# examples/ and jobs/


def _config_class(data: dict[str, Any]) -> type:
    """Each kind of file has a field no other has."""
    marks = {
        "space": TuneConfig,
        "objective": Recipe,
        "trainer": Recipe,
        "rows": EvalConfig,
        "base": ServeConfig,
    }
    return next(cls for mark, cls in marks.items() if mark in data)


@_named(_files("examples"))
def test_examples_load(path: Path) -> None:
    data = _objects(path)[0]
    config = load(_config_class(data), path)
    if isinstance(config, TuneConfig):
        recipe = load(Recipe, config.recipe)
        for field, distribution in config.space.items():
            ((kind, values),) = distribution.items()
            assert kind in ("choice", "uniform", "loguniform")
            for value in values:
                replace(recipe, field, value)


@_named(_files("jobs"))
def test_jobs_load_and_name_a_config_that_loads(path: Path) -> None:
    job = load(JobConfig, path)
    classes = {"run": Recipe, "tune": TuneConfig, "serve": ServeConfig, "eval": EvalConfig}
    assert load(classes[job.verb], job.config)
    assert command_line(job).endswith(" ".join(["ftray", job.verb, job.config, *job.arguments]))


# clusters/


@_named(_files("clusters"))
def test_clusters_are_what_the_installed_ray_takes(path: Path) -> None:
    from ray import autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    (config,) = _objects(path)
    schema = json.loads((Path(autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]


@_named(_files("clusters"))
def test_clusters_want_a_token_and_keep_the_dashboard_to_themselves(path: Path) -> None:
    (config,) = _objects(path)
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert all("RAY_AUTH_MODE=token" in line for line in commands if "ray start" in line)
    assert any("--dashboard-host=127.0.0.1" in line for line in config["head_start_ray_commands"])
    assert any(place.endswith("/.ray/auth_token") for place in config["file_mounts"])
    assert any("chmod 600 ~/.ray/auth_token" in line for line in config["setup_commands"])
    for rule in config["provider"].get("security_group", {}).get("IpPermissions", []):
        assert all(source["CidrIp"] != "0.0.0.0/0" for source in rule["IpRanges"])


# k8s/


def _crd_schema(kind: str) -> dict[str, Any]:
    """The schema of a KubeRay kind, closed: a key it does not know is an error, as for the API server."""
    path = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        pytest.skip(f"KubeRay's CRDs are not in {CRDS}; name their folder in FTRAY_KUBERAY_CRDS")
    versions = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]
    schema = next(item["schema"]["openAPIV3Schema"] for item in versions if item["name"] == "v1")
    _close(schema)
    schema["properties"]["metadata"].pop("additionalProperties", None)
    return schema


def _close(schema: Any) -> None:
    if isinstance(schema, list):
        for item in schema:
            _close(item)
    elif isinstance(schema, dict):
        if schema.get("x-kubernetes-int-or-string"):
            schema.pop("type", None)
        if isinstance(schema.get("properties"), dict) and not schema.get(
            "x-kubernetes-preserve-unknown-fields"
        ):
            schema.setdefault("additionalProperties", False)
        for item in schema.values():
            _close(item)


def _pods(spec: Any, name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template below a KubeRay object, with the name of the field that holds it."""
    if isinstance(spec, dict):
        if "containers" in spec.get("spec", {}) if isinstance(spec.get("spec"), dict) else False:
            yield name, spec
            return
        for key, item in spec.items():
            yield from _pods(item, key)
    elif isinstance(spec, list):
        for item in spec:
            yield from _pods(item, name)


def _all(kinds: tuple[str, ...] = ()) -> list[Any]:
    return [
        pytest.param(item, id=f"{path.name}:{item['kind']}/{item['metadata']['name']}")
        for path in _files("k8s")
        for item in _objects(path)
        if not kinds or item["kind"] in kinds
    ]


RAY_KINDS = ("RayJob", "RayService", "RayCluster")


@pytest.mark.parametrize("item", _all())
def test_kubernetes_objects_are_valid(item: dict[str, Any]) -> None:
    if item["kind"] not in RAY_KINDS:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)
        return
    for _, template in _pods(item["spec"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": template["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    assert item["apiVersion"] == "ray.io/v1"
    jsonschema.validate(item, _crd_schema(item["kind"]))


def test_the_closed_schema_refuses_an_unknown_key() -> None:
    item = next(param.values[0] for param in _all(("RayJob",)))
    schema = _crd_schema("RayJob")
    wrong = json.loads(json.dumps(item))
    wrong["spec"]["rayClusterSpec"]["headGroupSpec"]["templates"] = {}
    with pytest.raises(jsonschema.ValidationError, match="templates"):
        jsonschema.validate(wrong, schema)


@pytest.mark.parametrize("item", _all(RAY_KINDS))
def test_pods_are_locked_down(item: dict[str, Any]) -> None:
    spec = item["spec"]
    cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    assert cluster["authOptions"]["mode"] == "token"
    pods = list(_pods(spec))
    assert len(pods) >= 2
    for name, template in pods:
        pod = template["spec"]
        assert (
            template["metadata"]["labels"]["app.kubernetes.io/part-of"] == "ftray"
        )  # the policies' selector
        assert pod["automountServiceAccountToken"] is False
        assert not any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not any("hostPath" in volume for volume in pod["volumes"])
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            _container_is_locked_down(container, probed=name == "template")


def _container_is_locked_down(container: dict[str, Any], probed: bool) -> None:
    context = container["securityContext"]
    assert context["allowPrivilegeEscalation"] is False and not context.get("privileged")
    assert context["readOnlyRootFilesystem"] is True
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert {"cpu", "memory"} <= set(container["resources"]["requests"]) & set(
        container["resources"]["limits"]
    )
    assert not re.search(r":latest$|^[^:]+$", container["image"])
    for variable in container["env"]:
        if re.search("TOKEN$|KEY|SECRET|PASSWORD", variable["name"]):
            assert set(variable) == {"name", "valueFrom"}, f"{variable['name']} must come from a Secret"
    if probed:
        assert "readinessProbe" in container and "livenessProbe" in container
        assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_the_network_policies_deny_first_and_let_dns_out() -> None:
    policies = {item["metadata"]["name"]: item["spec"] for path in _files("k8s") for item in _objects(path)
                if item["kind"] == "NetworkPolicy"}  # fmt: skip
    deny = policies["ftray-deny-all"]
    assert deny["policyTypes"] == ["Ingress", "Egress"] and not deny.get("ingress") and not deny.get("egress")
    dns = {(port["protocol"], port["port"]) for rule in policies["ftray-cluster"]["egress"] for port in
           rule.get("ports", [])}  # fmt: skip
    assert {("UDP", 53), ("TCP", 53)} <= dns
    for spec in policies.values():
        for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
            peers = rule.get("from") or rule.get("to")
            assert peers and all(peer.get("podSelector") for peer in peers), (
                "a rule without peers lets all in"
            )


def test_the_configurations_inside_the_manifests_load(tmp_path: Path) -> None:
    maps = {item["metadata"]["name"]: item["data"] for path in _files("k8s") for item in _objects(path)
            if item["kind"] == "ConfigMap"}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(maps["ftray-train"]["recipe.yaml"])
    (tmp_path / "serve.yaml").write_text(maps["ftray-serve"]["serve.yaml"])
    recipe = load(Recipe, tmp_path / "recipe.yaml")
    job = next(param.values[0] for param in _all(("RayJob",)))
    workers = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert recipe.strategy.num_workers == workers["replicas"]
    cpus = float(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert recipe.strategy.cpus_per_worker <= cpus - 1  # room for reading data
    assert load(ServeConfig, tmp_path / "serve.yaml").tenants
    service = next(param.values[0] for param in _all(("RayService",)))
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert application["import_path"] == "ftray.serve.ray_app:build"
    assert application["args"] == {"config": "/etc/ftray/serve.yaml"}


def test_the_served_application_is_built_from_its_arguments(tiny_base: Path, tmp_path: Path) -> None:
    import importlib

    from ray.serve import Application

    service = next(param.values[0] for param in _all(("RayService",)))
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    module, _, attribute = application["import_path"].partition(":")
    build = getattr(importlib.import_module(module), attribute)
    (tmp_path / "serve.yaml").write_text(f"base: {tiny_base}\n")
    with pytest.raises(ConfigError, match="tenants"):  # the deployer may listen to all the world
        build({"config": str(tmp_path / "serve.yaml")})
    tenants = f"tenants: [{{name: ann, key_sha256: '{'0' * 64}'}}]"
    (tmp_path / "serve.yaml").write_text(f"base: {tiny_base}\n{tenants}\n")
    assert isinstance(build({"config": str(tmp_path / "serve.yaml")}), Application)
    with pytest.raises(ConfigError, match="args"):
        build({"conf": "x"})


def test_serve_config_is_what_ray_serve_takes() -> None:
    from ray.serve.schema import ServeDeploySchema

    service = next(param.values[0] for param in _all(("RayService",)))
    ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
