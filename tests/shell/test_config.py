"""The configuration: one line for every mistake, one source for every word, flag over env over file."""

import dataclasses
import json
import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepguard.settings import GuardSettings as TrainerSettings
from stepguardd.checkpoints.layouts import Framework
from stepguardd.config import Config, ConfigError, load_config, read_config, warnings
from stepguardd.config.loading import keys, parse_assignments, sections
from stepguardd.config.text import as_markdown, as_toml, default_file, toml_value
from stepguardd.core.reward import RewardConfig
from stepguardd.settings import core_settings

ROOT = Path(__file__).parents[2]
SERVER = '[server]\nurl = "http://127.0.0.1:30000"\ncommand = ["true"]\n'


def written(folder: Path, text: str) -> Path:
    file = folder / "c.toml"
    file.write_text(text)
    return file


def complaint(folder: Path, text: str, **more: object) -> str:
    """The one line that this file earns, without the folder it lies in."""
    with pytest.raises(ConfigError) as refused:
        load_config(written(folder, text), environ={}, **more)
    line = str(refused.value)
    assert "\n" not in line
    return line.replace(f"{folder}/", "")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "[probe]\nintervall_s = 2",
            "c.toml:2: unknown key probe.intervall_s; did you mean probe.interval_s?",
        ),
        ("[prob]\ninterval_s = 2", "c.toml:1: unknown key prob; did you mean [probe]?"),
        ("interval_s = 2", "c.toml:1: unknown key interval_s; did you mean probe.interval_s?"),
        ("[run]\ninterval_s = 2", "c.toml:2: unknown key run.interval_s; did you mean probe.interval_s?"),
        ("[guard]\nzzz = 2", "c.toml:2: unknown key guard.zzz; the nearest one is guard."),
        ("[zzz]\na = 2", f"c.toml:1: unknown key zzz; the sections are {', '.join(sections())}"),
        (SERVER + "nam = 1", "c.toml:4: unknown key server.nam; did you mean server.name?"),
        ('[probe]\ninterval_s = "2"', 'c.toml:2: probe.interval_s must be a number, not "2"'),
        ("[probe]\ninterval_s = true", "c.toml:2: probe.interval_s must be a number, not true"),
        ("[guard]\nmax_staleness = 1.5", "c.toml:2: guard.max_staleness must be a whole number, not 1.5"),
        ("[reward]\nmin_reward = nan", "c.toml:2: reward.min_reward must be a finite number, not NaN"),
        ("[probe]\n\n\ninterval_s = 0", "c.toml:4: probe.interval_s must be greater than 0, not 0"),
        ('[run]\nmode = "go"', "c.toml:2: run.mode must be 'shadow', 'hold' or 'act', not \"go\""),
        ("run = 3", "c.toml:1: run must be a table, not 3"),
        ("[[servers]]", "c.toml:1: servers[0].url is missing"),
        (
            "[probe]\nhealth_interval_s = 1",
            "c.toml:2: probe.health_interval_s (1) must be at least health_timeout_s",
        ),
        (
            '[[servers]]\nurl = "http://h:1"',
            'c.toml:1: servers[0].command is missing: backend "process" needs it',
        ),
        ('[server]\nurl = "ftp://h:1"', "c.toml:2: server.url must look like http://host:port"),
        (SERVER + SERVER.replace("[server]", "[[servers]]"), "c.toml: has both [server] and [[servers]]"),
        ("x = ", "c.toml:1: is not TOML: Invalid value"),
        ('[run]\nx = "', "c.toml:2: is not TOML: "),
        ('[weights]\npath = "/w"', "c.toml:2: weights.path must contain {version}"),
        (
            '[weights]\npath = "/w/{version:6}"',
            "c.toml:2: weights.path must contain {version} or {version:06d}",
        ),
        ('[run]\nname = "../x"', "c.toml:2: run.name must match pattern"),
    ],
)
def test_a_mistake_is_one_line_with_place_key_and_remedy(tmp_path: Path, text: str, line: str) -> None:
    assert complaint(tmp_path, text).startswith(line)


def test_several_mistakes_tell_the_first_and_count_the_others(tmp_path: Path) -> None:
    line = complaint(tmp_path, '[probe]\ninterval_s = "x"\ntimeout_s = "y"\nspinn_after_s = 1')
    assert line == "c.toml:4: unknown key probe.spinn_after_s; did you mean probe.spin_after_s? (and 2 more)"


def test_two_servers_of_one_name_are_refused(tmp_path: Path) -> None:
    twice = SERVER.replace("[server]", "[[servers]]") * 2
    assert "servers has two called 'server'" in complaint(tmp_path, twice)


def test_a_server_in_trouble_is_named_by_its_place(tmp_path: Path) -> None:
    text = (
        SERVER.replace("[server]", "[[servers]]")
        + '[[servers]]\nname = "b"\nurl = "http://h:1"\nstop_timeout_s = -1'
    )
    assert complaint(tmp_path, text).startswith("c.toml:7: servers[1].stop_timeout_s must be greater than 0")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9\n")
    (tmp_path / "big.toml").write_bytes(b"#" * (2 << 20))
    for name, words in [
        ("none.toml", "No such file"),
        (".", "Is a directory"),
        ("latin.toml", ":1: is not UTF-8"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(words)):
            load_config(tmp_path / name, environ={})
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        load_config(tmp_path / "big.toml", environ={})


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    file = written(tmp_path, "[probe]\ninterval_s = 2\ntimeout_s = 2\nspin_after_s = 50")
    environ = {
        "STEPGUARD__PROBE__INTERVAL_S": "3",
        "STEPGUARD__PROBE__TIMEOUT_S": "3",
        "STEPGUARD_RUN_DIR": "/x",
    }
    loaded = read_config(file, {"probe.interval_s": "4"}, environ=environ)
    probe = loaded.config.probe
    assert (probe.interval_s, probe.timeout_s, probe.spin_after_s, probe.kill_after_s) == (4, 3, 50, 60)
    origins = [
        loaded.origin(f"probe.{key}") for key in ("interval_s", "timeout_s", "spin_after_s", "kill_after_s")
    ]
    assert [origin.kind for origin in origins] == ["flag", "env", "file", "default"]
    assert [origins[1].place, origins[2].place] == ["STEPGUARD__PROBE__TIMEOUT_S", f"{file}:4"]


def test_text_from_outside_takes_the_type_of_its_key(tmp_path: Path) -> None:
    environ = {
        "STEPGUARD__RUN__NAME": "123",
        "STEPGUARD__CONTROL__ALLOWED_UIDS": "[1000, 1001]",
        "STEPGUARD__SERVER__URL": "http://127.0.0.1:1",
        "STEPGUARD__SERVER__COMMAND": '["serve", "-x"]',
        "STEPGUARD__SERVERS__0__ENV__HF_TOKEN": "42",
        "STEPGUARD__REWARD__MIN_REWARD": "0.5",
    }
    config = load_config(environ=environ)
    assert config.run.name == "123"
    assert config.control.allowed_uids == (1000, 1001)
    assert config.servers[0].command == ("serve", "-x")
    assert config.servers[0].environment() == {"HF_TOKEN": "42"}
    assert config.reward.min_reward == 0.5


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        (
            "STEPGUARD__PROBE__INTERVALL_S",
            "2",
            "unknown key probe.intervall_s; did you mean probe.interval_s?",
        ),
        ("STEPGUARD__PROBE__INTERVAL_S", "soon", 'probe.interval_s must be a number, not "soon"'),
        ("STEPGUARD__PROBE", "2", "probe must be a table, not 2"),
        ("STEPGUARD__SERVERS__7__URL", "x", "the servers are counted from 0, and there are 0"),
        ("STEPGUARD__RUN__MODE__X", "x", "run.mode must be 'shadow'"),
        ("STEPGUARD__", "x", "unknown key"),
    ],
)
def test_a_mistake_in_the_environment_names_the_variable(name: str, value: str, line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(environ={name: value})
    assert str(refused.value).startswith(f"{name}: ")
    assert line in str(refused.value)


def test_assignments_need_a_key_and_a_value() -> None:
    assert parse_assignments(["a.b = c=d", "e="]) == {"a.b": "c=d", "e": ""}
    for wrong in ("a", "=3", ""):
        with pytest.raises(ConfigError, match=r"section\.key=value"):
            parse_assignments([wrong])


def test_secrets_are_in_no_dump_and_in_no_complaint(tmp_path: Path) -> None:
    text = SERVER + 'env = { TOKEN = "hunter2" }\n'
    config = load_config(written(tmp_path, text), environ={})
    assert config.servers[0].environment() == {"TOKEN": "hunter2"}
    for shown in (repr(config), str(config.model_dump()), config.model_dump_json()):
        assert "hunter2" not in shown
    assert "hunter2" not in complaint(tmp_path, text.replace('"hunter2"', '["hunter2"]'))
    assert "hunter2" not in complaint(tmp_path, SERVER.replace("//", "//me:hunter2@"))


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, '[checkpoints]\ndir = "ckpt"\n[stream]\nwandb_dir = "/abs"')
    config = load_config(file, environ={})
    assert config.checkpoints.dir == tmp_path / "ckpt"
    assert config.stream.wandb_dir == Path("/abs")


def test_a_run_dir_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    assert "bytes too long for the sockets in it" in complaint(tmp_path, f'[run]\nrun_dir = "/{"d" * 120}"')


def test_the_annotated_file_and_the_page_are_the_settings() -> None:
    """Both are generated, never edited."""
    remedy = "run: .venv/bin/python tests/shell/regenerate.py"
    assert (ROOT / "config.toml").read_text() == as_toml(), remedy
    assert (ROOT / "docs" / "configuration.md").read_text() == as_markdown(), remedy
    assert default_file().read_text() == as_toml()


def test_the_annotated_file_shows_the_true_defaults(tmp_path: Path) -> None:
    """Uncommented line by line, it is the default configuration, but for keys that have none."""
    text = as_toml()
    assert load_config(written(tmp_path, text), environ={}) == Config()
    lines = re.sub(r"^# (\w+ = .*|\[\[servers\]\])$", r"\1", text, flags=re.MULTILINE).splitlines()
    shown = load_config(written(tmp_path, "\n".join(lines)), environ={})
    without = [line for line in lines if line.startswith("[") or line.endswith(("# not set", "# required"))]
    assert any(tomllib.loads("\n".join(without)).values()), "the keys without a default are marked"
    plain = [line for line in lines if not line.endswith("# not set")]
    assert (
        load_config(written(tmp_path, "\n".join(plain[: plain.index("[[servers]]")])), environ={}) == Config()
    )
    for section, model in sections().items():
        table = shown.servers[0] if section == "servers" else getattr(shown, section)
        for key, field in model.model_fields.items():
            marked = any(
                line.startswith(f"{key} = ") and line.endswith(("# not set", "# required")) for line in lines
            )
            assert marked or getattr(table, key) == field.get_default(), f"{section}.{key}"


def test_every_key_is_explained() -> None:
    for section, model in sections().items():
        assert model.__doc__, section
        for key, field in model.model_fields.items():
            assert field.description, f"{section}.{key}"
            assert field.description.endswith((".", ":")), f"{section}.{key}"


def test_times_say_their_unit() -> None:
    """A key that holds seconds ends in _s."""
    for key in keys():
        if any(word in key for word in ("timeout", "interval", "window", "backoff_max", "grace")):
            assert key.endswith("_s"), key


def test_the_guards_section_is_the_trainers_own_type() -> None:
    assert Config().guard.for_trainer() == TrainerSettings()
    # Which batches crashed the run is no setting of a person's.
    assert {field.name for field in dataclasses.fields(TrainerSettings)} == {
        *sections()["guard"].model_fields,
        "skip_steps",
    }


def test_every_known_framework_can_be_named() -> None:
    named = set(get_args(sections()["checkpoints"].model_fields["framework"].annotation))
    assert named == {"auto", *Framework} - {Framework.CUSTOM}


def test_every_figure_the_core_decides_by_can_be_set_under_the_same_name() -> None:
    """And at its default the core gets the core's own default."""
    core = core_settings(Config())
    settable = {key.rpartition(".")[2] for key in keys()}
    settable |= {key.replace(".", "_") for key in keys() if key.startswith("trainer.")}
    figures = [field for field in dataclasses.fields(core) if type(field.default) in {int, float}]
    assert len(figures) > 15
    assert {field.name for field in figures} <= settable
    unlike = {field.name for field in figures if getattr(core, field.name) != field.default}
    assert unlike == set()
    assert core.reward == RewardConfig()


def test_a_plain_config_is_warned_of_nothing(tmp_path: Path) -> None:
    assert warnings(load_config(written(tmp_path, SERVER), environ={})) == []


def test_rungs_that_do_not_fall_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mem_fractions must fall from rung to rung"):
        load_config(written(tmp_path, SERVER + "[memory]\nmem_fractions = [0.4, 0.8]"), environ={})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "servers: none is configured"),
        (SERVER.replace("127.0.0.1", "0.0.0.0"), "is an address to listen on"),
        (SERVER.replace('"true"', '"no-such-program"'), "'no-such-program' is not found"),
        (SERVER + "[probe]\nkill_after_s = 5", "probe.kill_after_s is shorter"),
    ],
)
def test_what_will_disappoint_is_warned_of(tmp_path: Path, text: str, words: str) -> None:
    assert any(words in warning for warning in warnings(load_config(written(tmp_path, text), environ={})))


TOML_KEYS = st.sampled_from([*keys(), "run.x", "server.url", "servers.0.env.A", "x", "x.y.z"])
TOML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(TOML_KEYS, TOML_VALUES, max_size=4))
def test_whatever_is_given_only_one_line_comes_out(overrides: dict[str, object]) -> None:
    """Any key with any value is either taken or refused in one printable line."""
    try:
        config = load_config(None, overrides, environ={})
        line = ""
    except ConfigError as refused:
        config, line = None, str(refused)
    assert line.isprintable()
    assert isinstance(config, Config) or line


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet=st.sampled_from(list('[]={}".,#\n abc_0123é\x00server run probe')), max_size=80))
def test_any_file_is_taken_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    file = tmp_path_factory.mktemp("fuzz") / "c.toml"
    file.write_text(text)
    line = ""
    try:
        load_config(file, environ={})
    except ConfigError as refused:
        line = str(refused)
    assert line.isprintable()


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=5), inner, max_size=3)
        ),
        max_leaves=6,
    )
)
def test_what_is_shown_as_toml_reads_back_the_same(value: object) -> None:
    assert tomllib.loads(f"v = {toml_value(value)}")["v"] == value


def test_the_schema_is_json() -> None:
    schema = json.loads(json.dumps(Config.model_json_schema()))
    assert set(schema["properties"]) == set(sections())
