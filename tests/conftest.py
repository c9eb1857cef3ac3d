import os

# Most of a test's time is spent compiling. There are 8 devices for the tests of sharding; whatever
# is not put elsewhere is on the first one. Set before JAX is imported.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} "
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_force_host_platform_device_count=8"
)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """A process can hold only so many memory maps, and each program has some."""
    yield
    jax.clear_caches()
