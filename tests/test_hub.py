"""Names without a network: one line within seconds, and what is in the cache still loads."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import datasets
import huggingface_hub.constants as hub
import pytest

from evollm import ConfigurationError, DataError
from evollm.data.open_dataset import open_dataset
from evollm.hub import hub_or_cache, unreachable
from evollm.models.loading.pretrained import find_config, load_base_model, load_tokenizer

NAME = "nobody/nothing-here"
# What the libraries take by themselves is 23 s for each file.
SECONDS = 10


@pytest.fixture
def no_network(monkeypatch, tmp_path) -> None:
    """Whoever calls the hub is turned away at once, and the caches are empty."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)


def test_a_hub_name_without_network_is_one_line_within_seconds(no_network) -> None:
    start = time.monotonic()
    assert find_config(NAME) is None
    for load in (load_tokenizer, load_base_model):
        with pytest.raises(ConfigurationError, match=r"not in the cache .* cannot be reached .* the folder") as found:
            load(NAME)
        assert "\n" not in str(found.value)
    with pytest.raises(DataError, match=r"is no file here .*split 'train', .*cannot be reached .*give a file"):
        open_dataset(NAME, "data")
    assert time.monotonic() - start < SECONDS
    assert not hub.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE


def test_a_model_in_the_cache_loads_without_network(no_network, make_model, tokenizer, tmp_path) -> None:
    snapshot = tmp_path / "hub/models--nobody--small/snapshots" / ("0" * 40)
    make_model().save_pretrained(snapshot)
    tokenizer.save_pretrained(snapshot)
    refs = tmp_path / "hub/models--nobody--small/refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    start = time.monotonic()
    assert load_tokenizer("nobody/small").get_vocab() == tokenizer.get_vocab()
    assert load_base_model("nobody/small").config.hidden_size == 32
    assert time.monotonic() - start < SECONDS
    # What is damaged in the cache is no matter of the network.
    (snapshot / "config.json").write_text("{")
    with pytest.raises(ConfigurationError, match="cannot be loaded as a language model"):
        load_base_model("nobody/small")


def test_offline_mode_is_said(no_network, monkeypatch) -> None:
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigurationError, match="not in the cache of the hub, and HF_HUB_OFFLINE is set"):
        load_tokenizer(NAME)
    assert hub.HF_HUB_OFFLINE


@pytest.fixture
def slow_hub(monkeypatch) -> Iterator[None]:
    """One that takes calls and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(hub, "HF_HUB_ETAG_TIMEOUT", 1)
        yield


def test_a_hub_that_is_slow_is_still_asked(slow_hub) -> None:
    assert unreachable() is None


def test_nothing_is_asked_for_a_folder(no_network, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("evollm.hub.unreachable", lambda: pytest.fail("asks"))
    with hub_or_cache(tmp_path) as why:
        assert why is None
