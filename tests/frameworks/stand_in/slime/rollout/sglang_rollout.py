"""The rollout: groups of trajectories under one asyncio.gather, as in slime."""

from __future__ import annotations

import asyncio
from typing import Any

from slime.rollout.base_types import RolloutFnTrainOutput
from slime.utils.types import Sample


async def generate_and_rm(
    args: Any, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False
) -> Any:
    out = await args.generate(args, sample, sampling_params)
    for one in out if isinstance(out, list) else [out]:
        if one.reward is None and not args.group_rm:
            one.reward = await args.reward(one)
    return out


async def generate_and_rm_group(
    args: Any, group: list[Sample], sampling_params: dict[str, Any], evaluation: bool = False
) -> Any:
    tasks = [asyncio.create_task(generate_and_rm(args, sample, sampling_params)) for sample in group]
    out = await asyncio.gather(*tasks)
    if args.group_rm:
        for one in out:
            one.reward = await args.reward(one)
    return out


def generate_rollout(args: Any, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
    async def all_groups() -> list[Any]:
        groups = data_source.get_samples(args.rollout_batch_size)
        return list(await asyncio.gather(*(generate_and_rm_group(args, group, {}) for group in groups)))

    return RolloutFnTrainOutput(samples=asyncio.run(all_groups()), metrics={"rollout/done": 1.0})
