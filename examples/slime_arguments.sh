# The three lines that Stepguard needs in a slime (or miles) launch script: source this, and pass "${STEPGUARD_ARGS[@]}".
# STEPGUARD_RUN_DIR belongs into the Ray job's environment: --runtime-env-json '{"env_vars": {"STEPGUARD_RUN_DIR": "..."}}'
STEPGUARD_ARGS=(
  --rollout-function-path stepguard.integrations.slime.generate_rollout
  --custom-megatron-before-train-step-hook-path stepguard.integrations.slime.before_train_step
  --custom-reward-post-process-path stepguard.integrations.slime.post_process_rewards
)
