"""doctor and init: what runs here is found by itself, what is wrong comes with a remedy, a config passes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo.server_process import ServerProcess, running
from stepguard_grpo.model import write_base_model
from stepguardd.cli import main
from stepguardd.config import load_config
from stepguardd.doctor.findings import Level
from stepguardd.doctor.machine import FoundServer, FoundTrainer, Machine, Process, found_in
from stepguardd.doctor.proposal import propose
from stepguardd.doctor.runs import check_trainers, check_wandb
from stepguardd.doctor.servers import check_servers


class Ports:
    """Who listens where, as told."""

    def __init__(self, told: dict[int, int]) -> None:
        self._told = told

    def ports(self, pids: object) -> set[int]:
        return {self._told[pid] for pid in pids if pid in self._told}


def process(pid: int, ppid: int, command: str, **more: object) -> Process:
    fields: dict[str, object] = {"state": "S", "comm": "python", "uid": os.getuid(), "environ": {}}
    return Process(pid=pid, ppid=ppid, session=pid, command=tuple(command.split()), **{**fields, **more})


SERVER = "python -m sglang.launch_server --model-path /m --port 30100 --api-key hush"


def test_servers_are_found_with_their_tree_their_port_and_their_orphans() -> None:
    machine = found_in(
        [
            process(10, 1, SERVER),
            process(11, 10, "sglang::scheduler_TP0"),
            process(12, 10, "sglang::detokenizer"),
            process(20, 1, "python -m sglang.launch_server --host 0.0.0.0"),
            process(30, 1, "sglang::scheduler_TP1", comm="sglang::schedul"),
            process(40, 1, "vim sglang.launch_server"),
            process(50, 1, "ray::SGLangEngine"),
            process(51, 50, "sglang::scheduler"),
        ],
        Ports({20: 31000, 50: 31500}),
    )
    found = {
        server.process.pid: (server.port, [part.pid for part in server.tree]) for server in machine.servers
    }
    assert found == {10: (30100, [10, 11, 12]), 20: (31000, [20]), 50: (31500, [50, 51])}
    assert [orphan.pid for orphan in machine.orphans] == [30]


@pytest.mark.parametrize(
    ("command", "framework"),
    [
        ("python -m verl.trainer.main_ppo trainer.default_local_dir=/c", "verl"),
        ("python /opt/slime/train.py --rollout-batch-size 32 --save /c", "slime"),
        ("python train_async.py --rollout-batch-size 32", "slime"),
        ("python -m openrlhf.cli.train_ppo_ray --ckpt_path /c", "openrlhf"),
        ("torchrun examples/run_grpo_math.py", "nemo-rl"),
        ("python my_grpo.py --output_dir /c", "trl"),
        ("python -m prime_rl.trainer.rl.train", "prime-rl"),
        ("python -m skyrl_train.entrypoints.main_base", "skyrl"),
        ("bash -c python grpo.py", None),
        ("python serve.py", None),
    ],
)
def test_trainers_are_known_by_their_command_line(command: str, framework: str | None) -> None:
    machine = found_in([process(7, 1, command), process(8, 7, command)], Ports({}))
    assert [trainer.framework for trainer in machine.trainers] == ([] if framework is None else [framework])


def test_any_trainer_with_the_guard_is_found_and_the_daemon_is_none() -> None:
    environ = {"STEPGUARD_RUN_DIR": "/run/x"}
    machine = found_in(
        [
            process(7, 1, "python loop.py", environ=environ),
            process(8, 1, "python -m stepguardd run", environ=environ),
        ],
        Ports({}),
    )
    assert [(one.process.pid, one.framework, one.run_dir) for one in machine.trainers] == [
        (7, None, Path("/run/x"))
    ]


def levels(findings: object) -> list[tuple[str, Level]]:
    return [(finding.check, finding.level) for finding in findings]


def test_a_collective_that_gives_up_before_a_recovery_is_warned_about() -> None:
    def told(command: str) -> list[tuple[str, Level]]:
        trainer = FoundTrainer(process=process(7, 1, command), framework="slime", run_dir=None, ranks=2)
        found = check_trainers(Machine(trainers=(trainer,)), None)
        return [one for one in levels(found) if one[0] == "collectives"]

    assert told("python train.py --distributed-timeout-minutes 5") == [("collectives", Level.WARN)]
    assert told("python train.py --distributed_timeout_minutes=60") == [("collectives", Level.OK)]


def test_the_flush_setting_of_wandb_matters_where_there_is_no_guard(tmp_path: Path) -> None:
    log = tmp_path / "run-1.wandb"
    log.write_bytes(b":W&B")
    for run_dir, environ, level in (
        (None, {}, Level.WARN),
        (None, {"WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "0.2"}, Level.OK),
        (tmp_path, {}, Level.OK),
    ):
        owner = process(7, 1, "python t.py", environ=environ, cwd=tmp_path)
        trainer = FoundTrainer(process=owner, framework=None, run_dir=run_dir, ranks=1)
        found = list(check_wandb(Machine(trainers=(trainer,), wandb=(log,))))
        assert levels(found) == [("wandb", level)]
        assert (level is Level.OK) == (found[0].remedy is None)


def test_a_stopped_process_and_an_orphan_are_bad_with_a_remedy() -> None:
    tree = (process(10, 1, SERVER), process(11, 10, "sglang::scheduler", state="T"))
    server = FoundServer(process=tree[0], tree=tree, host="127.0.0.1", port=1, real=True)
    machine = Machine(servers=(server,), orphans=(process(30, 1, "sglang::scheduler"),))
    found = [one for one in check_servers(machine, generate=False) if one.check == "process tree"]
    assert [one.level for one in found] == [Level.BAD, Level.BAD]
    assert found[0].remedy == "kill -CONT 11"
    assert "kill -9 30" in str(found[1].remedy)


def proposed(tmp_path: Path, machine: Machine, **more: object) -> Path:
    given: dict[str, object] = {"framework": None, "checkpoints": [], "units": {}, "name": None}
    path = tmp_path / "config.toml"
    path.write_text(propose(machine, **{**given, **more}))
    return path


def test_a_proposal_passes_its_check_whatever_was_found(tmp_path: Path) -> None:
    assert load_config(proposed(tmp_path, Machine())).servers == ()
    odd = process(10, 1, SERVER, cwd=Path('/a "b"\\c'), output=Path("/var/log/a b.log"))
    servers = tuple(
        FoundServer(process=odd, tree=(odd,), host="127.0.0.1", port=port, real=True) for port in (1, 2)
    )
    cwd = tmp_path / "my run (2)"
    trainer = FoundTrainer(
        process=process(7, 1, "python t.py", cwd=cwd), framework="slime", run_dir=None, ranks=1
    )
    machine = Machine(servers=servers, trainers=(trainer,), wandb=(Path("/w/wandb/run-1/run-1.wandb"),))
    path = proposed(tmp_path, machine, checkpoints=[Path("/c/1"), Path("/c/2")], units={10: "s.service"})
    config = load_config(path)
    assert [one.name for one in config.servers] == ["sglang-0", "sglang-1"]
    assert (config.run.name, config.run.mode) == ("my-run-2", "hold")
    assert (config.weights.sync, config.checkpoints.framework) == ("nccl", "slime")
    assert config.servers[0].unit == "s.service"
    assert config.stream.wandb_dir == Path("/w/wandb")
    assert "hush" not in proposed(tmp_path, machine).read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    model = tmp_path_factory.mktemp("base")
    write_base_model(model, seed=0)
    with running(model, tmp_path_factory.mktemp("server") / "server.log") as started:
        yield started.until_up()


def ran(*arguments: str, environment: dict[str, str] | None = None) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "stepguardd", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **(environment or {})},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.e2e
def test_a_real_server_is_found_asked_and_made_a_config_of(server: ServerProcess, tmp_path: Path) -> None:
    _, out, _ = ran("doctor", "--json", "--generate")
    told = json.loads(out)
    assert server.url in [one["url"] for one in told["found"]["servers"]]
    port = server.url.rpartition(":")[2]
    mine = [one for one in told["findings"] if port in one["subject"]]
    assert {"server", "generation", "process tree"} <= {one["check"] for one in mine if one["level"] == "ok"}
    assert all(one["remedy"] for one in told["findings"] if one["level"] != "ok")
    path = tmp_path / "config.toml"
    code, out, _ = ran("init", "--out", str(path), "--framework", "verl")
    assert code == 0
    assert server.url in out
    assert ran("config", "check", "--config", str(path))[0] == 0
    assert server.url in [one.url for one in load_config(path).servers]


@pytest.mark.e2e
def test_a_server_that_was_stopped_is_bad_news(server: ServerProcess) -> None:
    pid = server.process.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        code, out, err = ran("doctor", "--quiet")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert code == 1
    assert "bad   " in out
    assert f"kill -CONT {pid}" in out
    assert max(map(len, out.splitlines())) <= 80
    assert err == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["init", "--framework", "nope"], "use one of verl"),
        (["init", "--name", "a b"], "letters, digits"),
        (["init", "--out", "."], "is a folder"),
        (["init", "--out", "there"], "--force writes over it"),
        (["ack"], "--why is missing"),
        (["completion", "tcsh"], "use one of bash, zsh, fish"),
    ],
)
def test_wrong_uses_name_the_remedy(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
    assert (tmp_path / "there").read_text() == "mine"


def test_a_shell_completes_commands_and_options() -> None:
    def completed(words: str, at: int) -> list[str]:
        environment = {"_STEPGUARD_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(at)}
        return ran(environment=environment)[1].split()

    assert completed("stepguard rep", 1) == ["replay", "report"]
    assert "--generate" in completed("stepguard doctor --", 2)
    assert completed("stepguard config s", 2) == ["show", "schema"]
