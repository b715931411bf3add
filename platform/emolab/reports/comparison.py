"""The page and the tables of a comparison, from its analysis alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import rich.table

from edu_emotionnet import zoo
from emolab.reports.comparison_figures import class_scores, differences, loss_curves, modality_weights
from emolab.reports.comparison_text import class_prior, header_lines
from emolab.reports.comparison_theory import theory_sections, theory_tables
from emolab.reports.page import Measured, Section, Styled, TableData, page
from emolab.reports.tables import to_csv, to_latex
from emolab.studies.bootstrap import Metric
from emolab.studies.comparison_analysis import Analysis, Difference
from emolab.studies.comparison_settings import TABLES

_NAMES: dict[Metric, str] = {"accuracy": "accuracy", "macro_f1": "macro-F1"}
_TITLES = {
    "Table I": "Table I: recent baselines",
    "Table II": "Table II: single modalities and simple fusion",
    "Table III": "Table III: ablations",
    "Further models": "Further models",
}


def comparison_files(analysis: Analysis) -> dict[str, bytes]:
    """File name -> content: report.html, and every table of it as CSV and LaTeX."""
    files = {"report.html": comparison_page(analysis)}
    for name, table in comparison_tables(analysis).items():
        stem = "tables/" + name.lower().replace(" ", "-")
        files |= {f"{stem}.csv": to_csv(table), f"{stem}.tex": to_latex(table)}
    return files


def comparison_tables(analysis: Analysis) -> dict[str, TableData]:
    """All tables by name: the paper's three and further models, what the models are, differences in both metrics, its
    lemma and theorem, cells."""
    groups = model_groups(analysis)
    tables = {name: _scores(analysis, models) for name, models in groups.items()}
    tables["Models"] = _models(analysis)
    for metric, rows in analysis.differences.items():
        if rows:
            tables[f"Differences {_NAMES[metric]}"] = _differences(rows)
    return tables | theory_tables(analysis.comparison) | {"Cells": _cells(analysis)}


def model_groups(analysis: Analysis) -> dict[str, list[str]]:
    """Table -> the models compared in it, the reference last, as the paper has it."""
    models, reference = analysis.comparison.models, analysis.comparison.reference
    placed = {name for names in TABLES.values() for name in names}
    groups = {
        title: [name for name in names if name in models and name != reference] for title, names in TABLES.items()
    }
    groups["Further models"] = [name for name in models if name not in placed and name != reference]
    filled = {title: [*names, reference] for title, names in groups.items() if names}
    return filled or {"Further models": [reference]}


def comparison_page(analysis: Analysis) -> bytes:
    """One self-contained HTML file."""
    comparison, tables = analysis.comparison, comparison_tables(analysis)
    sections = [
        Section(title=_TITLES[name], text=_SCORES_TEXT if number == 0 else "", table=tables[name])
        for number, name in enumerate(model_groups(analysis))
    ]
    sections.append(Section(title="Models: size and training", text=_MODELS_TEXT, table=tables["Models"]))
    sections += [section for metric in ("macro_f1", "accuracy") for section in _difference_sections(analysis, metric)]
    sections += [*_figures(analysis), *theory_sections(comparison)]
    sections.append(Section(title="Cells", text=_CELLS_TEXT, table=tables["Cells"]))
    sections.append(Section(title="Settings", text=_SETTINGS_TEXT, table=_settings(comparison.settings)))
    return page(f"Comparison {comparison.name}", header_lines(analysis), sections)


def standings_table(analysis: Analysis) -> rich.table.Table:
    """The models with their test scores, best first, for a terminal."""
    table = rich.table.Table(title=f"test split, {len(analysis.standings)} models of {analysis.comparison.name}")
    for column in ("model", "accuracy", "macro-F1", "seeds", "parameters", "seconds"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in analysis.standings.values():
        scores = [str(Measured(row.scores[metric].mean, row.scores[metric].deviation)) for metric in _NAMES]
        table.add_row(row.model, *scores, str(row.seeds), f"{row.parameters:,}", f"{row.training_seconds:.0f}")
    return table


def _scores(analysis: Analysis, models: Sequence[str]) -> TableData:
    planned = len(analysis.comparison.seeds)
    rows = [_score_row(analysis, model, planned) for model in models]
    manifest = analysis.comparison.manifest
    known = manifest.splits["test"].reference_scores
    prior = class_prior(manifest)
    rows.append(["(class prior)", Measured(prior[0]), Measured(prior[1]), *[None] * 5])
    if "ceiling_accuracy" in known:
        ceiling = Measured(known["ceiling_accuracy"]), Measured(known["ceiling_macro_f1"])
        rows.append(["(exact filter)", *ceiling, *[None] * 5])
    return TableData(
        columns=["model", "accuracy", "macro-F1", "seeds", "parameters", "training s", "causal", "runs"], rows=rows
    )


def _score_row(analysis: Analysis, model: str, planned: int) -> list[Any]:
    causal = "yes" if zoo.entry(model).causal else "no"
    row = analysis.standings.get(model)
    if row is None:
        return [model, None, None, f"0/{planned}", None, None, causal, None]
    scores = [Measured(row.scores[metric].mean, row.scores[metric].deviation) for metric in _NAMES]
    runs = " ".join(run_id[:8] for run_id in row.run_ids)
    seconds = round(row.training_seconds, 1)
    return [model, *scores, f"{row.seeds}/{planned}", row.parameters, seconds, causal, Styled(runs, "ids")]


_SCORES_TEXT = (
    "Mean ± standard deviation over seeds, on the test split. Parameters are the trainable ones; training time is that "
    "of all epochs with their validation, on a machine that other cells shared. A model that is not causal looks "
    "ahead in the session and is not bounded by the exact filter. Runs are named by their first eight digits."
)


def _models(analysis: Analysis) -> TableData:
    """What each model was, as its own runs have it; nothing is known of a model without a result."""
    comparison = analysis.comparison
    rows = []
    for model in comparison.models:
        configuration = next((cell.configuration for cell in comparison.tested(model).values()), {})
        found = [configuration.get(section, {}).get(key) for section, key in _MODEL_SETTINGS.values()]
        row = analysis.standings.get(model)
        rows.append([model, *found, row.parameters if row is not None else None])
    return TableData(columns=["model", *_MODEL_SETTINGS, "parameters"], rows=rows)


_MODEL_SETTINGS = {
    "width": ("model", "d_model"),
    "layers": ("model", "layers"),
    "heads": ("model", "heads"),
    "dropout": ("model", "dropout"),
    "learning rate": ("training", "learning_rate"),
    "lambda": ("training", "kl_weight"),
}
"""Column -> section and key of a run's configuration."""

_MODELS_TEXT = (
    "Options under model go to every model that has one of that name: in size a baseline follows the full model and "
    "not its own publication, unless tuned.NAME.model says otherwise. Layers are those of the modality encoders; of "
    "MulT and CFN-ESA, which have none, those of their cross-modal parts. Lambda weighs the smoothness term of "
    "equation 10, with which all models are trained, the baselines and the ablations included."
)


def _difference_sections(analysis: Analysis, metric: Metric) -> list[Section]:
    rows = analysis.differences[metric]
    if not rows:
        return []
    intervals = {row.model: row.by_session for row in rows if row.by_session is not None}
    reference = analysis.comparison.reference
    figure = differences(intervals, reference=reference, metric=_NAMES[metric]) if intervals else None
    name, text = _NAMES[metric], _DIFFERENCES_TEXT if metric == "macro_f1" else ""
    table, title = _differences(rows), f"{reference} against each model: {name}"
    by_seed = any(row.t_test for row in rows)
    return [
        Section(title=f"{title}, over sessions", text=text, table=_columns(table, _BY_SESSION), figure=figure),
        *([Section(title=f"{title}, over seeds", table=_columns(table, _BY_SEED))] if by_seed else []),
    ]


_DIFFERENCES_TEXT = (
    "Reference minus model. Intervals and p: paired bootstrap over test sessions of the score averaged over seeds; "
    "p Holm is adjusted for all models compared. Speakers: the same with speakers resampled, wider where speakers "
    "differ. t, p t: paired t-test over the seeds in common, as in the paper, with its power for the difference "
    "observed and the difference it would find with power 0.8. The bootstrap speaks of other sessions and these very "
    "weights, the t-test of other seeds and these very sessions. The verdict, at 5 %, is for or against the reference "
    "where both tests agree after Holm; where the bootstrap alone decides it holds for these weights."
)


def _columns(table: TableData, wanted: Sequence[str]) -> TableData:
    """Some columns of a table: a page has no room for all of those that files for other programs hold."""
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    wrapped = [row | {"verdict": Styled(row["verdict"], "ids")} for row in rows]
    return TableData(columns=wanted, rows=[[row[name] for name in wanted] for row in wrapped])


_BY_SESSION = ("model", "difference", "low", "high", "p", "p Holm", "speakers low", "speakers high", "verdict")
_BY_SEED = ("model", "difference", "t", "p t", "p t Holm", "power", "detectable", "seeds", "verdict")


def _differences(rows: Sequence[Difference]) -> TableData:
    columns = [
        "model", "difference", "low", "high", "p", "p Holm", "verdict", "speakers low", "speakers high",
        "t", "p t", "p t Holm", "power", "detectable", "seeds",
    ]  # fmt: skip
    return TableData(columns=columns, rows=[_difference_row(row) for row in rows])


def _difference_row(row: Difference) -> list[Any]:
    session, speaker, test = row.by_session, row.by_speaker, row.t_test
    return [
        row.model,
        *([session.value, session.low, session.high, session.p] if session else [None] * 4),
        row.adjusted_p,
        row.verdict,
        *([speaker.low, speaker.high] if speaker else [None] * 2),
        *([None if math.isnan(test.t) else test.t, test.p] if test else [None] * 2),
        row.adjusted_t_p,
        *([test.observed_power, test.detectable_difference, test.seeds] if test else [None] * 3),
    ]


def _figures(analysis: Analysis) -> list[Section]:
    comparison, sections = analysis.comparison, []
    if analysis.class_f1:
        text = "95 % intervals: bootstrap over test sessions of the F1 averaged over seeds."
        figure = class_scores(analysis.class_f1, comparison.manifest.classes)
        sections.append(Section(title="F1 per class (Fig. 4)", text=text, figure=figure))
    if analysis.weights is not None:
        text = f"{comparison.reference}, weights averaged over seeds; bands: 95 %, bootstrap over test sessions."
        figure = modality_weights(analysis.weights, comparison.sessions.modalities)
        sections.append(Section(title="Weight of the modalities over time (Fig. 3)", text=text, figure=figure))
    histories = {
        model: [cell.history for cell in comparison.tested(model).values()]
        for model in (comparison.reference, *comparison.models)
        if model in analysis.standings
    }
    first, *others = histories
    figures = [loss_curves({first: histories[first]})]
    if others:
        figures.append(loss_curves({model: histories[model] for model in others}))
    text = "One line per seed. Models have loss terms of their own, so their losses are not to be compared."
    return [*sections, Section(title="Loss curves (Fig. 6)", text=text, figures=figures)]


_CELLS_TEXT = "Every number above comes from these runs."


def _cells(analysis: Analysis) -> TableData:
    rows = []
    for cell in analysis.comparison.cells:
        metrics, last = cell.metrics, cell.history[-1] if cell.history else {}
        rows.append(
            [
                cell.model,
                cell.seed,
                metrics.get("test_accuracy"),
                metrics.get("test_macro_f1"),
                last.get("kept_macro_f1"),
                last.get("epoch"),
                round(metrics["training_seconds"], 1) if "training_seconds" in metrics else None,
                Styled(cell.opened, "ids") if cell.opened else None,
                Styled(cell.run_id, "ids"),
                Styled(cell.failure) if cell.failure else None,
            ]
        )
    columns = [
        "model", "seed", "accuracy", "macro-F1", "validation macro-F1", "epochs", "training s", "test opened",
        "run", "failure",
    ]  # fmt: skip
    return TableData(columns=columns, rows=rows)


_SETTINGS_TEXT = (
    "All models were trained with these; settings of a model's own, given or found by its search, stand under tuned. "
    "With search.trials above zero every model was searched with as many trials over the same space, on validation; "
    "otherwise a model without settings of its own was not tuned."
)


def _settings(settings: Mapping[str, Any]) -> TableData:
    rows = [[key, str(value)] for key, value in _flat(settings) if not key.startswith(("tracking.", "cluster."))]
    return TableData(columns=["setting", "value"], rows=rows)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value
        pairs += _flat(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", value)]
    return pairs
