"""The functions for slime and miles: on a stand-in, which is itself held against the frameworks' source."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from frameworks.sources import source
from guard.virtual_daemon import BOOT, VirtualDaemon, VirtualTime, virtual_guard
from stepguard.gate import Order
from stepguard.guard import Guard
from stepguard.integrations import slime
from stepguard.integrations.onlooker import Onlooker
from stepguard.orders import RollbackRequested, StopRequested
from stepguard.settings import GuardSettings

STAND_IN = Path(__file__).parent / "stand_in"
EXAMPLE = Path(__file__).parents[2] / "examples/slime_arguments.sh"


def load(path: str) -> Callable[..., Any]:
    """As slime's load_function."""
    module, _, name = path.rpartition(".")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


class Prompts:
    """Groups of four, numbered through."""

    def __init__(self) -> None:
        self.next = 0

    def get_samples(self, number: int) -> list[Any]:
        from slime.utils.types import Sample

        groups = []
        for _ in range(number):
            groups.append([Sample(group_index=self.next, index=self.next * 4 + i) for i in range(4)])
            self.next += 1
        return groups


@pytest.fixture
def args(guard: Guard) -> Iterator[SimpleNamespace]:
    """slime's arguments, with a model that gives every second member a reward."""
    sys.path.insert(0, str(STAND_IN))
    slime.use(guard)

    async def generate(args: Any, sample: Any, params: Any) -> Any:
        sample.tokens, sample.response_length, sample.loss_mask = [1, 2], 1, [1]
        sample.rollout_log_probs = [-0.5]
        sample.weight_versions = ["7"]
        sample.status = type(sample).Status.COMPLETED
        return sample

    async def reward(sample: Any) -> float:
        return float(sample.index % 2)

    yield SimpleNamespace(
        generate=generate,
        reward=reward,
        group_rm=False,
        reward_key=None,
        rollout_batch_size=8,
        n_samples_per_prompt=4,
        advantage_estimator="grpo",
        rewards_normalization=True,
        grpo_std_normalization=True,
    )
    sys.path.remove(str(STAND_IN))
    for name in [name for name in sys.modules if name.partition(".")[0] == "slime"]:
        del sys.modules[name]
    slime.use()


def failing(args: Any, *indices: int) -> None:
    generate = args.generate

    async def sometimes(args: Any, sample: Any, params: Any) -> Any:
        if sample.index in indices:
            raise ConnectionResetError("the tool went away")
        return await generate(args, sample, params)

    args.generate = sometimes


def flat(groups: Any) -> list[Any]:
    return list(slime._samples(groups))


def test_batches_are_judged_and_steps_reported(args: Any, daemon: VirtualDaemon) -> None:
    prompts = Prompts()
    for rollout_id in range(3):
        output = slime.generate_rollout(args, rollout_id, prompts)
        slime.log_rollout(rollout_id, args, output.samples, output.metrics, 1.5)
    batches = daemon.of_kind("batch")
    assert [(batch["step"], batch["ok"], batch["weight_versions"]) for batch in batches] == [
        (step, 32, {"7": 32}) for step in range(3)
    ]
    reported = daemon.of_kind("step")
    assert [(report["step"], report["reward"]) for report in reported] == [(0, 0.5), (1, 0.5)]
    assert reported[0]["metrics"] == {"rollout/done": 1.0, "time/rollout_s": 1.5}


def test_a_failed_trajectory_costs_one_trajectory_and_is_outside_of_its_group(
    args: Any, daemon: VirtualDaemon
) -> None:
    failing(args, 5)
    output = slime.generate_rollout(args, 0, Prompts())
    samples = flat(output.samples)
    assert [sample.index for sample in samples] == list(range(32)), "everyone in his place"
    (failed,) = [sample for sample in samples if sample.status.value == "failed"]
    assert (failed.index, failed.remove_sample, failed.loss_mask) == (5, True, [0])
    assert failed.response_length == len(failed.rollout_log_probs) == 1
    assert "ConnectionResetError" in failed.metadata["stepguard_failed"]
    raw, advantages = slime.post_process_rewards(args, samples)
    assert raw[5] == pytest.approx(1 / 3), "the mean of the three others, and no zero"
    assert advantages[5] == 0.0
    assert sum(advantages[4:8]) == pytest.approx(0.0)
    assert advantages[4] == advantages[6] < 0 < advantages[7]
    (batch,) = daemon.of_kind("batch")
    assert (batch["ok"], batch["failed"], batch["reward"]["mean"]) == (31, 1, pytest.approx(15 / 31))


def test_requests_that_fail_in_a_row_are_told(args: Any, daemon: VirtualDaemon) -> None:
    args.rollout_batch_size = 40  # so that what fails is no tenth of them
    failing(args, *range(8))
    slime.generate_rollout(args, 0, Prompts())
    told = [(report["in_a_row"], report["error"]) for report in daemon.of_kind("requests_failed")]
    assert told == [(8, "ConnectionResetError: the tool went away"), (0, "")]


def test_the_fan_out_is_kept(args: Any, daemon: VirtualDaemon) -> None:
    generate = args.generate

    async def two(args: Any, sample: Any, params: Any) -> Any:
        from slime.utils.types import Sample

        other = Sample(group_index=sample.group_index, index=sample.index)
        return [await generate(args, sample, params), await generate(args, other, params)]

    args.generate = two
    failing(args, 2)
    output = slime.generate_rollout(args, 0, Prompts())
    lengths = [[len(member) for member in group] for group in output.samples]
    assert lengths[0] == [2, 2, 1, 2]
    assert lengths[1:] == [[2, 2, 2, 2]] * 7


def test_a_group_whose_reward_model_fails_is_a_failed_group(args: Any, daemon: VirtualDaemon) -> None:
    async def reward(sample: Any) -> float:
        raise TimeoutError("reward model")

    args.group_rm, args.reward, args.rollout_batch_size = True, reward, 1
    daemon.judge = lambda batch: None
    calls = []
    guard = slime.process.guard
    assert guard is not None

    class EnoughError(Exception):
        pass

    class Prompted(Prompts):
        def get_samples(self, number: int) -> list[Any]:
            calls.append(number)
            if len(calls) == 3:
                raise EnoughError
            return super().get_samples(number)

    with pytest.raises(EnoughError):
        slime.generate_rollout(args, 0, Prompted())
    assert [batch["refused"] for batch in daemon.of_kind("batch")] == ["failed_fraction"] * 2


def test_a_refused_batch_never_reaches_training(args: Any, daemon: VirtualDaemon, time: VirtualTime) -> None:
    """The incident: every reward is 0 while the server is away."""
    away = {"batches": 2}
    reward = args.reward

    async def zero(sample: Any) -> float:
        return 0.0 if away["batches"] else float(await reward(sample))

    def judge(batch: dict[str, Any]) -> str | None:
        if batch["reward"]["max"] > 0:
            return None
        away["batches"] -= 1
        time.after(20, lambda: daemon.order(Order.GO))
        return "reward_collapse"

    args.reward, daemon.judge = zero, judge
    prompts = Prompts()
    output = slime.generate_rollout(args, 188, prompts)
    assert len(daemon.of_kind("batch")) == 3
    assert sum(sample.reward for sample in flat(output.samples)) == 16
    assert flat(output.samples)[0].group_index == 16, "the next prompts"


def test_stop_and_rollback_end_the_job(args: Any, daemon: VirtualDaemon) -> None:
    daemon.order(Order.ROLLBACK, "poison", target_step=3, target_path="/c/iter_0000003")
    with pytest.raises(RollbackRequested):
        slime.generate_rollout(args, 9, Prompts())
    daemon.order(Order.STOP, "enough")
    with pytest.raises(StopRequested):
        slime.generate_rollout(args, 9, Prompts())


def test_weights_that_slime_pushes_over_a_disk_are_announced_before_the_rollouts(
    args: Any, daemon: VirtualDaemon, tmp_path: Path
) -> None:
    """slime counts anew in a job that was started again: the newest folder is the last one written."""
    args.update_weight_disk_dir = str(tmp_path / "weights")
    announced = []
    generate = args.generate

    async def seen(args: Any, sample: Any, params: Any) -> Any:
        page = daemon.page.trainer()
        assert page is not None
        announced.append(page.weight_version)
        sample = await generate(args, sample, params)
        sample.weight_versions = [page.weight_version or "default"]
        return sample

    args.generate = seen
    for rollout_id, written in enumerate((None, 7, 8, 1)):
        if written is not None:
            folder = tmp_path / f"weights/weight_v{written:06d}"
            folder.mkdir(parents=True)
            os.utime(folder, ns=(rollout_id, rollout_id))
        slime.generate_rollout(args, rollout_id, Prompts())
    assert announced == [None] * 32 + ["7"] * 32 + ["8"] * 32 + ["1"] * 32
    assert [batch["refused"] for batch in daemon.of_kind("batch")] == [None] * 4
    args.partial_rollout = True
    generated = slime.generate_rollout(args, 4, Prompts())
    assert generated.samples


def test_the_prompts_in_which_the_job_died_twice_are_left_out(
    args: Any, daemon: VirtualDaemon, time: VirtualTime
) -> None:
    with virtual_guard(daemon.run_dir, time, settings=GuardSettings(skip_steps=(1,))) as guard:
        slime.use(guard)
        prompts = Prompts()
        first = [
            flat(slime.generate_rollout(args, rollout_id, prompts).samples)[0] for rollout_id in range(3)
        ]
    assert [sample.group_index for sample in first] == [0, 16, 24]


def test_rollouts_of_other_weights_than_the_pushed_are_refused(
    args: Any, daemon: VirtualDaemon, time: VirtualTime, tmp_path: Path
) -> None:
    """A server that somebody else restarted answers with what it loaded."""
    args.update_weight_disk_dir = str(tmp_path)
    (tmp_path / "weight_v000008").mkdir()
    tries = []

    def judge(batch: dict[str, Any]) -> None:
        tries.append(batch["refused"])
        args.now = "8"

    generate, args.now = args.generate, "default"

    async def served(args: Any, sample: Any, params: Any) -> Any:
        sample = await generate(args, sample, params)
        sample.weight_versions = [args.now]
        return sample

    args.generate, daemon.judge = served, judge
    output = slime.generate_rollout(args, 3, Prompts())
    assert tries == ["stale_weights", None]
    assert {version for sample in flat(output.samples) for version in sample.weight_versions} == {"8"}


def test_the_examples_lines_guard_a_job_from_its_start_to_its_end(
    args: Any, daemon: VirtualDaemon, time: VirtualTime
) -> None:
    """
    Its functions, loaded by their paths and called where slime's driver, manager and Megatron step call them.

    `test_slime_run.py` has slime's own code for all of that, where a checkout is at hand.
    """
    functions = [load(path) for path in re.findall(r"^  --\S+ (\S+)$", EXAMPLE.read_text(), re.MULTILINE)]
    rollout, before_step, post_process = functions
    looks = Onlooker(daemon.run_dir, clock_ns=time.now, sleep=time.sleep, boot_id=BOOT)
    slime.use(slime.process.guard, onlooker=looks)
    failing(args, 5)

    def judge(batch: dict[str, Any]) -> str | None:
        if len(daemon.of_kind("batch")) != 3:
            return None
        time.after(20, lambda: daemon.order(Order.GO))
        return "outage"

    daemon.judge = judge
    prompts, taken = Prompts(), []
    for rollout_id in range(5):
        output = rollout(args, rollout_id, prompts, evaluation=False)
        samples = flat(output.samples)
        raw, advantages = post_process(args, samples)
        assert len(raw) == len(advantages) == len(samples) == 32
        if rollout_id == 3:  # rolled out, and not yet trained on
            daemon.order(Order.HOLD, "server_dead")
            time.after(30, lambda: daemon.order(Order.GO))
        began = time.ns
        before_step(args, rollout_id, 0, [], None, None)
        taken.append((rollout_id, sum(sample.remove_sample for sample in samples), (time.ns - began) >= 30e9))
    looks.close()
    assert taken == [(0, 1, False), (1, 0, False), (2, 0, False), (3, 0, True), (4, 0, False)]
    refused = [batch["step"] for batch in daemon.of_kind("batch")]
    assert refused == [0, 1, 2, 2, 3, 4], "the third batch is refused, and rolled out again"
    assert [step["step"] for step in daemon.of_kind("step")] == [0, 1, 2, 3]


@pytest.fixture
def onlooker(daemon: VirtualDaemon, time: VirtualTime) -> Iterator[Onlooker]:
    made = Onlooker(daemon.run_dir, clock_ns=time.now, sleep=time.sleep, boot_id=BOOT)
    slime.use(onlooker=made)
    yield made
    made.close()
    slime.use()


def hook() -> None:
    slime.before_train_step(SimpleNamespace(), 4, 0, model=[], optimizer=None, opt_param_scheduler=None)


def test_the_megatron_hook_waits_while_held_and_shows_nothing(
    onlooker: Onlooker, daemon: VirtualDaemon, time: VirtualTime
) -> None:
    hook()
    began = time.ns
    daemon.order(Order.HOLD, "server_dead")
    time.after(30, lambda: daemon.order(Order.GO))
    hook()
    assert time.ns - began >= 30e9
    assert daemon.page.trainer() is None
    assert daemon.of_kind("ack") == []


@pytest.mark.parametrize("order", [Order.RESYNC, Order.SAVE])
def test_the_megatron_hook_lets_pass_what_the_guard_will_do_after_this_step(
    order: Order, onlooker: Onlooker, daemon: VirtualDaemon
) -> None:
    daemon.order(order)
    hook()


def test_the_megatron_hook_raises_rollback_and_stop(onlooker: Onlooker, daemon: VirtualDaemon) -> None:
    daemon.order(Order.ROLLBACK, target_step=2, target_path="/c")
    with pytest.raises(RollbackRequested) as raised:
        hook()
    assert (raised.value.step, raised.value.reloaded) == (2, False)
    daemon.order(Order.STOP, "enough")
    with pytest.raises(StopRequested, match="enough"):
        hook()


def test_a_held_onlooker_is_let_go_of_when_nobody_is_left_to_lift_the_hold(
    onlooker: Onlooker, daemon: VirtualDaemon, time: VirtualTime
) -> None:
    daemon.order(Order.HOLD, "server_dead")
    daemon.die()
    with pytest.raises(StopRequested, match="lifted by nobody"):
        hook()


@pytest.mark.parametrize("framework", ["slime", "miles"])
def test_the_frameworks_call_what_is_here(framework: str) -> None:
    """Held against the source of the framework itself."""
    model = source(framework, f"{framework}/backends/megatron_utils/model.py")
    (call,) = [c for c in model.calls() if c.startswith("custom_before_train_step_hook(")]
    assert (
        call
        == "custom_before_train_step_hook(args, rollout_id, step_id, model, optimizer, opt_param_scheduler)"
    )
    before_step = model.calls("train_one_step")
    hook, step = before_step.index(call), before_step.index("optimizer.step()")
    assert hook < step
    rollout = source(framework, f"{framework}/rollout/sglang_rollout.py")
    assert rollout.parameters("generate_rollout")[:3] == [
        "args",
        "rollout_id",
        rollout.parameters("generate_rollout")[2],
    ]
    assert "evaluation" in rollout.parameters("generate_rollout")
    for name in ("generate_and_rm", "generate_and_rm_group"):
        assert rollout.parameters(name)[1:] == [
            "sample" if name == "generate_and_rm" else "group",
            "sampling_params",
            "evaluation",
        ]
    assert any(c.startswith("generate_and_rm(") for c in rollout.calls("generate_and_rm_group"))
    assert any("gather(" in c for c in rollout.calls("generate_and_rm_group"))
    sample = source(framework, f"{framework}/utils/types.py")
    for name in (
        "group_index", "index", "tokens", "response_length", "reward", "loss_mask", "weight_versions",
        "rollout_log_probs", "remove_sample", "status", "metadata",
    ):  # fmt: skip
        assert f"    {name}:" in sample.text, f"{sample.where}: Sample.{name}"
    assert {"FAILED = ", "ABORTED = "} <= {
        word for word in ("FAILED = ", "ABORTED = ") if word in sample.text
    }
    assert sample.parameters("Sample.get_reward_value") == ["self", "args"]


def test_slimes_driver_pushes_before_it_asks_for_rollouts_and_names_its_folders_so() -> None:
    driver = source("slime", "train.py").calls("train")
    pushes = [at for at, call in enumerate(driver) if call == "actor_model.update_weights()"]
    asks = [at for at, call in enumerate(driver) if call.startswith("rollout_manager.generate.remote(")]
    trains = [at for at, call in enumerate(driver) if call.startswith("actor_model.async_train(rollout_id")]
    assert len(pushes) == 2
    assert pushes[0] < asks[0] < trains[0] < pushes[1]
    group = source("slime", "slime/ray/actor_group.py").text
    assert 'Path(self.args.update_weight_disk_dir) / f"weight_v{weight_version:06d}"' in group


@pytest.mark.parametrize("framework", ["slime", "miles"])
def test_the_frameworks_take_the_arguments(framework: str) -> None:
    arguments = source(framework, f"{framework}/utils/arguments.py").text
    for argument in (
        "--rollout-function-path",
        "--custom-megatron-before-train-step-hook-path",
        "--custom-reward-post-process-path",
        "--custom-rollout-log-function-path",
    ):
        assert f'"{argument}"' in arguments, argument
    if '"--custom-megatron-post-save-hook-path"' in arguments:  # miles, newer than its release 0.0.2
        actor = source(framework, f"{framework}/backends/megatron_utils/actor.py")
        (call,) = [c for c in actor.calls() if c.startswith("post_save_hook(")]
        assert call.count(",") == 3


def test_our_functions_take_what_is_passed() -> None:
    import inspect

    def names(function: Callable[..., Any]) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert names(slime.before_train_step) == [
        "args", "rollout_id", "step_id", "model", "optimizer", "opt_param_scheduler",
    ]  # fmt: skip
    assert names(slime.generate_rollout) == ["args", "rollout_id", "data_source", "evaluation"]
    assert names(slime.post_process_rewards) == ["args", "samples"]
    assert len(names(slime.log_rollout)) == 5
