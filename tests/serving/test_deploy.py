"""Files of deployment: what they name exists, and what they say is understood."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


@pytest.fixture(scope="module")
def cluster() -> dict:
    return yaml.safe_load((DEPLOY / "ray-serve.yaml").read_text())


def test_the_image_has_both_variants_and_copies_what_exists() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert re.findall(r"^FROM .* AS (\w+)", text, re.MULTILINE) == ["build", "cpu", "cuda"]
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE)
    names = [name for line in copied for name in line.split()]
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert names
    for name in names:
        assert (DEPLOY.parent / name).exists(), name
        assert f"!{name}" in ignored, name
    extras = re.search(r"^ARG EXTRAS=(.+)$", text, re.MULTILINE)[1].split(",")
    project = (DEPLOY.parent / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = ", project, re.MULTILINE) for extra in extras)


def test_kubernetes_objects_fit_together() -> None:
    objects = {item["kind"]: item for item in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}
    assert set(objects) == {"Secret", "Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler"}
    spec = objects["Deployment"]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"] == labels == objects["Service"]["spec"]["selector"]
    container = spec["template"]["spec"]["containers"][0]
    assert container["envFrom"][0]["secretRef"]["name"] == objects["Secret"]["metadata"]["name"]
    assert "UNIALIGN_API_KEYS" in objects["Secret"]["stringData"]
    assert objects["Service"]["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted <= {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    assert f"uid {container['securityContext'].get('runAsUser', 10001)}" in (DEPLOY / "Dockerfile").read_text()


def test_ray_understands_the_cluster_file(cluster: dict) -> None:
    pytest.importorskip("ray", reason="Ray Serve is an extra")
    from ray.serve.schema import ServeDeploySchema

    from unialignment.serving import ray_app

    schema = ServeDeploySchema.model_validate(cluster)
    application = schema.applications[0]
    module, _, name = application.import_path.partition(":")
    assert module == ray_app.__name__
    assert callable(getattr(ray_app, name))
    args = ray_app.RayArguments(**application.args)
    settings = args.server_settings()
    assert settings.engine.max_queue == 64
    assert settings.max_n == 8


def test_unknown_arguments_are_refused() -> None:
    pytest.importorskip("ray", reason="Ray Serve is an extra")
    from unialignment.errors import InputError
    from unialignment.serving import ray_app

    with pytest.raises(ValueError, match="replica_count"):
        ray_app.RayArguments(replica_count=2)
    with pytest.raises(InputError, match="max_que"):
        ray_app.RayArguments(engine={"max_que": 2}).server_settings()


def test_what_can_not_work_on_ray_is_said_before_it_starts() -> None:
    ray = pytest.importorskip("ray", reason="Ray Serve is an extra")
    from unialignment.errors import CheckpointError, InputError
    from unialignment.serving import ray_app

    for error, words, arguments in (
        (InputError, "URLs", {"server": {"allow_urls": True}}),
        (CheckpointError, "no/such/folder", {"model": "./no/such/folder"}),
    ):
        with pytest.raises(error, match=words):
            ray_app.start(ray_app.RayArguments(**arguments), "127.0.0.1", 0)
    assert not ray.is_initialized()


def test_autoscaling_is_on_when_there_is_room_for_it() -> None:
    pytest.importorskip("ray", reason="Ray Serve is an extra")
    from unialignment.serving import ray_app

    def deployments(**options: object) -> dict:
        frontend = ray_app.build(ray_app.RayArguments(**options))._bound_deployment
        model = frontend.init_args[0]._bound_deployment
        return {"frontend": frontend, "model": model}

    fixed = deployments(replicas=3)["model"]._deployment_config
    assert fixed.num_replicas == 3
    assert fixed.autoscaling_config is None
    scaled = deployments(replicas=1, max_replicas=4, target_requests=5)["model"]._deployment_config
    assert scaled.autoscaling_config.max_replicas == 4
    assert scaled.autoscaling_config.min_replicas == 1
    assert scaled.max_queued_requests == 64
