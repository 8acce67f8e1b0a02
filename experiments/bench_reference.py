r"""The reference procedure through devinterp and torch, and ours: time, forward passes and AUROC on the same models.

    pip install torch && pip install --no-deps devinterp==1.3.2
    python -m experiments.bench_reference --data=DATA
    python -m experiments.bench_reference --data=DATA --models=checkpoint --checkpoint=runs/cifar/models/badnet-0

On each model, in one run: a chain of RMSprop-SGLD by devinterp with the paper's settings, at each draw the losses of
the trusted and the test images by torch, and class correlation; the same procedure by madjax, chain and all; madjax
with its defaults. All get the same weights, images and split, and a GPU where there is one. madjax runs each program
once before it is timed, so that no compilation counts. The defaults' time is the median of --repeats; the 2,000 steps
of the chains are run once.

Prints a line a model and procedure, and JSON as the last line.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import cases, common, detection
from madjax import Detector, Gaussian, Langevin
from madjax.coupling import DEFAULT, couplings
from madjax.metrics import auroc, recall_at_fpr
from madjax.models import to_arrays
from madjax.models.convert import TORCH_LEAVES
from madjax.sampling.perturbation import Perturbation
from madjax.scorer import Traces

_MODELS = ["digits", "cnn_mnist", "cnn_cifar10", "checkpoint"]

flags.DEFINE_string("data", None, "Folder with checkpoints and data sets, for all models but the digits'.")
common.define_list("models", ["digits"], _MODELS, "Models, each with a backdoor.")
flags.DEFINE_string("checkpoint", None, "For checkpoint: a preact_resnet18 that experiments.backdoor kept.")
common.define_layout()
flags.FLAGS.set_default("layout", "host")
flags.DEFINE_integer("batch_size", 256, "Images of a forward pass of our sweep.", lower_bound=1)
flags.DEFINE_integer("num_draws", 1750, "Draws of the chains, a step each.", lower_bound=4)
flags.DEFINE_integer("num_burnin_steps", 250, "Steps before them.", lower_bound=0)
flags.DEFINE_integer("num_default_draws", 64, "Draws of madjax's default sampler.", lower_bound=2)
flags.DEFINE_integer("num_pool", 1200, "Images to split into trusted, sampling and test.", lower_bound=20)
flags.DEFINE_integer("repeats", 5, "Runs of the defaults.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed of training, split and draws.")


def main() -> None:
    """Runs all procedures on every model."""
    values, results = flags.FLAGS, {}
    if (values.checkpoint is None) == ("checkpoint" in values.models):
        raise ValueError("checkpoint: wanted it and the model checkpoint, or neither")
    for name in values.models:
        results[name] = _compare(name)
        for procedure, row in results[name].items():
            print(
                f"{name:<12} {procedure:<18} {row['seconds']:>8.1f} s {row['forward_passes']:>9} forward passes  "
                f"AUROC {row['auroc']:.3f}",
                flush=True,
            )
    print(json.dumps({"device": common.device(), **_settings(), "models": results}))


def _settings() -> dict[str, Any]:
    names = [
        "num_draws",
        "num_burnin_steps",
        "num_default_draws",
        "num_pool",
        "repeats",
        "seed",
        "layout",
        "batch_size",
    ]
    return {name: flags.FLAGS[name].value for name in names}


def _compare(name: str) -> dict[str, dict[str, Any]]:
    values = flags.FLAGS
    if name == "digits":
        case = cases.train_case("badnet", values.seed)
    elif name == "checkpoint":
        case = cases.load_case(Path(values.checkpoint), values.data, values.num_pool)
    else:
        case = cases.PUBLISHED[name](Path(values.data))
    case = cases.subset(case, values.num_pool)
    test_set = cases.make_test_set(case, "badnet", values.seed)
    sampling = test_set.sampling

    def measure(run: Callable[[], tuple[np.ndarray, int]], repeats: int) -> dict[str, Any]:
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            scores, forward_passes = run()
            seconds.append(time.perf_counter() - start)
        benign, anomalous = scores[~test_set.is_anomalous], scores[test_set.is_anomalous]
        return {
            "seconds": statistics.median(seconds),
            "forward_passes": forward_passes,
            "auroc": auroc(benign, anomalous),
            "recall_at_1%": recall_at_fpr(benign, anomalous, 0.01),
        }

    def ours(perturbation: Perturbation, num_draws: int, coupling: str, traces: Traces) -> tuple[np.ndarray, int]:
        test = {"image": test_set.images}
        detector = Detector.fit(
            jax.random.key(values.seed), case.loss_fn, case.params, test_set.trusted, test=test, sampling=sampling,
            perturbation=perturbation, num_draws=num_draws, coupling=coupling, traces=traces, layout=values.layout,
            batch_size=values.batch_size,
        )  # fmt: skip
        assert detector.test is not None
        scores = detector.score_losses(*detector.test).anomaly_score
        return scores, detection.sample_forwards(detector, len(test_set.images))

    def chain(num_draws: int, num_burnin_steps: int) -> tuple[np.ndarray, int]:
        langevin = Langevin(num_burnin_steps=num_burnin_steps, drift=True)
        return ours(langevin, num_draws, "class_correlation", "raw")

    def defaults() -> tuple[np.ndarray, int]:
        return ours(Gaussian(), values.num_default_draws, DEFAULT, "whitened")

    chain(4, 0)  # compiles
    defaults()
    return {
        "devinterp": measure(lambda: _devinterp(case, test_set, name), 1),
        "the same by madjax": measure(lambda: chain(values.num_draws, values.num_burnin_steps), 1),
        "madjax's defaults": measure(defaults, values.repeats),
    }


def _devinterp(case: cases.Case, test_set: cases.TestSet, name: str) -> tuple[np.ndarray, int]:
    """Anomaly scores by the reference's own code and torch, and the forward passes that it took."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
        from devinterp.optim.sgmcmc import SGMCMC  # pyright: ignore[reportMissingImports]
        from devinterp.slt.sampler import sample  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"devinterp: {error}; pip install torch, and --no-deps devinterp==1.3.2") from error
    from experiments import torch_networks

    values = flags.FLAGS
    size, _, channels = case.pool.images.shape[1:]
    if name == "checkpoint":
        net = torch_networks.Residual("preact", (64, 128, 256, 512), 2, channels)
    else:
        net = (torch_networks.digits if name == "digits" else torch_networks.badnets)(channels, size)
    net.load_state_dict(_torch_weights(case, net))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net.to(device)
    cross_entropy = torch.nn.functional.cross_entropy
    images = np.concatenate([test_set.trusted["image"], test_set.images])
    batches = _images(case, images).to(device).split(256)
    net.eval()
    with torch.no_grad():
        answers = [net(batch).argmax(1) for batch in batches]
    predicted = torch.cat(answers).cpu().numpy()
    # rounding on a GPU may tip a few
    if np.mean(predicted != case.predict(images)) > (0 if device == "cpu" else 0.005):
        raise ValueError(f"models: torch's {name} does not answer as ours does")
    losses = np.empty((values.num_draws, len(images)), np.float32)

    def record(*, model: Any, draw: int, **_: Any) -> None:
        model.eval()
        parts = [cross_entropy(model(x), y, reduction="none") for x, y in zip(batches, answers, strict=True)]
        losses[draw] = torch.cat(parts).cpu().numpy()

    data = torch.utils.data.TensorDataset(
        _images(case, test_set.sampling["image"]), torch.from_numpy(test_set.sampling["label"].astype(np.int64))
    )
    sample(
        net,
        torch.utils.data.DataLoader(data, batch_size=256, shuffle=True),
        [record],
        evaluate=lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        sampling_method=SGMCMC.rmsprop_sgld,
        optimizer_kwargs={"lr": 1e-6, "nbeta": 100.0, "localization": 1e4},
        num_draws=values.num_draws,
        num_chains=1,
        num_burnin_steps=values.num_burnin_steps,
        seed=values.seed,
        device=device,
        verbose=False,
    )
    count = len(test_set.trusted["image"])
    classes = predicted[:count]
    scores = -couplings("class_correlation", losses[:, :count], losses[:, count:], classes)
    steps = values.num_draws + values.num_burnin_steps
    return scores, losses.size + 3 * steps * min(256, len(data))


def _images(case: cases.Case, images: np.ndarray) -> Any:
    import torch  # pyright: ignore[reportMissingImports]

    normalized = np.asarray(case.loss_fn.module.preprocess(images))
    return torch.from_numpy(normalized.transpose(0, 3, 1, 2).copy())


def _torch_weights(case: cases.Case, net: Any) -> dict[str, Any]:
    """Our parameters by torch's names and in torch's order of axes."""
    import torch  # pyright: ignore[reportMissingImports]

    result = {}
    for path, array in to_arrays(case.params).items():
        module, kind = path.rsplit(".", 1)
        array = np.asarray(array)
        if kind == "kernel":
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        leaf = TORCH_LEAVES[kind]
        # the published CNN has every layer as the first of a few
        name = next(one for one in (f"{module}.{leaf}", f"{module}.0.{leaf}") if one in net.state_dict())
        result[name] = torch.from_numpy(array.copy())
    missing = {name: value for name, value in net.state_dict().items() if name.endswith("num_batches_tracked")}
    return result | missing


if __name__ == "__main__":
    common.run(main)
