import os

from processes import QUICKLY_COMPILED

# There are 8 devices for the tests of sharding; whatever is not put elsewhere is on the first one.
# Most of a test's time is spent compiling, so XLA is told to compile quickly rather than well. All
# of this is set before JAX is imported, and inherited by the programs that tests start. (JAX can
# keep what it compiled on disk. With jax 0.6.0 programs that were read back gave wrong numbers.)
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} {QUICKLY_COMPILED} --xla_force_host_platform_device_count=8"
)

import costs
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    config.pluginmanager.register(costs.Costs(config))


def pytest_collection_modifyitems(items):
    """The files that take longest come first: with several workers, none is left alone with one."""
    order = {file: number for number, file in enumerate(costs.LONGEST)}
    items.sort(key=lambda item: order.get(costs.file_of(item), len(order)))


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
