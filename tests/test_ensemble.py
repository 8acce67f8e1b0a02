import dataclasses

import jax
import numpy as np
import pytest

from madjax import Detector, Ensemble, Tangent
from madjax.calibration import p_values
from madjax.ensemble import DRAWS, TANGENT
from tests.test_detector import images as images  # a fixture
from tests.test_detector import model as model  # a fixture


@pytest.fixture(scope="module")
def ensemble(model, images):
    members = (DRAWS._replace(num_draws=8), TANGENT._replace(num_draws=16))
    return Ensemble.fit(jax.random.key(0), *model, {"image": images[:40]}, members=members, layout="host", fpr=0.2)


def standard(values, known):
    return (values - known.mean()) / known.std()


def test_couplings_are_added_in_trusted_deviations(ensemble, images):
    batch = {"image": images[40:]}
    first, second = (detector.score(batch) for detector in ensemble.detectors)
    known = [detector.scorer.trusted_couplings for detector in ensemble.detectors]
    scores = ensemble.score(batch)
    wanted = standard(-first.anomaly_score, known[0]) + 0.5 * standard(-second.anomaly_score, known[1])
    np.testing.assert_allclose(-scores.anomaly_score, wanted)
    own = standard(known[0], known[0]) + 0.5 * standard(known[1], known[1])
    np.testing.assert_allclose(ensemble.trusted_couplings, own)
    np.testing.assert_array_equal(scores.p_value, p_values(own, wanted))
    np.testing.assert_array_equal(scores.flagged, wanted <= ensemble.threshold())
    np.testing.assert_array_equal(scores.prediction, first.prediction)
    np.testing.assert_array_equal(scores.nearest, first.nearest)
    assert scores.flagged.any()


def test_members_differ_as_they_should(ensemble):
    draws, tangent = ensemble.detectors
    assert (draws.scorer.coupling, tangent.scorer.coupling) == ("standardized_ccc", "class_profile")
    assert (draws.layout, tangent.layout) == ("host", "auto")
    assert tangent.sample_forwards == 3 * 40 < draws.sample_forwards
    assert draws.fpr == tangent.fpr == 0.2


def test_save_and_load(ensemble, model, images, tmp_path):
    ensemble.save(tmp_path / "kept")
    loaded = Ensemble.load(tmp_path / "kept", *model)
    batch = {"image": images[40:]}
    before, after = ensemble.score(batch), loaded.score(batch)
    np.testing.assert_allclose(after.anomaly_score, before.anomaly_score)
    np.testing.assert_array_equal(after.p_value, before.p_value)
    assert loaded.weights == (1.0, 0.5)
    with pytest.raises(ValueError, match=r"path: .* exists already"):
        ensemble.save(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"path: .* holds nothing saved by madjax"):
        Ensemble.load(tmp_path, *model)


def test_one_alone_flags_what_it_flags(ensemble, images):
    detector = ensemble.detectors[0]
    batch = {"image": images[40:]}
    np.testing.assert_array_equal(Ensemble((detector,), (3.0,)).score(batch).p_value, detector.score(batch).p_value)


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
