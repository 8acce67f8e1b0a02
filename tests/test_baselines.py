"""Baselines against independent implementations on the same features, and what all of them share."""

from contextlib import nullcontext

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import nnx
from sklearn.covariance import OAS, EmpiricalCovariance, ShrunkCovariance
from sklearn.ensemble import IsolationForest

from madjax import calibration, from_linen, from_nnx
from madjax.baselines import (
    BASELINES,
    KNN,
    LOF,
    TED,
    VAE,
    Baseline,
    Beatrix,
    ClassMahalanobis,
    Gram,
    Isolation,
    Mahalanobis,
    Model,
    QuantumEntropy,
    RelativeMahalanobis,
    Spectral,
    ViM,
    gram,
    ted,
    vae,
)
from madjax.baselines import lookup as baseline_named
from madjax.baselines import model as model_module
from madjax.baselines.baseline import Transductive, cross_fitted, rows
from madjax.baselines.features import OfFeatures
from madjax.baselines.model import Layers
from tests.conftest import to_unit

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def observed(count, seed, size=6, num_classes=3, spread=1.0):
    """Logits and features around class means, float32."""
    rng = np.random.default_rng(seed)
    kernel = np.random.default_rng(9).normal(size=(size, num_classes))
    features = rng.normal(size=(count, size)) * np.linspace(0.5, 2, size) * spread
    features += 2 * kernel.T[rng.integers(num_classes, size=count)]
    return {"features": features.astype(np.float32), "logits": (features @ kernel).astype(np.float32)}


TRUSTED, TEST = observed(60, 0), observed(25, 1, spread=1.5)


def classes_of(values):
    return values["logits"].argmax(1)


# --- reading a model


class Mlp(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, image):
        x = flax.linen.relu(flax.linen.Dense(12, name="first")(image.reshape(len(image), -1)))
        return flax.linen.Dense(10, name="last")(x)


@pytest.fixture(scope="module")
def images(examples):
    return examples["image"]


@pytest.fixture(scope="module")
def linen(images):
    module = Mlp()
    return module, module.init(jax.random.key(0), to_unit(images[:1]))


def test_layers_of_an_nnx_model_are_what_they_compute(digits_model, images):
    loss_fn, params = digits_model
    model = Model(loss_fn, params, batch_size=16)
    before = nnx.Conv.__call__
    names = ("conv2", "hidden:input", "output:input")
    read = model.read(Layers(names), images)
    assert nnx.Conv.__call__ is before  # nothing is left on the classes of the user's model
    network = nnx.merge(loss_fn.module.graphdef, loss_fn.module.rng_state, params)
    network.eval()
    network.set_attributes(use_running_average=True, raise_if_not_found=False)
    convolved = network.conv2(nnx.relu(network.norm1(network.conv1(to_unit(jnp.asarray(images))))))
    np.testing.assert_allclose(read["conv2"], convolved.mean((1, 2)), atol=1e-5)
    np.testing.assert_allclose(read["output:input"], nnx.relu(network.hidden(read["hidden:input"])), atol=1e-5)
    np.testing.assert_allclose(read["logits"], network(to_unit(jnp.asarray(images))), atol=1e-5)
    assert read["logits"].dtype == np.float32
    assert model.find(None, images) == "output:input"
    assert model.layers(images)["conv2"] == (8, 8, 32)
    kernel, bias = model.head_weights(images)
    np.testing.assert_allclose(read["output:input"] @ kernel + bias, read["logits"], atol=1e-4)


def test_layers_of_a_linen_model(linen, images):
    module, variables = linen
    model = Model(*from_linen(module, variables, preprocess=to_unit), batch_size=16)
    read = model.read(Layers(("first", "last:input")), images)
    weights = jax.tree.map(np.asarray, variables["params"]["first"])
    flat = images.reshape(len(images), -1) / 255
    np.testing.assert_allclose(read["first"], flat @ weights["kernel"] + weights["bias"], atol=1e-5)
    np.testing.assert_allclose(read["last:input"], np.maximum(read["first"], 0), atol=1e-6)
    assert model.find(None, images) == "last:input"
    kernel, bias = model.head_weights(images)
    np.testing.assert_allclose(read["last:input"] @ kernel + bias, read["logits"], atol=1e-4)


def test_features_too_large_for_memory_lie_on_disk(digits_model, images, monkeypatch):
    model = Model(*digits_model, batch_size=16)
    in_memory = model.read(Layers(("conv2",)), images)
    monkeypatch.setattr(model_module, "MAX_BYTES_IN_MEMORY", 100)
    on_disk = model.read(Layers(("conv2",)), images)
    assert isinstance(on_disk["conv2"], np.memmap)
    np.testing.assert_array_equal(on_disk["conv2"], in_memory["conv2"])


def test_what_cannot_be_read_is_told(digits_model, images):
    model = Model(*digits_model)
    with pytest.raises(ValueError, match=r"^layer: the model has no 'conv3'; near are .*conv2"):
        model.find("conv3", images)
    with pytest.raises(ValueError, match=r"^loss_fn: wanted one of from_nnx, from_linen or from_decoder"):
        Model(lambda params, batch: batch, {})


def test_a_model_without_a_linear_layer():
    class Mean(nnx.Module):
        def __call__(self, image):
            return image.mean((1, 2))

    model = Model(*from_nnx(Mean(), preprocess=to_unit))
    with pytest.raises(ValueError, match=r"^layer: the model has no linear layer"):
        model.find(None, np.zeros((2, 4, 4, 3), np.uint8))


# --- statistics, by published formulas re-derived or by scikit-learn


def test_output_statistics():
    """The formulas of pytorch-ood and OpenOOD, one example at a time."""
    wanted = {name: [] for name in ("msp", "entropy", "energy", "max_logit", "loss")}
    for row in TEST["logits"].astype(float):
        p = np.exp(row) / np.exp(row).sum()
        wanted["msp"].append(-max(p))
        wanted["entropy"].append(-sum(x * np.log(x) for x in p))
        wanted["energy"].append(-np.log(sum(np.exp(row))))
        wanted["max_logit"].append(-max(row))
        wanted["loss"].append(-np.log(p[np.argmax(row)]))
    for name, values in wanted.items():
        np.testing.assert_allclose(BASELINES[name].fit(TRUSTED)(TEST), values, **TOLERANCE)


@pytest.mark.parametrize("shrinkage", [None, 0.0, 0.3])
def test_mahalanobis_is_scikit_learns(shrinkage):
    classes = classes_of(TRUSTED)
    centers = np.stack([TRUSTED["features"][classes == label].mean(0) for label in range(3)])
    estimator = {None: OAS(), 0.0: EmpiricalCovariance(), 0.3: ShrunkCovariance(shrinkage=0.3)}[shrinkage]
    estimator.set_params(assume_centered=True).fit(TRUSTED["features"] - centers[classes])
    wanted = np.min([estimator.mahalanobis(TEST["features"] - center) for center in centers], axis=0)
    np.testing.assert_allclose(Mahalanobis(shrinkage=shrinkage).fit(TRUSTED)(TEST), wanted, **TOLERANCE)
    background = estimator.set_params(assume_centered=False).fit(TRUSTED["features"])
    relative = wanted - background.mahalanobis(TEST["features"])
    np.testing.assert_allclose(RelativeMahalanobis(shrinkage=shrinkage).fit(TRUSTED)(TEST), relative, **TOLERANCE)


def test_class_mahalanobis_is_scikit_learns():
    # one more class, of which only one trusted example is there
    trusted, test = observed(60, 0, num_classes=4), observed(25, 1, num_classes=4)
    classes = classes_of(trusted)
    kept = np.r_[np.flatnonzero(classes != 3), np.flatnonzero(classes == 3)[:1]]
    trusted = rows(trusted, kept)
    classes = classes[kept]
    models = {label: OAS().fit(trusted["features"][classes == label]) for label in range(3)}
    wanted = []
    for features, label in zip(test["features"], classes_of(test), strict=True):
        chosen = [models[label]] if label in models else models.values()
        wanted.append(min(model.mahalanobis(features[None])[0] for model in chosen))
    assert 3 in classes_of(test)
    with pytest.warns(UserWarning, match=r"trusted: some class: 5 examples for 6 features"):
        anomaly = ClassMahalanobis().fit(trusted)
    np.testing.assert_allclose(anomaly(test), wanted, **TOLERANCE)


def test_knn_is_a_double_loop():
    def unit(x):
        return x / np.linalg.norm(x)

    wanted = [
        sorted(np.linalg.norm(unit(x) - unit(y)) for y in TRUSTED["features"])[4] for x in TEST["features"]
    ]  # fmt: skip
    np.testing.assert_allclose(KNN(k=5).fit(TRUSTED)(TEST), wanted, **TOLERANCE)
    farthest = [max(np.linalg.norm(unit(x) - unit(y)) for y in TRUSTED["features"]) for x in TEST["features"]]
    np.testing.assert_allclose(KNN(k=500).fit(TRUSTED)(TEST), farthest, **TOLERANCE)


def test_vim_is_openoods():
    """OpenOOD's vim_postprocessor in NumPy and scikit-learn."""
    covariance = EmpiricalCovariance(assume_centered=True).fit(TRUSTED["features"].astype(float)).covariance_
    values, vectors = np.linalg.eig(covariance)
    rest = vectors[:, np.argsort(-values)[2:]]
    alpha = TRUSTED["logits"].max(1).mean() / np.linalg.norm(TRUSTED["features"] @ rest, axis=1).mean()
    virtual = alpha * np.linalg.norm(TEST["features"] @ rest, axis=1)
    wanted = virtual - np.log(np.exp(TEST["logits"].astype(float)).sum(1))
    np.testing.assert_allclose(ViM(num_dimensions=2).fit(TRUSTED)(TEST), wanted, **TOLERANCE)


def test_vim_starts_where_the_head_is_zero(linen, images):
    module, variables = linen
    biased = jax.tree.map(lambda leaf: leaf + 0.3, variables)  # biases start at zero
    model = Model(*from_linen(module, biased, preprocess=to_unit))
    found = ViM().observe(model, images, images)
    kernel, bias = model.head_weights(images)
    origin = model.read(Layers(("last:input",)), images)["last:input"] - found["features"]
    # of 12 features and 10 outputs there is a point where all outputs are zero
    np.testing.assert_allclose(origin @ kernel + bias, 0, atol=1e-4)


def gram_oracle(x, order):
    """Of one image's values [num_positions, c], as in the published code: powers, products, root of the sign."""
    gram = (x**order).T @ (x**order)
    return np.sign(gram) * np.abs(gram) ** (1 / order)


@pytest.fixture(scope="module")
def maps():
    """Values of two layers with positions, classes, and which of them are trusted."""
    rng = np.random.default_rng(3)
    layers = {"a": rng.normal(size=(70, 4, 5)), "b": rng.gamma(1, size=(70, 2, 3)) * 300}
    logits = np.eye(3)[np.arange(70) % 3]
    return layers, logits, np.arange(70) < 45


def test_beatrix_is_as_published(maps):
    """get_deviations_ of the published code, with loops."""
    layers, logits, is_trusted = maps
    x, classes = layers["a"], logits.argmax(1)
    wanted = np.zeros(25)
    for index, image in enumerate(x[~is_trusted]):
        own = x[is_trusted & (classes == classes[~is_trusted][index])]
        for order in range(1, 9):
            grams = np.stack([np.triu(gram_oracle(one, order)).ravel() for one in own])
            median = np.median(grams, axis=0)
            mad = np.median(np.abs(grams - median), axis=0)
            low, high = median - 10 * mad, median + 10 * mad
            own_gram = np.triu(gram_oracle(image, order)).ravel()
            wanted[index] += (np.maximum(low - own_gram, 0) / np.abs(low + 1e-6)).sum()
            wanted[index] += (np.maximum(own_gram - high, 0) / np.abs(high + 1e-6)).sum()
    wanted = wanted / (5 * 5 / 2) / 8
    grams = np.asarray(gram.upper_triangles(jnp.asarray(x[:, :, None, :], jnp.float32)))
    seen = {"logits": logits, "grams": grams}
    assert wanted.max() > 0
    found = Beatrix().fit(rows(seen, is_trusted))(rows(seen, ~is_trusted))
    np.testing.assert_allclose(found, wanted, **TOLERANCE)


def test_gram_is_as_published(maps):
    """Minima and maxima by class, and deviations in units of those of a tenth that is set aside."""
    layers, logits, is_trusted = maps
    classes, aside = logits.argmax(1), np.arange(70) % 10 == 9

    def sums(x, order):  # the root after the sum over columns
        total = ((x**order).T @ (x**order)).sum(axis=1)
        return np.sign(total) * np.abs(total) ** (1 / order)

    def deviation(x, index):
        own = x[is_trusted & ~aside & (classes == classes[index])]
        total = 0
        for order in range(1, 9):
            values = np.stack([sums(one, order) for one in own])
            low, high, value = values.min(0), values.max(0), sums(x[index], order)
            total += (np.maximum(low - value, 0) / np.abs(low + 1e-6)).sum()
            total += (np.maximum(value - high, 0) / np.abs(high + 1e-6)).sum()
        return total

    wanted = np.zeros(25)
    for x in layers.values():
        unit = np.mean([deviation(x, index) for index in np.flatnonzero(is_trusted & aside)]) + 1e-6
        wanted += [deviation(x, index) / unit for index in np.flatnonzero(~is_trusted)]
    seen = {
        "logits": logits,
        "grams": {name: np.asarray(gram.row_sums(jnp.asarray(x, jnp.float32))) for name, x in layers.items()},
    }
    found = Gram().fit(rows(seen, is_trusted))(rows(seen, ~is_trusted))
    np.testing.assert_allclose(found, wanted, rtol=1e-3)


def test_gram_matrices_of_large_values_are_finite():
    large = jnp.full((1, 2, 2, 3), 1e4)
    np.testing.assert_allclose(gram.row_sums(large)[0, -3:], 1e8 * (4 * 3) ** (1 / 8), rtol=1e-5)


def test_ted_is_as_published(maps):
    """Ranks with loops, and PyOD's PCA by an eigendecomposition."""
    layers, logits, is_trusted = maps
    flat, classes = {name: x.reshape(70, -1) for name, x in layers.items()}, logits.argmax(1)
    trusted = np.flatnonzero(is_trusted)

    def ranks(index):
        result = []
        for x in flat.values():
            distances = {j: np.linalg.norm(x[index] - x[j]) for j in trusted if j != index}
            order = sorted(distances, key=distances.get)
            result.append([classes[j] for j in order].index(classes[index]))
        return result

    seen = {"logits": logits, "layers": flat}
    known, new = (np.array([ranks(i) for i in part], float) for part in (trusted, np.flatnonzero(~is_trusted)))
    mean, deviation = known.mean(0), known.std(0)
    values, vectors = np.linalg.eigh(np.cov((known - mean) / deviation, rowvar=False))
    scaled = (new - mean) / deviation
    found = TED().fit(rows(seen, is_trusted))(rows(seen, ~is_trusted))
    # the sign of a component is nobody's choice, and the distance to it depends on it
    signs = [(s, t) for s in (-1, 1) for t in (-1, 1)]
    candidates = [
        sum(
            np.linalg.norm(scaled - sign * axis, axis=1) / (value / values.sum())
            for sign, axis, value in zip(pair, vectors.T, values, strict=True)
        )
        for pair in signs
    ]
    assert min(np.abs(found - wanted).max() for wanted in candidates) < 1e-4


def test_ted_goes_by_the_names_of_layers(maps):
    layers, logits, is_trusted = maps
    flat = {name: x.reshape(70, -1) for name, x in layers.items()}
    # JAX sorts the names of whatever it is given, and what the model tells is in the order of the layers
    one, other = ({"logits": logits, "layers": dict(sorted(flat.items(), reverse=turned))} for turned in (False, True))

    def part(seen, which):
        return {"logits": seen["logits"][which], "layers": {name: x[which] for name, x in seen["layers"].items()}}

    scores = TED().fit(part(other, is_trusted))(part(one, ~is_trusted))
    np.testing.assert_allclose(scores, TED().fit(part(other, is_trusted))(part(other, ~is_trusted)))


def test_ted_without_a_trusted_example_of_the_class(maps):
    layers, logits, is_trusted = maps
    seen = {"logits": logits, "layers": {name: x.reshape(70, -1) for name, x in layers.items()}}
    anomaly = TED().fit(rows(seen, is_trusted & (logits.argmax(1) < 2)))
    scores = anomaly(rows(seen, ~is_trusted))
    unseen = logits.argmax(1)[~is_trusted] == 2
    assert scores[unseen].min() > scores[~unseen].max()


def test_layers_are_made_coarse():
    array = jnp.arange(2 * 10 * 12 * 16, dtype=jnp.float32).reshape(2, 10, 12, 16)
    found = ted.coarse(array)
    wanted = [np.asarray(array[1, i : i + 2, j : j + 2]).mean((0, 1)) for i in range(0, 10, 2) for j in range(0, 12, 2)]
    np.testing.assert_allclose(found[1], np.concatenate(wanted))


def residuals_of(values, trusted):
    classes = classes_of(trusted)
    centers = np.stack([trusted["features"][classes == label].astype(float).mean(0) for label in range(3)])
    return values["features"] - centers[classes_of(values)]


POOL = {name: np.concatenate([TRUSTED[name], TEST[name]]) for name in TRUSTED}


def test_spectral_signatures_are_as_published():
    """The top eigenvector of a class's examples around the trusted mean."""
    pool, own = residuals_of(POOL, TRUSTED), residuals_of(TEST, TRUSTED)
    wanted = np.zeros(25)
    for label in range(3):
        part = pool[classes_of(POOL) == label]
        axis = np.linalg.eigh(part.T @ part)[1][:, -1]
        chosen = classes_of(TEST) == label
        wanted[chosen] = (own[chosen] @ axis) ** 2
    np.testing.assert_allclose(Spectral().given(POOL).fit(TRUSTED)(TEST), wanted, **TOLERANCE)


@pytest.mark.parametrize("alpha", [0.0, 4.0])
def test_quantum_entropy_is_as_published(alpha):
    """SPECTRE's formula with matrix functions of SciPy."""
    covariance = OAS(assume_centered=True).fit(residuals_of(TRUSTED, TRUSTED)).covariance_
    root = scipy.linalg.inv(scipy.linalg.sqrtm(covariance))
    pool, own = residuals_of(POOL, TRUSTED) @ root, residuals_of(TEST, TRUSTED) @ root
    spread = pool.T @ pool / len(pool)
    excess = np.linalg.norm(spread, 2) - 1
    weight = scipy.linalg.expm(alpha * (spread - np.eye(6)) / excess)
    wanted = np.einsum("ni,ij,nj->n", own, weight, own) / np.trace(weight)
    np.testing.assert_allclose(QuantumEntropy(alpha=alpha).given(POOL).fit(TRUSTED)(TEST), wanted, **TOLERANCE)


def test_what_looks_at_all_examples_is_calibrated_with_them(digits_model, images):
    baseline = Baseline.fit(baseline_named("spectral"), *digits_model, {"image": images[:24]})
    scores = baseline.score({"image": images[24:]})
    seen = [OfFeatures().observe(baseline.model, part, part) for part in (images[:24], images[24:])]
    statistic = Spectral().given({name: np.concatenate([one[name] for one in seen]) for name in seen[0]})
    wanted = calibration.p_values(-cross_fitted(statistic, seen[0]), -statistic.fit(seen[0])(seen[1]))
    np.testing.assert_array_equal(scores.p_value, wanted)


def test_local_outlier_factor_is_the_papers():
    """Breunig et al. 2000, with loops."""
    x, k = TRUSTED["features"].astype(float), 7
    known = np.linalg.norm(x[:, None] - x, axis=2)
    np.fill_diagonal(known, np.inf)
    k_distance = np.sort(known, axis=1)[:, k - 1]

    def density(distances):
        near = np.argsort(distances)[:k]
        return 1 / np.mean(np.maximum(distances[near], k_distance[near])), near

    wanted = []
    for row in TEST["features"]:
        own, near = density(np.linalg.norm(x - row, axis=1))
        wanted.append(np.mean([density(known[j])[0] for j in near]) / own)
    np.testing.assert_allclose(LOF(num_neighbors=7).fit(TRUSTED)(TEST), wanted, **TOLERANCE)


def test_isolation_forest_is_scikit_learns():
    wanted = -IsolationForest(random_state=0).fit(TRUSTED["features"]).score_samples(TEST["features"])
    np.testing.assert_allclose(Isolation().fit(TRUSTED)(TEST), wanted, **TOLERANCE)


def test_vae_is_what_torch_trains():
    """The same weights, codes and features through PyTorch's own layers, gradient and Adam."""
    torch = pytest.importorskip("torch")
    key, steps = jax.random.key(0), 5
    x = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    start = vae.initial_weights(key, 6, 8, 3)
    counts = np.arange(20) < 15
    found = vae.train(start, jnp.asarray(x), counts, key, steps, 1e-2)
    weights = {name: torch.tensor(np.asarray(value), requires_grad=True) for name, value in start.items()}

    def layer(name, value):
        return torch.nn.functional.linear(value, weights[name].T, weights[f"{name}_bias"][0])

    def bound(x, noise):
        hidden = torch.relu(layer("encode", x))
        mean, log_variance = layer("mean", hidden), layer("log_variance", hidden)
        decoded = layer("output", torch.relu(layer("decode", mean + torch.exp(log_variance / 2) * noise)))
        code = torch.distributions.Normal(mean, torch.exp(log_variance / 2))
        divergence = torch.distributions.kl_divergence(code, torch.distributions.Normal(0.0, 1.0)).sum(1)
        return ((x - decoded) ** 2).sum(1) / 2 + divergence

    optimizer = torch.optim.Adam(weights.values(), lr=1e-2)
    for step in range(steps):
        noise = np.asarray(jax.random.normal(jax.random.fold_in(key, step), (20, 3)))
        optimizer.zero_grad()
        bound(torch.tensor(x), torch.tensor(noise))[:15].mean().backward()
        optimizer.step()
    for name, value in weights.items():
        np.testing.assert_allclose(found[name], value.detach().numpy(), **TOLERANCE)
    wanted = bound(torch.tensor(x), torch.zeros(20, 3)).detach().numpy()
    np.testing.assert_allclose(vae.negative_elbo(found, jnp.asarray(x), jnp.zeros((20, 3))), wanted, **TOLERANCE)


def test_vae_learns_the_features():
    # who knows nothing but the mean errs by half a nat a feature
    vae = VAE(num_steps=600, num_hidden=16, num_codes=4, learning_rate=3e-3)
    assert vae.fit(TRUSTED)(TRUSTED).mean() < 0.8 * 6 / 2


FEATURE_BASELINES = [name for name, statistic in BASELINES.items() if isinstance(statistic, OfFeatures)] + ["vim"]


@pytest.mark.parametrize("name", FEATURE_BASELINES)
def test_constant_features_are_refused(name):
    constant = {**TRUSTED, "features": np.full_like(TRUSTED["features"], 0.1)}
    with pytest.raises(ValueError, match=r"constant|differ"):
        baseline_named(name).fit(constant)


def test_vae_tells_what_is_far_out_by_a_number():
    score = VAE(num_steps=50).fit(TRUSTED)
    far = score({**TRUSTED, "features": TRUSTED["features"] * 1e6})
    assert np.isfinite(far).all()
    assert far.min() > score(TRUSTED).max()


@pytest.mark.parametrize("name", [name for name in FEATURE_BASELINES if name != "vae"])
def test_some_constant_features_are_not(name):
    trusted, test = (dict(values) for values in (TRUSTED, TEST))
    for values in (trusted, test):
        values["features"] = np.concatenate([values["features"], np.full((len(values["features"]), 3), 2.0)], axis=1)
    with pytest.warns() if name == "class_mahalanobis" else nullcontext():
        anomaly = baseline_named(name).fit(trusted)
    assert np.isfinite(anomaly(test)).all()


def test_fewer_examples_than_features_are_shrunk_and_told():
    trusted = observed(40, 0, size=50)
    with pytest.warns(UserWarning, match=r"40 examples for 50 features; their covariance is shrunk"):
        anomaly = Mahalanobis().fit(trusted)
    assert np.isfinite(anomaly(observed(20, 1, size=50))).all()
    with pytest.warns(UserWarning, match=r"40 examples for a subspace of 25 dimensions; it gets 20"):
        ViM().fit(trusted)


# --- what all share


def test_a_trusted_example_is_scored_by_others():
    found = cross_fitted(Mahalanobis(), TRUSTED, num_folds=60)
    for index in (0, 17):
        others = np.arange(60) != index
        anomaly = Mahalanobis().fit(rows(TRUSTED, others))
        np.testing.assert_allclose(found[index], anomaly(rows(TRUSTED, [index]))[0])
    assert found.mean() > 1.1 * Mahalanobis().fit(TRUSTED)(TRUSTED).mean()


@pytest.mark.parametrize("name", list(BASELINES))
def test_every_baseline_fits_and_scores(name, digits_model, images):
    loss_fn, params = digits_model
    statistic = baseline_named(name)
    if name == "vae":
        statistic = VAE(num_steps=5)
    with pytest.warns() if "mahalanobis" in name or name in ("vim", "quantum_entropy") else nullcontext():
        baseline = Baseline.fit(statistic, loss_fn, params, {"image": images[:24]}, fpr=0.2)
    scores = baseline.score({"image": images[24:]})
    again = baseline.score({"image": images[24:][::-1]})
    np.testing.assert_allclose(scores.anomaly_score, again.anomaly_score[::-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(scores.prediction, loss_fn.label(params, {"image": images[24:]})["label"])
    if not isinstance(statistic, Transductive):  # which calibrates anew
        wanted = calibration.p_values(-baseline.trusted_scores, -scores.anomaly_score)
        np.testing.assert_array_equal(scores.p_value, wanted)
    np.testing.assert_array_equal(scores.flagged, scores.p_value <= 0.2)
    assert scores.nearest.shape == (13, 0)
    assert statistic.forwards >= 1


def test_classes_may_be_calibrated_apart(digits_model, images):
    baseline = Baseline.fit(baseline_named("msp"), *digits_model, {"image": images}, per_class=True)
    scores = baseline.score({"image": images})
    for label in np.unique(scores.prediction):
        own = scores.prediction == label
        wanted = calibration.p_values(-baseline.trusted_scores[own], -scores.anomaly_score[own])
        np.testing.assert_array_equal(scores.p_value[own], wanted)


def test_the_false_positive_rate_holds():
    """Over many trusted sets, of which each has fewer than ten examples a feature."""
    flagged = []
    for seed in range(40):
        both = observed(90, seed, size=10)
        trusted, test = rows(both, slice(0, 60)), rows(both, slice(60, 90))
        p = calibration.p_values(-cross_fitted(Mahalanobis(), trusted), -Mahalanobis().fit(trusted)(test))
        flagged.append((p <= 0.1).mean())
    assert 0.07 < np.mean(flagged) < 0.13


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trusted": {"image": np.zeros((1, 8, 8, 1), np.uint8)}}, "trusted: wanted a few hundred examples, got 1"),
        ({"fpr": 2}, "fpr: wanted a rate between 0 and 1, got 2"),
        ({"statistic": Mahalanobis(layer="conv9")}, "layer: the model has no 'conv9'; near are"),
    ],
)
def test_bad_input(change, message, digits_model, images):
    loss_fn, params = digits_model
    given = {"statistic": baseline_named("msp"), "trusted": {"image": images}} | change
    with pytest.raises(ValueError, match=message):
        Baseline.fit(loss_fn=loss_fn, params=params, **given)


def test_other_shapes_and_names_are_refused(digits_model, images):
    baseline = Baseline.fit(baseline_named("msp"), *digits_model, {"image": images})
    with pytest.raises(ValueError, match=r"^examples/image: wanted shape \[n, 8, 8, 1\] as in trusted"):
        baseline.score({"image": images[:, :4]})
    with pytest.raises(ValueError, match=r"^detector: wanted one of msp, .*, got 'mps'"):
        baseline_named("mps")
