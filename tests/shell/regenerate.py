"""Writes config.toml and docs/configuration.md anew from the settings. Run it after changing a setting."""

from pathlib import Path

from stepguardd.config.text import as_markdown, as_toml

ROOT = Path(__file__).parents[2]

if __name__ == "__main__":
    (ROOT / "config.toml").write_text(as_toml())
    (ROOT / "docs" / "configuration.md").write_text(as_markdown())
