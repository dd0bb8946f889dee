"""The daemon's configuration: settings with defaults, read once, from flags over environment over file."""

from stepguardd.config.loading import ConfigError, LoadedConfig, Origin, load_config, read_config
from stepguardd.config.settings import (
    CheckpointSettings,
    Config,
    ControlSettings,
    GuardSettings,
    LaunchSettings,
    ProbeSettings,
    RecoverySettings,
    ReportSettings,
    RewardSettings,
    RunSettings,
    ServerSettings,
    StreamSettings,
    WebSettings,
    WeightsSettings,
    warnings,
)

__all__ = [
    "CheckpointSettings",
    "Config",
    "ConfigError",
    "ControlSettings",
    "GuardSettings",
    "LaunchSettings",
    "LoadedConfig",
    "Origin",
    "ProbeSettings",
    "RecoverySettings",
    "ReportSettings",
    "RewardSettings",
    "RunSettings",
    "ServerSettings",
    "StreamSettings",
    "WebSettings",
    "WeightsSettings",
    "load_config",
    "read_config",
    "warnings",
]
