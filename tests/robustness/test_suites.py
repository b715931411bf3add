from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import REPOSITORY

from emolab.names import UserError, checked_name
from emolab.robustness.cells import distinct_variants
from emolab.robustness.corruptions.catalog import corruptions
from emolab.robustness.shipped import shipped_suites
from emolab.robustness.suites import expand, load_suite, lowered, parse_suite
from emolab.studies.robustness_settings import RobustnessSettings

MODALITIES = ("audio", "visual", "text")


@pytest.mark.parametrize("name", shipped_suites())
@pytest.mark.parametrize("modalities", [MODALITIES, ("audio", "text"), ("visual",)])
def test_shipped_suites_expand_to_distinct_cells_with_usable_ids(name, modalities):
    cells = expand(load_suite(name), modalities)
    assert cells[0].id == "clean" and cells[0].is_clean and len(cells) > 1
    assert len({cell.id for cell in cells}) == len({cell.variants for cell in cells}) == len(cells)
    for cell in cells:
        checked_name(cell.id, what="cell id")
        assert tuple(variant.modality for variant in cell.variants) == modalities
    assert sum(not cell.is_clean for cell in cells) == len(cells) - 1


def test_every_shipped_suite_is_told_of_where_one_is_chosen():
    description = RobustnessSettings.model_fields["suite"].description or ""
    told = (REPOSITORY / "docs" / "jobs.md").read_text().partition("\nSuites: ")[2].partition("a YAML file")[0]
    for name in shipped_suites():
        assert name in description.split(", "), name
        assert f"`{name}`" in told, name


def test_the_paper_suite_is_the_missing_rate_curve():
    cells = expand(load_suite("paper"), MODALITIES)
    assert len(cells) == 1 + 9 * 3
    assert sorted({cell.level for cell in cells}) == pytest.approx([i / 10 for i in range(10)])
    assert cells[1].id == "frame_missing-0.1.audio-visual-text.seed0"
    assert {cell.modalities for cell in cells[1:]} == {MODALITIES}


def test_a_joint_grid_shares_its_variants():
    instances = [
        {"corruption": "frame_missing", "levels": [0.0, 0.2, 0.4]},
        {"corruption": "time_shift", "levels": [2]},
    ]
    cells = expand(parse_suite({"name": "g", "seeds": [0, 1], "grids": [{"instances": instances}]}), MODALITIES)
    assert len(cells) == 1 + 2 * (4**3 - 1) - (2**3 - 1)  # those of time_shift alone do not depend on the seed
    assert len(distinct_variants(cells)) == 3 * (1 + 2 * 2 + 1)
    assert "audio-time_shift-2.text-frame_missing-0.4.seed1" in {cell.id for cell in cells}


def test_fixed_patterns_are_all_proper_subsets():
    cells = expand(
        parse_suite({"name": "p", "sweeps": [{"corruption": "absent", "modalities": "subsets"}]}), MODALITIES
    )
    assert len(cells) == 1 + 6 and len(distinct_variants(cells)) == 6


def test_a_joint_corruption_knows_its_group():
    sweep = {"corruption": "step_missing", "levels": [0.5], "modalities": [["text", "audio"]]}
    cell = expand(parse_suite({"name": "p", "sweeps": [sweep]}), MODALITIES)[1]
    assert cell.modalities == ("audio", "text")
    assert [variant.group for variant in cell.variants] == [("audio", "text"), (), ("audio", "text")]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "s", "sweep": []}, "unknown key 'sweep', did you mean 'sweeps'"),
        (
            {"name": "s", "sweeps": [{"corruption": "x", "rates": [1]}]},
            "unknown key 'sweeps.0.rates' .valid here: corruption, levels, modalities",
        ),
        ({"name": "s", "sweeps": [{"corruption": "gausian"}]}, "did you mean 'gaussian'"),
        ({"name": "s", "sweeps": [{"corruption": "gaussian", "levels": [6]}]}, "no severity 6"),
        ({"name": "s", "sweeps": [{"corruption": "step_missing", "levels": [0.9]}]}, "no rate 0.9"),
        ({"name": "s", "sweeps": [{"corruption": "frame_missing", "levels": [-0.1]}]}, "greater than or equal to 0"),
        (
            {"name": "s", "sweeps": [{"corruption": "frame_missing", "levels": ["much"]}]},
            "sweeps.0.levels.0: must be a number, got 'much'",
        ),
        ({"name": "s", "sweeps": [{"corruption": "audio_babble"}]}, "when sessions are prepared"),
        ({"name": "s", "sweeps": [{"corruption": "speckle"}]}, "is kept for validation"),
        ({"name": "s", "purpose": "validation", "sweeps": [{"corruption": "gaussian"}]}, "is not kept for validation"),
        ({"name": "s", "grids": [{"instances": [{"corruption": "step_missing"}]}]}, "use it in sweeps, not in grids"),
        ({"name": "s", "seeds": []}, "seeds"),
        ({"name": "s", "seeds": [0, 2**63 - 1]}, "seeds.1: must be less than 2147483648"),
        ({}, "name: is missing, a value is needed"),
        ([], "the file"),
    ],
)
def test_mistakes_in_a_suite_are_one_line_that_names_the_place(values, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_suite(values, where="mine.yaml")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("mine.yaml: ")


@pytest.mark.parametrize(
    ("modalities", "levels", "told"),
    [
        (MODALITIES, [0.1, 0.5, 0.6, 2 / 3], "no cell has rate 0.7, the highest is 0.667"),
        (("audio", "text"), [0.1, 0.5], "no cell has rate 0.6, 0.7, the highest is 0.5"),
    ],
)
def test_rates_that_so_few_modalities_cannot_have_become_the_highest_they_can(modalities, levels, told):
    suite = parse_suite({"name": "s", "sweeps": [{"corruption": "step_missing", "levels": [0.1, 0.5, 0.6, 0.7]}]})
    cells = expand(suite, modalities)
    assert [cell.level for cell in cells] == [0.0, *levels]
    assert lowered(suite, cells) == f"step_missing leaves a modality at every step: {told}"
    alone = load_suite("standard")
    cells = expand(alone, ("text",))
    assert not [cell for cell in cells if cell.corruption == "step_missing"]
    assert lowered(alone, cells).endswith("0.6, 0.7, the highest is 0")
    assert lowered(load_suite("paper"), expand(load_suite("paper"), modalities)) == ""


@pytest.mark.parametrize(
    ("sweeps", "message"),
    [
        ([], "no condition for data with audio, visual, text"),
        ([{"corruption": "frame_missing", "levels": [0]}], "no condition .* level above 0"),
        ([{"corruption": "frame_missing", "modalities": []}], "a sweep over no modality"),
        ([{"corruption": "gaussian"}, {"corruption": "frame_missing", "modalities": []}], "a sweep over no modality"),
        (
            [{"corruption": "frame_missing", "levels": [0.3, 0.3000000001]}],
            "2 conditions named frame_missing-0.3",
        ),
    ],
)
def test_a_suite_without_a_condition_or_with_two_of_one_name_is_refused(sweeps, message):
    suite = parse_suite({"name": "s", "sweeps": sweeps})
    with pytest.raises(UserError, match=message) as caught:
        expand(suite, MODALITIES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sets", [[["visual"]], [["audio"], ["audio", "visual"]]])
def test_a_modality_that_the_data_lacks_is_refused_before_anything_is_computed(sets):
    suite = parse_suite({"name": "s", "sweeps": [{"corruption": "frame_missing", "modalities": sets}]})
    with pytest.raises(UserError, match=r"'visual', the data has audio, text"):
        expand(suite, ("audio", "text"))
    grid = parse_suite({"name": "s", "grids": [{"instances": [{"corruption": "gaussian"}], "modalities": ["viusal"]}]})
    with pytest.raises(UserError, match="did you mean 'visual'"):
        expand(grid, MODALITIES)


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(UserError, match=r"mine\.yaml: no such file"):
        load_suite(tmp_path / "mine.yaml")


def test_files(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nsweeps: [{corruption: gaussian, levels: [2]}]\n")
    assert len(expand(load_suite(file), MODALITIES)) == 2
    file.write_text("name: [unclosed")
    with pytest.raises(UserError, match=r"mine\.yaml is not YAML"):
        load_suite(file)
    with pytest.raises(UserError, match="did you mean 'paper'"):
        load_suite("papre")


@settings(deadline=None)
@given(values=st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=4))
def test_anything_else_is_a_user_error(values):
    with pytest.raises(UserError):
        parse_suite(values)


def test_exactly_two_feature_corruptions_are_kept_for_validation():
    assert sum(row.validation_only for row in corruptions().values()) == 2
