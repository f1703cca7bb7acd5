"""`regjax launch`: what it refuses, what it prints, and that words arrive as they were given."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from regjax import InputError
from regjax.launch import local
from regjax.launch.command import launch
from regjax.launch.local import Host
from tests.launch.stand_ins import StandIns

# Whatever a shell would change, and Kubernetes too.
ODD = [
    "a b",
    "it's",
    '"',
    "$HOME",
    "`id`",
    "\\",
    "a\\nb",
    "*",
    "",
    "two\nlines",
    "$(NAME)",
    "é",
    "-x",
    "!",
]
COMMAND = ["train", "config.py", "--workdir", "runs/a b", *ODD]


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    found = StandIns(folder)
    monkeypatch.setenv("PATH", found.path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("CUDA_VISIBLE_DEVICES", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return found


def printed(capsys, *arguments):
    assert launch(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


REFUSED = {
    "nowhere": ((), "expected one of --local, --hosts, --slurm, --tpu, --gke; given: none"),
    "two places": (("--local", "2", "--slurm"), "given: --local and --slurm"),
    "negative": (("--local", "-2"), "--local -2 is negative"),
    "restarts": (("--local", "2", "--max-restarts", "-1"), "--max-restarts -1 is negative"),
    "a TPU without its zone": (("--tpu", "a"), "--tpu a needs its --zone"),
    "no such file": (("--hosts", "none"), "--hosts none cannot be read"),
    "a name with a blank": (("--slurm", "--name", "a b"), "--name 'a b'"),
    "a variable that is not set": (("--local", "2", "--env", "NOWHERE"), "--env NOWHERE: it is not set"),
    "no variable": (("--local", "2", "--env", "1=2"), "expected NAME=VALUE or NAME"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_together_is_refused(stand_ins, name):
    options, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        launch([*options, "--", "train", "config.py"])


@pytest.mark.parametrize("command", [[], ["--"], ["--", "eval", "--model", "a"], ["train", "a.py"]])
def test_the_command_comes_after_two_dashes(stand_ins, capsys, command):
    with pytest.raises((InputError, SystemExit)) as found:
        launch(["--local", "2", *command])
    if isinstance(found.value, InputError):
        assert "after the options comes -- and the command, train or predict" in str(found.value)
    else:
        assert found.value.code == 2


def test_the_command_line_passes_the_status_on(capsys, stand_ins):
    from regjax import cli

    assert cli.main(["launch", "--slurm"]) == 2
    assert "-- and the command" in capsys.readouterr().err
    stand_ins.write("interpreter", "sys.exit(1)")
    with pytest.raises(SystemExit) as found:
        cli.main(["launch", "--local", "1", "--python", "interpreter", "--", "train", "a.py"])
    assert found.value.code == 1
    assert len(stand_ins.calls("interpreter")) == 1


# This machine


def test_local_processes_are_what_the_dry_run_prints(stand_ins, capsys, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 5, 6, 7, 8})
    arguments = ["--local", "3", "--python", "interpreter", "--env", "A=b c", "--", *COMMAND]
    lines = [shlex.split(line) for line in printed(capsys, "--dry-run", *arguments).split("\nenv ")]
    assert len(lines) == 3
    for process, words in enumerate(lines):
        settings = dict(word.split("=", 1) for word in words if "=" in word and "--" not in word)
        assert settings["A"] == "b c"
        assert (settings["JAX_NUM_PROCESSES"], settings["JAX_PROCESS_ID"]) == ("3", str(process))
        cores = words[words.index("--cpu-list") + 1]
        assert cores == ("0,1", "2,5", "6,7")[process]
        assert words[words.index("interpreter") :] == ["interpreter", "-m", "regjax", *COMMAND]
    coordinators = {w for words in lines for w in words if w.startswith("JAX_COORDINATOR_ADDRESS=")}
    assert len(coordinators) == 1 and not stand_ins.calls("interpreter")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    launch(arguments)
    calls = stand_ins.calls("interpreter")
    assert [call["argv"] for call in calls] == [["-m", "regjax", *COMMAND]] * 3
    found = sorted(call["environment"]["JAX_PROCESS_ID"] for call in calls)
    assert found == ["0", "1", "2"]
    assert {call["environment"]["A"] for call in calls} == {"b c"}


def test_gpus_are_shared(stand_ins, capsys, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    stand_ins.write("nvidia-smi", "print('GPU 0: a\\n  MIG b\\nGPU 1: a\\nGPU 2: a\\nGPU 3: a')")

    def visible(count):
        words = shlex.split(printed(capsys, "--local", str(count), "--dry-run", "--", "train"))
        assert "taskset" not in words
        prefix = "CUDA_VISIBLE_DEVICES="
        return [word.removeprefix(prefix) for word in words if word.startswith(prefix)]

    assert visible(4) == ["0", "1", "2", "3"]
    assert visible(2) == ["0,1", "2,3"]
    with pytest.raises(InputError, match="--local 3: 4 GPUs cannot be shared equally"):
        visible(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5a")
    assert visible(2) == ["3", "GPU-5a"]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert "CUDA" not in printed(capsys, "--local", "3", "--dry-run", "--", "train")


# Hosts


def test_hosts_file(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two kinds\nme@a.example slots=8\n\n10.0.0.2  # the other\nfe80::1%eth0\n")
    assert local.read_hosts(path) == [
        Host("me@a.example", 8), Host("10.0.0.2", 1), Host("fe80::1%eth0"),
    ]  # fmt: skip
    for text, message in (
        ("a b", "hosts:1: 'a b': expected"),
        ("a\n-oProxyCommand=x", "hosts:2: '-oProxyCommand=x'"),
        ("a slots=0", "slots=0"),
        ("# none", "holds no host"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            local.read_hosts(path)


def test_words_arrive_over_ssh_as_they_were_given(stand_ins, tmp_path, capsys, monkeypatch):
    (tmp_path / "hosts").write_text("me@a slots=2\nb\n")
    folder = tmp_path / "it's a $folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2 $x")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("JAX_PROCESS_ID", "17")
    arguments = ["--hosts", str(tmp_path / "hosts"), "--python", "interpreter"]
    assert launch([*arguments, "--", *COMMAND]) == 0
    calls = sorted(
        stand_ins.calls("interpreter"), key=lambda call: call["environment"]["JAX_PROCESS_ID"]
    )
    assert [call["argv"] for call in calls] == [["-m", "regjax", *COMMAND]] * 3
    assert {call["folder"] for call in calls} == {str(folder)}
    environments = [call["environment"] for call in calls]
    assert [e["JAX_PROCESS_ID"] for e in environments] == ["0", "1", "2"]
    assert [e.get("CUDA_VISIBLE_DEVICES") for e in environments] == ["0", "1", None]
    assert {e["JAX_NUM_CPU_DEVICES"] for e in environments} == {"2 $x"}
    (address,) = {e["JAX_COORDINATOR_ADDRESS"] for e in environments}
    assert address.startswith("a:")
    connections = stand_ins.calls("ssh")
    assert sorted(call["argv"][-2] for call in connections) == ["b", "me@a", "me@a"]
    assert all("BatchMode=yes" in call["argv"] for call in connections)
    assert not any("secret" in word for call in connections for word in call["argv"])

    lines = printed(
        capsys, *arguments, "--coordinator", "10.0.0.7", "--dry-run", "--", "train", "x y"
    )
    assert len(lines.splitlines()) == 3
    for line in lines.splitlines():
        ssh = shlex.split(line)
        assert ssh[0] == "ssh"
        subprocess.run(["bash", "-n", "-c", ssh[-1]], check=True)
        assert "JAX_COORDINATOR_ADDRESS=10.0.0.7:" in ssh[-1]


def test_remote_processes_end_over_standard_input(stand_ins, tmp_path):
    """A process elsewhere that dies takes the rest with it, though no signal reaches them."""
    (tmp_path / "hosts").write_text("a\nb\n")
    log = tmp_path / "log"
    body = f"""
sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})
import signal, time
from regjax import lifeline
process = os.environ["JAX_PROCESS_ID"]
def save(*_):
    open({str(log)!r}, "a").write("saved\\n")
    os._exit(143)
signal.signal(signal.SIGTERM, save)
lifeline.hold()
open({str(log)!r}, "a").write("begun\\n")
while process == "0" and open({str(log)!r}).read().count("begun") % 2:
    time.sleep(0.01)
if process == "0":
    os._exit(9)
time.sleep(600)
"""
    stand_ins.write("interpreter", body)
    # ssh as it is: a signal to it reaches no process elsewhere.
    stand_ins.write(
        "ssh",
        "import subprocess\n"
        "process = subprocess.Popen(['sh', '-c', sys.argv[-1]], start_new_session=True)\n"
        "sys.exit(process.wait())\n",
    )
    status = launch(
        ["--hosts", "hosts", "--python", "interpreter", "--max-restarts", "1", "--", "train"]
    )
    assert status == 9
    assert sorted(log.read_text().split()) == ["begun"] * 4 + ["saved"] * 2


def test_the_environment_elsewhere(monkeypatch):
    for name in list(os.environ):
        if local.FORWARDED.fullmatch(name):
            monkeypatch.delenv(name)
    for name in (
        "JAX_A",
        "XLA_FLAGS",
        "NCCL_DEBUG",
        "PYTHONPATH",
        "HF_HOME",
        "OTHER",
        "HF_API_KEY",
    ):
        monkeypatch.setenv(name, name.lower())
    assert list(local.environment_for(["OTHER", "B=1=2"])) == [
        "HF_HOME", "JAX_A", "NCCL_DEBUG", "PYTHONPATH", "XLA_FLAGS", "OTHER", "B",
    ]  # fmt: skip
    assert local.environment_for(["B=1=2"])["B"] == "1=2"
    assert sys.executable
