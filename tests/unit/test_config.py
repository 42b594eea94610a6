"""Files are checked whole, with all problems told at once, and are written whole or not at all."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parsim import config
from parsim.errors import ParsimError
from parsim.hardware import Cluster
from parsim.plan import ParallelPlan

PROFILE = config.shipped("hardware_profiles")["h100-sxm-80gb"].read_text(encoding="utf-8")


@pytest.fixture
def load_edited(tmp_path: Path) -> Callable[..., Cluster]:
    """Loads the H100's profile after replacing text in it, as a user's own file."""

    def load(*edits: tuple[str, str]) -> Cluster:
        text = PROFILE
        for old, new in edits:
            assert old in text
            text = text.replace(old, new, 1)
        path = tmp_path / "mine.toml"
        path.write_text(text, encoding="utf-8")
        return config.load_cluster(str(path))

    return load


# Profiles and other TOML


def test_a_users_own_file_loads_by_its_path(load_edited: Callable[..., Cluster]) -> None:
    cluster = load_edited(('"3.35 TB/s"', "3.9e12"), ("usd_per_gpu_hour = 3.99", "usd_per_gpu_hour = 2"))
    assert cluster.device.memory_bandwidth_bytes_per_s == 3.9e12
    assert cluster.device.peak_flops_per_s["bf16"] == 989.4e12
    assert cluster.price is not None
    assert cluster.price.usd_per_gpu_hour == 2


def test_an_optional_table_may_be_left_out(load_edited: Callable[..., Cluster]) -> None:
    start = PROFILE.index("[price]")
    end = PROFILE.find("\n[", start)
    assert load_edited((PROFILE[start : end if end > 0 else None], "")).price is None


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("num_sms", "num_smss", ["device.num_smss: unknown key; did you mean 'num_sms'?"]),
        ("num_sms = 132\n", "", ["device.num_sms: field required"]),
        ("num_sms = 132", "num_sms = 0", ["device.num_sms: this must be greater than zero, got 0"]),
        ("num_sms = 132", "num_sms = 1.5", ["device.num_sms: ", "got 1.5"]),
        ("num_sms = 132", "num_sms = true", ["device.num_sms: this is a number, got true"]),
        ('"700 W"', '"700 J"', ["device.power_w: unknown unit of power, got '700 J'", "W, kW, MW"]),
        ('"450 GB/s"', '"-450 GB/s"', ["intra_node.bandwidth_bytes_per_s: this must be greater"]),
        ('"450 GB/s"', "nan", ["intra_node.bandwidth_bytes_per_s: a number must be finite, got nan"]),
        ('"989.4 TFLOP/s"', "inf", ["device.peak_flops_per_s.bf16: a number must be finite"]),
        (
            '"989.4 TFLOP/s"',
            '"989 TB/s"',
            ["device.peak_flops_per_s.bf16: unknown unit of compute rate"],
        ),
        ("bf16 =", "bf17 =", ["device.peak_flops_per_s: unknown dtype, got bf17", "did you mean"]),
        ("scale_up_domain = 8", "scale_up_domain = 12", ["scale_up_domain: the scale-up domain holds"]),
        (
            "[inter_node]",
            "[internode]",
            ["internode: unknown key; did you mean", "inter_node: field req"],
        ),
    ],
)
def test_a_problem_is_told_with_its_place(
    load_edited: Callable[..., Cluster], old: str, new: str, told: list[str]
) -> None:
    with pytest.raises(ParsimError) as error:
        load_edited((old, new))
    assert error.value.where is not None
    assert error.value.where.endswith("mine.toml")
    for text in told:
        assert text in error.value.what


def test_all_problems_of_a_file_are_told_at_once(load_edited: Callable[..., Cluster]) -> None:
    with pytest.raises(ParsimError) as error:
        load_edited(
            ("gpus_per_node", "gpu_per_node"),
            ('"3.35 TB/s"', '"3.35 TB"'),
            ('power_w = "700 W"\n', ""),
            ('"450 GB/s"', '"-450 GB/s"'),
            ("usd_per_gpu_hour = 3.99", 'usd_per_gpu_hour = "cheap"'),
        )
    lines = [line.strip(" -") for line in error.value.what.splitlines()]
    assert lines[0] == "6 problems in this file:"
    assert {line.split(":")[0] for line in lines[1:]} == {
        "gpu_per_node",
        "gpus_per_node",
        "device.memory_bandwidth_bytes_per_s",
        "device.power_w",
        "intra_node.bandwidth_bytes_per_s",
        "price.usd_per_gpu_hour",
    }


@pytest.mark.parametrize(
    "text",
    ["[device", "a = 1\na = 2", "a = " + "[" * 5000, "a = " + "1" * 5000, '\x00 = "nul"'],
    ids=["cut short", "twice", "deep", "digits", "nul"],
)
def test_broken_toml_is_an_explained_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ParsimError, match=r"TOML|deeply") as error:
        config.load_cluster(str(path))
    assert error.value.where == str(path)


def test_a_file_that_is_no_text_or_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParsimError, match="cannot read"):
        config.read_toml(tmp_path)
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(ParsimError, match="not UTF-8"):
        config.read_toml(path)
    os.truncate(path, config.MAX_FILE_BYTES + 1)
    with pytest.raises(ParsimError, match="too large"):
        config.read_toml(path)


# Names


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("h100-sxm-80", "did you mean 'h100-sxm-80gb'?"),
        ("gb200-nvl-72", "did you mean 'gb200-nvl72'?"),
        ("mi300", "did you mean 'mi300x'?"),
        ("quantum-annealer", "`parsim hardware` lists them"),
    ],
)
def test_an_unknown_profile_names_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ParsimError, match=f"unknown hardware '{name}'") as error:
        config.load_cluster(name)
    assert error.value.hint == hint


@pytest.mark.parametrize("name", ["nowhere.toml", "./h100", "x" * 5000 + ".toml", "a\x00b.toml", "/"])
def test_a_path_without_a_file_is_an_explained_error(name: str) -> None:
    with pytest.raises(ParsimError, match=r"no such hardware file|unknown hardware"):
        config.load_cluster(name)


# validate on any noun


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    m: int
    time_s: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    name: str
    points: tuple[Point, ...] = ()
    limits: dict[str, float] = field(default_factory=dict)
    samples_s: tuple[tuple[float, float], ...] = ()
    best: Point | None = None


def test_nested_tables_lists_and_units() -> None:
    data = {
        "name": "5 ms",
        "points": [{"m": 1, "time_s": "2 ms"}, {"m": 2}],
        "best": {"m": 3, "time_s": 4},
        "samples_s": [[1, 2], ["3 us", 4.5]],
    }
    table = config.validate(Table, data, where="here")
    assert table.name == "5 ms"
    assert table.points == (Point(m=1, time_s=2e-3), Point(m=2))
    assert table.best == Point(m=3, time_s=4.0)
    assert table.samples_s == ((1.0, 2.0), (3e-6, 4.5))


def test_places_inside_lists_and_tables() -> None:
    data = {
        "name": 5,
        "points": [{"m": 1}, {"m": "two", "times": 1}, {"m": 3, "time_s": "1 m"}],
        "limits": {"bf16": "fast", "fp8": math.inf},
        "samples_s": [[1.0, math.nan]],
    }
    with pytest.raises(ParsimError) as error:
        config.validate(Table, data, where="here")
    places = {line.strip(" -").split(":")[0] for line in error.value.what.splitlines()[1:]}
    assert places == {
        "name",
        "points[1].m",
        "points[1].times",
        "points[2].time_s",
        "limits.bf16",
        "limits.fp8",
        "samples_s[0][1]",
    }


@pytest.mark.parametrize("data", [[], "text", None, 3])
def test_something_that_is_no_table_is_refused(data: object) -> None:
    with pytest.raises(ParsimError, match="a problem in this file"):
        config.validate(Table, data, where="here")


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)
keys = st.sampled_from(["name", "points", "limits", "samples_s", "best", "m", "time_s"])


@given(st.dictionaries(keys, trees | st.dictionaries(keys, trees), max_size=5))
def test_any_data_is_a_noun_or_an_explained_error(data: dict[str, object]) -> None:
    try:
        table = config.validate(Table, data, where="here")
    except ParsimError as error:
        assert error.where == "here"  # noqa: PT017
    else:
        assert table.name == data["name"]


def test_a_plan_survives_a_file(tmp_path: Path) -> None:
    plan = ParallelPlan(dp=2, tp=4, pp=2, vpp=2, schedule="interleaved", stage_split=(1, 2, 3, 2))
    path = tmp_path / "plan.json"
    config.write_file(path, config.dump_json(config.to_data(plan)))
    assert config.validate(ParallelPlan, config.read_json(path), where=str(path)) == plan


# JSON


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"a": 1', "[1, 2", "{'a': 1}", '{"a": 1}}', "1" * 5000, "[" * 100_000],
    ids=["empty", "brace", "cut", "list", "quotes", "more", "digits", "deep"],
)
def test_broken_json_is_an_explained_error(text: str) -> None:
    with pytest.raises(ParsimError, match=r"no valid JSON|deeply|must be finite") as error:
        config.parse_json(text, where="plan.json")
    assert error.value.where == "plan.json"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_json_numbers_are_finite(number: str) -> None:
    with pytest.raises(ParsimError, match="must be finite") as error:
        config.parse_json(f'{{"a": [{number}]}}', where="plan.json")
    assert error.value.got == number


def test_a_key_given_twice_is_named() -> None:
    with pytest.raises(ParsimError, match="given twice") as error:
        config.parse_json('{"plan": {"dp": 1, "tp": 2, "dp": 3}}', where="plan.json")
    assert error.value.where == "plan.json: dp"


finite_trees = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(1 - 2**63, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(finite_trees)
def test_json_that_parsim_writes_it_reads(document: object) -> None:
    text = config.dump_json(document)
    assert text.endswith("\n")
    lists_are_short = "[" not in text or len(text) < 3 * config._LONG_COLUMN
    assert not lists_are_short or text == json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    assert config.parse_json(text, where="here") == document


@given(finite_trees, st.data())
def test_a_truncated_file_is_never_taken_for_a_whole_one(document: object, data: st.DataObject) -> None:
    text = config.dump_json({"document": document}).rstrip()
    cut = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(ParsimError):
        config.parse_json(text[:cut], where="here")


def test_parsim_never_writes_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        config.dump_json({"step_time_s": math.nan})


# Writing


def test_a_file_is_written_with_its_folders_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "reports" / "new" / "plan.json"
    config.write_file(path, "first")
    config.write_file(path, b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(path.parent) == ["plan.json"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("step", ["fdopen", "chmod", "replace"])
def test_a_failing_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "plan.json"
    config.write_file(path, "old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(ParsimError, match="cannot write") as error:
        config.write_file(path, "new and longer")
    assert error.value.got == "No space left on device"
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    config.write_file(path, "old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        config.write_file(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_folder_or_a_file_in_the_way_is_an_explained_error(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(ParsimError, match="cannot write"):
        config.write_file(tmp_path / "taken", "text")
    (tmp_path / "file").write_text("text")
    with pytest.raises(ParsimError, match="cannot write"):
        config.write_file(tmp_path / "file" / "inside.json", "text")
    assert sorted(os.listdir(tmp_path)) == ["file", "taken"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    config.write_file(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "text"


@pytest.mark.parametrize("name", ["new/deep/a.json", "there.json", "link.json"])
def test_what_can_be_written_is_not_refused_and_nothing_is_made(tmp_path: Path, name: str) -> None:
    (tmp_path / "there.json").write_text("old")
    (tmp_path / "there.json").chmod(0o444)  # it is replaced, not written to
    (tmp_path / "link.json").symlink_to(tmp_path / "target.json")
    config.require_writable(tmp_path / name)
    config.require_writable(tmp_path / "new" / "reports", folder=True)
    assert sorted(os.listdir(tmp_path)) == ["link.json", "there.json"]


@pytest.mark.parametrize(
    ("name", "folder", "what"),
    [
        ("folder", False, "a folder, not a file"),
        ("file", True, "a file, not a folder"),
        ("file/a.json", False, "cannot write"),
        ("file/reports", True, "cannot write"),
        ("n" * 300, False, "cannot write"),
        ("pipe", False, "a device"),
        ("/dev/null", False, "a device"),
        ("/dev/stdout", False, "a device"),
    ],
)
def test_what_cannot_be_written_is_refused(
    tmp_path: Path, name: str, *, folder: bool, what: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ParsimError, match=what):
        config.require_writable(tmp_path / name, folder=folder)


def test_to_data_leaves_out_what_holds_nothing() -> None:
    data = config.to_data(ParallelPlan(dp=2))
    assert "stage_split" not in data
    assert data["zero"] == 0
    assert json.loads(config.dump_json(data))["dp"] == 2
