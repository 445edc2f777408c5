"""launch/gke_jobset.yaml says the same thing in all the places that must agree."""

import math
import pathlib

import pytest

from clip_jax.config import validate
from clip_jax.main import parse_arguments

yaml = pytest.importorskip("yaml")  # flax brings it

FILE = pathlib.Path(__file__).parents[2] / "launch" / "gke_jobset.yaml"


@pytest.fixture(scope="module")
def jobset() -> dict:
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def job(jobset) -> dict:
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1  # one slice
    return replicated["template"]["spec"]


@pytest.fixture(scope="module")
def pod(job) -> dict:
    return job["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod) -> dict:
    (container,) = pod["containers"]
    return container


def test_it_is_a_jobset_that_restarts(jobset):
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert jobset["spec"]["network"]["enableDNSHostnames"] is True


def test_hosts_times_chips_are_the_topology(job, pod, container):
    selector = pod["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
    chips = math.prod(int(side) for side in selector["cloud.google.com/gke-tpu-topology"].split("x"))
    on_each_host = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == on_each_host == 4  # all of a host's, no fewer
    assert job["completions"] == job["parallelism"] == chips // on_each_host


def test_the_global_batch_can_be_shared_out_among_the_chips(job, container):
    config, _, _ = parse_arguments(container["args"])
    assert config.global_batch_size % (job["completions"] * container["resources"]["limits"]["google.com/tpu"]) == 0


def test_the_program_accepts_the_command_line(container):
    assert container["command"] == ["python", "-m", "clip_jax.main"]
    config, workdir, flags = parse_arguments(container["args"])
    validate(config)
    assert config.model.name == "ViT-L/14"
    assert workdir.startswith("/mnt/bucket/") and not flags.distributed


def test_the_run_and_its_data_are_on_the_mounted_bucket(job, pod, container):
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    bucket = mounts["/mnt/bucket"]["csi"]
    assert bucket["driver"] == "gcsfuse.csi.storage.gke.io" and bucket["volumeAttributes"]["bucketName"]
    options = bucket["volumeAttributes"]["mountOptions"].split(",")
    assert {"metadata-cache:ttl-secs:0", "metadata-cache:negative-ttl-secs:0"} < set(options)
    assert not any(" " in option for option in options)
    assert job["template"]["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"


def test_only_a_mistake_of_the_users_is_not_tried_again(jobset, job, pod, container):
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0


def test_the_ports_are_those_that_jax_uses(container):
    from jax._src.clusters import cloud_tpu_cluster

    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["coordinator"] == int(cloud_tpu_cluster.coordinator_port)
