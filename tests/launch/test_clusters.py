"""What Slurm, GKE and a Cloud TPU are given: scripts that run here with stand-ins, a manifest by a schema."""

import os
import shlex
import signal
import subprocess
import time

import pytest
import yaml

from regjax import InputError
from regjax.launch.command import launch
from tests.kills import wait_for
from tests.launch.test_command import COMMAND, ODD, printed, stand_ins

stand_ins = stand_ins  # a fixture


# Slurm

OPTIONS = ["--slurm", "--nodes", "2", "--gpus-per-node", "4", "--time", "1-12:00:00", "--partition",
           "gpu", "--account", "me", "--sbatch-options", "qos=high", "exclusive"]  # fmt: skip


def directives(script):
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if "#SBATCH" in line]
    return dict(line.partition("=")[::2] for line in lines)


def test_the_script_that_is_submitted_is_the_one_that_is_printed(stand_ins, tmp_path, capsys):
    arguments = [*OPTIONS, "--name", "mine", "--save-seconds", "90", "--", *COMMAND]
    script = printed(capsys, "--dry-run", *arguments)
    assert not list(tmp_path.glob("*.sbatch")) and not stand_ins.calls("sbatch")
    assert launch(arguments) == 0
    (call,) = stand_ins.calls("sbatch")
    assert call["argv"] == ["mine.sbatch"] and call["script"] == script
    assert script.startswith("#!/bin/bash\n#SBATCH ")
    assert directives(script) == {
        "job-name": "mine", "nodes": "2", "ntasks-per-node": "4", "gpus-per-node": "4",
        "time": "1-12:00:00", "partition": "gpu", "account": "me", "output": "%x-%j.log",
        "open-mode": "append", "signal": "B:TERM@90", "requeue": "", "qos": "high", "exclusive": "",
    }  # fmt: skip
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    on_cpu = printed(capsys, "--slurm", "--cpus-per-task", "8", "--dry-run", "--", *COMMAND)
    assert directives(on_cpu)["ntasks-per-node"] == "1"
    assert "gpus-per-node" not in directives(on_cpu) and "SRUN_CPUS_PER_TASK" in on_cpu


def test_without_slurm_the_script_is_left_to_be_submitted(stand_ins, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(InputError, match=r"no sbatch here; regjax\.sbatch is written"):
        launch(["--slurm", "--", *COMMAND])
    assert (tmp_path / "regjax.sbatch").read_text().startswith("#!/bin/bash")


@pytest.mark.parametrize("option", ["a b", "qos=a b", "qos='a'", "Qos=1", "", "a=\nrm"])
def test_what_would_not_be_one_word_is_refused(stand_ins, option):
    with pytest.raises(InputError, match="sbatch option"):
        launch(["--slurm", "--sbatch-options", option, "--", *COMMAND])


def batch(capsys, tmp_path, *options):
    path = tmp_path / "job.sh"
    path.write_text(
        printed(capsys, "--slurm", "--python", "interpreter", *options, "--dry-run", "--", *COMMAND)
    )
    return subprocess.Popen(
        ["bash", str(path)],
        env={**os.environ, "SLURM_JOB_ID": "4711"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def test_the_script_runs_its_words_as_they_were_given(stand_ins, tmp_path, capsys):
    folder = tmp_path / "it's $HOME"
    folder.mkdir()
    job = batch(capsys, tmp_path, "--folder", str(folder), "--env", "A=b $c")
    assert job.communicate(timeout=30) == ("", "") and job.returncode == 0
    (call,) = stand_ins.calls("interpreter")
    assert call["argv"] == ["-m", "regjax", *COMMAND]
    assert call["folder"] == str(folder) and call["environment"]["A"] == "b $c"
    (srun,) = stand_ins.calls("srun")
    assert srun["argv"][:2] == ["--kill-on-bad-exit=1", "--label"]
    assert list(folder.iterdir()) == []


def test_the_script_starts_again_what_died_but_not_what_said_why(stand_ins, tmp_path, capsys):
    count = tmp_path / "count"
    dies = f"open({str(count)!r}, 'a').write('x'); "
    dies += f"n = len(open({str(count)!r}).read()); sys.exit(0 if n > 2 else 137)"
    stand_ins.write("interpreter", dies)
    job = batch(capsys, tmp_path)
    _, err = job.communicate(timeout=30)
    assert job.returncode == 0 and err.count("ended with exit status 137") == 2
    ports = [call["environment"]["JAX_COORDINATOR_PORT"] for call in stand_ins.calls("srun")]
    assert len(set(ports)) == 3 and all(1024 < int(port) < 65536 for port in ports)

    # One task has said it, the others were ended by srun, whose status is the highest.
    stand_ins.write(
        "interpreter",
        "open(os.environ['REGJAX_FINAL_STATUS'], 'w').write('2\\n'); sys.exit(143)",
    )
    said = batch(capsys, tmp_path)
    said.communicate(timeout=30)
    stand_ins.write("interpreter", "sys.exit(1)")
    stopped = batch(capsys, tmp_path)
    stopped.communicate(timeout=30)
    stand_ins.write("interpreter", "sys.exit(70)")
    crashes = batch(capsys, tmp_path, "--max-restarts", "1")
    crashes.communicate(timeout=30)
    assert [said.returncode, stopped.returncode, crashes.returncode] == [2, 1, 70]
    assert len(stand_ins.calls("srun")) == 3 + 1 + 1 + 2
    assert not list(tmp_path.glob(".*status"))


def test_the_script_passes_the_notice_of_slurm_on_and_waits(stand_ins, tmp_path, capsys):
    begun = tmp_path / "begun"
    stand_ins.write(
        "interpreter",
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), print('saved'), sys.exit(143)))\n"
        f"open({str(begun)!r}, 'w').close()\n"
        "time.sleep(600)\n",
    )
    job = batch(capsys, tmp_path)
    wait_for(job, begun.exists)
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=30)
    assert (job.returncode, out, err) == (143, "saved\n", "")
    assert len(stand_ins.calls("srun")) == 1


# Cloud TPU


def test_words_arrive_on_a_tpu_as_they_were_given(stand_ins, tmp_path, capfd):
    folder = tmp_path / "it's $HOME"
    folder.mkdir()
    arguments = ["--tpu", "pod", "--zone", "here", "--project", "mine", "--folder", str(folder)]
    arguments += ["--python", "interpreter", "--env", "A=b $c"]
    stand_ins.write("interpreter", "print('two\\nlines'); sys.exit(3)")
    assert launch([*arguments, "--max-restarts", "1", "--", *COMMAND]) == 3
    calls = stand_ins.calls("interpreter")
    assert [call["argv"] for call in calls] == [["-m", "regjax", *COMMAND]] * 2
    assert calls[0]["folder"] == str(folder) and calls[0]["environment"]["A"] == "b $c"
    assert "REGJAX_LIFELINE" not in calls[0]["environment"]
    gcloud = stand_ins.calls("gcloud")[0]["argv"]
    expected = (
        "compute tpus tpu-vm ssh pod --zone here --project mine --worker all --batch-size all"
    )
    assert gcloud[:-1] == [*expected.split(), "--command"]
    out, _ = capfd.readouterr()
    host = os.uname().nodename
    assert out.splitlines() == [f"[{host}] two", f"[{host}] lines"] * 2


def test_what_is_printed_for_a_tpu_is_shell(stand_ins, capsys):
    line = printed(capsys, "--tpu", "pod", "--zone", "here", "--dry-run", "--", *COMMAND)
    words = shlex.split(line)
    assert words[0] == "gcloud" and words[-2] == "--command"
    bash = shlex.split(words[-1])
    assert bash[:2] == ["bash", "-c"] and len(bash) == 3
    subprocess.run(["bash", "-n", "-c", bash[2]], check=True)


def test_a_tpu_host_ends_what_an_earlier_start_has_left(stand_ins, tmp_path):
    """A connection that broke leaves a process behind, which holds the chips."""
    log = tmp_path / "log"
    stand_ins.write(
        "interpreter",
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"log = open({str(log)!r}, 'a+'); log.write(str(os.getpid()) + '\\n'); log.flush(); log.seek(0)\n"
        "time.sleep(0 if len(log.readlines()) > 1 else 600)\n",
    )
    arguments = ["--tpu", "pod", "--zone", "here", "--python", "interpreter", "--", "train"]
    broken = subprocess.Popen(
        [os.sys.executable, "-c", "import sys; from regjax.launch.command import launch; "
         f"launch({arguments!r})"],
        env={**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(os.path.dirname(__file__)))},
    )  # fmt: skip
    wait_for(broken, lambda: log.exists() and log.read_text().endswith("\n"))
    broken.kill()
    broken.wait()
    time.sleep(0.2)
    left = int(log.read_text())
    os.kill(left, 0)
    assert launch(arguments) == 0
    assert len(log.read_text().split()) == 2
    with pytest.raises(ProcessLookupError):
        os.kill(left, 0)


# GKE

GKE = ["--gke", "--image", "registry/regjax:1", "--topology", "v5e:4x4"]

STRING, NUMBER, STRINGS = str, int, [str]
POD = {
    "restartPolicy": STRING,
    "terminationGracePeriodSeconds": NUMBER,
    "nodeSelector": {
        "cloud.google.com/gke-tpu-accelerator": STRING,
        "cloud.google.com/gke-tpu-topology": STRING,
    },
    "containers": [
        {
            "name": STRING,
            "image": STRING,
            "command": STRINGS,
            "workingDir": STRING,
            "env": [{"name": STRING, "value": STRING}],
            "resources": {"limits": {"google.com/tpu": NUMBER}},
            "volumeMounts": [{"name": STRING, "mountPath": STRING}],
        }
    ],
    "volumes": [{"name": STRING, "persistentVolumeClaim": {"claimName": STRING}}],
}
# Of the types JobSetSpec, JobSpec and PodSpec of their public Go sources, as far as they are used.
JOB_SET = {
    "apiVersion": STRING,
    "kind": STRING,
    "metadata": {
        "name": STRING,
        "namespace": STRING,
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": STRING},
    },
    "spec": {
        "failurePolicy": {
            "maxRestarts": NUMBER,
            "rules": [{"name": STRING, "action": STRING, "onJobFailureReasons": STRINGS}],
        },
        "replicatedJobs": [
            {
                "name": STRING,
                "replicas": NUMBER,
                "template": {
                    "spec": {
                        "completionMode": STRING,
                        "completions": NUMBER,
                        "parallelism": NUMBER,
                        "backoffLimit": NUMBER,
                        "podFailurePolicy": {
                            "rules": [
                                {
                                    "action": STRING,
                                    "onExitCodes": {
                                        "containerName": STRING,
                                        "operator": STRING,
                                        "values": [NUMBER],
                                    },
                                }
                            ]
                        },
                        "template": {"spec": POD},
                    }
                },
            }
        ],
    },
}


def check(value, schema, place=""):
    """Every field is known and of its type."""
    if isinstance(schema, dict):
        assert isinstance(value, dict) and value.keys() <= schema.keys(), place
        for name, inner in value.items():
            check(inner, schema[name], f"{place}.{name}")
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, place
        for inner in value:
            check(inner, schema[0], f"{place}[]")
    else:
        assert type(value) is schema, place


def test_the_manifest_that_is_written_is_the_one_that_is_printed(stand_ins, tmp_path, capsys):
    arguments = [
        *GKE,
        "--name",
        "mine",
        "--claim",
        "data:/data",
        "--folder",
        "/code",
        "--env",
        "A=$(B)",
    ]
    arguments += ["--namespace", "team", "--slices", "2", "--save-seconds", "45", "--", *COMMAND]
    text = printed(capsys, "--dry-run", *arguments)
    assert launch(arguments) == 0
    assert capsys.readouterr().out == "mine.yaml is written: kubectl apply -f mine.yaml\n"
    assert (tmp_path / "mine.yaml").read_text() == text
    manifest = yaml.safe_load(text)
    check(manifest, JOB_SET)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (replicated["replicas"], job["completions"], job["parallelism"]) == (2, 4, 4)
    assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    # A restart of the whole set, but not after exit status 1 or 2. The API wants restartPolicy Never then.
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [1, 2]
    (rule,) = manifest["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    pod = job["template"]["spec"]
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 45)
    (container,) = pod["containers"]
    # Kubernetes puts $( in the place of $$(.
    words = [word.replace("$$(", "$(") for word in container["command"]]
    assert words == ["python3", "-m", "regjax", *COMMAND] and "$$(NAME)" in container["command"]
    assert {"name": "A", "value": "$$(B)"} in container["env"]
    assert pod["volumes"][0]["name"] == container["volumeMounts"][0]["name"]
    assert set(ODD) <= set(words)


@pytest.mark.parametrize(
    "topology, options, accelerator, hosts, chips",
    [
        ("v5e:4x4", (), "tpu-v5-lite-podslice", 4, 4),
        ("v5e:2x4", (), "tpu-v5-lite-podslice", 2, 4),
        ("v5e:2x4", ("--chips-per-host", "8"), "tpu-v5-lite-podslice", 1, 8),
        ("v6e:1x1", (), "tpu-v6e-slice", 1, 1),
        ("v5p:2x2x4", (), "tpu-v5p-slice", 4, 4),
        ("v4:2x2x1", (), "tpu-v4-podslice", 1, 4),
    ],
)
def test_topologies(stand_ins, capsys, topology, options, accelerator, hosts, chips):
    arguments = [*GKE, "--topology", topology, *options, "--dry-run", "--", *COMMAND]
    manifest = yaml.safe_load(printed(capsys, *arguments))
    check(manifest, JOB_SET)
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == job["parallelism"] == hosts
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology.split(":")[1],
    }
    assert pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips


BAD_GKE = {
    "no image": (["--image", ""], "--gke needs --image"),
    "no such TPU": (["--topology", "v9:4x4"], "expected a generation of v4, v5e, v5p, v6e"),
    "no shape": (["--topology", "v5e:16"], "and a shape"),
    "hosts": (["--chips-per-host", "3"], "no multiple of 3 a host"),
    "claim": (["--claim", "data"], "expected CLAIM:/PATH"),
    "name": (["--name", "My_job"], "expected at most 40 of a-z"),
}


@pytest.mark.parametrize("name", BAD_GKE)
def test_a_manifest_that_could_not_be_applied_is_refused(stand_ins, name):
    options, message = BAD_GKE[name]
    with pytest.raises(InputError, match=message):
        launch([*GKE, *options, "--", *COMMAND])
