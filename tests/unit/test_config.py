"""The Config refuses what makes no sense, and comes back from its TOML as it was."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dlion_mpi.config.fields import Every, convert, declared, flag, type_name
from dlion_mpi.config.options import FIELDS, TABLES, Config
from dlion_mpi.config.renamed import FIXED, RENAMED
from dlion_mpi.config.target import Target
from dlion_mpi.errors import UserError
from dlion_mpi.simulation import free_network
from dlion_mpi.strategies.dlion import Dlion
from dlion_mpi.strategies.given import values_of as given_values
from dlion_mpi.strategies.registry import STRATEGIES, resolve
from tests import options as named

OWN = {f"{cls.name}.{f.name}": f for cls in STRATEGIES.values() for f in declared(cls.Options)}
OPTIONS = FIELDS | OWN
"""Every option by its full name."""
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))  # all of Unicode but lone surrogates
AWKWARD = ["", '"', "\\", "'''", '\\"', "a\nb\r\tc", "\x00\x1b\x7f\x85\u2028", "é ü 语 😀", "{rank} %s # [x] = 1"]


CHECKPOINTS = {"out": "runs/a", "checkpoint_every": Every(steps=9)}
BELONGS: dict[str, dict[str, Any]] = {
    "dirichlet_alpha": {"partition": "dirichlet"},
    "checkpoint_every": {"out": "runs/a"},
    "keep_checkpoints": CHECKPOINTS,
    "time_limit": CHECKPOINTS,
    "save_model_of": {"save_model": "a.keras"},
    "best": {"save_model": "a.keras"},
}
"""What some fields do not make sense without."""


def config_of(name: str, value: Any) -> Config:
    options: dict[str, Any] = {**BELONGS.get(name, {}), name: value}
    strategy, _, own = name.rpartition(".")
    if strategy:
        made = STRATEGIES[strategy](**{own: value})
        options |= {"strategy": strategy, name: getattr(made.options, own)}
    return Config.of(options)


def from_toml(path: str) -> dict[str, Any]:
    return given_values({"config": path})


def read_back(config: Config, folder: Path) -> Config:
    path = folder / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    return Config.of(from_toml(str(path)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config")


# ---- there and back

# What every number may be; a new field has to be added here, and to be refused outside.
WHOLE: dict[str, tuple[int, int]] = {
    "staleness": (0, 10**6),
    "backup": (0, 100),
    "steps": (1, 10**12),
    "keep_checkpoints": (1, 10**6),
    "seed": (0, 2**32 - 1),
    "threads": (0, 4096),
    "batch_size": (1, 10**6),
    "batch_size_max": (32, 10**6),
    "ako.partitions": (0, 10**6),
    "hop.max_gap": (1, 10**6),
    "hop.skip": (0, 10**6),
    "powersgd.rank": (1, 10**6),
    "dgc.warmup": (0, 10**6),
    "local-sgd.h": (1, 10**6),
    "diloco.h": (1, 10**6),
    "streaming-diloco.h": (1, 10**6),
    "streaming-diloco.fragments": (1, 10**6),
    "streaming-diloco.overlap": (1, 16),
    "sparseloco.h": (1, 10**6),
    "sparseloco.entries": (1, 4096),
    "demo.entries": (1, 4096),
    "test_samples": (1, 10**9),
    "transfer_period": (1, 10**6),
}
REAL: dict[str, tuple[float, float]] = {
    "seconds": (1e-3, 1e300),
    "progress_every": (0, 1e300),
    "learning_rate": (1e-9, 1e30),
    "momentum": (0, 0.999),
    "dirichlet_alpha": (1e-6, 1e30),
    "gaia.threshold": (0, 1e30),
    "choco-sgd.density": (1e-6, 1),
    "choco-sgd.gamma": (1e-6, 1),
    "dgc.density": (1e-6, 1),
    "dgc.momentum": (0, 0.999),
    "dgc.clip": (0, 1e30),
    "diloco.outer_learning_rate": (1e-9, 1e30),
    "diloco.outer_momentum": (0, 0.999),
    "streaming-diloco.alpha": (0, 0.999),
    "streaming-diloco.outer_learning_rate": (1e-9, 1e30),
    "streaming-diloco.outer_momentum": (0, 0.999),
    "sparseloco.decay": (0, 1),
    "demo.decay": (0, 1),
    "dlion.max_n": (1e-3, 100),
    "dlion.link_share": (1e-3, 1),
    "dlion.outer_learning_rate": (1e-6, 100),
    "patience": (0, 1e300),
    "exchange_share": (0, 1e30),
    "transfer_merge": (0, 1),
}
EVERY = st.one_of(st.builds(Every, steps=st.integers(1, 10**15)), st.builds(Every, seconds=st.floats(1e-300, 1e300)))


METRIC = st.text("abc_ /=<%\u00e9").map(lambda name: f"x{name}x")
TARGETS = st.builds(Target, METRIC, st.sampled_from([">=", "<="]), st.floats(allow_nan=False, allow_infinity=False))
EVERYS = ("evaluate_every", "checkpoint_every", "time_limit", "stall_limit")


def values_of(name: str) -> st.SearchStrategy[Any]:
    if OPTIONS[name].metadata["choices"]:
        return st.sampled_from(OPTIONS[name].metadata["choices"])
    if name in WHOLE:
        return st.integers(*WHOLE[name])
    if name in REAL:
        return st.floats(*REAL[name])
    if name in ("time_limit", "stall_limit"):
        return st.builds(Every, seconds=st.floats(1e-300, 1e300))
    if name == "save_model":
        return TEXTS.map(lambda text: f"{text}.keras")
    if name == "target":
        return TARGETS
    return EVERY if name in EVERYS else TEXTS


@pytest.mark.parametrize("name", OPTIONS)
@given(data=st.data())
def test_every_option_comes_back_from_toml(folder: Path, name: str, data: st.DataObject) -> None:
    config = config_of(name, data.draw(values_of(name)))
    back = read_back(config, folder)
    assert back == config
    assert type(back.values()[name]) is type(config.values()[name]) or name in REAL


@pytest.mark.parametrize("name", ["strategy", "model", "data", "out"])
@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_texts_come_back_from_toml(folder: Path, name: str, text: str) -> None:
    config = config_of(name, text)
    assert getattr(read_back(config, folder), name) == text


@pytest.mark.parametrize(("name", "mode"), [(s.name, mode) for s in STRATEGIES.values() for mode in s.modes])
def test_a_resolved_config_comes_back_whole(folder: Path, name: str, mode: str) -> None:
    resolved = resolve(Config(strategy=name, sync=mode, out="runs/a", steps=5, seconds=2.5))[1]
    assert read_back(resolved, folder) == resolved


def test_a_field_that_is_not_set_is_not_written() -> None:
    text = Config().to_toml()
    assert "sync" not in text
    assert "None" not in text
    assert 'evaluate_every = "20s"' in text


def test_every_option_is_documented_bounded_and_in_a_table() -> None:
    for name, f in OPTIONS.items():
        assert f.metadata["help"], name
        assert name in OWN or f.metadata["table"] in TABLES, name
        if not f.metadata["choices"] and name not in (*EVERYS, "target"):
            assert (type_name(f) != "str") == (name in WHOLE or name in REAL), name


@pytest.mark.parametrize("name", [name for name in OPTIONS if type_name(OPTIONS[name]) == "str"])
def test_text_that_cannot_be_written_as_utf_8_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="must be"):
        config_of(name, "run\udcff")


# ---- values

OUTSIDE: list[tuple[str, Any]] = [
    *((name, low - 1) for name, (low, _) in WHOLE.items() if name != "batch_size_max"),
    ("batch_size_max", 0),
    ("seed", 2**32),
    ("threads", 4097),
    *((name, low - 1) for name, (low, _) in REAL.items()),
    *((name, 1.001) for name in ("momentum", "transfer_merge", "dlion.link_share")),
    ("dlion.max_n", 100.001),
    *((name, 0.0) for name in ("seconds", "learning_rate", "dirichlet_alpha", "dlion.max_n")),
    ("momentum", 1.0),
    *((name, value) for name in REAL for value in (math.nan, math.inf, -math.inf)),
]


@pytest.mark.parametrize(("name", "value"), OUTSIDE)
def test_a_number_outside_its_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{flag(name)} .*must be"):
        config_of(name, value)


@pytest.mark.parametrize("name", [name for name in OPTIONS if OPTIONS[name].metadata["choices"]])
def test_a_choice_is_one_of_those_that_there_are(name: str) -> None:
    with pytest.raises(
        UserError, match=f"{flag(name)} nonsense: must be one of .*{OPTIONS[name].metadata['choices'][-1]}"
    ):
        config_of(name, "nonsense")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"optimizer": "adam", "momentum": 0.9}, "--momentum"),
        ({"sync": "sync", "staleness": 3}, "--staleness.*--sync sync"),
        ({"sync": "async", "backup": 0}, "--backup.*--sync async"),
        ({"partition": "iid", "dirichlet_alpha": 0.1}, "--dirichlet-alpha.*--partition iid"),
        ({"sync": "async", "patience": 0.5}, "--patience.*--sync async"),
        ({"sync": "sync", "exchange_share": 0.2}, "--exchange-share.*--sync sync"),
        ({"transfer": "none", "transfer_period": 10}, "--transfer-period"),
        ({"transfer": "none", "transfer_merge": 0.5}, "--transfer-merge"),
        ({"batch_size": 64, "batch_size_max": 32}, "--batch-size-max 32.*--batch-size 64"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Config(**options)


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 3  # type: ignore[misc]


def test_when_a_run_ends() -> None:
    assert Config().last_step == 1000
    assert Config(steps=7, seconds=3).last_step == 7
    assert Config(seconds=3).last_step == math.inf
    assert Config(target=Target("accuracy", ">=", 0.5)).last_step == math.inf


# ---- how often


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("100", Every(steps=100)),
        (" 1 ", Every(steps=1)),
        ("20s", Every(seconds=20.0)),
        ("0.5s", Every(seconds=0.5)),
        ("1e+16s", Every(seconds=1e16)),
    ],
)
def test_steps_and_seconds(text: str, expected: Every) -> None:
    assert Every.parse(text) == expected
    assert Every.parse(str(expected)) == expected


@given(EVERY)
@example(Every(seconds=1234567.0))
@example(Every(seconds=0.1 + 0.2))
@example(Every(seconds=1e16))
def test_how_often_survives_as_text(every: Every) -> None:
    assert Every.parse(str(every)) == every


@pytest.mark.parametrize(
    "text", ["", "0", "0s", "-5", "1.5", "s", "20 s", "20d", "1e3", "nan", "infs", "9" * 400, "1e999s"]
)
def test_nonsense_is_no_interval(text: str) -> None:
    with pytest.raises(UserError, match="number of steps such as 100"):
        Every.parse(text)


# ---- from text


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("steps", "12", 12),
        ("steps", 12.0, 12),
        ("batch_size_max", "64", 64),
        ("learning_rate", "1e-3", 0.001),
        ("seconds", 3, 3.0),
        ("out", "runs/a", "runs/a"),
        ("value_type", "float16", "float16"),
        ("evaluate_every", "5s", Every(seconds=5.0)),
        ("evaluate_every", 5, Every(steps=5)),
        ("evaluate_every", Every(steps=2), Every(steps=2)),
    ],
)
def test_text_becomes_the_field_s_type(name: str, text: Any, expected: Any) -> None:
    value = convert(OPTIONS[name], text)
    assert value == expected
    assert type(value) is type(expected)


OF_ANOTHER_TYPE: dict[str, list[Any]] = {
    "steps": ["many", "1.5", "1e3", "", 1.5, True, None, math.inf, math.nan, [1]],
    "seconds": ["soon", "1,5", "", False, None, {}],
    "out": [3, True, None, ["a"]],
    "evaluate_every": ["sometimes", True, 1.5],
}


@pytest.mark.parametrize(
    ("name", "text"),
    [(name, text) for name, texts in OF_ANOTHER_TYPE.items() for text in texts],
)
def test_what_is_not_of_the_type_is_refused_by_name(name: str, text: Any) -> None:
    with pytest.raises(UserError, match=flag(name)):
        convert(OPTIONS[name], text)


# ---- files


def written(folder: Path, text: str | bytes) -> str:
    path = folder / "run.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_keys_may_be_spelled_as_on_the_command_line(tmp_path: Path) -> None:
    path = written(tmp_path, '[dlion]\nmax-n = 2\n[exchange]\nvalue_type = "float16"\n[run]\nsteps = 5\n')
    assert from_toml(path) == {"dlion.max_n": 2.0, "value_type": "float16", "steps": 5}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps = 5", "'steps' stands outside a table"),
        ("[run]\nstep = 5", r"unknown key 'step' in \[run\]; known there: .*steps"),
        ("[exchange]\nsteps = 5", r"unknown key 'steps' in \[exchange\]; known there: .*value_type"),
        ("[hop]\nmax_gaps = 5", r"unknown key 'max_gaps' in \[hop\]; known there: graph, max_gap, skip"),
        ("[hop]\nmax_gap = 0.5", "--hop.max-gap 0.5: must be a whole number"),
        ("[batching]\nlbs = 5", "--lbs is now --batch-size"),
        ("[exchange]\nwindow = 5", "--window is fixed now, at 2 messages, 3 in dlion: drop it"),
        ("[runs]\nsteps = 5", r"unknown key 'steps' in \[runs\]; tables are run, model"),
        ("[run.inner]\nsteps = 5", r"unknown key 'inner' in \[run\]"),
        ("[[run]]\nsteps = 5", "'run' stands outside a table"),
        ("[run]\nsteps = ?\n", "not valid TOML: .*line 2"),
        ("[run]\nsteps = 5\nsteps = 6", "not valid TOML"),
        (b"\xff\xfe", "not valid TOML"),
        ('[run]\nsteps = "many"', "--steps many: must be a whole number"),
        ("[run]\nsteps = true", "--steps True: must be a whole number"),
        ("[run]\nsteps = inf", "--steps inf: must be a whole number"),
        (f"[run]\nsteps = 1{'0' * 400}", "--steps 10.*: must be a whole number"),
        ("[run]\nstrategy = 5", "--strategy 5: must be a text"),
        ("[run]\nseed = 2020-01-01", "--seed 2020-01-01: must be a whole number"),
        ('[run]\nevaluate_every = "often"', "--evaluate-every: 'often' is not a number of steps"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong_in_it(tmp_path: Path, text: str | bytes, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UserError, match=said) as caught:
        from_toml(path)
    assert str(caught.value).startswith(f"--config {path}: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.toml", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            from_toml(str(path))


# ---- strategies' defaults


def own(config: Config, name: str) -> Any:
    """An option of the strategy's own in a resolved Config."""
    return config.strategy_options.get(name)


def test_defaults_are_filled_in_for_the_chosen_strategy() -> None:
    strategy, resolved = resolve(Config())
    assert strategy.name == "dlion"
    assert (resolved.sync, resolved.staleness, own(resolved, "dlion.unsent")) == ("bounded", 5, "accumulate")
    assert resolve(Config(strategy="baseline"))[1].strategy_options == {}
    assert resolve(Config(strategy="gaia"))[1].strategy_options == {
        "gaia.threshold": 0.01,
        "gaia.barrier": "selective",
    }


def test_help_names_every_strategy() -> None:
    assert all(name in FIELDS["strategy"].metadata["help"] for name in STRATEGIES)


def test_what_is_given_comes_before_the_default() -> None:
    resolved = resolve(named.config(unsent="drop", staleness=0, transfer_merge=0.0, exchange_share=0.0))[1]
    assert (own(resolved, "dlion.unsent"), resolved.staleness) == ("drop", 0)
    assert (resolved.transfer_merge, resolved.exchange_share) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("options", "transfer"),
    [
        ({}, "none"),
        ({"unsent": "drop"}, "all"),
        ({"transfer_period": 20}, "all"),
        ({"transfer_merge": 0.5}, "all"),
        ({"unsent": "drop", "transfer": "worst"}, "worst"),
        ({"unsent": "drop", "transfer": "none"}, "none"),
    ],
)
def test_knowledge_is_transferred_where_gradients_are_dropped_or_it_is_asked_for(
    options: dict[str, Any], transfer: str
) -> None:
    resolved = resolve(named.config(**options))[1]
    assert resolved.transfer == transfer
    assert (resolved.transfer_merge is None) == (transfer == "none")


@pytest.mark.parametrize(
    ("options", "share", "short"),
    [
        ({}, 0.05, True),
        ({"sync": "sync"}, 0.05, True),
        ({"unsent": "drop"}, 1.0, False),
        ({"unsent": "drop", "link_share": 0.1}, 0.1, False),
        ({"link_share": 0.05}, 0.05, False),
        ({"link_share": 1.0}, 1.0, False),
        ({"preset": "paper"}, 1.0, False),
        ({"preset": "paper", "unsent": "accumulate"}, 1.0, False),
        ({"max_n": 10.0}, 1.0, False),
        ({"preset": "paper", "max_n": 10.0}, 1.0, False),
    ],
)
def test_messages_are_short_unless_gradients_are_dropped_or_it_is_asked_for(
    options: dict[str, Any], share: float, short: bool
) -> None:
    for config in (named.config(**options), resolve(named.config(**options))[1]):
        strategy = resolve(config)[0]
        assert isinstance(strategy, Dlion)
        assert (strategy.link_share, strategy.short) == (share, short)


@pytest.mark.parametrize(
    ("options", "patience"),
    [
        ({}, 0.5),
        ({"sync": "sync"}, None),
        ({"sync": "async"}, None),
        ({"unsent": "drop"}, 0.0),
        ({"unsent": "drop", "link_share": 0.1}, 0.5),
        ({"link_share": 1.0}, 0.0),
        ({"max_n": 10.0}, 0.0),
        ({"preset": "paper"}, 0.0),
        ({"preset": "paper", "unsent": "accumulate"}, 0.0),
        ({"preset": "paper", "link_share": 0.1}, 0.0),
        ({"max_n": 10.0, "patience": 2.0}, 2.0),
    ],
)
def test_workers_wait_for_messages_that_do_not_fill_their_links(
    options: dict[str, Any], patience: float | None
) -> None:
    assert resolve(named.config(**options))[1].patience == patience


def test_the_paper_s_preset_stands_behind_what_is_given() -> None:
    paper = resolve(Config(preset="paper"))[1]
    assert (paper.batching, paper.transfer, paper.transfer_period) == ("proportional", "all", 100)
    assert (paper.patience, paper.value_type, paper.exchange_share) == (0.0, "float32", 0.0)
    assert paper.strategy_options == {
        "dlion.unsent": "drop",
        "dlion.link_share": 1.0,
        "dlion.weighting": "paper",
        "dlion.outer_learning_rate": 1.0,
    }
    assert paper.transfer_merge == 0.75
    given = resolve(named.config(preset="paper", unsent="accumulate", transfer="none"))[1]
    assert (own(given, "dlion.unsent"), given.transfer, given.transfer_merge) == ("accumulate", "none", None)


def test_what_has_no_effect_is_left_out() -> None:
    resolved = resolve(named.config(transfer="none", max_n=10.0))[1]
    assert resolved.transfer_period is None
    assert "dlion.link_share" not in resolved.strategy_options
    assert resolved.exchange_share == 0.15, "what the exchange may cost is bounded whatever N is"
    hop = resolve(Config(strategy="hop", sync="sync"))[1]
    assert hop.strategy_options == {"hop.graph": "all"}


@pytest.mark.parametrize(("batch_size", "most"), [(32, 1024), (512, 1024), (2048, 4096)])
def test_the_largest_batch_leaves_room_for_twice_the_batch_size(batch_size: int, most: int) -> None:
    assert resolve(Config(batch_size=batch_size))[1].batch_size_max == most
    assert resolve(Config(batch_size=batch_size, batch_size_max=batch_size))[1].batch_size_max == batch_size
    assert resolve(Config(strategy="baseline", batch_size=batch_size))[1].batch_size_max is None
    assert free_network.resolve(Config(strategy="free-network", batch_size=batch_size)).batch_size_max == most


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_staleness_is_for_bounded_alone(mode: str) -> None:
    resolved = resolve(Config(sync=mode))[1]
    assert resolved.staleness is None
    assert resolved.backup is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strategy": "hope"}, "--strategy hope: unknown; known are dlion, baseline"),
        ({"strategy": "baseline", "sync": "async"}, "baseline does not support --sync async: it supports sync"),
        (
            {"strategy": "baseline", "dlion.max_n": 10.0},
            "--dlion.max-n belongs to --strategy dlion, not to --strategy baseline",
        ),
        ({"strategy": "hop", "patience": 0.5}, "--patience is not used by --strategy hop"),
        ({"strategy": "baseline", "transfer": "all"}, "--transfer is not used by --strategy baseline"),
        ({"strategy": "baseline", "batch_size_max": 64}, "--batch-size-max is not used by --strategy baseline"),
        ({"strategy": "baseline", "preset": "paper"}, "--preset paper: unknown; --strategy baseline has none"),
        ({"preset": "article"}, "--preset article: unknown; --strategy dlion has paper"),
        ({"strategy": "baseline", "staleness": 1}, "--staleness is not used by --strategy baseline"),
        ({"strategy": "baseline", "backup": 1}, "--strategy baseline, which has no options: drop it"),
        ({"strategy": "ako", "transfer": "all"}, "which has --staleness, --ako.partitions: drop it"),
        ({"strategy": "gaia", "backup": 1}, "has --staleness, --gaia.threshold, --gaia.barrier: drop it"),
        ({"sync": "sync", "exchange_share": 0.2}, "--exchange-share has no effect with --sync sync"),
        (
            {"strategy": "ako", "staleness": 2},
            "--staleness has no effect with --sync async: drop it, or choose another --sync",
        ),
        ({"strategy": "hop", "sync": "sync", "hop.skip": 1}, "--hop.skip has no effect with --sync sync"),
        ({"dlion.max_n": 10.0, "dlion.link_share": 1.0}, "--dlion.link-share has no effect with --dlion.max-n 10"),
    ],
)
def test_what_a_strategy_does_not_use_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        resolve(Config.of(options))


# ---- options that were


def test_no_option_has_the_name_of_one_that_was() -> None:
    assert not (RENAMED.keys() | FIXED.keys()) & OPTIONS.keys()
    for said in RENAMED.values():
        assert said.split()[0].rstrip(":").removeprefix("--").replace("-", "_") in OPTIONS
