"""
GRPO with TRL, guarded: the two lines between the rulers are all that Stepguard needs.

    STEPGUARD_RUN_DIR=/run/stepguard/my-run python examples/trl_grpo.py MODEL OUTPUT_DIR [STEPS]
"""

import sys

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer


def starts_with_the_digit(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """1 where the completion begins with the last word of its prompt."""
    return [
        float(completion.split()[:1] == prompt.split()[-1:])
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def main() -> None:
    """Train the model of the first argument."""
    model, folder, *steps = sys.argv[1:]
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=starts_with_the_digit,
        args=GRPOConfig(
            output_dir=folder,
            max_steps=int(steps[0]) if steps else 100,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=4,
            save_steps=5,
            bf16=False,
            report_to=[],
        ),
        train_dataset=Dataset.from_dict({"prompt": [f"copy {index % 10}" for index in range(1000)]}),
    )
    # ---------------------------------------------------------------
    from stepguard.integrations.trl import StepguardCallback  # noqa: PLC0415 - shown as the lines to add

    trainer.add_callback(StepguardCallback(trainer))
    # ---------------------------------------------------------------
    trainer.train()


if __name__ == "__main__":
    main()
