r"""Out-of-distribution inputs: our detector beside its rivals on the same model, and all of them as one score.

    python -m experiments.ood --dataset=digits --workdir=runs/ood
    python -m experiments.ood --dataset=cifar10 --data_dir=DATA --checkpoint=clean_resnet56_cifar10.th \
        --model=resnet56 --normalization=imagenet --far=mnist,gtsrb,DATA/textures32.npz --resize

In distribution are test images of `--dataset`, right or wrong: half are trusted, half benign. OOD sets come by a name
or path of `madjax.data.load_images`, in OpenOOD v1.5's groups (Zhang et al. 2023, arXiv 2306.09301): on CIFAR-10 near
are CIFAR-100 and Tiny-ImageNet, far MNIST, SVHN, Textures and Places365; `cifar100`, `svhn_cropped` and
`places365_small` need tfds and a network. Of Tiny-ImageNet only classes without an object of CIFAR-10 count
(`OVERLAP`). `jpeg` is the control: benign images after a JPEG round trip, for Tiny-ImageNet and DTD were compressed
that way. On digits the model learns 0 to 7; near are its `held_out` 8 and 9, far `patches` of the two photographs that
scikit-learn ships.

`combined` adds what our detector knows to what the rivals know: every part is brought to the mean and spread that it
has on trusted examples, each scored by a fit that did not see it, and weighed; the sum is calibrated on them as any
score. Metrics are OpenOOD's, with OOD as positive: AUROC, FPR at 95 % of OOD caught, area under precision and recall of
the out- and of the in-distribution; near and far are unweighted means over sets.

Writes config.json, results.json and, under losses/, what was swept. A second run with the same --workdir resumes.
"""

from __future__ import annotations

import io
import math
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from PIL import Image
from sklearn.datasets import load_sample_images

from experiments import cases, common, detection
from experiments.cases import Case
from madjax import Scores, calibration, report
from madjax.baselines import BASELINES
from madjax.data import load_images, split_by_class
from madjax.metrics import auroc, average_precision, fpr_at_recall

# classes of Tiny-ImageNet that show what CIFAR-10 has a class for, by WordNet id
OVERLAP = {
    "n01855672": "goose", "n02002724": "black stork", "n02056570": "king penguin", "n02058221": "albatross",
    "n02123045": "tabby", "n02123394": "Persian cat", "n02124075": "Egyptian cat",
    "n02085620": "Chihuahua", "n02094433": "Yorkshire terrier", "n02099601": "golden retriever",
    "n02099712": "Labrador retriever", "n02106662": "German shepherd", "n02113799": "standard poodle",
    "n01641577": "bullfrog", "n01644900": "tailed frog",
    "n02814533": "beach wagon", "n03100240": "convertible", "n03670208": "limousine", "n03977966": "police van",
    "n04285008": "sports car", "n03796401": "moving van", "n03662601": "lifeboat",
}  # fmt: skip
_NEAR = {"digits": ["held_out"], "cifar10": ["tiny_imagenet"]}
_FAR = {"digits": ["patches"], "cifar10": ["mnist", "gtsrb"]}
# a quarter of coupling was the best of 1, 1/2 and 1/4 on CIFAR-10's ResNet-20; on digits it is as good as the others
_PARTS, _PARTS_OF_DIGITS = ["functional:0.25", "energy", "knn"], ["functional", "energy", "knn"]
_KNOWN_DIGITS = 8


def _part(text: str) -> tuple[str, float]:
    """A part and its weight."""
    name, _, given = text.partition(":")
    try:
        weight = float(given or 1)
    except ValueError:
        weight = math.nan
    known = (detection.FUNCTIONAL, *BASELINES)
    if name not in known or not 0 < weight < math.inf:
        raise ValueError(f"wanted part or part:weight of {', '.join(known)}, got {text!r}")
    return name, weight


common.define_training_flags()
common.define_seeds()
common.define_weights("Weights: torch, safetensors or orbax; a model is trained if not given.")
flags.DEFINE_list("near", None, "OOD sets that are near; held_out for digits, tiny_imagenet for cifar10 if not given.")
flags.DEFINE_list("far", None, "OOD sets that are far; patches for digits, mnist and gtsrb for cifar10 if not given.")
flags.DEFINE_bool("jpeg", True, "Add the JPEG control.")
flags.DEFINE_bool("resize", False, "Bring OOD images of another size, or with other channels, to the model's.")
flags.DEFINE_integer("num_ood", 500, "Images of each OOD set at most.", lower_bound=1)
detection.define_detectors(with_ours=True)
flags.FLAGS.set_default("detector", [detection.FUNCTIONAL, "msp", "energy", "knn", "vim", "mahalanobis"])
common.define_texts(
    "parts", None, _part, "What is combined, a detector or detector:weight each; functional:0.25,energy,knn if not "
    "given, and functional,energy,knn for digits.",
)  # fmt: skip
flags.DEFINE_string("workdir", "runs/ood", "Folder for results.")
detection.define_flags()
# what is no backdoor shows in how sure the model is as well: small perturbations keep that, and these traces show it
flags.FLAGS.set_default("retained", 0.95)
flags.FLAGS.set_default("traces", "margins")

_OWN_FLAGS = ["seed", "checkpoint", "normalization", "near", "far", "jpeg", "resize", "num_ood", "detector", "parts"]


def main() -> None:
    """Runs all seeds and prints the table."""
    values = flags.FLAGS
    near = values.near if values.near is not None else _NEAR.get(values.dataset, [])
    far = values.far if values.far is not None else _FAR.get(values.dataset, [])
    if not near + far:
        raise ValueError(f"near, far: wanted the OOD sets for {values.dataset}, got none")
    weights = _weights(values.parts, values.dataset)
    groups = dict.fromkeys(near, "near") | dict.fromkeys(far, "far") | ({"jpeg": "control"} if values.jpeg else {})
    names = [*common.TRAINING_FLAGS, *_OWN_FLAGS, *detection.flag_names()]
    workdir, config = common.open_workdir(values.workdir, names)
    rows = [row for seed in values.seed for row in _run(int(seed), groups, weights, workdir)]
    report.write_json(workdir / "results.json", {"config": config, "device": common.device(), "rows": rows})
    _print(rows)
    print(f"\nresults in {workdir}")


def _weights(parts: list[str] | None, dataset: str) -> dict[str, float]:
    """By part."""
    parts = parts or (_PARTS_OF_DIGITS if dataset == "digits" else _PARTS)
    weights = dict(map(_part, parts))
    if len(weights) < len(parts):
        raise ValueError(f"parts: wanted each once, got {','.join(parts)}")
    return weights


def _run(seed: int, groups: dict[str, str], weights: dict[str, float], workdir: Path) -> list[dict[str, Any]]:
    values, folder = flags.FLAGS, workdir / "losses" / str(seed)
    case, others = _case(seed, workdir)
    pool = case.pool
    parts = split_by_class(cases.cell_rng("ood", seed), pool.labels, (0.5, 0.5), pool.groups)
    trusted, benign = ({"image": pool.images[part]} for part in parts)
    sets = {name: _ood(name, others, benign["image"], seed) for name in groups}

    settings = detection.settings_from_flags("default")
    start = time.perf_counter()
    detector = detection.fit(settings, seed, case.loss_fn, case.params, trusted, None, None, folder / "trusted")
    ours: dict[str, Scores] = {}
    asked = {"benign": benign["image"]} | sets
    for name, images in asked.items():
        swept = detector.sweep({"image": images}, workdir=folder / Path(name).name, progress=True)
        ours[name] = detector.score_losses(*swept)
    scored = {detection.FUNCTIONAL: ours}
    trusted_scores = {detection.FUNCTIONAL: -detector.scorer.trusted_couplings}
    num_draws, num_trusted, num_asked = len(detector.scorer.trusted), len(parts[0]), sum(map(len, asked.values()))
    forwards = detection.sample_forwards(detector, num_asked) / (num_trusted + num_asked)
    costs = {detection.FUNCTIONAL: _Cost(time.perf_counter() - start, forwards)}
    rivals = dict.fromkeys([*values.detector, *weights])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fewer trusted examples than the published settings are made for
        for rival in detection.fit_rivals(case.loss_fn, case.params, trusted, rivals, fpr=values.fpr):
            start = time.perf_counter()
            trusted_scores[rival.name] = rival.baseline.trusted_scores
            scored[rival.name] = {name: rival.baseline.score({"image": images}) for name, images in asked.items()}
            seconds = rival.seconds + time.perf_counter() - start
            costs[rival.name] = _Cost(seconds, rival.baseline.statistic.forwards)
    shares = _combine(scored, trusted_scores, weights, values.fpr)
    costs["combined"] = _Cost(*np.sum([costs[part] for part in weights], axis=0))
    accuracy = float((case.predict(benign["image"]) == pool.labels[parts[1]]).mean())
    return [
        _row(method, name, group, seed, scored[method]["benign"], scored[method][name], num_trusted)
        | {"acc": accuracy, "scale": detector.scale, "num_draws": num_draws}
        | {"seconds": float(costs[method].seconds), "forwards_per_example": float(costs[method].forwards_per_example)}
        | ({"shares": shares[name]} if method == "combined" else {})
        for method in scored
        for name, group in groups.items()
    ]


class _Cost(NamedTuple):
    """Of fitting a detector and scoring all sets: seconds, those that a resumed run saves not counted."""

    seconds: float
    forwards_per_example: float


def _combine(
    scored: dict[str, dict[str, Scores]], trusted_scores: dict[str, np.ndarray], parts: dict[str, float], fpr: float
) -> dict[str, dict[str, float]]:
    """Adds the scores of `combined`; returns each part's share of what sets a set apart from the benign, by set.

    Args:
      parts: their weights.
    """
    moments = {part: (trusted_scores[part].mean(), trusted_scores[part].std()) for part in parts}

    def standard(part: str, scores: np.ndarray) -> np.ndarray:
        mean, spread = moments[part]
        return parts[part] * (scores - mean) / max(spread, 1e-12)

    trusted = np.sum([standard(part, trusted_scores[part]) for part in parts], axis=0)
    sums, excess = {}, {}
    for name, one in scored[next(iter(parts))].items():
        terms = {part: standard(part, scored[part][name].anomaly_score) for part in parts}
        total = np.sum(list(terms.values()), axis=0)
        p_value = calibration.p_values(-trusted, -total)
        sums[name] = Scores(total, p_value, p_value <= fpr, one.prediction, np.zeros((len(total), 0), int))
        excess[name] = {part: float(term.mean()) for part, term in terms.items()}
    scored["combined"] = sums
    shares = {}
    for name in sums:
        gap = {part: excess[name][part] - excess["benign"][part] for part in parts}
        whole = sum(gap.values())
        shares[name] = {part: value / whole if whole else math.nan for part, value in gap.items()}
    return shares


def _row(
    method: str, name: str, group: str, seed: int, benign: Scores, ood: Scores, num_trusted: int
) -> dict[str, Any]:
    within, out = benign.anomaly_score, ood.anomaly_score
    return {
        "attack": Path(name).stem,
        "group": group,
        "detector": method,
        "seed": seed,
        "auroc": auroc(within, out),
        "fpr_at_95": fpr_at_recall(within, out, 0.95),
        "aupr_out": average_precision(within, out),
        "aupr_in": average_precision(-out, -within),
        "realized_fpr": float(benign.flagged.mean()),
        "tpr": float(ood.flagged.mean()),
        "num_trusted": num_trusted,
        "num_benign": len(within),
        "num_anomalous": len(out),
    }


def _case(seed: int, workdir: Path) -> tuple[Case, np.ndarray]:
    """The model with in-distribution images, and images of classes that it did not learn."""
    values, recipe = flags.FLAGS, common.recipe_from_flags()
    if values.checkpoint is not None:
        case = cases.read_case(Path(values.checkpoint), recipe, "clean", values.normalization, seed)
        return case, case.pool.images[:0]
    if values.dataset == "digits":
        return cases.train_known(_KNOWN_DIGITS, seed, recipe, workdir / "models" / f"known-{seed}")
    case = cases.train_case("clean", seed, recipe, workdir / "models" / f"clean-{seed}")
    return case, case.pool.images[:0]


def _ood(name: str, others: np.ndarray, benign: np.ndarray, seed: int) -> np.ndarray:
    """At most `--num_ood` images of one set, uint8 of the shape of the benign ones.

    Raises:
      ValueError: images of another size or with other channels, unless `--resize` asks for it.
    """
    values, rng, shape = flags.FLAGS, np.random.default_rng(seed), benign.shape[1:]
    if name == "jpeg":
        return np.stack([_jpeg(image) for image in benign[: values.num_ood]])
    if name == "held_out":
        images = others
        if not len(images):
            raise ValueError("near: held_out is for --dataset=digits, of which the model learns a part")
    elif name == "patches":
        images = _patches(rng, shape, values.num_ood)
    else:
        found = load_images(name, "all" if name.endswith("textures32.npz") else "test", data_dir=values.data_dir)
        known = np.ones(len(found.labels), bool)
        if found.class_names is not None and name == "tiny_imagenet":
            known = ~np.isin(np.array(found.class_names)[found.labels], list(OVERLAP))
        images = found.images[known]
    images = images[np.sort(rng.permutation(len(images))[: values.num_ood])]
    if images.shape[1:] != shape and not values.resize:
        raise ValueError(
            f"{name}: its images are {images.shape[1:]} and the model's {shape}; --resize brings them to that"
        )
    return images if images.shape[1:] == shape else np.stack([_resized(image, shape) for image in images])


def _resized(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    picture = picture.convert("L" if shape[-1] == 1 else "RGB").resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(picture).reshape(shape)


def _jpeg(image: np.ndarray) -> np.ndarray:
    """After a round trip at quality 75, Pillow's and most cameras' default."""
    file = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(file, "JPEG", quality=75)
    return np.asarray(Image.open(file)).reshape(image.shape)


def _patches(rng: np.random.Generator, shape: tuple[int, ...], count: int) -> np.ndarray:
    """Random squares of scikit-learn's sample photographs, of 1 to 16 times the size."""
    photographs = load_sample_images().images
    patches = []
    for _ in range(count):
        photograph = photographs[rng.integers(len(photographs))]
        side = shape[0] * int(rng.integers(1, 17))
        row, column = (int(rng.integers(0, length - side + 1)) for length in photograph.shape[:2])
        patches.append(_resized(photograph[row : row + side, column : column + side], shape))
    return np.stack(patches)


def _print(rows: list[dict[str, Any]]) -> None:
    """Means over seeds, for every set, and over the sets of a group."""
    columns = {
        name: [row for row in rows if row["attack"] == name] for name in dict.fromkeys(r["attack"] for r in rows)
    }
    for group in dict.fromkeys(row["group"] for row in rows):
        columns[f"[{group}]"] = [row for row in rows if row["group"] == group]
    print("AUROC / FPR at 95 % of OOD caught, both in %")
    print(
        f"{'detector':<14}"
        + "".join(f"{name[:13]:>14}" for name in columns)
        + f"{'flagged':>9}{'seconds':>9}{'forwards':>9}"
    )
    for method in dict.fromkeys(row["detector"] for row in rows):
        cells = ""
        for some in columns.values():
            mine = [row for row in some if row["detector"] == method]
            area, rate = (100 * np.mean([row[key] for row in mine]) for key in ("auroc", "fpr_at_95"))
            cells += f"{area:>8.1f} /{rate:>4.0f}"
        flagged, seconds, forwards = (
            np.mean([row[key] for row in rows if row["detector"] == method])
            for key in ("realized_fpr", "seconds", "forwards_per_example")
        )
        print(f"{method:<14}{cells}{flagged:>9.1%}{seconds:>9.1f}{forwards:>9.1f}")
    combined = [row for row in rows if row["detector"] == "combined"]
    for name in dict.fromkeys(row["attack"] for row in combined):
        mine = [row["shares"] for row in combined if row["attack"] == name]
        print(f"shares, {name}: " + ", ".join(f"{part} {np.mean([s[part] for s in mine]):.0%}" for part in mine[0]))


if __name__ == "__main__":
    common.run(main)
