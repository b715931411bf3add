"""Strict configuration: what is unknown is refused, what is printed can be read back."""

import gc
import shlex
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from emolab.commands import job_command
from emolab.configuration import parse, presets, read_preset, to_yaml, validate
from emolab.corpora.catalog import corpora
from emolab.corpora.options import options_of
from emolab.job import run_job
from emolab.names import UserError, checked_name, contained
from emolab.serving.settings import ServeSettings
from emolab.sessions.settings import FLAGS
from emolab.studies.preparation_settings import PreparationSettings
from emolab.training.recipe import TrainSettings
from emolab.tuning.search import TuneSettings
from emolab.tuning.space import SearchSpace


def settings_of(*arguments: str) -> TuneSettings:
    return parse(TuneSettings, arguments, description="")[0]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["training.learning_rat=1"], ["training.learning_rat", "did you mean 'learning_rate'"]),
        (["traning.epochs=1"], ["traning", "did you mean 'training'"]),
        (["model.d_modle=8"], ["d_modle", "did you mean 'd_model'"]),
        (["model.name=edu_emotionet"], ["edu_emotionet", "did you mean 'edu_emotionnet'"]),
        (["training.epochs=0"], ["training.epochs", "greater than or equal to 1"]),
        (["training.epochs=many"], ["training.epochs", "many"]),
        (["model.heads=3"], ["d_model must be a multiple of heads"]),
        (["model.name=edu_emotionnet-tfl", "model.tfl=true"], ["tfl", "cannot be changed"]),
        (["--preset", "smal"], ["smal", "did you mean 'small'"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["--trials", "3"], ["--trials"]),
        (["epochs"], ["epochs", "section.key=value"]),
        (["training.learning_rate=.nan"], ["training.learning_rate"]),
        (["tuning.trials=true"], ["tuning.trials", "must be a whole number, got 'true'"]),
        (["training.learning_rate=yes"], ["training.learning_rate", "must be a number"]),
        (["tuning.trials=1:30"], ["tuning.trials", "must be a whole number, got '1:30'"]),
        (["--config", ""], ["a YAML file is needed"]),
        (["--preset", ""], ["unknown preset"]),
        (["--output", '"a\\0b"'], ["output must not hold a zero byte"]),
        (["training.seed=100000000000000000000000"], ["training.seed"]),
        (["tuning.seed=4294967296"], ["tuning.seed", "less than 4294967296"]),
        (["workers.cpus=0.00001"], ["workers.cpus", "greater than or equal to 0.01"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(arguments: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        settings_of(*arguments)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value), str(error.value)


def test_a_number_with_zeros_before_it_is_that_number() -> None:
    """In old YAML 010 is eight."""
    assert settings_of("tuning.trials=010").tuning.trials == 10


def test_a_mistyped_key_is_named_rather_than_the_one_it_leaves_missing() -> None:
    with pytest.raises(UserError) as error:
        validate(SearchSpace, {"parameter": {}}, where="mine.yaml: ")
    assert "mine.yaml: unknown key 'parameter', did you mean 'parameters'" in str(error.value)


@pytest.mark.parametrize("place", ["file", "below a file", "too long"])
def test_a_folder_that_cannot_be_made_is_one_line(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "taken"
    file.write_text("")
    folder = {"file": file, "below a file": file / "runs", "too long": tmp_path / ("a" * 300)}[place]
    with pytest.raises(SystemExit) as ended:
        run_job(lambda: folder.mkdir(exist_ok=True))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {folder}: ")


def test_a_failure_that_is_no_mistake_of_the_user_keeps_its_traceback() -> None:
    def job() -> None:
        raise OSError("the network is gone")

    with pytest.raises(OSError, match="the network is gone"):
        run_job(job)


def test_a_job_ends_without_a_last_search_for_garbage() -> None:
    """Which takes more than a second among the objects of PyTorch and MLflow."""
    gc.unfreeze()
    with pytest.raises(SystemExit):
        run_job(lambda: None)
    assert gc.get_freeze_count()
    gc.unfreeze()


def test_overrides_win_over_files_and_files_over_presets(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("training: {epochs: 7, seed: 3}\n")
    settings = settings_of("--preset", "smoke", "--config", str(file), "training.seed=5", "--data", "elsewhere")
    assert settings.training.epochs == 7
    assert settings.training.seed == 5
    assert settings.model.options.d_model == 16
    assert settings.data == "elsewhere"


@pytest.mark.parametrize("name", ["edusim #2", "#2", "2026-01-01", "a 'b' c", "50%"])
def test_a_name_on_the_command_line_is_all_that_was_typed(name: str) -> None:
    """YAML would begin a comment, or read a date."""
    settings = settings_of("--data", name, f"tracking.experiment={name}")
    assert (settings.data, settings.tracking.experiment) == (name, name)


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_valid_and_prints_as_a_configuration_that_reads_back(name: str, tmp_path: Path) -> None:
    settings = validate(TuneSettings, read_preset(name, TuneSettings))
    file = tmp_path / "resolved.yaml"
    file.write_text(to_yaml(settings))
    assert settings_of("--config", str(file)) == settings
    assert settings.model.options.d_model == settings.model.model_dump()["d_model"]


def test_the_paper_preset_is_the_papers_recipe() -> None:
    settings = validate(TrainSettings, read_preset("paper", TrainSettings))
    options, training = settings.model.options, settings.training
    assert (options.d_model, options.layers, options.heads, options.dropout) == (256, 4, 4, 0.2)
    assert (training.epochs, training.batch_size, training.patience) == (50, 128, 5)
    assert (training.learning_rate, training.weight_decay) == (1e-4, 1e-5)
    rates = [training.learning_rate_at(epoch, 0, 1) for epoch in range(50)]
    assert rates[:5] == pytest.approx([2e-5, 4e-5, 6e-5, 8e-5, 1e-4])
    assert rates[29] == pytest.approx(1e-4)
    assert rates[30] == pytest.approx(1e-5)
    assert rates[40] == pytest.approx(1e-6)


def test_print_config_exits_cleanly(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        settings_of("--print-config", "training.epochs=9")
    assert end.value.code == 0
    assert "epochs: 9" in capsys.readouterr().out


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        settings_of("--help")
    text = capsys.readouterr().out
    for key in ("training.kl_weight", "tuning.space", "workers.count", "--data", "cluster.address"):
        assert key in text


def test_help_gives_the_defaults_of_flags_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(ServeSettings, ["--help"], description="")
    text = " ".join(capsys.readouterr().out.split())
    for said in ("0: any free one (default: 8000)", "the whole session (default: null)", "(default: 127.0.0.1)"):
        assert said in text


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `jobs/prepare.py --print-config`, or `--help`, prints."""
    with pytest.raises(SystemExit):
        parse(PreparationSettings, arguments, description="")
    return capsys.readouterr().out


@pytest.mark.parametrize("corpus", sorted(corpora()))
def test_the_options_of_a_corpus_are_printed_listed_and_read_back(
    corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "printed.yaml"
    file.write_text(printed(capsys, "--corpus", corpus, "--print-config"))
    options = yaml.safe_load(file.read_text())["options"]
    known = [name for name in options_of(corpora()[corpus]) if name not in FLAGS]
    assert sorted(options) == sorted(known)
    assert printed(capsys, "--config", str(file), "--print-config") == file.read_text()
    listing = printed(capsys, "--corpus", corpus, "--help")
    for name in known:
        assert f"\n  options.{name}" in listing, name
    for section in (name for name in known if isinstance(options[name], dict)):
        for key in options[section]:
            assert f"\n  options.{section}.{key} = " in listing, key
    assert f"corpora: {', '.join(corpora())}" in listing


def test_what_is_given_of_a_corpuss_options_is_printed_as_it_will_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--corpus", "media", "options.text.extractor=none", "options.class_names=[low, high]"]
    options = yaml.safe_load(printed(capsys, *given, "--print-config"))["options"]
    assert options["class_names"] == ["low", "high"]
    assert options["text"]["extractor"] == "none" and options["text"]["long_transcripts"] == "windows"
    with pytest.raises(SystemExit):
        settings_of("--preset", "smoke", "--print-config")
    study = yaml.safe_load(capsys.readouterr().out)
    assert study["prepare"]["options"]["sessions"] == 120 and study["prepare"]["options"]["audio_features"] == 40
    seeded = yaml.safe_load(printed(capsys, "--seed", "7", "--print-config"))
    assert seeded["seed"] == 7 and "seed" not in seeded["options"]  # a flag over a printed file keeps its say


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ([], "data/edusim"),
        (["--corpus", "mosi"], "data/mosi"),
        (["--corpus", "mosi", "--output", "data/edusim"], "data/edusim"),
    ],
)
def test_a_data_set_is_named_after_its_corpus_by_default(arguments: list[str], folder: str) -> None:
    settings = parse(PreparationSettings, arguments, description="")[0]
    assert settings.output == folder
    again = shlex.split(job_command("prepare", settings))[2:]
    assert parse(PreparationSettings, again, description="")[0] == settings


@pytest.mark.fault
@given(st.text(max_size=40))
def test_a_name_never_leaves_its_folder(name: str) -> None:
    root = Path("runs")
    try:
        path = contained(root, name, what="run name")
    except UserError:
        return
    assert path.parent == root
    assert path.name not in ("", ".", "..")


@pytest.mark.fault
@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "", ".", "..", "a/b", "a\\b", "a\nb", "x" * 121, "~root"])
def test_dangerous_names_are_refused(name: str) -> None:
    with pytest.raises(UserError):
        checked_name(name, what="run name")


@pytest.mark.fault
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to("/etc")
    with pytest.raises(UserError, match="leaves the folder"):
        contained(tmp_path / "runs", "link", what="run name")
