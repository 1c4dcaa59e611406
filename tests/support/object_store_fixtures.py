"""Fixtures of an S3 server and a proxy in front of it. A test module loads them with `pytest_plugins = ["object_store_fixtures"]`."""

import object_store
import pytest

from manta.data.storage import remote_requests


@pytest.fixture(scope="module")
def store():
    with object_store.ObjectStore() as store:
        yield store


@pytest.fixture(scope="module")
def shared_proxy(store):
    with object_store.Proxy(store.port) as proxy:
        yield proxy
        object_store.close_connections()


@pytest.fixture
def proxy(shared_proxy, monkeypatch):
    """The proxy that this process's requests go through, without faults."""
    shared_proxy.reset()
    for name, value in shared_proxy.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote_requests, "WAIT", 0.01)
    return shared_proxy


@pytest.fixture
def store_environment(monkeypatch):
    """A function that changes the environment of later requests; None unsets a variable."""

    def change(**environment):
        object_store.close_connections()
        for name, value in environment.items():
            monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)

    yield change
    object_store.close_connections()
