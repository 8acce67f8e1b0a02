"""The river: examples and a model → loss → draws → sweep → traces → couplings → scores. Nothing flows back."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

PACKAGE = Path(__file__).parents[1] / "madjax"
# a module may import those to the left of it
RIVER = [
    "types", "losses", "sharding", "sampling.diagnostics", "sampling.draws", "sampling.restrict", "sampling.target",
    "sampling.sgld", "sampling.chains", "sampling.gaussian", "sampling.layerwise", "sampling.tangent",
    "sampling.backward", "sampling.scale", "sampling.perturbation", "hosts", "prefix", "store", "sweep", "traces",
    "information", "standardize", "profile", "coupling", "calibration", "scorer", "checkpoint", "detector", "batch",
    "stopping", "mechanisms", "xla_flags",
]  # fmt: skip
WINGS = ("models", "attacks", "baselines", "ensemble", "data", "interop", "metrics", "report")


def _imports(path):
    """Modules of the package that a file imports, without the package's name, and other top-level packages."""
    own, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if (PACKAGE.parent / node.module.replace(".", "/")).is_dir():  # from madjax import coupling
                names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("madjax."):
                own.add(name.removeprefix("madjax."))
            else:
                others.add(name.split(".")[0])
    return own, others


def _file(module):
    return PACKAGE / (module.replace(".", "/") + ".py")


@pytest.mark.parametrize("module", RIVER)
def test_the_river_flows_one_way(module):
    own, others = _imports(_file(module))
    for name in own:
        assert name in RIVER, f"{module} imports {name}, which is not on the river"
        assert RIVER.index(name) < RIVER.index(module), f"{module} imports {name}, which is downstream"
    if module != "losses":
        assert "flax" not in others, f"{module} imports flax"
    if module != "checkpoint":
        assert "orbax" not in others, f"{module} imports orbax"


def test_every_module_is_on_the_river_or_in_a_wing():
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        assert path.name == "__init__.py" or module in RIVER or module.startswith(WINGS), module
    assert all(_file(module).exists() for module in RIVER)


def test_the_package_imports_neither_torch_nor_drivers():
    for path in PACKAGE.rglob("*.py"):
        _, others = _imports(path)
        assert not others & {"torch", "experiments", "blackjax"}, path


def test_importing_computes_nothing():
    code = "import jax, madjax; from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)


CONVOLVE = """
import os, jax, jax.numpy as jnp
convolve = lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
arguments = jnp.ones((8, 14, 14, 16)), jnp.ones((5, 5, 16, 32))
print("ynn" in jax.jit(convolve).lower(*arguments).compile().as_text(), os.environ.get("XLA_FLAGS"))
"""


@pytest.mark.slow
@pytest.mark.skipif(not jax.__version__.startswith("0.10."), reason="the flag is for JAX 0.10")
def test_convolutions_are_left_to_xla():
    def run(code, flags):
        # without the tests' own settings, under which XLA fuses nothing
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
        environment |= {} if flags is None else {"XLA_FLAGS": flags}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert run(CONVOLVE, None) == "True None"
    set_by_us = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
    assert run("import madjax" + CONVOLVE, None) == f"False {set_by_us}"
    assert run("import madjax" + CONVOLVE, "--xla_cpu_enable_fast_math=false").endswith(f"=false {set_by_us}")
    own = "--xla_cpu_experimental_ynn_fusion_type=individual_convolution"
    assert run("import madjax" + CONVOLVE, own) == f"True {own}"
