"""Draws of parameters near the trained ones."""

from madjax.sampling.chains import ChainDraws, split_chains
from madjax.sampling.diagnostics import TraceDiagnostics, trace_diagnostics
from madjax.sampling.draws import Draws, StoredDraws
from madjax.sampling.gaussian import GaussianDraws, diagonal_curvature, gaussian
from madjax.sampling.perturbation import Gaussian, Langevin, Tangent
from madjax.sampling.restrict import drawn_parameters
from madjax.sampling.scale import choose_scale
from madjax.sampling.sgld import Sampler, rmsprop_sgld, sgld
from madjax.sampling.tangent import TangentDraws
from madjax.sampling.target import Target

__all__ = [
    "ChainDraws",
    "Draws",
    "Gaussian",
    "GaussianDraws",
    "Langevin",
    "Sampler",
    "StoredDraws",
    "Tangent",
    "TangentDraws",
    "Target",
    "TraceDiagnostics",
    "choose_scale",
    "diagonal_curvature",
    "drawn_parameters",
    "gaussian",
    "rmsprop_sgld",
    "sgld",
    "split_chains",
    "trace_diagnostics",
]
