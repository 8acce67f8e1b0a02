"""The detector: from a model and trusted examples to scores of new ones."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from madjax import calibration, checkpoint, hosts
from madjax.coupling import DEFAULT, lookup
from madjax.sampling.diagnostics import ensure_finite
from madjax.sampling.draws import Draws, NumberedDraws, RecordedDraws, StoredDraws
from madjax.sampling.gaussian import GaussianDraws
from madjax.sampling.perturbation import Gaussian, Perturbation, check_labels
from madjax.sampling.restrict import path_names
from madjax.sampling.tangent import TangentDraws
from madjax.scorer import Scorer, Scores, Traces
from madjax.sharding import place, put_model
from madjax.store import TraceStore
from madjax.sweep import forward_passes, loss_matrix
from madjax.traces import TraceMap
from madjax.types import Batch, LossFn, LossMatrix, Params, num_examples

# fields of a detector that a file keeps as they are
_SAVED = ("fpr", "per_class", "scale", "sample_forwards", "layout", "batch_size", "model_shards", "example_shapes")


@dataclasses.dataclass(frozen=True)
class Detector:
    """A model, draws around it, and the losses of its trusted examples at them.

    >>> detector = Detector.fit(jax.random.key(0), loss_fn, params, trusted)  # doctest: +SKIP
    >>> detector.score({"image": images}).flagged  # doctest: +SKIP

    Attributes:
      loss_fn, params: the model.
      draws: regenerated from a key (Gaussian and tangent) or stored (chains).
      scorer: the trusted losses, and how others are held against them.
      fpr: the false-positive rate that `flagged` is calibrated for.
      per_class: whether each predicted class is calibrated by itself.
      scale: the scale of Gaussian draws, None for others.
      sample_forwards: forward passes of one example that the fit took; a gradient counts as three.
      layout, batch_size, model_shards: of the sweep.
      example_shapes: shape of one trusted example by path, without the label.
      test: losses `[num_draws, num_test]` and predicted classes of the test examples that the fit swept; not saved.
    """

    loss_fn: LossFn
    params: Params
    draws: Draws
    scorer: Scorer
    fpr: float
    per_class: bool
    scale: float | None
    sample_forwards: int
    layout: str
    batch_size: int
    model_shards: int
    example_shapes: dict[str, list[int]]
    test: tuple[LossMatrix, np.ndarray | None] | None = None

    @classmethod
    def fit(
        cls,
        rng_key: jax.Array,
        loss_fn: LossFn,
        params: Params,
        trusted: Batch,
        *,
        test: Batch | None = None,
        sampling: Batch | None = None,
        workdir: str | Path | None = None,
        perturbation: Perturbation = Gaussian(),  # noqa: B008 - frozen
        num_draws: int = 128,
        coupling: str = DEFAULT,
        traces: Traces = "whitened",
        fpr: float = 0.05,
        per_class: bool = False,
        layout: str = "auto",
        batch_size: int = 256,
        model_shards: int = 1,
        progress: bool = False,
    ) -> Detector:
        """Draws parameters, sweeps the trusted examples and calibrates on them.

        Args:
          loss_fn, params: from `from_nnx` or `from_linen`; or any `(params, batch) -> float32 [n]`, and then the
            examples must carry the output to explain, with `label` as the class where a coupling is over classes.
          trusted: pytree of arrays with a leading axis `[num_trusted]`, usually `{"image": ...}`; a few hundred
            examples that the usual mechanism is known to explain. A `label` in it is replaced by the model's own
            prediction where `loss_fn` can predict.
          test: examples to sweep in the same pass, for `test`. Chains are then not kept, however many draws they
            make, and walk again for a later `sweep`.
          sampling: examples with *true* labels for chains to train on; not needed for Gaussian draws.
          workdir: folder where the losses are kept block by block. After an interruption the same call goes on from
            there, to the same result; `madjax.open_traces` reads them.
          num_draws: draws in all; of a tangent, of each tensor.
          coupling: a name in `madjax.coupling.COUPLINGS`.
          model_shards: over how many devices the parameters are split, see `loss_matrix`.

        Raises:
          ValueError: arguments that cannot work, named with what came and what was wanted; a workdir with the losses
            of other settings, which are named.
          FloatingPointError: parameters, inputs or losses that are not finite.
        """
        lookup(coupling)
        calibration.check_fpr(fpr)
        if num_draws < 2:
            raise ValueError(f"num_draws: wanted at least 2, got {num_draws}")
        if num_examples(trusted, "trusted") < 2:
            raise ValueError(f"trusted: wanted a few hundred examples, got {num_examples(trusted)}")
        check_parameters(params)
        if model_shards > 1:
            params = put_model(params, place(num_examples(trusted), model_shards=model_shards))
        trusted = explain(loss_fn, params, trusted, "trusted")
        examples, count = trusted, num_examples(trusted)
        if test is not None:
            check_shapes(test, example_shapes(trusted))
            test = explain(loss_fn, params, test, "examples")
            examples = jax.tree.map(_Joined, trusted, test)
        if sampling is not None:
            check_examples(sampling, "sampling")
            if hasattr(loss_fn, "num_classes"):
                check_labels(np.asarray(sampling["label"]), loss_fn.num_classes(params, sampling), "sampling")  # pyright: ignore
        store = None
        if workdir is not None:
            given = {"model": params, "trusted": trusted, "test": test, "sampling": sampling}
            settings = {"perturbation": type(perturbation).__name__, **dataclasses.asdict(perturbation)}
            settings |= {"rng_key": fingerprint(rng_key), "num_draws": num_draws, "model_shards": model_shards}
            settings |= {"layout": layout, "batch_size": batch_size}
            split = {"trusted": count} | ({} if test is None else {"test": num_examples(test)})
            store = _store(workdir, given, settings, split, _classes(examples))
        perturbed = perturbation.perturb(rng_key, loss_fn, params, trusted, sampling, num_draws)
        draws = perturbed.draws
        if test is None and not isinstance(draws, NumberedDraws):
            # a chain is walked once and kept; the others come back from their key
            draws = RecordedDraws(draws)
        losses = loss_matrix(
            loss_fn, draws, examples, layout=layout, batch_size=batch_size, model_shards=model_shards, store=store,
            progress=progress,
        )  # fmt: skip
        scorer = Scorer.fit(
            losses[:, :count], _classes(trusted), coupling=coupling, traces=traces,
            num_parts=getattr(draws, "num_parts", 1),
        )  # fmt: skip
        return cls(
            loss_fn,
            params,
            draws.stored() if isinstance(draws, RecordedDraws) else draws,
            scorer,
            fpr,
            per_class,
            perturbed.scale,
            perturbed.forwards + forward_passes(loss_fn, draws) * count,
            layout,
            batch_size,
            model_shards,
            example_shapes(trusted),
            None if test is None else (losses[:, count:], _classes(test)),
        )

    def score(self, examples: Batch, *, progress: bool = False) -> Scores:
        """Scores new examples, of the shapes of the trusted ones; the fit is not run again.

        Warns of test examples predicted as a class that no trusted example has: nothing trusted shares their output.
        """
        return self.score_losses(*self.sweep(examples, progress=progress))

    def sweep(
        self, examples: Batch, *, workdir: str | Path | None = None, progress: bool = False
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The losses `[num_draws, num_test]` of new examples at the detector's draws, and their predicted classes.

        Args:
          workdir: as for `fit`; another folder than the fit's.
        """
        check_shapes(examples, self.example_shapes)
        examples = explain(self.loss_fn, self.params, examples, "examples")
        store = None
        if workdir is not None:
            # the trusted losses tell draws apart, however they are made
            given = {"model": self.params, "trusted_losses": self.scorer.trusted, "test": examples}
            settings = {name: getattr(self, name) for name in ("layout", "batch_size", "model_shards")}
            store = _store(workdir, given, settings, {"test": num_examples(examples)}, _classes(examples))
        losses = loss_matrix(
            self.loss_fn, self.draws, examples, layout=self.layout, batch_size=self.batch_size,
            model_shards=self.model_shards, store=store, progress=progress,
        )  # fmt: skip
        return losses, _classes(examples)

    def score_losses(self, losses: np.ndarray, classes: np.ndarray | None) -> Scores:
        """Scores from what `sweep` returned, or from `test`."""
        trusted_classes = self.scorer.trusted_classes
        if classes is not None and trusted_classes is not None:
            unseen = np.setdiff1d(classes, trusted_classes)
            if len(unseen):
                count = int(np.isin(classes, unseen).sum())
                warnings.warn(
                    f"trusted: no example is predicted as class {', '.join(map(str, unseen))}, as {count} test "
                    "examples are; they are held against the other classes",
                    stacklevel=3,
                )
        return self.scorer.score(losses, classes, fpr=self.fpr, per_class=self.per_class)

    @property
    def trusted_couplings(self) -> np.ndarray:
        """Float64 `[num_trusted]`: what the coupling of each would be, had it come as a test example."""
        return self.scorer.trusted_couplings

    def threshold(self) -> float:
        """The coupling under which an example is flagged, where classes are not calibrated each by itself."""
        return calibration.threshold(self.trusted_couplings, self.fpr)

    def with_coupling(self, coupling: str, traces: Traces) -> Detector:
        """The same draws and losses under another coupling."""
        known = self.scorer
        scorer = Scorer.fit(
            known.trusted, known.trusted_classes, coupling=coupling, traces=traces, num_parts=known.num_parts
        )
        return dataclasses.replace(self, scorer=scorer)

    def save(self, path: str | Path) -> None:
        """Writes the detector to the folder `path`, without the model: `load` is given it again.

        Raises:
          ValueError: where `path` exists already, or the chains were not kept.
        """
        if not isinstance(self.draws, NumberedDraws | StoredDraws):
            raise ValueError("test: a detector of chains that was fitted together with test examples cannot be saved")
        scorer = self.scorer
        settings = {
            "model": fingerprint(self.params),
            "coupling": scorer.coupling,
            "traces": scorer.traces,
            **{name: getattr(self, name) for name in _SAVED},
        }
        arrays: dict[str, Any] = {
            "trusted": scorer.trusted,
            "trusted_couplings": scorer.left_out,
        }
        if scorer.trusted_classes is not None:
            arrays["trusted_classes"] = scorer.trusted_classes
        if scorer.trace_map is not None:
            arrays["trace_map"] = {name: x for name, x in scorer.trace_map._asdict().items() if x is not None}
        if isinstance(self.draws, GaussianDraws):
            settings |= {"drawn": list(self.draws.drawn), "antithetic": self.draws.antithetic}
            arrays["gaussian"] = {
                "rng_key": jax.random.key_data(self.draws.rng_key),
                "scales": self.draws.scales,
                "unit": dict(enumerate(self.draws.unit)),
            }
        elif isinstance(self.draws, TangentDraws):
            settings |= {"drawn": list(self.draws.drawn), "draws_of_each": self.draws.draws_of_each}
            arrays["tangent"] = {"rng_key": jax.random.key_data(self.draws.rng_key), "moved": self.draws.moved}
        else:
            arrays["stored"] = dict(enumerate(jax.tree.leaves(self.draws.stacked)))
        checkpoint.save(path, settings, arrays)

    @classmethod
    def load(cls, path: str | Path, loss_fn: LossFn, params: Params) -> Detector:
        """Reads a saved detector, for the model it was fitted on.

        Raises:
          ValueError: where `path` holds no detector, or one of another model.
        """
        settings, arrays = checkpoint.load(path)
        if settings["model"] != fingerprint(params):
            raise ValueError(f"params: {path} was fitted on a model with other parameters")
        if "gaussian" in arrays:
            saved = arrays["gaussian"]
            draws = GaussianDraws(
                jax.random.wrap_key_data(jnp.asarray(saved["rng_key"])),
                params,
                _in_order(saved["unit"]),
                jnp.asarray(saved["scales"]),
                tuple(settings["drawn"]),
                settings.get("antithetic", False),  # detectors of the first version lack it
            )
        elif "tangent" in arrays:
            saved = arrays["tangent"]
            draws = TangentDraws(
                jax.random.wrap_key_data(jnp.asarray(saved["rng_key"])), params, jnp.asarray(saved["moved"]),
                tuple(settings["drawn"]), settings["draws_of_each"],
            )  # fmt: skip
        else:
            draws = StoredDraws(jax.tree.unflatten(jax.tree.structure(params), _in_order(arrays["stored"])))
        trace_map = arrays.get("trace_map")
        scorer = Scorer(
            settings["coupling"],
            settings["traces"],
            arrays["trusted"],
            arrays.get("trusted_classes"),
            arrays["trusted_couplings"],
            # what was saved before least was part of the map had this one
            None
            if trace_map is None
            else TraceMap(trace_map["mean"], trace_map.get("root"), trace_map.get("least", 1e-5)),
            getattr(draws, "num_parts", 1),
        )
        return cls(loss_fn, params, draws, scorer, *(settings[name] for name in _SAVED))


@dataclasses.dataclass(frozen=True)
class _Joined:
    """Two arrays end to end; of a slice, only what it needs is read."""

    first: Any
    second: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.first) + len(self.second), *self.first.shape[1:])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        split = len(self.first)
        parts = (
            self.first[min(start, split) : min(stop, split)],
            self.second[max(start - split, 0) : max(stop - split, 0)],
        )
        return np.concatenate([np.asarray(part) for part in parts])

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        del copy
        return np.asarray(self[:], dtype)


def explain(loss_fn: LossFn, params: Params, examples: Batch, name: str) -> Batch:
    """The examples, checked, with the model's own output as their label where the loss can tell it."""
    check_examples(examples, name)
    label = getattr(loss_fn, "label", None)
    if label is None or hosts.count() == 1:
        return examples if label is None else label(params, examples)
    # every host asks about its own examples; one that has none asks about the first, and drops the answer
    count = num_examples(examples)
    here = hosts.host_range(count)
    some = slice(here.start, here.stop) if here.stop > here.start else slice(0, 1)
    labels = np.asarray(label(params, jax.tree.map(lambda leaf: leaf[some], examples))["label"])
    return {**examples, "label": hosts.gather(labels[: here.stop - here.start], count)}


def check_examples(examples: Batch, name: str) -> None:
    """Raises unless there are examples, of one length, with finite numbers."""
    if num_examples(examples, name) < 1:
        raise ValueError(f"{name}: wanted at least one example, got none")
    for path, leaf in jax.tree_util.tree_leaves_with_path(examples):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            ensure_finite(np.asarray(leaf), f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}")


def check_shapes(examples: Batch, wanted: dict[str, list[int]]) -> None:
    """Raises ValueError unless examples have the arrays and shapes of the trusted ones, but for their number."""
    shapes = example_shapes(examples)
    if shapes.keys() != wanted.keys():
        raise ValueError(f"examples: wanted the arrays {', '.join(wanted)} as in trusted, got {', '.join(shapes)}")
    for name, shape in shapes.items():
        if shape != wanted[name]:
            inner = ", ".join(map(str, wanted[name]))
            count = num_examples(examples)
            raise ValueError(f"examples/{name}: wanted shape [n, {inner}] as in trusted, got {[count, *shape]}")


def example_shapes(examples: Batch) -> dict[str, list[int]]:
    """The shape of one example by path, without the label."""
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape[1:])
        for path, leaf in jax.tree_util.tree_leaves_with_path(examples)
    }
    shapes.pop("label", None)  # made by the model, so test examples need none
    return shapes


def check_parameters(params: Params) -> None:
    """Raises FloatingPointError that names the first parameter which is not finite."""
    for name, leaf in zip(path_names(params), jax.tree.leaves(params), strict=True):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.isfinite(leaf).all()):
            ensure_finite(np.asarray(leaf), f"params: {name}")


def fingerprint(tree: Any) -> str:
    """SHA-256 of the names and bytes of a pytree's arrays."""
    digest = hashlib.sha256()
    for name, leaf in zip(path_names(tree), jax.tree.leaves(tree), strict=True):
        leaf = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _store(
    workdir: str | Path,
    given: dict[str, Any],
    settings: dict[str, Any],
    split: dict[str, int],
    classes: np.ndarray | None,
) -> TraceStore:
    """Losses kept under all that they depend on; `given` are pytrees of arrays."""
    settings = {name: _fingerprint_of_all(tree) for name, tree in given.items()} | settings
    settings |= {"num_hosts": hosts.count(), "device": jax.devices()[0].device_kind}
    hosts.agree("workdir", settings)
    return TraceStore(workdir, settings, split, classes)


def _fingerprint_of_all(tree: Any) -> str | None:
    """Of parameters, a matrix or examples, of which no host looks at more than its share."""
    if tree is None or hosts.count() == 1:
        return None if tree is None else fingerprint(tree)

    def share(leaf: Any) -> Any:
        return leaf[hosts.host_range(np.shape(leaf)[0])] if np.ndim(leaf) else leaf

    return " ".join(hosts.everywhere(fingerprint(jax.tree.map(share, tree))[:16]))


def _classes(examples: Batch) -> np.ndarray | None:
    has_label = isinstance(examples, dict) and "label" in examples
    return np.asarray(examples["label"]) if has_label else None


def _in_order(leaves: dict[str, Any]) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(leaves[str(index)]) for index in range(len(leaves)))
