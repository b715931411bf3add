"""The zoo itself: names, errors, and which subsets of the modalities each model accepts."""

from itertools import combinations

import pytest
from tests.model.random_batches import CLASSES, DIMENSIONS, NAMES, random_batch, small_config, small_model

from edu_emotionnet import zoo
from edu_emotionnet.conventions import MODALITIES

SUBSETS = [subset for size in (1, 2, 3) for subset in combinations(MODALITIES, size)]


def test_every_model_of_the_paper_is_there() -> None:
    tables = "audio_only visual_only text_only early_fusion late_fusion mult self_mm cfn_esa hybrid_fusion misa"
    assert set(tables.split()) <= set(NAMES)


def test_a_misspelt_name_gets_a_hint() -> None:
    with pytest.raises(ValueError, match="did you mean 'late_fusion'"):
        zoo.build("late_fushion", dimensions=DIMENSIONS, classes=CLASSES)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'mult' is registered twice"):
        zoo.register("mult", zoo.entry("mult"))


@pytest.mark.parametrize("dimensions", [{}, {"audio": 3, "pulse": 2}])
def test_modalities_must_be_known_and_some(dimensions: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="non-empty subset of audio, visual, text"):
        zoo.build("early_fusion", dimensions=dimensions, classes=CLASSES)


@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
@pytest.mark.parametrize("name", NAMES)
def test_a_corpus_may_lack_modalities(name: str, subset: tuple[str, ...]) -> None:
    dimensions = {modality: DIMENSIONS[modality] for modality in subset}
    needed = name.removesuffix("_only") if name.endswith("_only") else None
    if needed is not None and needed not in subset:
        with pytest.raises(ValueError, match=f"needs {needed} features"):
            zoo.build(name, small_config(name), dimensions=dimensions, classes=CLASSES)
        return
    predictions = small_model(name, dimensions=dimensions)(random_batch(seed=1, dimensions=dimensions))
    assert predictions.log_probabilities.shape == (4, 7, CLASSES)
    assert predictions.log_probabilities.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("option", "value"), [("d_model", 0), ("heads", 7), ("layers", 0), ("dropout", 1.0)], ids=str)
def test_impossible_shapes_are_refused_by_name(name: str, option: str, value: float) -> None:
    with pytest.raises(ValueError, match=option):
        small_config(name, **{option: value})
