import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

import madjax.ensemble
from madjax import Detector, Ensemble, Tangent, batch
from madjax.baselines import KNN, Baseline
from madjax.calibration import p_values
from madjax.ensemble import DRAWS, FEATURES, TANGENT
from tests.test_detector import images as images  # a fixture
from tests.test_detector import model as model  # a fixture


@pytest.fixture(scope="module")
def ensemble(model, images):
    members = (DRAWS._replace(num_draws=8), TANGENT._replace(num_draws=16), FEATURES)
    return Ensemble.fit(jax.random.key(0), *model, {"image": images[:40]}, members=members, layout="host", fpr=0.2)


def standard(values, known):
    return (values - known.mean()) / known.std()


def test_couplings_are_added_in_trusted_deviations(ensemble, images):
    examples = {"image": images[40:]}
    first, second, third = (detector.score(examples) for detector in ensemble.detectors)
    draws, tangent, features = ensemble.detectors
    known = [draws.scorer.trusted_couplings, tangent.scorer.trusted_couplings, -features.trusted_scores]
    scores = ensemble.score(examples)
    wanted = standard(-first.anomaly_score, known[0]) + 0.5 * standard(-second.anomaly_score, known[1])
    wanted += 0.5 * standard(-third.anomaly_score, known[2])
    np.testing.assert_allclose(-scores.anomaly_score, wanted)
    own = standard(known[0], known[0]) + 0.5 * standard(known[1], known[1]) + 0.5 * standard(known[2], known[2])
    np.testing.assert_allclose(ensemble.trusted_couplings, own)
    np.testing.assert_array_equal(scores.p_value, p_values(own, wanted))
    np.testing.assert_array_equal(scores.flagged, wanted <= ensemble.threshold())
    np.testing.assert_array_equal(scores.prediction, first.prediction)
    np.testing.assert_array_equal(scores.nearest, first.nearest)
    assert scores.flagged.any()


def test_a_batch_is_scored_by_all(ensemble, images):
    examples = {"image": images[40:]}
    losses, _ = ensemble.detectors[0].sweep(examples)
    alone, together = ensemble.score(examples), ensemble.score_batch(examples)
    wanted = batch.as_batch(ensemble.detectors[0].scorer, losses, alone, ensemble.trusted_couplings, fpr=0.2)
    np.testing.assert_allclose(together.anomaly_score, wanted.anomaly_score)
    np.testing.assert_array_equal(together.flagged, wanted.flagged)
    assert (together.anomaly_score != alone.anomaly_score).all()


def test_members_differ_as_they_should(ensemble):
    draws, tangent, features = ensemble.detectors
    assert (draws.scorer.coupling, tangent.scorer.coupling) == ("standardized_ccc", "class_profile")
    assert (draws.layout, tangent.layout) == ("host", "auto")
    assert tangent.sample_forwards == 3 * 40 < draws.sample_forwards
    assert draws.fpr == tangent.fpr == features.fpr == 0.2
    assert features.statistic == KNN()


def test_features_are_asked_where_they_can_be_read(model, images, monkeypatch):
    loss_fn, params = model
    trusted = loss_fn.label(params, {"image": images[:30]})
    fit = partial(Ensemble.fit, jax.random.key(0), params=params, trusted=trusted, layout="host")
    for name in ("DRAWS", "TANGENT"):  # a tangent's program takes long to compile
        monkeypatch.setattr(madjax.ensemble, name, DRAWS._replace(num_draws=4))
    assert [type(each) for each in fit(loss_fn=loss_fn).detectors] == [Detector, Detector, Baseline]
    own_code = lambda params, batch: loss_fn(params, batch)  # noqa: E731
    assert [type(each) for each in fit(loss_fn=own_code).detectors] == [Detector, Detector]
    with pytest.raises(ValueError, match="loss_fn: wanted one of from_nnx, from_linen or from_decoder"):
        fit(loss_fn=own_code, members=[FEATURES])


def test_a_statistic_with_settings_of_its_own_is_not_kept(ensemble, model, images, tmp_path):
    own = Baseline.fit(KNN(k=3), *model, {"image": images[:40]})
    with pytest.raises(ValueError, match=r"statistic: wanted one of BASELINES, by whose name it is kept, got KNN"):
        Ensemble((ensemble.detectors[0], own), (1.0, 0.5)).save(tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_save_and_load(ensemble, model, images, tmp_path):
    ensemble.save(tmp_path / "kept")
    loaded = Ensemble.load(tmp_path / "kept", *model)
    examples = {"image": images[40:]}
    before, after = ensemble.score(examples), loaded.score(examples)
    np.testing.assert_allclose(after.anomaly_score, before.anomaly_score)
    np.testing.assert_array_equal(after.p_value, before.p_value)
    assert loaded.weights == (1.0, 0.5, 0.5)
    assert loaded.detectors[2].fpr == 0.2
    with pytest.raises(ValueError, match=r"path: .* exists already"):
        ensemble.save(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"path: .* holds nothing saved by madjax"):
        Ensemble.load(tmp_path, *model)


def test_one_alone_flags_what_it_flags(ensemble, images):
    detector = ensemble.detectors[0]
    examples = {"image": images[40:]}
    np.testing.assert_array_equal(
        Ensemble((detector,), (3.0,)).score(examples).p_value, detector.score(examples).p_value
    )


def test_classes_may_be_calibrated_by_themselves(ensemble, images):
    by_class = Ensemble(
        tuple(dataclasses.replace(each, per_class=True) for each in ensemble.detectors), ensemble.weights
    )
    scores = by_class.score({"image": images[40:]})
    classes = ensemble.detectors[0].scorer.trusted_classes
    for label in np.unique(scores.prediction):
        asked = scores.prediction == label
        wanted = p_values(ensemble.trusted_couplings[classes == label], -scores.anomaly_score[asked])
        np.testing.assert_array_equal(scores.p_value[asked], wanted)


def test_members_must_have_one_trusted_set(ensemble, model, images):
    other = Detector.fit(
        jax.random.key(0), *model, {"image": images[:20]}, perturbation=Tangent(), num_draws=4, coupling="class_profile"
    )
    with pytest.raises(
        ValueError, match="detectors: wanted some of the same trusted examples, with a weight each, got"
    ):
        Ensemble((ensemble.detectors[0], other), (1.0, 1.0))
    with pytest.raises(ValueError, match=r"got \[40\] examples and 2 weights"):
        Ensemble(ensemble.detectors[:1], (1.0, 1.0))
    with pytest.raises(ValueError, match="detectors: wanted a Detector first"):
        Ensemble(ensemble.detectors[2:], (0.5,))
