"""The Frechet distance against closed forms and scipy, its statistics against numpy, the detector with real torchscript."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn

from evaluation.fvd import I3D, FeatureStatistics, frechet_distance, frechet_video_distance
from tokenizer import UserError


def drawn(seed, n, dim, scale=1.0, shift=0.0):
    generator = np.random.default_rng(seed)
    return shift + scale * generator.normal(size=(n, dim)) @ generator.normal(size=(dim, dim))


def test_closed_forms():
    eye, zero = np.eye(5), np.zeros(5)
    assert frechet_distance(zero, eye, zero, eye) == 0
    m = np.array([3.0, -4.0, 0, 1, 0.5])
    assert frechet_distance(m, eye, zero, eye) == pytest.approx(26.25, abs=1e-12)
    a, b = np.array([1.0, 4, 9, 0, 2]), np.array([4.0, 1, 0.25, 5, 2])
    expected = np.square(np.sqrt(a) - np.sqrt(b)).sum()  # (1, 1, 6.25, 5, 0)
    assert expected == pytest.approx(13.25)
    assert frechet_distance(zero, np.diag(a), zero, np.diag(b)) == pytest.approx(13.25, abs=1e-12)


def test_it_equals_the_usual_formula_with_scipy():
    one, other = np.cov(drawn(0, 400, 30), rowvar=False), np.cov(drawn(1, 400, 30), rowvar=False)
    expected = 30 * 0.5**2 + np.trace(one) + np.trace(other) - 2 * np.trace(sqrtm(one @ other)).real
    distance = frechet_distance(np.zeros(30), one, np.full(30, 0.5), other)
    assert distance == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(np.full(30, 0.5), other, np.zeros(30), one) == pytest.approx(distance, rel=1e-12)


def test_singular_covariances():
    zero = np.zeros(2)
    assert frechet_distance(zero, np.diag([1.0, 0]), zero, np.diag([0, 1.0])) == 2
    assert frechet_distance(zero, np.zeros((2, 2)), zero, np.diag([3.0, 1])) == 4
    few = drawn(2, 6, 40, scale=100)  # 6 clips, 40 features: rank 5
    statistics = FeatureStatistics.of(few)
    assert frechet_video_distance(statistics, statistics) < 1e-9 * np.trace(statistics.covariance)
    step = np.arange(40) / 10
    assert frechet_video_distance(statistics, FeatureStatistics.of(few + step)) == pytest.approx(
        np.square(step).sum(), rel=1e-6
    )


def test_streamed_and_merged_statistics_are_those_of_the_whole():
    features = drawn(3, 103, 12, scale=1e-3, shift=1e4)  # sums of raw squares would lose the variance in rounding
    streamed = FeatureStatistics.of(features[:1])
    for start in range(1, 103, 17):
        streamed = streamed + FeatureStatistics.of(features[start : start + 17])
    # as from three processes, of different shares, in another order
    parts = [pickle.loads(pickle.dumps(FeatureStatistics.of(part))) for part in np.split(features, [50, 53])]
    merged = parts[2] + (parts[0] + parts[1])
    for statistics in (streamed, merged):
        assert statistics.count == 103 and statistics.mean.dtype == np.float64
        np.testing.assert_allclose(statistics.mean, features.mean(0), rtol=1e-14)
        expected = np.cov(features, rowvar=False)
        np.testing.assert_allclose(statistics.covariance, expected, atol=1e-8 * np.abs(expected).max())
    with pytest.raises(UserError, match="at least 2 clips, not 1"):
        _ = FeatureStatistics.of(features[:1]).covariance


class Detector(nn.Module):
    """Takes the call of the published file and tells what it was called with."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: torch.Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False):
        sides = torch.tensor([x.shape[2], x.shape[3], x.shape[4]], dtype=x.dtype).expand(x.shape[0], 3)
        flags = torch.tensor([float(rescale), float(resize), float(return_features)]).expand(x.shape[0], 3)
        return torch.cat([x.mean((2, 3, 4)) * self.weight, x.amax((2, 3, 4)), sides, flags], dim=1)


class OneArgument(nn.Module):
    def forward(self, x: torch.Tensor):
        return x.mean((2, 3, 4))


class NotFinite(nn.Module):
    def forward(self, x: torch.Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False):
        return torch.full([x.shape[0], 4], float("nan"))


def script(module, file):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(str(file))
    return file


def test_the_detector_sees_224_pixels_between_minus_one_and_one(tmp_path):
    detector = I3D(script(Detector(), tmp_path / "i3d.pt"))
    clips = np.zeros((2, 13, 32, 48, 3), np.uint8)
    clips[0, :, :, :24, 0] = 255  # half of the first clip is red
    clips[1] = (51, 102, 204)
    features = detector(clips)
    assert features.dtype == np.float64 and features.shape == (2, 12)
    np.testing.assert_allclose(features[0, :6], [0, -2, -3, 1, -1, -1], atol=1e-5)
    np.testing.assert_allclose(features[1, :6], [-0.6, -0.4, 1.8, -0.6, -0.2, 0.6], atol=1e-5)
    assert (features[:, 6:] == [13, 224, 224, 0, 0, 1]).all()
    with pytest.raises(UserError, match="at least 10 frames, not 9"):
        detector(clips[:, :9])


def test_missing_and_broken_detectors_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.pt does not exist"):
        I3D(tmp_path / "nowhere.pt")
    (tmp_path / "text.pt").write_text("no archive")
    with pytest.raises(UserError, match="text.pt can't be loaded as torchscript"):
        I3D(tmp_path / "text.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="weights.pt can't be loaded as torchscript"):
        I3D(tmp_path / "weights.pt")
    with pytest.raises(UserError, match="does not work as I3D"):
        I3D(script(OneArgument(), tmp_path / "other.pt"))
    with pytest.raises(UserError, match="not finite"):
        I3D(script(NotFinite(), tmp_path / "nan.pt"))
