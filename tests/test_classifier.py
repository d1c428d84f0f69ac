"""Training and prediction: compared with scikit-learn, evaluated by groups, and "unknown" for unfamiliar images."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image
from runs import ON, Finish, configure, draw
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, precision_score, recall_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import fruitdask
from fruitdask.analysis import classifier
from fruitdask.cli import cli
from fruitdask.core.config import ModelConfig
from fruitdask.core.sample import draw_sample
from fruitdask.errors import OutputError, TrainingError


def draw_features(n_images: int, n_classes: int, *, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Draw features of classes that overlap."""
    rng = np.random.default_rng(3)
    codes = rng.permutation(np.arange(n_images) % n_classes)
    centres = rng.normal(0, 1, (n_classes, 12))
    features = (centres[codes] + rng.normal(0, spread, (n_images, 12))).astype(np.float32)
    return features, np.array([f"class {code}" for code in codes])


@pytest.mark.parametrize("n_classes", [2, 4])
def test_probe_equals_sklearn(n_classes: int) -> None:
    features, labels = draw_features(200, n_classes)
    features[:, 3] = 7
    probe, report = classifier.train(features, labels)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=10 / 12)).fit(features.astype(np.float64), labels)
    assert report["classes"] == model.classes_.tolist()
    np.testing.assert_allclose(probe.predict_proba(features), model.predict_proba(features), atol=2e-3)


@pytest.mark.parametrize("grouped", [False, True])
def test_evaluation_equals_sklearn_on_the_same_folds(grouped: bool) -> None:
    features, labels = draw_features(240, 3, spread=1.5)
    groups = np.random.default_rng(0).integers(0, 20, 240).astype(str) if grouped else None
    _, report = classifier.train(features, labels, groups)
    codes = np.unique(labels, return_inverse=True)[1]
    folds = classifier.choose_folds(codes, None if groups is None else np.unique(groups, return_inverse=True)[1])
    assert len(folds) == report["n_folds"] == 5 and report["n_groups"] == (20 if grouped else None)
    if groups is not None:
        assert all(not set(groups[known]) & set(groups[held_out]) for known, held_out in folds)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=10 / 12))
    guesses = cross_val_predict(model, features.astype(np.float64), labels, cv=folds)
    found = report["linear_probe"]
    assert 0.5 < found["accuracy"] < 0.99 and found["accuracy"] == pytest.approx((guesses == labels).mean(), abs=0.01)
    np.testing.assert_allclose(found["confusion"], confusion_matrix(labels, guesses), atol=2)
    for name, measure in (("recall", recall_score), ("precision", precision_score)):
        expected = measure(labels, guesses, average=None)
        np.testing.assert_allclose([each[name] for each in found["by_class"].values()], expected, atol=0.03)
    assert found["interval"][0] < found["accuracy"] < found["interval"][1]
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_evaluation_of_very_many_classes_shows_those_with_the_most_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "_MAX_CONFUSED", 4)
    rng, names = np.random.default_rng(0), [f"class {n:02}" for n in range(12)]
    codes = rng.integers(0, 12, 500)
    guesses = np.where(rng.random(500) < np.linspace(0.2, 0.9, 12)[codes], codes, rng.integers(0, 12, 500))
    found = classifier.evaluate(codes, guesses, names, None)
    whole = confusion_matrix(codes, guesses)
    shown = sorted(sorted(range(12), key=lambda code: (whole[code, code] - whole[code].sum(), code))[:4])
    assert found["confused"] == [names[code] for code in shown]
    assert found["confusion"] == whole[np.ix_(shown, shown)].tolist()
    precision = precision_score(codes, guesses, average=None)
    np.testing.assert_allclose([each["precision"] for each in found["by_class"].values()], precision)


def test_images_of_one_object_are_never_in_both_training_and_test() -> None:
    rng = np.random.default_rng(0)
    # Objects differ more than classes, and photographs of one object hardly at all.
    objects = rng.normal(0, 1, (24, 40))
    features = (np.repeat(objects, 10, axis=0) + rng.normal(0, 0.01, (240, 40))).astype(np.float32)
    labels, groups = np.repeat(["a", "b"] * 12, 10), np.repeat(np.arange(24), 10).astype(str)
    plain, grouped = (classifier.train(features, labels, each)[1] for each in (None, groups))
    for name in ("linear_probe", "nearest_neighbors"):
        assert plain[name]["accuracy"] > 0.99 and grouped[name]["accuracy"] < 0.75
        low, high = grouped[name]["interval"]
        # Twenty-four objects are less evidence than 240 images.
        assert high - low > 0.25


def test_copies_are_never_in_both_training_and_test() -> None:
    # Labels are random, so there is nothing to learn except which images are copies.
    rng = np.random.default_rng(0)
    features, labels = rng.normal(0, 1, (80, 200)).astype(np.float32), rng.permutation(["a", "b"] * 40)
    report = classifier.train(np.repeat(features, 3, axis=0), np.repeat(labels, 3))[1]
    assert report["n_groups"] is None and report["n_images"] == 240
    for name in ("linear_probe", "nearest_neighbors"):
        low, high = report[name]["interval"]
        # Eighty different images are no more evidence than that.
        assert low < 0.5 < high and high - low > 0.2
    once = classifier.train(features, labels)[1]
    assert report["linear_probe"]["accuracy"] == pytest.approx(once["linear_probe"]["accuracy"], abs=0.1)


def test_copies_in_other_groups_are_never_in_both_training_and_test() -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.normal(0, 1, (80, 200)).astype(np.float32), rng.permutation(["a", "b"] * 40)
    groups = np.arange(160).astype(str)
    report = classifier.train(np.tile(features, (2, 1)), np.tile(labels, 2), groups)[1]
    assert report["n_groups"] == 160
    for name in ("linear_probe", "nearest_neighbors"):
        assert report[name]["accuracy"] < 0.7
    # Two groups of the same images leave no other image to learn from.
    with pytest.raises(TrainingError, match="found only copies of the same images in several groups;"):
        classifier.train(np.tile(features, (2, 1)), np.tile(labels, 2), np.repeat(["x", "y"], 80))


def test_training_image_is_known_even_if_all_images_have_copies() -> None:
    features, labels = draw_features(60, 2)
    probe, report = classifier.train(np.repeat(features, 2, axis=0), np.repeat(labels, 2))
    # The computed distance of equal features is not always 0.
    found, _ = classifier.predict(probe, report, features, np.full(60, 2e-16, np.float32))
    assert (found != classifier.UNKNOWN_LABEL).all()
    # An image without a copy has its nearest neighbour farther away than that.
    assert report["unknown_distance"] > 1e-3


def test_few_groups_may_leave_a_single_class_for_training() -> None:
    labels, groups = np.array(list("bbaa")), np.array(list("1312"))
    folds = classifier.choose_folds(np.array([1, 1, 0, 0]), groups.astype(int))
    assert {len(set(labels[known])) for known, _ in folds} == {1, 2}
    # Classes lie in two directions, which a probe trained on one class cannot tell apart.
    features = np.array([[0, 1], [0, 1.1], [1, 0], [1.1, 0]], np.float32)
    found = classifier.train(features, labels, groups)[1]["linear_probe"]
    right = [len(set(labels[known])) == 2 or labels[known][0] == labels[held_out] for known, held_out in folds]
    assert (
        found["accuracy"]
        == np.concatenate(
            [np.broadcast_to(each, held_out.shape) for each, (_, held_out) in zip(right, folds, strict=True)]
        ).mean()
    )


@pytest.mark.parametrize("exponent", [-100, 80])
def test_evaluation_does_not_depend_on_the_scale_of_features(exponent: int) -> None:
    features, labels = draw_features(80, 3, spread=1.5)
    expected, found = (classifier.train(each, labels)[1] for each in (features, np.ldexp(features, exponent)))
    assert found["nearest_neighbors"] == expected["nearest_neighbors"]
    assert found["unknown_distance"] == expected["unknown_distance"]
    assert found["linear_probe"]["accuracy"] == pytest.approx(expected["linear_probe"]["accuracy"], abs=0.02)


def test_feature_that_differs_only_by_rounding_is_ignored() -> None:
    features, labels = draw_features(60, 2)
    # It differs in its last bit, as between batches; a new photograph may differ more.
    features[:, 3] = np.float32(0.1) * (1 + np.random.default_rng(0).integers(0, 2, 60) * np.finfo(np.float32).eps)
    probe, _ = classifier.train(features, labels)
    other = features.copy()
    other[:, 3] = 0.3
    np.testing.assert_allclose(probe.predict_proba(other), probe.predict_proba(features), atol=1e-3)


def test_interval_without_groups_is_wilsons() -> None:
    is_right = np.arange(80) < 63
    expected = binomtest(63, 80).proportion_ci(method="wilson")
    assert classifier.measure_interval(is_right, None) == pytest.approx([expected.low, expected.high], abs=1e-6)
    # Groups of one image change little, as one estimates their variance.
    assert classifier.measure_interval(is_right, np.arange(80)) == pytest.approx(
        [expected.low, expected.high], abs=5e-3
    )
    # Groups whose images are all right or all wrong count as one image each.
    repeated, groups = np.repeat(is_right, 5), np.repeat(np.arange(80), 5)
    assert classifier.measure_interval(repeated, groups) == pytest.approx([expected.low, expected.high], abs=5e-3)
    low, high = classifier.measure_interval(np.ones(50, bool), np.arange(50) % 3)
    # Not a rounding error beside it, which would be printed as 99.9 % or 0.1 %.
    assert classifier.measure_interval(np.ones(159, bool), None)[1] == 1
    assert classifier.measure_interval(np.zeros(159, bool), None)[0] == 0
    assert (low, high) == pytest.approx(tuple(binomtest(3, 3).proportion_ci(method="wilson")), abs=1e-6)


@pytest.mark.parametrize(
    ("labels", "groups", "message"),
    [
        ([], None, "expected images of at least 2 classes, found no image with features; check input.label_from"),
        (["a"] * 4, None, "expected images of at least 2 classes, found only 'a'; check input.label_from"),
        (["a", "unknown"] * 2, None, "expected no class 'unknown', which .* unlike all training images; rename"),
        (["a", "a", "b"], None, "at least 2 images with features of each class, found 1 of 'b'; add images, or leave"),
        (["a", "a", "b", "b"], ["1", "2", "3", "3"], "at least 2 groups of each class, found 1 group of 'b'; a"),
        (["a", "a", "b", "b"], ["1"] * 4, "at least 2 groups of each class, found 1 group of 'a'; a classifier"),
        (["a", "a", "b", "b"], None, "at least 2 different images of each class, found only copies of one of 'a'; add"),
    ],
    ids=["nothing", "one class", "unknown", "one image", "a class of one group", "one group", "copies"],
)
def test_data_that_cannot_be_tested_is_refused(labels: list[str], groups: list[str] | None, message: str) -> None:
    features = np.zeros((len(labels), 3), np.float32)
    with pytest.raises(TrainingError, match=message):
        classifier.train(features, np.array(labels, str), None if groups is None else np.array(groups))


@pytest.fixture(scope="module")
def trained(
    tiny_model: ModelConfig, finish: Finish, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, fruitdask.Classifier]:
    """Results on a drawn data set, one image of which is broken, with a classifier."""
    folder = tmp_path_factory.mktemp("trained")
    draw_sample(folder / "in", per_class=12, size_px=48)
    (folder / "in" / "pear_1" / "broken.jpg").write_bytes(b"no image")
    config = configure(
        folder / "in", folder / "out", tiny_model, report=ON, explore=ON, featurize={"max_failed_fraction": 0.1}
    )
    finish(config)
    return folder / "out", fruitdask.train(str(folder / "out"))


def test_train_stores_a_classifier_without_code(trained: tuple[Path, fruitdask.Classifier]) -> None:
    output, found = trained
    assert found.report["n_images"] == 72 and found.report["linear_probe"]["accuracy"] > 0.6
    again = fruitdask.open(str(output)).classifier
    assert again.report == json.loads(json.dumps(found.report)) | {"format": 1}
    photographs = sorted((output.parent / "in").rglob("r0_1*.jpg"))
    pd.testing.assert_frame_equal(again.predict(photographs), found.predict(photographs))
    assert "held-out images right" in found._repr_html_()
    page = (output / "report.html").read_text()
    assert page.count('id="classifier-heading"') == 1 and "these figures are too high" in page
    assert fruitdask.verify(str(output)).is_well


@pytest.mark.parametrize("change", ["nothing", "labels", "groups", "splits"])
def test_page_and_predictions_say_that_a_classifier_was_trained_on_earlier_data(
    tiny_model: ModelConfig,
    finish: Finish,
    client: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: str,
) -> None:
    table = pd.DataFrame(
        [(f"{name}/{number}.png", name, f"{name}{number}", "train") for name in "ab" for number in range(4)],
        columns=["path", "label", "group", "split"],
    )
    draw(tmp_path / "in", *table["path"])
    table.to_csv(tmp_path / "labels.csv", index=False)
    given = {"manifest": str(tmp_path / "labels.csv")}
    config = configure(tmp_path / "in", tmp_path / "out", tiny_model, input=given, report=ON)
    fruitdask.train(finish(config))
    if change != "nothing":
        table.loc[0, change.removesuffix("s")] = "b"
    table.to_csv(tmp_path / "labels.csv", index=False)
    result = fruitdask.run(config, client=client)
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'id="classifier-heading"' in page
    assert result.classifier.report["n_images"] == 8
    for text in (page, caplog.text):
        assert ("have changed since the classifier was trained" in text) == (change in ("labels", "groups"))


def test_familiar_photographs_are_labelled_and_others_are_unknown(
    trained: tuple[Path, fruitdask.Classifier],
) -> None:
    output, found = trained
    known = sorted((output.parent / "in").rglob("r0_*.jpg"))
    strange = Image.new("RGB", (48, 48), (0, 0, 255))
    table = found.predict([*known, strange, b"no image"])
    assert list(table.columns) == ["path", "status", "label", "probability", "nearest", "distance"]
    names = [f"{path.parent.name}/{path.name}" for path in known]
    # The nearest training image of a training image is itself.
    assert table["nearest"].iloc[:-2].tolist() == names and (table["distance"].iloc[:-2] < 1e-5).all()
    right = [label == path.parent.name for label, path in zip(table["label"], known)]
    assert np.mean(right) > 0.7 and "unknown" not in set(table["label"].iloc[:-2])
    assert table["label"].iloc[-2] == "unknown"
    assert table.iloc[-1][["status", "label", "nearest"]].tolist() == ["unreadable", "", ""]
    assert table["probability"].iloc[:-1].between(0, 1).all() and np.isnan(table["probability"].iloc[-1])


@pytest.mark.slow
def test_predict_labels_a_folder_and_can_be_repeated(
    trained: tuple[Path, fruitdask.Classifier], client: Any, tmp_path: Path
) -> None:
    output, found = trained
    shutil.copytree(output.parent / "in" / "tomato_1", tmp_path / "new")
    shutil.copy(output.parent / "in" / "pear_1" / "broken.jpg", tmp_path / "new" / "broken.jpg")
    Image.new("RGB", (48, 48), (0, 0, 255)).save(tmp_path / "new" / "strange.png")
    places = {"input": str(tmp_path / "new"), "output": str(tmp_path / "labelled")}
    settings = ["featurize.max_failed_fraction=0.5", "plots.enabled=false"]
    table = fruitdask.predict(str(output), **places, overrides=settings, client=client)
    assert table["path"].tolist() == sorted(path.name for path in (tmp_path / "new").iterdir())
    expected = found.predict([tmp_path / "new" / name for name in table["path"]])
    pd.testing.assert_frame_equal(
        table.drop(columns="path"), expected.drop(columns="path"), check_exact=False, atol=1e-4
    )
    for read, name in ((pd.read_parquet, "predictions.parquet"), (pd.read_csv, "predictions.csv")):
        assert read(tmp_path / "labelled" / name)["path"].tolist() == table["path"].tolist()
    assert "least certain" in (tmp_path / "labelled" / "report.html").read_text()
    assert fruitdask.verify(str(tmp_path / "labelled")).is_well
    again = fruitdask.predict(str(output), **places, overrides=settings)
    pd.testing.assert_frame_equal(again, table)
    options = [text for key, value in places.items() for text in (f"--{key}", value)]
    options += [text for setting in settings for text in ("--set", setting)]
    printed = CliRunner().invoke(cli, ["predict", str(output), *options])
    assert printed.exit_code == 0, printed.output
    assert "1 unknown" in printed.output and "set input.group_from, run and train again" in printed.output
    # Old predictions of other images would be wrong.
    draw(tmp_path / "new", "another.png")
    fruitdask.apply(str(output), **places, overrides=settings, client=client)
    assert not (tmp_path / "labelled" / "predictions.parquet").exists()


def test_without_a_classifier_nothing_is_predicted(
    tiny_model: ModelConfig, finish: Finish, sample_folder: Path, tmp_path: Path
) -> None:
    finish(configure(sample_folder, tmp_path / "out", tiny_model))
    with pytest.raises(OutputError, match="a trained classifier, found none; use fruitdask train"):
        fruitdask.predict(str(tmp_path / "out"), input=str(sample_folder), output=str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_commands_say_how_far_to_trust_it(trained: tuple[Path, fruitdask.Classifier], tmp_path: Path) -> None:
    output, _ = trained
    shutil.copytree(output, tmp_path / "out")
    printed = CliRunner().invoke(cli, ["train", str(tmp_path / "out"), "--max-rows", "60"])
    assert printed.exit_code == 0, printed.output
    assert "tomato_1" in printed.output and "% right (95 % interval" in printed.output
    labels = pd.read_csv(tmp_path / "out" / "results.csv").query("status == 'ok'")["label"]
    assert f"{labels.value_counts(normalize=True).iloc[0]:.1%} right if it were always named" in printed.output
    assert "5 folds of 60 images" in printed.output and "these figures are too high" in printed.output
    refused = CliRunner().invoke(cli, ["train", str(tmp_path / "none")])
    assert refused.exit_code == 2 and "expected the results of a run, found none" in refused.output
